"""A box by onnxruntime, numpy and Pillow alone: python onnx_boxes.py model.onnx photo.jpg boxed.png [CLASS]."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
info = json.loads(session.get_modelmeta().custom_metadata_map["wsolkit"])
rules = info["protocol"]["threshold_rule"], info["protocol"].get("normalisation", "minmax")
if rules != ("relative_8_bit", "minmax"):
    sys.exit(f"protocol {info['protocol']['name']} has other rules than this example: export with protocol=maxboxacc")
photo = Image.open(sys.argv[2])
if photo.mode[0] in "IF":
    sys.exit(f"'{sys.argv[2]}' is of mode {photo.mode}, with more than 8 bits a pixel: convert it to 8")
if info.get("exif") == "apply":  # the photo of a phone, as people see it
    photo = ImageOps.exif_transpose(photo)
photo = photo.convert("RGB")

side, size = info["resize"], info["image_size"]
margin = (side - size) // 2
seen = photo.resize((side, side), Image.Resampling.BILINEAR).crop((margin, margin, margin + size, margin + size))
pixels = (np.asarray(seen, np.float32) / 255 - np.float32(info["mean"])) / np.float32(info["std"])
(logits,), (maps,) = session.run(None, {"image": pixels.transpose(2, 0, 1)[None]})  # [C] and [C, h, w]
label = info["class_names"].index(sys.argv[4]) if len(sys.argv) > 4 else int(logits.argmax())
score_map = maps[label if len(maps) > 1 else 0]  # SAT has one map for all classes

cells = len(score_map)  # a side; enlarged as PyTorch does, bicubic or bilinear: [h, w] → [size, size]
places = (np.arange(size)[:, None] + 0.5) * cells / size - 0.5 - np.arange(-2, cells + 2)
d = np.abs(places)
cubic = np.where(d < 1, (1.25 * d - 2.25) * d**2 + 1, np.where(d < 2, ((3.75 - 0.75 * d) * d - 6) * d + 3, 0))
weights = cubic if info["protocol"]["interpolation"] == "bicubic" else np.maximum(1 - d, 0)
score_map = weights @ np.pad(score_map, 2, "edge") @ weights.T
grey = (255 * (score_map - score_map.min()) / max(np.ptp(score_map), 1e-12)).astype(np.uint8)

above = grey > int(info["threshold"] * grey.max())
part, before = np.arange(1, above.size + 1).reshape(above.shape) * above, None
while not np.array_equal(part, before):  # neighbours take the larger number, until a component has one
    around, before = np.pad(part, 1), part
    part = np.max([around[y : y + size, x : x + size] for y in range(3) for x in range(3)], axis=0) * above
y, x = np.nonzero(part == np.bincount(part[above]).argmax())

edges = np.array([x.min(), y.min(), min(x.max() + 2, size), min(y.max() + 2, size)]) + margin  # as MaxBoxAcc has it
x0, y0, x1, y1 = np.floor(edges * np.tile([photo.width, photo.height], 2) / side + 0.5).astype(int).tolist()
ImageDraw.Draw(photo).rectangle((x0, y0, x1 - 1, y1 - 1), outline="red", width=2)
photo.save(sys.argv[3])
print(json.dumps({"label": info["class_names"][label], "box": [x0, y0, x1 - 1, y1 - 1]}))
