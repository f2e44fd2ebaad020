"""SCM: spatial calibration module (Bai et al., ECCV 2022), with a diffusion that needs no N×N matrix.

A network like TS-CAM's gives semantic maps S⁰ [B, C, H, W] and the min-max normalised attention map of the class token,
F⁰ [B, H, W]. In training, a stack of L activation diffusion blocks (ADB) calibrates both, and the spatial mean of S^L
gives the logits. The network thus learns maps that need no calibration. At inference the stack is dropped. The mean of
S⁰ then gives the logits, and the score map of class c is F⁰ · S⁰_c.

One ADB works on the 4-neighbour grid of N = H·W patches (Eqn. 3 to 7):

    E_ij = cosine similarity of patches i and j over the channels of S^l
    M    = (D − A) ⊙ (λE − 1), with adjacency A, degrees D, and a learnable λ
    X₀   = α Mᵀ;  p times X ← X (2I − M X), which approaches the inverse of M
    F'   = Xᵀ F^l
    F'   = min-max(z − tanh z), z = F' / (β max F^l), which drops the background; β is learnable
    S^{l+1} = S^l + S^l ⊙ F',  F^{l+1} = F^l + F'

Why no N×N matrix is needed: each step of the iteration doubles the number of terms, which gives the closed form
X_p = X₀ Σ_{k < 2^p} (I − M X₀)^k. M and X₀ are symmetric, so with C = X₀

    Xᵀ v = Σ_{k < 2^p} (I − C M)^k C v,    by Horner's rule  u ← C v + u − C M u,  2^p − 1 times.

M only joins neighbours, so M u is a five-point stencil, whose cost and memory are linear in N.

Why the stack needs the channels only once: 1 + F' lies in [1, 2], so S^{l+1} is S^l with each patch scaled by a
positive number. The cosine similarity does not change with this scale. E is therefore the same in every block, and S^L
= S⁰ ⊙ Π_l (1 + F'^l).

The released code differs from the paper in three points. The defaults or the recipes follow the released code:
- p is 16 in the first block and 4 in the others. The paper says 4 everywhere. Released code has it on a Conformer.
- X₀ is a constant for the gradient (`detach_initial`). At p = 4, this makes the gradients of λ and S about ten times
  smaller.
- The supplement writes 1 − λE. The sign of M carries over to F', and this code uses the released sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolkit.backbones.transformer import Transformer
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.maps import choose_classes, select_maps
from wsolkit.methods.similarity import SimilarityWalk
from wsolkit.methods.ts_cam import TSCAMNetwork, couple
from wsolkit.types import Classes, Localization, TrainingBatch

Solver = Literal["auto", "stencil", "dense"]


class Stencil(NamedTuple):
    """A symmetric matrix [N, N] for each of B images, with entries only between neighbours on a grid of width W.

    The rows of the grid form one line of N patches. Images come last, so a neighbour is always the same step away, and
    every operation runs over contiguous memory.

    Attributes:
        diagonal: [N, B].
        right: [N − 1, B], between patches i and i + 1, with 0 where i ends a row.
        down: [N − W, B], between patches i and i + W.
    """

    diagonal: Tensor
    right: Tensor
    down: Tensor

    @property
    def width(self) -> int:
        """Return the width W of the grid."""
        return self.diagonal.shape[-2] - self.down.shape[-2]

    def times(self, vector: Tensor) -> Tensor:
        """Compute matrix · vector, [..., N, B]."""
        return self._add_neighbours(self.diagonal * vector, vector, 1)

    def subtract_product(self, out: Tensor, vector: Tensor) -> Tensor:
        """Compute out −= matrix · vector in place, both [..., N, B]."""
        return self._add_neighbours(out.addcmul_(self.diagonal, vector, value=-1), vector, -1)

    def _add_neighbours(self, out: Tensor, vector: Tensor, sign: int) -> Tensor:
        for entries, step in ((self.right, 1), (self.down, self.width)):
            pairs = entries.shape[-2]
            out.narrow(-2, 0, pairs).addcmul_(entries, vector.narrow(-2, step, pairs), value=sign)
            out.narrow(-2, step, pairs).addcmul_(entries, vector.narrow(-2, 0, pairs), value=sign)
        return out

    def scaled(self, factor: float) -> Stencil:
        """Return factor · matrix."""
        return Stencil(*(factor * entries for entries in self))

    def gradient(self, left: Tensor, right: Tensor) -> Stencil:
        """Return the gradient of Σ_k left_kᵀ · matrix · right_k for the matrix, both [K, N, B]."""

        def both_ways(step: int) -> Tensor:  # one number stands for (i, j) and for (j, i)
            return (left[:, :-step] * right[:, step:] + left[:, step:] * right[:, :-step]).sum(dim=0)

        return Stencil((left * right).sum(dim=0), both_ways(1), both_ways(self.width))

    def dense(self) -> Tensor:
        """Return the matrices [B, N, N], differentiable."""
        matrix = torch.diag_embed(self.diagonal.T)
        for entries, offset in ((self.right.T, 1), (self.down.T, self.width)):
            if entries.shape[-1]:
                upper = torch.diag_embed(entries, offset=offset)
                matrix = matrix + upper + upper.mT
        return matrix


class _Products(torch.autograd.Function):
    """Scalar products over the channels of S [B, C, N]: each patch with itself, the next, and the one W further.

    Plain autograd would copy S, the largest tensor here, for every term of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, semantic: Tensor, width: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(semantic)
        ctx.width = width
        length = semantic.shape[-1]
        return tuple(
            (semantic[..., : length - step] * semantic[..., step:]).sum(dim=1) for step in (0, 1, width)
        )  # [B, N], [B, N − 1], [B, N − W]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (semantic,) = ctx.saved_tensors
        own, right, down = (gradient[:, None] for gradient in gradients)  # [B, n] → [B, 1, n]
        result = 2 * own * semantic
        for gradient, step in ((right, 1), (down, ctx.width)):
            result[..., :-step].addcmul_(gradient, semantic[..., step:])
            result[..., step:].addcmul_(gradient, semantic[..., :-step])
        return result, None


def neighbour_similarity(semantic: Tensor) -> Stencil:
    """Compute the cosine similarity E of each patch with itself and its neighbours.

    Args:
        semantic: S [B, C, H, W]. A patch of zeros has similarity 0 to all others.

    Returns:
        the entries of E [N, N] that the grid needs, in float32, or in float64 if S has it, because a power series needs
        the digits. `right` has no meaning between the end of a row and the beginning of the next.
    """
    semantic = semantic if semantic.dtype == torch.float64 else semantic.float()
    width = semantic.shape[-1]
    squares, right, down = (products.T for products in _Products.apply(semantic.flatten(2), width))
    nonzero = squares > 0
    norm = squares.masked_fill(~nonzero, 1).sqrt()  # [N, B]
    return Stencil(
        nonzero.to(semantic),
        (right / (norm[:-1] * norm[1:])).contiguous(),
        (down / (norm[:-width] * norm[width:])).contiguous(),
    )


def diffusion_matrix(similarity: Stencil, semantic_weight: Tensor | float) -> Stencil:
    """Compute M = (D − A) ⊙ (λE − 1).

    Args:
        similarity: E, see `neighbour_similarity`.
        semantic_weight: λ.
    """
    diagonal, width = similarity.diagonal, similarity.width
    if isinstance(semantic_weight, Tensor):
        semantic_weight = semantic_weight.to(diagonal)
    patches = torch.arange(len(diagonal), device=diagonal.device)
    column = patches % width
    sides = [column > 0, column < width - 1, patches >= width, patches < len(patches) - width]
    degree = torch.stack(sides).sum(dim=0).to(diagonal)[:, None]  # [N, 1]
    has_right = sides[1].to(diagonal)[:-1, None]  # [N − 1, 1]
    return Stencil(
        degree * (semantic_weight * diagonal - 1),
        has_right * (1 - semantic_weight * similarity.right),
        1 - semantic_weight * similarity.down,
    )


class _Series(torch.autograd.Function):
    """Computes Xᵀ v by Horner's rule, for v [N, B] and the entries of M. The head of this file explains it.

    Backward runs the adjoint loop from the last step to the first. ū is the gradient of u:

        a = C ū,    M̄ −= a ⊗ u,    ū ← ū − M a;    v̄ = C w̄, where w̄ is the sum of all ū.

    If X₀ is differentiated too, C = αM has the gradient C̄ = w̄ ⊗ v − Σ ū ⊗ M u.
    """

    @staticmethod
    def forward(
        ctx: Any,
        vector: Tensor,
        diagonal: Tensor,
        right: Tensor,
        down: Tensor,
        iterations: int,
        alpha: float,
        detach_initial: bool,
    ) -> Tensor:
        matrix, steps = Stencil(diagonal, right, down), 2**iterations - 1
        initial = matrix.scaled(alpha)  # C
        start = u = initial.times(vector)
        history = vector.new_empty(steps if any(ctx.needs_input_grad[1:4]) else 0, *vector.shape)
        for step in range(steps):
            if len(history):
                history[step] = u
            u = initial.subtract_product(start + u, matrix.times(u))
        ctx.save_for_backward(vector, diagonal, right, down, history)
        ctx.steps, ctx.alpha, ctx.detach_initial = steps, alpha, detach_initial
        return u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        vector, diagonal, right, down, history = ctx.saved_tensors
        matrix = Stencil(diagonal, right, down)
        initial = matrix.scaled(ctx.alpha)
        u_bars, pulled = torch.empty_like(history), torch.empty_like(history)  # ū and a of each step
        u_bar = gradient.contiguous()
        start_bar = u_bar.clone()
        for step in reversed(range(ctx.steps)):
            a = initial.times(u_bar)
            if len(history):
                u_bars[step], pulled[step] = u_bar, a
            u_bar = matrix.subtract_product(u_bar.clone(), a)
            start_bar += u_bar
        entries: Sequence[Tensor | None] = (None, None, None)
        if any(ctx.needs_input_grad[1:4]):
            entries = parts = matrix.gradient(-pulled, history)
            if not ctx.detach_initial:
                later = matrix.gradient(-ctx.alpha * u_bars, matrix.times(history))
                first = matrix.gradient(ctx.alpha * start_bar[None], vector[None])
                entries = [sum(terms) for terms in zip(parts, later, first, strict=True)]  # type: ignore[misc]
        return initial.times(start_bar), *entries, None, None, None


def newton_schulz(matrix: Stencil, vector: Tensor, iterations: int, alpha: float, detach_initial: bool) -> Tensor:
    """Compute Xᵀ v by the matrix iteration itself: X₀ = α Mᵀ, then p times X ← X (2I − M X).

    `vector` and the result are [N, B].
    """
    dense = matrix.dense()
    x = alpha * (dense.detach() if detach_initial else dense)
    for _ in range(iterations):
        x = torch.baddbmm(x, x, dense @ x, beta=2, alpha=-1)
    return (x.mT @ vector.T[..., None])[..., 0].T  # [B, N, N]·[B, N, 1] → [N, B]


class Costs(NamedTuple):
    """Milliseconds, forward and backward: stencil 2^p · (step + element · N·B), dense p · (product + term · N³·B)."""

    step: float
    element: float
    product: float
    term: float


# The CPU's were measured by benchmarks/scm_diffusion.py. Those of GPUs are not measured: they follow from the number of
# kernels (27 for each step of the series, 8 for each of the iteration, 4 to 5 µs each), 2 TB/s and 40 TFLOP/s.
# benchmarks/gpu.py measures them on a GPU.
COSTS = {"cpu": Costs(0.3, 2e-5, 1.2, 1.1e-7), "cuda": Costs(0.11, 2e-7, 0.04, 3e-10)}


def choose_solver(device: str, batch: int, patches: int, iterations: int) -> Literal["stencil", "dense"]:
    """Choose the faster solver for a batch of images with N patches and p iterations on a "cpu" or "cuda" device."""
    costs = COSTS.get(device, COSTS["cuda"])
    stencil = 2**iterations * (costs.step + costs.element * patches * batch)
    dense = iterations * (costs.product + costs.term * patches**3 * batch)
    return "stencil" if stencil <= dense or iterations == 0 else "dense"


def diffuse(
    semantic: Tensor,
    attention: Tensor,
    semantic_weight: Tensor | float,
    iterations: int,
    alpha: float = 0.002,
    solver: Solver = "auto",
    detach_initial: bool = True,
) -> Tensor:
    """Diffuse an attention map along similar neighbours: F' = Xᵀ F^l. This is a block without its filter.

    Args:
        semantic: S^l [B, C, H, W].
        attention: F^l [B, H, W].
        semantic_weight: λ, a number or a tensor [1].
        iterations: p of the Newton–Schulz iteration.
        alpha: α in X₀ = α Mᵀ.
        solver: "stencil" needs no matrix, is linear in N, and doubles its cost with each p. "dense" uses N×N matrices
            and is linear in p. Both are exact. "auto" takes the faster one.
        detach_initial: whether X₀ is a constant for the gradient (released code).

    Returns:
        F' [B, H, W] in the type of `attention`. It is computed in float32, or in float64 if `semantic` has it.

    Raises:
        ConfigError: sizes do not fit, or there is no such solver.

    >>> import torch
    >>> from wsolkit.methods.scm import diffuse
    >>> semantic = torch.tensor([[[[1.0, 1.0, 1.0]], [[0.0, 0.5, 1.0]]]])  # two classes at three positions in a row
    >>> attention = torch.tensor([[[1.0, 0.0, 0.0]]])
    >>> (1000 * diffuse(semantic, attention, semantic_weight=1.0, iterations=4)).round().tolist()
    [[[0.0, 3.0, 0.0]]]
    """
    similarity = neighbour_similarity(semantic)
    diffused = _diffuse(similarity, attention, semantic_weight, iterations, alpha, solver, detach_initial)
    return diffused.to(attention.dtype) if attention.is_floating_point() else diffused


def _diffuse(
    similarity: Stencil,
    attention: Tensor,
    semantic_weight: Tensor | float,
    iterations: int,
    alpha: float,
    solver: Solver,
    detach_initial: bool,
) -> Tensor:
    patches, width = len(similarity.diagonal), similarity.width
    batch, height = similarity.diagonal.shape[1], patches // width
    if attention.shape != (batch, height, width):
        raise ConfigError(
            f"attention is {list(attention.shape)}: expected [{batch}, {height}, {width}], as the semantic maps have it"
        )
    if solver not in get_args(Solver):
        raise ConfigError(f"solver={solver!r}: expected one of {', '.join(get_args(Solver))}")
    if iterations < 0:
        raise ConfigError(f"iterations={iterations}: expected 0 or more")
    if solver == "auto":
        solver = choose_solver(attention.device.type, batch, patches, iterations)
    with torch.autocast(attention.device.type, enabled=False):
        matrix = diffusion_matrix(similarity, semantic_weight)
        vector = attention.to(similarity.diagonal).reshape(batch, patches).T.contiguous()  # [B, H, W] → [N, B]
        if solver == "stencil" or iterations == 0:  # They are alike, but with dense λ would be no part of the loss.
            diffused: Tensor = _Series.apply(vector, *matrix, iterations, alpha, detach_initial)
        else:
            diffused = newton_schulz(matrix, vector, iterations, alpha, detach_initial)
    return diffused.T.reshape(batch, height, width)


def shrink(z: Tensor) -> Tensor:
    """Compute z − tanh z, also for small z, where rounding drowns the difference and min-max would enlarge the noise.

    From 0.01 on, float32 keeps the difference to 0.2 %, and this code computes it as the released code does.
    """
    small = z.clamp(-0.01, 0.01)
    square = small.square()
    series = small * square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
    return torch.where(z.abs() < 0.01, series, F.tanhshrink(z))


def suppress_background(diffused: Tensor, attention: Tensor, threshold: Tensor | float) -> Tensor:
    """Shrink what is small compared with the map before diffusion, and scale the result to [0, 1].

    Args:
        diffused: F' [B, H, W].
        attention: F^l [B, H, W], the map before diffusion.
        threshold: β. Values below β max F^l shrink with their third power.

    Returns:
        maps [B, H, W] in [0, 1], or 0 where a map is constant.
    """
    scale = threshold * attention.amax(dim=(1, 2), keepdim=True)
    return min_max(shrink(diffused / scale.masked_fill(scale == 0, 1)))


class ActivationDiffusionBlock(nn.Module):
    """One ADB with its residuals.

    Args:
        iterations: p.
        alpha: α in X₀ = α Mᵀ.
        semantic_weight: the start of the learnable λ.
        threshold: the start of the learnable β.
        solver, detach_initial: see `diffuse`.

    >>> import torch
    >>> from wsolkit.methods.scm import ActivationDiffusionBlock
    >>> block = ActivationDiffusionBlock(iterations=4)
    >>> semantic = torch.tensor([[[[1.0, 1.0, 1.0]], [[0.0, 0.5, 1.0]]]])
    >>> semantic, attention = block(semantic, torch.tensor([[[1.0, 0.0, 0.0]]]))
    >>> semantic.tolist(), attention.tolist()  # what is like its neighbour has become brighter
    ([[[[1.0, 2.0, 1.0]], [[0.0, 1.0, 1.0]]]], [[[1.0, 1.0, 0.0]]])
    """

    def __init__(
        self,
        iterations: int = 4,
        alpha: float = 0.002,
        semantic_weight: float = 1.0,
        threshold: float = 0.5,
        solver: Solver = "auto",
        detach_initial: bool = True,
    ) -> None:
        super().__init__()
        self.iterations = iterations
        self.alpha = alpha
        self.solver: Solver = solver
        self.detach_initial = detach_initial
        self.semantic_weight = nn.Parameter(torch.tensor([float(semantic_weight)]))
        self.threshold = nn.Parameter(torch.tensor([float(threshold)]))

    def forward(self, semantic: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Compute S^{l+1} and F^{l+1} from S^l [B, C, H, W] and F^l [B, H, W]."""
        update = self.update(neighbour_similarity(semantic), attention)
        return semantic * (1 + update[:, None]), attention + update

    def update(self, similarity: Stencil, attention: Tensor) -> Tensor:
        """Compute F' [B, H, W] in [0, 1] from the map F^l [B, H, W], once E is known."""
        diffused = _diffuse(
            similarity,
            attention,
            self.semantic_weight,
            self.iterations,
            self.alpha,
            self.solver,
            self.detach_initial,
        )
        return suppress_background(diffused, attention.to(diffused), self.threshold).to(attention.dtype)


class SpatialCalibration(nn.Module):
    """A stack of ADBs, for any grid H×W.

    Args:
        blocks: the L blocks. Without blocks, the maps stay as they are.
    """

    blocks: Sequence[ActivationDiffusionBlock]

    def __init__(self, blocks: Sequence[ActivationDiffusionBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]

    def forward(self, semantic: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Compute S^L and F^L from S⁰ [B, C, H, W] and F⁰ [B, H, W]."""
        *_, (gain, attention) = self.states(semantic, attention)
        return semantic * gain[:, None], attention

    def states(self, semantic: Tensor, attention: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield G^l and F^l [B, H, W] for l = 0 … L, where S^l = S⁰ ⊙ G^l. The head of this file explains it."""
        gain = torch.ones_like(attention)
        yield gain, attention
        similarity = neighbour_similarity(semantic)
        for block in self.blocks:
            update = block.update(similarity, attention)
            gain, attention = gain * (1 + update), attention + update
            yield gain, attention


class SCM(WSOLModule):
    """SCM in training and evaluation, with the network of TS-CAM, see `TSCAMNetwork`.

    Args:
        num_blocks: the number L of ADBs. 0 trains the network without calibration.
        iterations: p, for all blocks or for each.
        alpha, semantic_weight, threshold, solver, detach_initial: see `ActivationDiffusionBlock`.
        postprocess: refines the maps, or None.
        semantic_level, attention_level: i and j, from 0 to L, of the evaluated map S^i · F^j (supplement, Fig. 2). 0
            and 0 need no ADB.
    """

    network: TSCAMNetwork

    def __init__(
        self,
        backbone: Transformer,
        num_classes: int,
        num_blocks: int,
        iterations: int | Sequence[int],
        alpha: float,
        semantic_weight: float,
        threshold: float,
        solver: Solver,
        detach_initial: bool,
        semantic_level: int,
        attention_level: int,
        head_init: Literal["default", "he"],
        keep_head_bias: bool,
        postprocess: SimilarityWalk | None,
        no_weight_decay: Sequence[str],
    ) -> None:
        iterations = [iterations] * num_blocks if isinstance(iterations, int) else list(iterations)
        check_settings(num_blocks, iterations, alpha, solver, semantic_level, attention_level)
        network = TSCAMNetwork(backbone, num_classes, head_init, keep_head_bias)
        super().__init__(network, no_weight_decay)
        self.calibration = SpatialCalibration(
            [
                ActivationDiffusionBlock(each, alpha, semantic_weight, threshold, solver, detach_initial)
                for each in iterations
            ]
        )
        self.postprocess = postprocess
        self.semantic_level = semantic_level
        self.attention_level = attention_level

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of a normalised image [B, 3, H, W], without calibration."""
        logits: Tensor = self.network(image)
        return logits

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy of the calibrated maps, and λ and β of each block, to watch."""
        semantic, attention, _, branch = self.network.with_tokens(batch["image"])
        semantic, _ = self.calibration(semantic, min_max(attention))
        losses = {"loss": classification_loss(self.network.classify(semantic, branch), batch)}
        for level, block in enumerate(self.calibration.blocks, start=1):
            losses[f"semantic_weight_{level}"] = block.semantic_weight[0]
            losses[f"threshold_{level}"] = block.threshold[0]
        return losses

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says, with one map per class."""
        semantic, attention, tokens, branch = self.network.with_tokens(image)
        attention = min_max(attention)
        logits = self.network.classify(semantic, branch)
        if self.semantic_level or self.attention_level:
            states = list(self.calibration.states(semantic, attention))
            semantic = semantic * states[self.semantic_level][0][:, None]
            attention = states[self.attention_level][1]
        maps = couple(select_maps(semantic, choose_classes(classes, logits)), attention)
        return Localization(logits, maps if self.postprocess is None else self.postprocess(maps, tokens))

    @torch.no_grad()
    def inside(self, image: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return S^l of a class and F^l for l = 0 … L (Fig. 6), two series [B, 1 + L, h, w]."""
        semantic, attention = self.network.with_attention(image)
        own = select_maps(semantic, classes[:, None])  # [B, C, h, w] → [B, 1, h, w]
        gains, attentions = zip(*self.calibration.states(semantic, min_max(attention)), strict=True)
        return {"S": own * torch.stack(gains, dim=1), "F": torch.stack(attentions, dim=1)}


def check_settings(
    num_blocks: int,
    iterations: Sequence[int],
    alpha: float,
    solver: Solver,
    semantic_level: int,
    attention_level: int,
) -> None:
    """Check what types cannot express.

    Raises:
        ConfigError: a setting is out of its range or does not fit another.
    """
    if num_blocks < 0:
        raise ConfigError(f"method.num_blocks={num_blocks}: expected the number of diffusion blocks, 0 or more")
    if len(iterations) != num_blocks:
        raise ConfigError(
            f"method.iterations={list(iterations)}: expected one number, or one for each of "
            f"method.num_blocks={num_blocks} blocks"
        )
    if not all(0 <= each <= 30 for each in iterations):
        raise ConfigError(f"method.iterations={list(iterations)}: expected 0 to 30 (the papers' are 4 and 16)")
    if solver == "stencil" and max(iterations, default=0) > 12:
        raise ConfigError(
            f"method.iterations={list(iterations)}: method.solver=stencil would take 2^{max(iterations)} steps. "
            "Use auto or dense"
        )
    if not alpha > 0:
        raise ConfigError(f"method.alpha={alpha}: expected a small positive number, such as 0.002")
    for name, level in (("semantic_level", semantic_level), ("attention_level", attention_level)):
        if not 0 <= level <= num_blocks:
            raise ConfigError(f"method.{name}={level}: expected 0 to {num_blocks}, the number of diffusion blocks")
