"""What every method reaches on the same images, under the same protocol and with the same number of images seen.

    python benchmarks/methods.py OUTPUT [--seeds 0 1 2] [--methods cam sat …] [--jobs 2] [--aligned] [SETTING=VALUE …]

Each method trains with each seed in a folder of its own, by the commands of the README, with these settings for all and
its own recipe. Methods in several steps run their steps one after another. A run whose metrics are there is not run
again, so the same command continues. `--aligned` also evaluates convolutional networks with backbone.align=true.

At the end, a table lists the methods by MaxBoxAcc: mean ± sample standard deviation over the seeds, and the processor
time of all steps of a run. `[cnn]SETTING=VALUE`, `[vit]…` and `[tokens]…` are for methods on one kind of network. On
the built-in data set, methods on frozen transformers are left out, since there is no pretrained one. On that data set,
and on a folder with the benchmark's lists:

    python benchmarks/methods.py outputs/shapes dataset=shapes trainer.max_epochs=3
    python benchmarks/methods.py outputs/listed dataset=listed dataset.root=DIR trainer.max_epochs=3 …
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from wsolkit import load_config
from wsolkit.settings.conf import CONF

METRICS = {
    "MaxBoxAcc": "maxboxacc/max_box_acc",
    "mean of IoU 30/50/70": "maxboxacc/max_box_acc_v2",
    "V2": "maxboxacc_v2/max_box_acc_v2",
    "Top-1 Loc": "maxboxacc/top1_loc",
    "Top-1 Cls": "top1_cls",
}
ALIGNED = "MaxBoxAcc, aligned"
QUIET = ("trainer.enable_progress_bar=false", "num_examples=0", "trainer.accelerator=cpu")
BEST = "checkpoints/best.ckpt"
IN_STEPS = ("psol", "spol", "ornet")


def kinds() -> dict[str, str]:
    """Return the kind of network of each method: cnn, vit or tokens."""
    methods = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    targets = {method: str(load_config(f"method={method}").backbone._target_) for method in methods}
    short = {"CNN": "cnn", "TokenBackbone": "tokens"}
    return {method: short.get(target.rpartition(".")[2], "vit") for method, target in targets.items()}


class Runs:
    """The runs of a seed of a method, whose steps are in folders of their own."""

    def __init__(self, method: str, seed: int, output: Path, settings: list[str]) -> None:
        self.method, self.seed, self.output, self.settings = method, seed, output, settings

    def folder(self, name: str) -> Path:
        """Return the folder of a step of this seed."""
        return self.output / name / f"seed{self.seed}"

    def command(self, name: str, *arguments: str, folder: Path, done: str) -> float:
        """Run a command unless it is done, and return the processor seconds that it took.

        Args:
            name: the command.
            arguments: its arguments.
            folder: where it writes.
            done: the file that is there when it is done.
        """
        log = folder / "cpu_seconds"
        if not ((folder / done).is_file() and log.is_file()):
            folder.mkdir(parents=True, exist_ok=True)
            run = [sys.executable, __file__, "--measure", str(log), sys.executable, "-m", f"wsolkit.{name}", *arguments]
            with (self.output / f"{self.method}_{self.seed}.log").open("a") as file:
                result = subprocess.run(run, stdout=file, stderr=subprocess.STDOUT, check=False)
            if result.returncode:
                raise RuntimeError(f"{name} of {self.method}, seed {self.seed}: see {file.name}")
        return float(log.read_text())

    def train(self, folder: Path, method: str, *own: str) -> float:
        """Train, and return the processor seconds."""
        given = [f"method={method}", *self.settings, *QUIET, f"seed={self.seed}", *own, f"hydra.run.dir={folder}"]
        return self.command("train", *given, folder=folder, done="metrics.json")

    def run(self) -> float:
        """Run the steps of the method, and return their processor seconds."""
        last, classifier = self.folder(self.method), self.folder("cam")
        given = f"{classifier / BEST}"
        if self.method == "psol":
            boxes = self.folder("psol_boxes")
            made = ["pseudo_boxes", f"checkpoint={given}", f"output={boxes}", "progress=false", "device=cpu"]
            spent = self.train(classifier, "cam") + self.command(*made, folder=boxes, done="settings.json")
            return spent + self.train(last, "psol", f"dataset.train_boxes={boxes}", f"method.classifier={given}")
        if self.method == "spol":
            first, masks = self.folder("spol_cam"), self.folder("spol_masks")
            made = ["pseudo_masks", f"checkpoint={first / BEST}", f"output={masks}", "progress=false", "device=cpu"]
            spent = self.train(first, "spol") + self.command(*made, folder=masks, done="settings.json")
            own = ("method.stage=segment", f"dataset.train_masks={masks}", f"method.classifier={first / BEST}")
            return spent + self.train(last, "spol", *own)
        if self.method == "ornet":
            first = self.folder("ornet_coarse")
            spent = self.train(classifier, "cam") + self.train(first, "ornet")
            own = (f"method.coarse={first / BEST}", f"method.evaluator={given}", "optimizer=adam")
            return spent + self.train(last, "ornet", "method.stage=fine", *own)
        return self.train(last, self.method)

    def align(self) -> None:
        """Evaluate the run with maps at their true positions."""
        folder = self.folder(f"{self.method}_aligned")
        quiet = [*QUIET, *(setting for setting in self.settings if setting.startswith("dataset"))]
        given = [f"checkpoint={self.folder(self.method) / BEST}", "backbone.align=true", *quiet]
        self.command("evaluate", *given, f"hydra.run.dir={folder}", folder=folder, done="metrics.json")


def measure(log: str, command: list[str]) -> int:
    """Run a command, and write the processor seconds of it and its children into a file."""
    code = subprocess.run(command, check=False).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code == 0:
        Path(log).write_text(f"{used.ru_utime + used.ru_stime:.1f}")
    return code


def metrics(folder: Path) -> dict[str, float]:
    """Return the metrics of a run by name."""
    found: dict[str, float] = json.loads((folder / "metrics.json").read_text())
    return found


def summary(values: list[float]) -> str:
    """Write values as mean ± sample standard deviation."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def table(seconds: dict[str, list[float]], kind: dict[str, str], output: Path, seeds: list[int]) -> str:
    """Return the table of all methods, best first."""
    rows: dict[str, tuple[float, str]] = {}
    for method, spent in seconds.items():
        found = [metrics(output / method / f"seed{seed}") for seed in seeds]
        cells = [summary([one[name] for one in found]) for name in METRICS.values()]
        aligned = [output / f"{method}_aligned" / f"seed{seed}" for seed in seeds]
        there = all((folder / "metrics.json").is_file() for folder in aligned)
        cells.append(summary([metrics(folder)[METRICS["MaxBoxAcc"]] for folder in aligned]) if there else "–")
        cost = f"{mean(spent) / 60:.1f}"
        order = mean(one[METRICS["MaxBoxAcc"]] for one in found)
        rows[method] = order, f"| `{method}` | {kind[method]} | {' | '.join(cells)} | {cost} |"
    head = ["method", "network", *METRICS, ALIGNED, "processor minutes a run"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [line for _, line in sorted(rows.values(), reverse=True)])


def main() -> None:
    """Run what is missing, and print the table."""
    if sys.argv[1:2] == ["--measure"]:
        sys.exit(measure(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--aligned", action="store_true")
    given = parser.parse_intermixed_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    kind = kinds()
    pretrained = "dataset=shapes" not in given.settings
    methods = given.methods or [name for name in sorted(kind) if pretrained or kind[name] != "tokens"]
    if {"psol", "ornet"} & {*methods} and "cam" not in methods:
        methods = ["cam", *methods]  # They take its checkpoints.
    output = given.output.absolute()
    output.mkdir(parents=True, exist_ok=True)

    def settings(method: str) -> list[str]:
        own = f"[{kind[method]}]"
        return [one.removeprefix(own) for one in given.settings if not one.startswith("[") or one.startswith(own)]

    def run(job: tuple[str, int]) -> float | None:
        method, seed = job
        runs = Runs(method, seed, output, settings(method))
        try:
            spent = runs.run()
            if given.aligned and kind[method] == "cnn":
                runs.align()
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            return None
        print(f"{method}, seed {seed}: {metrics(runs.folder(method))[METRICS['MaxBoxAcc']]:.1f}", flush=True)
        return spent

    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for in_steps in (False, True):  # Those in steps come last, since they take the checkpoints of others.
        jobs = [(name, seed) for seed in given.seeds for name in methods if (name in IN_STEPS) == in_steps]
        with ThreadPoolExecutor(given.jobs) as pool:
            for (method, _), spent in zip(jobs, pool.map(run, jobs), strict=True):
                if spent is not None:
                    seconds[method].append(spent)
    complete = {method: spent for method, spent in seconds.items() if len(spent) == len(given.seeds)}
    text = table(complete, kind, output, given.seeds)
    (output / "methods.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
