"""python -m wsolkit.import_checkpoint source=FILE method=sat: turn a paper's released file into a wsolkit checkpoint.

It reads files of TS-CAM, SCM, SAT and LCTR, as their training leaves them, or the state dict alone. It runs no code in
them, see `wsolkit.interop.foreign`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsolkit.errors import ConfigError, DataError
from wsolkit.export import check_output
from wsolkit.settings.checks import check_config
from wsolkit.settings.command import run_command
from wsolkit.settings.overrides import escaped

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wsolkit.interop.foreign import Foreign


METHODS = ("ts_cam", "scm", "sat", "lctr")
# Those whose papers have their own rules of evaluation here.
_PROTOCOLS = ("ts_cam", "scm", "sat")


@dataclass
class Settings:
    """The settings of conf/import_checkpoint.yaml."""

    source: str
    output: str
    overwrite: bool
    classes: str | None
    num_heads: int | None
    trust: bool


def import_checkpoint(cfg: DictConfig, folder: Path) -> None:
    """Write the model of `cfg.source` as a checkpoint to `cfg.output`."""
    from omegaconf import OmegaConf

    from wsolkit.data.classes import are_numbers, repeated
    from wsolkit.interop.foreign import read_foreign
    from wsolkit.interop.official import build_official, fitted
    from wsolkit.system.libraries import quieten_libraries
    from wsolkit.training.checkpointing import AtomicCheckpointIO

    if OmegaConf.is_missing(cfg, "source"):
        raise ConfigError("required and not given: source. Add source=…")
    if cfg.method.name not in METHODS:
        raise ConfigError(f"method={cfg.method.name}: released files of {', '.join(METHODS)} are read, not of others")
    quieten_libraries()
    source = Path(cfg.source)
    cfg.output = escaped(cfg.output or str(source.with_name(f"{source.name.split('.')[0]}.ckpt")))
    output = Path(cfg.output)
    numbered = cfg.dataset.name == "folder" and OmegaConf.is_missing(cfg.dataset, "root")
    if numbered:
        cfg.dataset.root = "."
    check_config(cfg, Settings)
    check_output(output, cfg.overwrite)
    found = read_foreign(source, cfg.trust)
    given, cfg = cfg, fitted(cfg, found.state_dict, cfg.num_heads)
    cfg.dataset.resize = cfg.dataset.image_size * 256 // 224  # The papers use this value.
    names = class_names(given, cfg.dataset.num_classes, numbered)
    module = build_official(cfg, found.state_dict, names)
    content: dict[str, Any] = {"state_dict": module.state_dict(), "epoch": 0, "global_step": 0}
    module.on_save_checkpoint(content)
    content["wsolkit"] |= {"thresholds": thresholds(found, cfg.method.name), "metrics": {}, "losses": {}}
    AtomicCheckpointIO().save_checkpoint(content, output)
    known = "numbered" if are_numbers(names) else f"{names[0]}, …"
    print(f"{cfg.method.name} on {cfg.backbone.name}, {len(names)} classes ({known}), {cfg.dataset.image_size} pixels")
    if twice := repeated(names):
        print(f"Several classes are called {', '.join(twice)}: say which one by its number")
    if found.left_out:
        print(f"Left out, and nothing of it was run: {', '.join(found.left_out)}")
    print(f"Written to {output}")


def class_names(cfg: DictConfig, count: int, numbered: bool) -> list[str]:
    """Return the names of a model's classes, from a file or the data set, or as numbers.

    Raises:
        DataError: their number differs from the model's, or they cannot be read.
    """
    if cfg.classes is not None:
        from wsolkit.data.files import read_lines

        lines = read_lines(Path(str(cfg.classes)), "classes=…")
        names, place = [line for _, line in lines], f"'{cfg.classes}'"
    elif numbered:
        return [str(label) for label in range(count)]
    else:
        from wsolkit.build import build_datamodule

        names, place = list(build_datamodule(cfg).class_names), f"dataset={cfg.dataset.name}"
    if len(names) != count:
        raise DataError(f"{place} has {len(names)} classes, but the model in '{cfg.source}' knows {count}")
    return names


def thresholds(found: Foreign, method: str) -> dict[str, float]:
    """Return the τ that SAT's training selects and stores. It counts if the paper gives none for the data set."""
    best = found.others.get("best_thr")
    if method != "sat" or not isinstance(best, float) or not 0 < best < 1:
        return {}
    return dict.fromkeys(("sat/gt_known_loc", "sat/gt_known_loc_predicted_class"), float(best))


def main() -> None:
    """Run the command, with the protocol of the method's paper, if there is one, before the user's settings."""
    method = [argument.removeprefix("method=") for argument in sys.argv[1:] if argument.startswith("method=")]
    if method and method[-1] in _PROTOCOLS:
        sys.argv.insert(1, f"protocol=[{method[-1]}]")
    run_command("import_checkpoint", import_checkpoint)


if __name__ == "__main__":
    main()
