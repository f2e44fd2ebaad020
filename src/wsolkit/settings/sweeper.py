"""Plan the jobs of a sweep with their settings and their directories, and list them before they run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from wsolkit.errors import JobError
from wsolkit.settings.jobs import RECORD, Job, duration, folder_name, read_job
from wsolkit.settings.overrides import escaped, quoted

_ALIKE = (
    *("method.name", "backbone.name", "dataset.name", "dataset.shots", "dataset.fraction", "dataset.image_size"),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches"),
)
"""Runs that share these settings take about the same time."""


_NAME = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
# It is not imported, since Hydra has loaded its module anew.
_Sweeper: Any = Plugins.instance().class_name_to_class[_NAME]


class Planned(NamedTuple):
    """A job before it runs: its overrides, those that differ between jobs, its settings and its directory."""

    overrides: list[str]
    varied: list[str]
    cfg: DictConfig
    folder: Path


class NamedSweeper(_Sweeper):  # type: ignore[misc]
    """Hydra's own sweeper, which names the directory of each job after the settings that differ between the jobs."""

    def setup(self, **given: Any) -> None:
        """Take over Hydra's objects, and put its own sweeper back.

        Launchers send the list of plugins to their workers, which must find Hydra's own sweeper in it.
        """
        Plugins.instance().class_name_to_class[_NAME] = _Sweeper
        super().setup(**given)

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Return the overrides of each job in batches, as Hydra asks for them, with the directory among them."""
        batches = _Sweeper.split_arguments(overrides, max_batch_size)
        names = iter([planned.folder.name for planned in self.plan(overrides)])
        return [[[*job, f"hydra.sweep.subdir={quoted(escaped(next(names)))}"] for job in batch] for batch in batches]

    def validate_batch_is_legal(self, batch: Any) -> None:
        """Do nothing: `plan` has composed every job already."""

    def plan(self, overrides: list[Override]) -> list[Planned]:
        """Compose every job, and say where it goes."""
        differs = {override.get_key_element(): override.is_sweep_override() for override in overrides}
        (jobs,) = _Sweeper.split_arguments(overrides, None)
        given = any(str(override).startswith("hydra.sweep.subdir=") for override in self.config.hydra.overrides.hydra)
        _ = self.config.hydra.sweep.dir  # The sweep, and not each job, sets the time in this name.
        planned = []
        for job in jobs:
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, job)
            HydraConfig.instance().set_config(cfg)  # The name of a directory may contain ${hydra:…}.
            varied = [override for override in job if differs[override.partition("=")[0]]]
            directory = Path(cfg.hydra.sweep.dir)
            name = cfg.hydra.sweep.subdir if given else folder_name(directory, job, varied)
            planned.append(Planned(job, varied, cfg, directory / name))
        return planned


class Preview(NamedSweeper):
    """Lists the jobs that a command would run, and runs none."""

    def setup(self, **given: Any) -> None:
        """Take over what Hydra gives, without a launcher."""
        self.hydra_context, self.config = given["hydra_context"], given["config"]

    def sweep(self, arguments: list[str]) -> None:
        """Print the jobs."""
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        print(described(self.plan(overrides)))


class PreviewOfRun(Preview):
    """Says where a single run would go, and does not run it."""

    def plan(self, overrides: list[Override]) -> list[Planned]:
        """Compose the run.

        Raises:
            HydraException: a setting has several values.
        """
        loader = self.hydra_context.config_loader
        loader.validate_sweep_overrides_legal(overrides, RunMode.RUN, from_shell=True)
        (planned,) = super().plan(overrides)
        return [planned._replace(varied=planned.overrides, folder=Path(planned.cfg.hydra.run.dir))]


def replace_sweeper(*, sweep: bool, preview: bool) -> None:
    """Replace Hydra's own sweeper by one of this package, since Hydra accepts none from other packages.

    Args:
        sweep: whether the command runs several jobs.
        preview: whether it only lists what it would run.
    """
    ours = NamedSweeper if not preview else Preview if sweep else PreviewOfRun
    Plugins.instance().class_name_to_class[_NAME] = ours


def described(jobs: Sequence[Planned]) -> str:
    """Return the list of jobs, with the settings that differ, and the time that they would take."""
    finished = {job.folder for job in jobs if (done := _record(job.folder)) and done.state == "finished"}
    places = sorted({str(job.folder.parent) for job in jobs})
    names = [job.folder.name for job in jobs]
    width = max(map(len, names))
    lines = [f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'} in {', '.join(places)}:"]
    for name, job in zip(names, jobs, strict=True):
        state = " (finished before)" if job.folder in finished else ""
        lines.append(f"  {name:<{width}}  {' '.join(job.varied)}{state}".rstrip())
    common = [override for override in jobs[0].overrides if override not in jobs[0].varied]
    if common:
        lines.append(f"All of them have {' '.join(common)}")
    lines.append(_time([job for job in jobs if job.folder not in finished], places))
    return "\n".join([*lines, "Nothing was run, and no folder was made."])


def _time(jobs: Sequence[Planned], places: Iterable[str]) -> str:
    """Return a sentence on the time that jobs take, by those in the same directories and below outputs."""
    records = [path.parent for place in {*places, "outputs"} for path in Path(place).glob(f"**/{RECORD}")]
    seconds: dict[tuple[Any, ...], list[float]] = {}
    for folder in set(map(Path.absolute, records)):
        job = _record(folder)
        if job is not None and job.state == "finished":
            seconds.setdefault(_kind(OmegaConf.create(escaped(job.settings))), []).append(job.seconds)
    kinds = [_kind(job.cfg) for job in jobs]
    unknown = sum(kind not in seconds for kind in kinds)
    if not jobs:
        return "Estimated time: none, since all have finished."
    if unknown:
        return (
            f"Estimated time: unknown. To compare with, {unknown} of {len(jobs)} jobs have no finished one of the same "
            "method, backbone, data set and length."
        )
    total = sum(statistics.median(seconds[kind]) for kind in kinds)
    count = sum(len(seconds[kind]) for kind in set(kinds))
    return f"Estimated time: {duration(total)}, one after the other, by {count} finished jobs of the same kind."


def _kind(settings: DictConfig) -> tuple[Any, ...]:
    return "checkpoint" in settings, *(str(OmegaConf.select(settings, key)) for key in _ALIKE)


def _record(folder: Path) -> Job | None:
    try:
        return read_job(folder)
    except JobError:  # The record is damaged.
        return None
