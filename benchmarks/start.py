"""What it takes to know all images of a data set as large as ILSVRC 2012: from its official files, and from its index.

    python benchmarks/start.py [FOLDER] [images a class]

Makes a data set in ILSVRC's official layout in FOLDER (a temporary one): 1,000 classes of 1,281 empty files, 50,000
validation images and their XML. That takes a minute or more, as a file system needs for so many files. Then each split
is read in a process of its own: seconds until the records are there, after the libraries are imported, and how much
more memory the process has than before, of which "own" is what it does not share with a file (Linux).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import DictConfig

from wsolkit import load_config
from wsolkit.build import build_records
from wsolkit.data.preparing.index import Indexed, write_index
from wsolkit.settings.compose import plain

CLASSES, VALIDATION = 1000, 50_000
XML = """<annotation>
	<folder>val</folder>
	<filename>{name}</filename>
	<size>
		<width>500</width>
		<height>375</height>
		<depth>3</depth>
	</size>
	<object>
		<name>{wnid}</name>
		<bndbox>
			<xmin>111</xmin>
			<ymin>108</ymin>
			<xmax>441</xmax>
			<ymax>193</ymax>
		</bndbox>
	</object>
</annotation>
"""


def make(root: Path, images: int) -> None:
    """Write the data set; images are empty files, as no one of them is opened."""
    wnids = [f"n{1440764 + 13 * label:08d}" for label in range(CLASSES)]
    for wnid in wnids:
        folder = root / "train" / wnid
        folder.mkdir(parents=True)
        for number in range(images):
            (folder / f"{wnid}_{7 * number}.JPEG").touch()
    (root / "val").mkdir()
    boxes = root / "Annotations" / "CLS-LOC" / "val"
    boxes.mkdir(parents=True)
    for number in range(VALIDATION):
        name = f"ILSVRC2012_val_{number + 1:08d}"
        (root / "val" / f"{name}.JPEG").touch()
        (boxes / f"{name}.xml").write_text(XML.format(name=name, wnid=wnids[number % CLASSES]))


def memory() -> tuple[float, float]:
    """MiB that this process has, all of it and its own."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        fields[name.rstrip(":")] = int(value) / 1024
    return fields["Rss"], fields["Private_Dirty"]


def measure(root: str, split: str, with_index: bool) -> None:
    """Read a split and print what it took."""
    node = plain(settings(root))["dataset"]
    read = build_records(settings(root))
    if with_index:
        read = Indexed(read, node["records"], Path(root), Path(node["index"]), print)
    before, start = memory(), time.perf_counter()
    records = read(split)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    everything, own = (now - then for now, then in zip(memory(), before, strict=True))
    print(f"{split:5} {len(records.labels):9,} images: {seconds:6.2f} s, {everything:5.0f} MiB, own {own:5.0f} MiB")


def settings(root: str) -> DictConfig:
    """Of the data set: ILSVRC 2012 of another size."""
    return load_config("dataset=imagenet", f"dataset.root={root}", "dataset.expected=null", "dataset.held_out=false")


def main() -> None:
    """Make the data set, and measure."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    root = folder / "ilsvrc"
    if not root.exists():
        make(root, int(sys.argv[2]) if len(sys.argv) > 2 else 1281)

    def each(with_index: bool) -> None:
        for split in ("train", "test"):
            subprocess.run([sys.executable, __file__, "--measure", str(root), split, str(with_index)], check=True)

    for name in ("the official files", "the official files, again"):
        print(name)
        each(with_index=False)
    node, start = plain(settings(str(root)))["dataset"], time.perf_counter()
    write_index(Path(node["index"]), ["train", "test"], build_records(settings(str(root))), node["records"], root)
    size = Path(node["index"]).stat().st_size / 2**20
    print(f"the index: written in {time.perf_counter() - start:.1f} s, {size:.0f} MiB")
    each(with_index=True)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(sys.argv[2], sys.argv[3], sys.argv[4] == "True")
    else:
        main()
