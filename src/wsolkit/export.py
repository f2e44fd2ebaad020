"""python -m wsolkit.export checkpoint=PATH output=model.onnx: write a trained model as a file that needs no wsolkit.

The file takes normalised images and returns logits and raw score maps. It also contains what users of the model need:
class names, normalisation, input size, threshold, and the rules that turn maps into boxes. See
`wsolkit.interop.programs`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.settings.checks import check_config
from wsolkit.settings.command import run_command_on_checkpoint
from wsolkit.settings.conf import given_overrides

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wsolkit.localizer import Localizer

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2"}


@dataclass
class Settings:
    """The settings of conf/export.yaml."""

    checkpoint: str
    output: str
    format: Literal["onnx", "torch_export"] | None
    overwrite: bool


def export(cfg: DictConfig, folder: Path) -> None:
    """Write the model of `cfg.checkpoint` to the file `cfg.output`, and compare the two."""
    from omegaconf import OmegaConf

    from wsolkit.checkpoint import read_checkpoint
    from wsolkit.interop import programs
    from wsolkit.localizer import Localizer
    from wsolkit.settings.restore import restore
    from wsolkit.system.libraries import quieten_libraries

    lacking = [name for name in ("checkpoint", "output") if OmegaConf.is_missing(cfg, name)]
    if lacking:
        raise ConfigError(f"required and not given: {lacking[0]}. Add {lacking[0]}=…")
    checkpoint = read_checkpoint(cfg.checkpoint)
    cfg = restore(cfg, checkpoint, given_overrides(), protocols=True)
    check_config(cfg, Settings)
    quieten_libraries()
    output = Path(cfg.output)
    form = file_format(output, cfg.format)
    check_output(output, cfg.overwrite)
    if cfg.method.get("semantic_level") or cfg.method.get("attention_level"):
        raise ConfigError(
            "SCM's diffusion blocks are for training, and are left out of the file: add method.semantic_level=0 "
            "method.attention_level=0"
        )
    size = exported_size(cfg)
    localizer = Localizer(cfg, checkpoint, "cpu", "32-true")
    program = programs.trace(localizer.module, size)
    write, run = {
        "onnx": (programs.write_onnx, programs.run_onnx),
        "torch_export": (programs.write_torch_export, programs.run_torch_export),
    }[form]
    draft = output.with_name(f".{output.name}.{os.getpid()}{output.suffix}")
    try:
        write(program, draft, describe(cfg, localizer))
        logits, maps, same = programs.differences(run(draft), localizer.module, size)
        if not same:
            raise CheckpointError(
                f"the exported program is not the model: logits differ by {logits:.2g} and maps by {maps:.2g} of the "
                "largest value. Nothing was written"
            )
        draft.replace(output)
    except OSError as error:
        raise ConfigError(f"output: '{output}' cannot be written ({error.strerror or error})") from error
    finally:
        draft.unlink(missing_ok=True)
    print(f"Differs from the model by up to {logits:.1g} of the largest logit, {maps:.1g} of the largest score in maps")
    print(f"Written to {output} ({output.stat().st_size / 1e6:.1f} MB)")


def file_format(output: Path, given: str | None) -> str:
    """Return the format of a file, as given or by its ending.

    Raises:
        ConfigError: the two contradict each other, or neither says it.
    """
    by_ending = {ending: name for name, ending in FORMATS.items()}.get(output.suffix)
    if given is None and by_ending is None:
        raise ConfigError(f"output: '{output}' ends in none of {', '.join(FORMATS.values())}: add format=onnx, or …")
    if given is not None and by_ending not in (None, given):
        raise ConfigError(f"output: '{output}' is named like format={by_ending}, and format={given} was given")
    return given or str(by_ending)


def check_output(output: Path, overwrite: bool) -> None:
    """Check that a file may be written.

    Raises:
        ConfigError: the file exists already, or its folder does not.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"output: expected the name of a file in a folder that exists, got '{output}'")
    if output.exists() and not overwrite:
        raise ConfigError(f"output: '{output}' exists already: add overwrite=true, or give another name")


def exported_size(cfg: DictConfig) -> int:
    """Return the side of the images that the program takes, which is that of the evaluation.

    Raises:
        ConfigError: the evaluation averages over several views, and a program has one.
    """
    given = cfg.dataset.eval_image_size
    sizes = [given or cfg.dataset.image_size] if given is None or isinstance(given, int) else list(given)
    if len(sizes) > 1 or cfg.dataset.eval_flip:
        raise ConfigError(
            f"the model averages over images of {', '.join(map(str, sizes))} pixels"
            f"{' and their mirror images' if cfg.dataset.eval_flip else ''}, and an exported program sees each image "
            f"once: add dataset.eval_image_size={max(sizes)} dataset.eval_flip=false"
        )
    return int(sizes[0])


def describe(cfg: DictConfig, localizer: Localizer) -> dict[str, Any]:
    """Describe what a user of the program needs to get from an image to a box.

    Images are resized to `resize`, whatever their aspect ratio, and the central `image_size` is cut out. `protocol` has
    the rules, see `wsolkit.localization.protocol`, and `threshold` is its τ. `exif` says whether images are turned
    upright.
    """
    rules, size = localizer.rules, exported_size(cfg)
    return {
        "wsolkit": localizer.version,
        "method": localizer.method,
        "backbone": localizer.backbone,
        "postprocess": cfg.postprocess.name if cfg.get("postprocess") else None,
        "class_names": localizer.class_names,
        "image_size": size,
        "resize": rules.resize * size // localizer.image_size if rules.input == "center_crop" else size,
        "exif": localizer.exif,
        "mean": localizer.mean,
        "std": localizer.std,
        "threshold": localizer.threshold,
        "protocol": {"name": localizer.protocol, **asdict(rules)},
        "metrics": localizer.metrics,
    }


def main() -> None:
    """Run the command."""
    run_command_on_checkpoint("export", export)


if __name__ == "__main__":
    main()
