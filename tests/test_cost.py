"""What a step costs and what makes it cheaper: nothing waits for the device, and cheaper settings learn the same."""

from __future__ import annotations

import csv
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import CNN_METHODS, METHODS, TOKEN_METHODS, learned, or_slow, targets
from tests.fresh import command
from tests.test_commands import config, weights
from wsolkit import build_datamodule, build_module, load_config
from wsolkit.build import compile_network
from wsolkit.errors import ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.cutmix import CutMix
from wsolkit.methods.sat import batch_area_loss
from wsolkit.system.libraries import quieten_libraries
from wsolkit.train import train
from wsolkit.training.evaluator import Evaluator
from wsolkit.training.failures import FiniteLoss
from wsolkit.training.loss_log import LossLog
from wsolkit.training.profiling import StepProfiler
from wsolkit.training.progress import Progress
from wsolkit.training.trainer import SyncBatchNormPlugin, build_trainer, quick_precision


def settings(method: str, *overrides: str) -> Any:
    """A small network with every term of its loss; nothing in it is drawn at random, and no BatchNorm of its batch."""
    own = {
        "sat": ("method.area_level=image", "method.num_blocks=2"),
        "scm": ("method.num_blocks=2",),
        "bas_vit": ("method.num_blocks=1",),
        "spa": ("method.start_epoch=0", "method.background_threshold=0.2"),
        "bridging_gap": ("method.warmup_epochs=0", "method.drop_probability=1"),
        "adl": ("method.drop_rate=1",),
        "spg": ("method.dropout=0", "method.seeds={b2: [0.5, 0.5], b1: [0.5, 0.5], c: [0.5, 0.5]}"),
        "i2c": ("method.dropout=0",),
        "da_wsol": ("method.start_epoch=0", "method.samples=64"),  # of 64 positions: none are drawn
        "psol": learned("psol"),
        "spol": ("method.dropout=0",),
        "has": ("augment=none",),
        "cutmix": ("augment=none",),
    }.get(method, ())
    backbone = "backbone.batch_norm=frozen" if method in CNN_METHODS else "backbone.options.depth=2"
    return load_config(
        f"method={method}",
        backbone,
        "dataset.records.sizes={train: 32, val: 2, test: 2}",
        "dataset.batch_size=8",
        "optimizer=sgd",
        "optimizer.lr=0.01",
        "schedule.warmup_epochs=0",
        "trainer=cpu",
        "trainer.max_steps=4",
        "trainer.limit_val_batches=0",
        "trainer.enable_progress_bar=false",
        *own,
        *overrides,
    )


@pytest.mark.parametrize("method", METHODS)
def test_losses_wait_for_no_number(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without contents: whatever would look at one (a number, a condition, positions of a mask) fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no such device
    module = build_module(settings(method)).to("meta").train()
    batch = {"image": torch.rand(4, 3, 64, 64), "label": torch.arange(4), **targets(4)}
    batch = {name: value.to("meta") for name, value in batch.items()}
    loss = module.losses(batch)["loss"]  # type: ignore[arg-type]
    loss.backward()
    for look in (Tensor.item, bool, Tensor.cpu, Tensor.nonzero):
        with pytest.raises(RuntimeError, match="meta"):
            look(loss)


class Looks(TorchDispatchMode):
    """Counts, for each step, how often Python looks at a number of a tensor; not while a batch is being loaded."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: list[int] = []
        self.counting = False

    def look(self) -> None:
        if self.counting and self.counts:
            self.counts[-1] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.look()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_steps_wait_for_the_device_only_to_log(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six steps, every third logs; progress bar, check of the loss, clipping and learning rates are there."""
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    # These draws are on the CPU, whatever the device of the images.
    monkeypatch.setattr(CutMix, "_draw", lambda *_: (8, 8, 32, 32))
    looks = Looks()
    for name in ("tolist", "cpu", "numpy", "__array__"):  # on the CPU, those do not reach the dispatcher
        plain = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, plain: Callable[..., Any] = plain, **kwargs: Any) -> Any:
            looks.look()
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)

    class Loader:
        def __init__(self, batches: list[Any]) -> None:
            self.batches = batches

        def __len__(self) -> int:
            return len(self.batches)

        def __iter__(self) -> Iterator[Any]:
            looks.counting = True
            for batch in self.batches:
                looks.counts.append(0)
                yield batch
            looks.counting = False

    augment = [f"augment={method}"] if method in ("has", "cutmix") else []
    cfg = settings(
        method, *augment, "trainer.max_steps=6", "trainer.log_every_n_steps=3", "trainer.gradient_clip_val=1"
    )
    module = build_module(cfg)
    callbacks: list[Callback] = [FiniteLoss(3), LearningRateMonitor("step"), Progress()]
    cfg.trainer.enable_progress_bar = True
    trainer = build_trainer(cfg, tmp_path, callbacks, [CSVLogger(tmp_path, "", "")])
    batch = {"image": torch.rand(4, 3, 64, 64), "label": torch.arange(4), **targets(4)}
    with looks:
        trainer.fit(module, Loader([batch] * 6))
    assert looks.counts[0] == looks.counts[1] == looks.counts[3] == looks.counts[4] == 0
    assert looks.counts[2] > 0
    with (tmp_path / "metrics.csv").open() as file:
        losses = [
            (row["step"], float(row["train/loss_step"])) for row in csv.DictReader(file) if row["train/loss_step"]
        ]
    assert [step for step, _ in losses] == ["2", "5"]
    assert losses[-1][1] == module.attached(LossLog).shown["loss"]


def fit(folder: Path, cfg: Any, prepare: Callable[[WSOLModule], None] = lambda module: None) -> dict[str, Tensor]:
    """What four steps change in the weights of a network."""
    quieten_libraries()
    torch.manual_seed(0)
    module = build_module(cfg)
    prepare(module)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    build_trainer(cfg, folder, [], []).fit(module, build_datamodule(cfg))
    return {name: value.detach() - before[name] for name, value in module.named_parameters()}


@functools.cache
def reference(method: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        return fit(Path(folder), settings(method))


def assert_learned(change: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The distance of all weights, as a share of how far they moved."""
    assert change.keys() == expected.keys()
    distance = sum((change[name] - value).square().sum() for name, value in expected.items())
    moved = sum(value.square().sum() for value in expected.values())
    assert moved > 0
    assert (distance / moved) ** 0.5 <= tolerance


@pytest.mark.parametrize("method", or_slow(METHODS))
@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        ("trainer.accumulate_grad_batches=4", 1e-4),
        ("trainer.precision=bf16-mixed", 0.05),
        ("backbone.channels_last=false", 1e-4),
    ],
)
def test_cheaper_settings_learn_the_same(method: str, setting: str, tolerance: float, tmp_path: Path) -> None:
    if "channels_last" in setting and method not in CNN_METHODS:
        with pytest.raises(ConfigError, match="there is no setting 'backbone.channels_last'"):
            settings(method, setting)
        return
    if "accumulate" in setting and method in ("c2am", "i2c", "da_wsol", "ornet", "spol"):
        pytest.skip("it compares the images of a batch, or remembers earlier ones, or has a BatchNorm of its own")
    if "accumulate" in setting and method in TOKEN_METHODS:
        pytest.skip("BatchNorm in its heads takes the statistics of each part of a batch")
    if "bf16" in setting:
        # BAS's loss jumps, SPOL multiplies three maps, and for ORNet see below.
        tolerance *= {"bas": 4, "spol": 4, "ornet": 10}.get(method, 1)
    elif method == "ornet":
        tolerance = 0.1  # Its generator makes a hundredth of a gradient from rounding. In float64, it is 1e-7.
    assert_learned(fit(tmp_path, settings(method, setting)), reference(method), tolerance)


@pytest.mark.parametrize(
    ("accelerator", "gpu", "matrix_units", "precision"),
    [
        ("auto", True, False, "bf16-mixed"),
        ("cpu", True, False, "32-true"),
        ("cpu", False, True, "bf16-mixed"),
        ("auto", False, True, "bf16-mixed"),
        ("auto", False, False, "32-true"),
        ("mps", False, True, "32-true"),
    ],
)
def test_precision_auto_is_the_quick_one(
    accelerator: str, gpu: bool, matrix_units: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    assert quick_precision(accelerator) == precision


def test_trainer_takes_the_quick_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    cfg = settings("sat", "trainer.precision=auto")
    build_module(cfg)  # checks the settings
    assert build_trainer(cfg, tmp_path, [], []).precision == "bf16-mixed"


@pytest.mark.parametrize("method", or_slow(METHODS))
def test_compiled_network_learns_the_same(method: str, tmp_path: Path) -> None:
    """All of a network's passes are one graph each; its weights keep their names."""
    torch._dynamo.reset()
    counters.clear()

    def prepare(module: WSOLModule) -> None:
        compile_network(module.network, backend="aot_eager", fullgraph=True)

    assert_learned(fit(tmp_path, settings(method), prepare), reference(method), 0.1 if method == "ornet" else 1e-4)
    assert counters["stats"]["unique_graphs"] == (2 if method in ("bas", "bas_vit") else 1)  # The background is one.


@pytest.mark.slow
def test_compiled_by_inductor_it_learns_the_same(tmp_path: Path) -> None:
    torch._dynamo.reset()
    assert_learned(fit(tmp_path, settings("cam", "compile=true")), reference("cam"), 1e-3)


@pytest.mark.slow
def test_compiled_run_leaves_the_checkpoint_of_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same names and numbers. An evaluation compiles, too: here it says that it cannot."""
    small = ("method=cam", "trainer.max_epochs=1")
    expected = train(config(*small), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # is quicker
    torch._dynamo.reset()
    assert train(config(*small, "compile=true"), tmp_path / "compiled") == pytest.approx(expected)
    plain, compiled = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value)

    nothing = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PATH": ""}
    given = ("checkpoint=compiled/checkpoints/best.ckpt", "compile=true")
    done = command("evaluate", *given, cwd=tmp_path, environment=nothing)
    assert done.returncode == 1
    assert "error: compile: torch.compile failed (" in done.stderr
    assert "Set compile=false" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("setting", ["fast", "reduce-overhead", "1"])
def test_compile_has_three_values(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"compile={setting}: expected false, true or max-autotune"):
        build_module(load_config(f"compile={setting}"))


def test_batch_area_is_that_of_each_accumulated_part() -> None:
    """SAT's area loss over a batch is not what its parts add up to where they lie on both sides of the prior."""
    small, large = torch.full((2, 4, 4), 0.2), torch.full((2, 4, 4), 0.6)
    assert batch_area_loss(torch.cat([small, large]), 0.4).item() == pytest.approx(0, abs=1e-6)
    assert (batch_area_loss(small, 0.4) + batch_area_loss(large, 0.4)).item() / 2 == pytest.approx(0.2)


def on(module: WSOLModule, device: str) -> WSOLModule:
    """A module whose trainer takes it to a device."""
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))  # type: ignore[assignment]
    return module


def test_batch_norm_is_not_synchronised_on_cpus() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.sync_batchnorm=true needs GPUs"):
        SyncBatchNormPlugin().apply(on(build_module(load_config("method=cam")), "cpu"))


@pytest.mark.parametrize("backbone", ["cnn_micro", "resnet50", "vgg16", "mobilenetv2", "inception_v3"])
def test_batch_norm_as_gpus_synchronise_it_computes_what_it_does(backbone: str) -> None:
    """Activations that are a part of timm's layers included, and by the same names."""
    size = "dataset.image_size=64"
    module = build_module(
        load_config("method=cam", f"backbone={backbone}", "backbone.pretrained=false", size, "dataset.resize=72")
    )
    image, names = torch.randn(2, 3, 64, 64), list(module.state_dict())
    with torch.no_grad():
        expected = module.eval().network(image)
        converted = SyncBatchNormPlugin().apply(on(module, "cuda"))
        assert torch.equal(converted.eval().network(image), expected)  # type: ignore[operator]
    layers = [layer for layer in converted.modules() if isinstance(layer, nn.SyncBatchNorm)]
    plain = [layer for layer in converted.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert bool(layers) == (backbone != "vgg16")
    assert not plain
    assert list(converted.state_dict()) == names


def test_trainer_synchronises_batch_norm(tmp_path: Path) -> None:
    trainer = build_trainer(settings("cam", "trainer.sync_batchnorm=true", "trainer.devices=2"), tmp_path, [], [])
    assert isinstance(trainer.strategy._layer_sync, SyncBatchNormPlugin)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", or_slow(METHODS))
def test_profile_finds_where_time_is_spent(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of a second in the forward pass and a tenth in the loss are found there, and parts add up."""
    cfg = settings(method, "trainer=profile", "trainer.accelerator=cpu", "trainer.limit_train_batches=4")
    cfg.trainer.limit_val_batches, cfg.trainer.profiler.skip, cfg.dataset.held_out = 2, 1, False
    cfg.dataset.batch_size = cfg.dataset.eval_batch_size = 2
    cfg.dataset.records.sizes.test = 8
    module = build_module(cfg)
    network, losses = module.network, module.losses

    def slower(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            time.sleep(seconds)
            return function(*arguments)

        return slow

    for name in network.passes:
        monkeypatch.setattr(network, name, slower(getattr(network, name), 0.2))
    monkeypatch.setattr(module, "losses", slower(losses, 0.1))
    trainer = build_trainer(cfg, tmp_path, [], [])
    profiler = trainer.profiler  # type: ignore[attr-defined]
    assert isinstance(profiler, StepProfiler)
    profiler.watch(module, module.attached(Evaluator).evaluation)
    trainer.fit(module, build_datamodule(cfg))
    profiler.report(tmp_path)
    result = json.loads((tmp_path / "profile.json").read_text())
    for stage in ("training", "evaluation"):
        assert sum(part["percent"] for part in result[stage]["parts"].values()) == pytest.approx(100)
        assert sum(part["ms"] for part in result[stage]["parts"].values()) == pytest.approx(result[stage]["ms"])
        assert result[stage]["parts"]["forward"]["ms"] > 200
    assert result["training"]["batches"] == 3
    assert result["training"]["parts"]["loss"]["ms"] > 100
    assert {"data", "backward", "optimizer", "logging"} < result["training"]["parts"].keys()
    assert {"data", "maps", "metrics", "summary"} < result["evaluation"]["parts"].keys()
