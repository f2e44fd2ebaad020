from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsolkit import build_module, load_config
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.scm import (
    SCM,
    ActivationDiffusionBlock,
    SpatialCalibration,
    Stencil,
    choose_solver,
    diffuse,
    diffusion_matrix,
    neighbour_similarity,
    shrink,
    suppress_background,
)

GRIDS = [(14, 14), (5, 7), (7, 4), (1, 9), (9, 1), (1, 1), (2, 2)]


def maps(height: int, width: int, channels: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height * 100 + width)
    semantic = torch.randn(3, channels, height, width, generator=generator, dtype=torch.float64)
    attention = torch.rand(3, height, width, generator=generator, dtype=torch.float64)
    return semantic.to(dtype), attention.to(dtype)


def literal(
    semantic: Tensor,
    attention: Tensor,
    semantic_weight: Tensor | float,
    iterations: int,
    alpha: float,
    detach_initial: bool = True,
) -> Tensor:
    """Eqn. 3 to 6 as they are written, with matrices [N, N] of all pairs of patches."""
    batch, _, height, width = semantic.shape
    tokens = F.normalize(semantic.flatten(2), dim=1)
    similarity = tokens.mT @ tokens
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = (row.reshape(-1, 1) - row.reshape(1, -1)).abs() + (column.reshape(-1, 1) - column.reshape(1, -1)).abs()
    adjacency = (distance == 1).to(semantic)
    laplacian = torch.diag(adjacency.sum(1)) - adjacency
    matrix = laplacian * (semantic_weight * similarity - 1)
    x = alpha * (matrix.detach() if detach_initial else matrix).mT
    for _ in range(iterations):
        x = x @ (2 * torch.eye(height * width).to(x) - matrix @ x)
    return (x.mT @ attention.reshape(batch, -1, 1)).reshape(attention.shape)


def value_and_gradients(function: Any, semantic: Tensor, attention: Tensor, semantic_weight: float) -> list[Tensor]:
    inputs = [semantic.clone().requires_grad_(), attention.clone().requires_grad_()]
    weight = torch.tensor(semantic_weight, dtype=semantic.dtype, requires_grad=True)
    value = function(*inputs, weight)
    probe = torch.cos(torch.arange(value.numel(), dtype=value.dtype)).view_as(value)
    gradients = torch.autograd.grad((value * probe).sum(), [*inputs, weight], allow_unused=True)
    return [value.detach(), *(torch.zeros(()) if each is None else each for each in gradients)]


@pytest.mark.parametrize("solver", ["stencil", "dense"])
@pytest.mark.parametrize("detach_initial", [True, False])
@pytest.mark.parametrize("iterations", range(1, 7))
def test_both_solvers_are_the_equations(iterations: int, detach_initial: bool, solver: Any) -> None:
    for size in GRIDS:
        for weight in (-2.0, -0.3, 0.0, 1.0, 2.0):
            expected = value_and_gradients(
                lambda s, a, w: literal(s, a, w, iterations, 0.002, detach_initial), *maps(*size), weight
            )
            actual = value_and_gradients(
                lambda s, a, w: diffuse(s, a, w, iterations, solver=solver, detach_initial=detach_initial),
                *maps(*size),
                weight,
            )
            for name, one, other in zip(("F'", "S", "F", "λ"), actual, expected, strict=True):
                error = (one - other).abs().max().item()
                assert error <= 1e-12 * max(1.0, other.abs().max().item()), (name, size, weight)


@pytest.mark.parametrize("solver", ["stencil", "dense"])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_maps(solver: Any, value: float) -> None:
    semantic, attention = torch.full((2, 4, 5, 6), value).double(), torch.full((2, 5, 6), 0.5).double()
    for weight in (1.0, 0.5):
        expected = literal(semantic, attention, weight, 4, 0.002)
        assert torch.allclose(diffuse(semantic, attention, weight, 4, solver=solver), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 5), (4, 1)])
def test_gradients_by_differences(height: int, width: int) -> None:
    semantic, attention = maps(height, width, channels=3)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inputs = (semantic.requires_grad_(), attention.requires_grad_(), weight)

    def all_inputs(s: Tensor, a: Tensor, w: Tensor) -> Tensor:
        return diffuse(s, a, w, 3, alpha=0.01, solver="stencil", detach_initial=False)

    def attention_alone(a: Tensor) -> Tensor:  # with X₀ detached, other gradients are not those of the value
        return diffuse(semantic, a, weight, 3, alpha=0.01, solver="stencil")

    assert torch.autograd.gradcheck(all_inputs, inputs)
    assert torch.autograd.gradcheck(attention_alone, inputs[1:2])


def test_detaching_changes_gradients_only() -> None:
    released, full = (
        value_and_gradients(lambda s, a, w, d=detach: diffuse(s, a, w, 4, detach_initial=d), *maps(14, 14), 1.0)
        for detach in (True, False)
    )
    assert torch.equal(released[0], full[0])
    assert torch.allclose(released[2], full[2])  # F does not come into X₀
    for of in (1, 3):  # S and λ: about ten times larger, by the specification
        assert full[of].norm() > 4 * released[of].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", ["stencil", "dense"])
def test_other_precisions_are_finite_and_close(solver: Any, dtype: torch.dtype) -> None:
    semantic, attention = maps(14, 14)
    half = ActivationDiffusionBlock(solver=solver)(semantic.to(dtype), attention.to(dtype))
    block = ActivationDiffusionBlock(solver=solver).double()
    exact = block(semantic.to(dtype).double(), attention.to(dtype).double())
    for actual, expected in zip(half, exact, strict=True):
        assert (actual.double() - expected).abs().max() < 3 * torch.finfo(dtype).eps * expected.abs().max() + 1e-3
    diffused = diffuse(semantic.to(dtype), attention.to(dtype), 1.0, 4, solver=solver)
    assert diffused.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        inside = diffuse(semantic.float(), attention.float(), 1.0, 4, solver=solver)
    assert torch.equal(inside, diffuse(semantic.float(), attention.float(), 1.0, 4, solver=solver))


def test_what_does_not_fit_is_refused() -> None:
    semantic, attention = maps(4, 5)
    with pytest.raises(ConfigError, match=r"attention is \[3, 20\]: expected \[3, 4, 5\]"):
        diffuse(semantic, attention.flatten(1), 1.0, 4)
    with pytest.raises(ConfigError, match="iterations=-1: expected 0 or more"):
        diffuse(semantic, attention, 1.0, -1)
    with pytest.raises(ConfigError, match="solver='sparse': expected one of auto, stencil, dense"):
        diffuse(semantic, attention, 1.0, 4, solver="sparse")  # type: ignore[arg-type]


def test_constant_attention_gives_no_nan() -> None:
    semantic, _ = maps(4, 4)
    for value in (0.0, 1.0):
        attention = torch.full((3, 4, 4), value, dtype=torch.float64, requires_grad=True)
        block = ActivationDiffusionBlock().double()
        outputs = block(semantic.requires_grad_(), attention)
        (outputs[0].sum() + outputs[1].sum()).backward()
        gradients = [semantic.grad, attention.grad, block.semantic_weight.grad, block.threshold.grad]
        assert all(each is not None and each.isfinite().all() for each in (*outputs, *gradients))


def test_filter_by_hand() -> None:
    attention = torch.tensor([[[0.0, 0.5, 2.0]]])
    diffused = torch.tensor([[[0.0, 1.0, 4.0]]])
    # t = 0.5 · 2 = 1: z = 0, 1, 4; z − tanh z = 0, 0.2384, 3.0007
    expected = (1 - math.tanh(1)) / (4 - math.tanh(4))
    assert suppress_background(diffused, attention, 0.5)[0, 0].tolist() == pytest.approx([0, expected, 1])


def test_filter_keeps_small_differences() -> None:
    """Beside float64, also where z³/3 is far below the rounding of z."""
    z = torch.logspace(-4, 0.5, 200, dtype=torch.float64)
    single = shrink(z.float()).double()
    exact = torch.where(z < 0.01, z**3 / 3 - 2 * z**5 / 15 + 17 * z**7 / 315, z - z.tanh())
    assert ((single - exact).abs() / exact).max() < 0.003
    assert torch.allclose(shrink(-z), -shrink(z), rtol=0)
    assert torch.autograd.gradcheck(shrink, z[::10].requires_grad_())
    large = torch.tensor([1e30, -1e30], requires_grad=True)
    shrink(large).sum().backward()
    assert large.grad is not None
    assert large.grad.tolist() == [1, 1]


def test_matrix_by_hand() -> None:
    """Two patches side by side with cosine c: M = [[λ − 1, 1 − λc], [1 − λc, λ − 1]]."""
    semantic = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).T.reshape(1, 2, 1, 2)
    matrix = diffusion_matrix(neighbour_similarity(semantic), 3.0).dense()[0]
    off = 1 - 3 / math.sqrt(2)
    assert matrix.flatten().tolist() == pytest.approx([2, off, off, 2])


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_stencil_is_its_dense_matrix(height: int, width: int) -> None:
    semantic, attention = maps(height, width)
    matrix = diffusion_matrix(neighbour_similarity(semantic), 1.5)
    dense, vector = matrix.dense(), attention.reshape(3, -1).T
    product = (dense @ vector.T[..., None])[..., 0].T
    assert torch.allclose(matrix.times(vector), product)
    assert torch.allclose(matrix.subtract_product(vector.clone(), vector), vector - product)
    assert isinstance(matrix.scaled(2.0), Stencil)
    assert torch.allclose(matrix.scaled(2.0).dense(), 2 * dense)


def test_similarity_is_the_same_in_every_block() -> None:
    """What the stack relies on: running the blocks one by one, each with its own S^l, gives the same."""
    semantic, attention = maps(6, 5)
    blocks = [ActivationDiffusionBlock(p, semantic_weight=0.8).double() for p in (5, 4, 3)]
    expected = (semantic, attention)
    for block in blocks:
        expected = block(*expected)
    actual = SpatialCalibration(blocks)(semantic, attention)
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
    empty = SpatialCalibration([])(semantic, attention)
    assert torch.equal(empty[0], semantic)
    assert torch.equal(empty[1], attention)


def test_memory_kept_for_backward_is_linear_in_patches() -> None:
    def kept(side: int, solver: Any) -> int:
        semantic, attention = maps(side, side, channels=2, dtype=torch.float32)
        semantic.requires_grad_()
        stored: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = ActivationDiffusionBlock(solver=solver)(semantic, attention.requires_grad_())
        assert output[0].requires_grad
        return sum(stored.values())

    assert kept(28, "stencil") < 4.3 * kept(14, "stencil")  # four times the patches
    assert kept(28, "dense") > 12 * kept(14, "dense")


@pytest.mark.parametrize("solver", ["stencil", "dense"])
def test_block_is_one_graph_for_torch_compile(solver: Any) -> None:
    block = ActivationDiffusionBlock(iterations=2, solver=solver).double()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    semantic, attention = maps(4, 5)
    results = []
    for function in (block, compiled):
        inputs = semantic.clone().requires_grad_(), attention.clone().requires_grad_()
        outputs = function(*inputs)
        loss = outputs[0].square().sum() + outputs[1].square().sum()
        results.append([*outputs, *torch.autograd.grad(loss, [*inputs, *block.parameters()])])
    for eager, one in zip(*results, strict=True):
        assert torch.allclose(one, eager, rtol=1e-10)


def test_automatic_solver() -> None:
    assert choose_solver("cpu", 64, 14 * 14, 4) == "stencil"
    assert choose_solver("cpu", 64, 28 * 28, 6) == "stencil"
    for device in ("cpu", "cuda", "mps"):
        assert choose_solver(device, 64, 14 * 14, 16) == "dense"
        assert choose_solver(device, 1, 14 * 14, 0) == "stencil"
    semantic, attention = maps(3, 3)
    auto, dense = (diffuse(semantic, attention, 1.0, 16, solver=solver) for solver in ("auto", "dense"))
    assert torch.equal(auto, dense)


def build(*overrides: str) -> SCM:
    torch.manual_seed(0)
    module = build_module(load_config("method=scm", *overrides))
    assert isinstance(module, SCM)
    return module


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method.num_blocks=2", "method.iterations=[3,2]", "method.detach_initial=false"],
        ["method.num_blocks=1", "method.solver=dense", "method.head_init=he"],
        ["method.num_blocks=0"],
    ],
)
def test_every_setting_trains(overrides: list[str]) -> None:
    module = build(*overrides)
    losses = module.losses({"image": torch.randn(4, 3, 64, 64), "label": torch.tensor([0, 1, 2, 7])})
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    unused = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not unused  # DDP would wait for them
    for level, block in enumerate(module.calibration.blocks, start=1):
        assert losses[f"semantic_weight_{level}"] == block.semantic_weight == 1
        assert losses[f"threshold_{level}"] == block.threshold == 0.5


def test_calibration_is_dropped_at_inference() -> None:
    module = build().eval()
    image = torch.randn(2, 3, 64, 64)
    before = module.localize(image)
    with torch.no_grad():
        for parameter in module.calibration.parameters():
            parameter.fill_(torch.nan)
    after = module.localize(image)
    assert torch.equal(before.maps, after.maps)
    assert torch.equal(module(image), after.logits)
    assert not any(isinstance(part, ActivationDiffusionBlock) for part in module.network.modules())


def test_maps_of_every_pair() -> None:
    module = build().eval()
    image = torch.randn(2, 3, 64, 64)
    classes = torch.tensor([[1], [2]])
    semantic, attention = module.network.with_attention(image)
    with torch.no_grad():
        levels = [(semantic, min_max(attention))]
        for block in module.calibration.blocks:
            levels.append(block(*levels[-1]))
    for i, j in ((0, 0), (4, 0), (0, 4), (2, 3)):
        module.semantic_level, module.attention_level = i, j
        expected = levels[i][0][[0, 1], [1, 2]] * levels[j][1]
        assert torch.allclose(module.localize(image, classes).maps[:, 0], expected, atol=1e-5)


def test_other_image_sizes() -> None:
    module = build()
    losses = module.losses({"image": torch.randn(2, 3, 40, 72), "label": torch.tensor([0, 1])})
    assert losses["loss"].isfinite()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("method.num_blocks=-1", "num_blocks=-1: expected the number of diffusion blocks, 0 or more"),
        (
            "method.iterations=[4,4]",
            "iterations=\\[4, 4\\]: expected one number, or one for each of method.num_blocks=4",
        ),
        ("method.iterations=31", "expected 0 to 30"),
        ("method.solver=stencil method.iterations=16", "solver=stencil would take 2\\^16 steps"),
        ("method.alpha=0", "alpha=0: expected a small positive number"),
        ("method.semantic_level=5", "semantic_level=5: expected 0 to 4"),
        ("method.solver=sparse", "method.solver='sparse'"),
    ],
)
def test_wrong_settings(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(*setting.split())
