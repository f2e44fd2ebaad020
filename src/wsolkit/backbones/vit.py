"""Open up vision transformers of timm: token embedding, single blocks, and single rows of attention.

Methods need one row of each attention matrix, that of the class token or of a spatial token, and never the whole
matrix. The row is computed from q and k. Everything else stays in the fused attention kernel, which never stores an N×N
matrix, except where plain attention is quicker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from wsolkit.backbones.pretrained import create, load
from wsolkit.backbones.transformer import Features, Gate, Read, Transformer, append_token
from wsolkit.backbones.weights import StateDict, load_weights
from wsolkit.errors import ConfigError


def token_scores(query: Tensor, key: Tensor, scale: float, token: int) -> Tensor:
    """Compute the scaled scores of one token against all others, before softmax, in float32.

    Args:
        query, key: [B, h, N, d].
        scale: usually d ** -0.5.
        token: the index of the token. -1 is the last one.

    Returns:
        [B, h, N].
    """
    return (query[:, :, token, None].float() * scale * key.float()).sum(-1)  # [B, h, 1, d]·[B, h, N, d] → [B, h, N]


def prefers_plain(device_type: str, dtype: torch.dtype, tokens: int, needs_gradient: bool) -> bool:
    """Say whether plain attention, which stores its N×N matrix, is quicker than the fused kernel and affordable.

    Args:
        device_type: for example "cpu" or "cuda".
        dtype: the type of q, k and v.
        tokens: N.
        needs_gradient: whether a backward pass follows.
    """
    # On CPUs, the backward pass of the fused kernel is slow in half precision. As benchmarks/attention.py measured on a
    # CPU without AMX, plain attention in bfloat16, forward and backward, is 3.3 times as fast at N = 65, 1.7 times at
    # 198, 1.4 times at 577, 1.2 times at 785 and 0.9 times at 1,025. It is 2.3 times as fast at 198 on a CPU with AMX.
    # The limit lies where the gain no longer pays for the memory. In float32 plain attention gains next to nothing, and
    # without a backward pass it is slower.
    return device_type == "cpu" and dtype in (torch.bfloat16, torch.float16) and needs_gradient and tokens <= 640


def mix(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Compute softmax(scale · q kᵀ) v in the form that `prefers_plain` chooses.

    Args:
        query, key, value: [B, h, N, d].
        scale: usually d ** -0.5.
        dropout: the probability of setting an entry of the softmax to 0.

    Returns:
        [B, h, N, d].
    """
    needs_gradient = torch.is_grad_enabled() and value.requires_grad
    if prefers_plain(value.device.type, value.dtype, value.shape[2], needs_gradient):
        weights = (query * scale @ key.mT).softmax(dim=-1)  # [B, h, N, d]·[B, h, d, N] → [B, h, N, N]
        return F.dropout(weights, dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)


def attend(attention: Attention, x: Tensor, token: int, gate: Gate | None = None) -> tuple[Tensor, Tensor]:
    """Run a timm attention layer, and return one token's row of scores beside its output.

    Args:
        attention: timm's layer, whose weights are used as they are.
        x: normalised tokens [B, N, D].
        token: the token whose row of scores is returned.
        gate: changes q, k and v after the row is known. SAT's spatial token weighs v by it.

    Returns:
        output [B, N, D] and the row [B, h, N], before softmax, float32.
    """
    query, key, value = _project(attention, x)
    row = token_scores(query, key, attention.scale, token)
    if gate is not None:
        query, key, value = gate(row, query, key, value)
    return _output(attention, query, key, value), row


def _project(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute q, k and v [B, h, N, d] of tokens [B, N, D]."""
    batch, length, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, length, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, N, 3, h, d] → three of [B, h, N, d]
    return attention.q_norm(query), attention.k_norm(key), value


def _output(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute a layer's output [B, N, D] from q, k and v [B, h, N, d]."""
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = mix(query, key, value, attention.scale, dropout)
    out = out.transpose(1, 2).flatten(2)  # [B, h, N, d] → [B, N, D]
    return attention.proj_drop(attention.proj(attention.norm(out)))  # type: ignore[no-any-return]


def run_block(block: Block, x: Tensor) -> Tensor:
    """Run one pre-norm transformer block on tokens [B, N, D], as timm does, but with the quicker form of attention."""
    return _add(block, x, _output(block.attn, *_project(block.attn, block.norm1(x))))


def block_with_scores(block: Block, x: Tensor, token: int, gate: Gate | None = None) -> tuple[Tensor, Tensor]:
    """Run one pre-norm transformer block: tokens [B, N, D] → tokens [B, N, D] and a token's row of scores [B, h, N]."""
    update, row = attend(block.attn, block.norm1(x), token, gate)
    return _add(block, x, update), row


def read_block(block: Block, x: Tensor, read: Read | None, rows: list[Tensor]) -> Tensor:
    """Run one pre-norm transformer block on tokens [B, N, D]. If it is read, append the row of scores to `rows`."""
    if read is None:
        return run_block(block, x)
    x, row = block_with_scores(block, x, read.token, read.gate)
    rows.append(row)
    return x


def _add(block: Block, x: Tensor, update: Tensor) -> Tensor:
    """Add the attention's update to the tokens, and then that of the MLP."""
    x = x + block.drop_path1(block.ls1(update))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]


class ViT(Transformer):
    """A timm vision transformer without its classifier.

    Args:
        model: timm's name, for example "deit_small_patch16_224.fb_in1k".
        image_size: the side of the input in training in pixels, a multiple of the patch size. The position embeddings
            keep the grid of timm's weights, and are interpolated once, to the grid of each batch. A model whose patch
            size `options` changes has the grid of `image_size`.
        drop_path_rate: stochastic depth at the last block. It grows linearly from 0 at the first block.
        pretrained: whether to take ImageNet weights from timm's hub, unless `weights` is given.
        weights: a file of weights (safetensors or a state dict, in timm's names).
        options: further arguments of timm's model, for example depth, embed_dim, num_heads, patch_size.

    Attributes:
        network: timm's network.

    Raises:
        ConfigError: timm has no such model, it is not a plain ViT with a class token, or sizes do not fit.
        CheckpointError: `weights` does not fit the model.
    """

    def __init__(
        self,
        model: str,
        image_size: int,
        drop_path_rate: float,
        pretrained: bool,
        weights: str | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        pretrained = pretrained and weights is None
        network = _create(model, image_size, drop_path_rate, pretrained, options)
        if weights is not None:
            self.classifier_bias = load_timm_weights(network, load_weights(weights), source=weights)
        elif pretrained and isinstance(network.head, nn.Linear):
            self.classifier_bias = network.head.bias.detach().clone()
        else:
            self.classifier_bias = None
        network.reset_classifier(0)
        self.network = network
        self.image_size = image_size
        self.patch_size = int(network.patch_embed.patch_size[0])
        self.embed_dim = int(network.embed_dim)
        self.num_prefix_tokens = int(network.num_prefix_tokens)

    @property
    def blocks(self) -> nn.Sequential:
        """Return the transformer blocks."""
        blocks: nn.Sequential = self.network.blocks
        return blocks

    @property
    def depth(self) -> int:
        """Return the number of transformer blocks."""
        return len(self.blocks)

    @property
    def class_token(self) -> nn.Parameter:
        """Return the class token [1, 1, D]."""
        token: nn.Parameter = self.network.cls_token
        return token

    def features(self, image: Tensor, reads: Mapping[int, Read], extra: Tensor | None = None) -> Features:
        """Run all blocks, see `Transformer.features`."""
        tokens = append_token(self.embed(image), extra)
        rows: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            tokens = read_block(block, tokens, reads.get(index), rows)
        return Features(tokens, rows, branch=None)

    def embed(self, image: Tensor) -> Tensor:
        """Turn an image [B, 3, H, W] into tokens [B, 1 + N, D] before the first block: class token, then patches.

        Raises:
            ConfigError: the patch size does not divide the image.
        """
        self.check_size(image)
        tokens = self.network._pos_embed(self.network.patch_embed(image))
        return self.network.norm_pre(self.network.patch_drop(tokens))  # type: ignore[no-any-return]

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the final LayerNorm."""
        return self.network.norm(tokens)  # type: ignore[no-any-return]


def load_timm_weights(network: VisionTransformer, state: StateDict, source: str) -> Tensor | None:
    """Load weights in timm's names without the classifier. Interpolate the position embedding to the network's grid.

    Returns:
        the bias of the classifier in `state`, if there is one.

    Raises:
        CheckpointError: an entry is missing, unknown or has another shape.
    """
    bias = state.get("head.bias")
    state = {name: value for name, value in state.items() if not name.startswith(("head.", "head_dist."))}
    load(network, checkpoint_filter_fn(state, network), classifier="head", source=source)
    return bias


def _create(
    model: str, image_size: int, drop_path_rate: float, pretrained: bool, options: Mapping[str, Any]
) -> VisionTransformer:
    plain = f"'{model}' is not a plain vision transformer with a class token, which this method needs"
    if timm.is_model(model) and not timm.models.is_model_in_modules(model, ("vision_transformer", "deit")):
        raise ConfigError(plain)
    pretrained_cfg = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    native = image_size if pretrained_cfg is None or "patch_size" in options else pretrained_cfg.input_size[-1]
    settings = {"img_size": native, "drop_path_rate": drop_path_rate, "dynamic_img_size": True, **options}
    network = create(model, pretrained, settings)
    if not isinstance(network, VisionTransformer) or network.cls_token is None or type(network.blocks[0]) is not Block:
        raise ConfigError(plain)
    patch_size = network.patch_embed.patch_size[0]
    if image_size % patch_size:
        raise ConfigError(
            f"dataset.image_size={image_size} is not a multiple of the patch size {patch_size} of '{model}': "
            f"use {image_size // patch_size * patch_size} or {(image_size // patch_size + 1) * patch_size}"
        )
    return network
