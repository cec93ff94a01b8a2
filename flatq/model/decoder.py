"""One decoder for every supported family, with separate widths for every layer.

Model libraries assume one head size for q, k and v, so their forward passes do not work with narrower value heads. The
families differ only in a few settings, so one configurable decoder replaces a copy of the model code per family; parity
tests compare it with transformers.

Multi-head attention is grouped-query attention with one query head per group, so there is a single code path.

Axes: b batch, s new positions, t all positions (past and new), h query heads, kv key/value heads,
d d_qk, r d_v, m d_model, f d_ff.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatq.model.config import DecoderConfig
from flatq.model.dims import ATTENTION_LINEARS, LINEARS, MLP_LINEARS, LayerDims
from flatq.model.rope import Rope

__all__ = [
    "ATTENTION_LINEARS",
    "LINEARS",
    "MLP_LINEARS",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "GrowingCache",
    "LayerDims",
    "Positions",
    "RMSNorm",
    "Rope",
    "locate",
]


class Cache(Protocol):
    """KV cache; transformers' ``DynamicCache`` has the same method."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append new keys [b, kv, s, d] and values [b, kv, s, r], and return all of them, [b, kv, t, d or r]."""
        ...


class GrowingCache:
    """A KV cache that concatenates."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See ``Cache.update``."""
        if layer_idx in self.layers:
            past_keys, past_values = self.layers[layer_idx]
            keys, values = torch.cat([past_keys, keys], 2), torch.cat([past_values, values], 2)
        self.layers[layer_idx] = (keys, values)
        return keys, values

    def length(self) -> int:
        """Number of cached positions."""
        return self.layers[0][0].shape[2] if self.layers else 0


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 or better."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        scaled = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=self.eps)
        return self.weight * scaled.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Positions:
    """Rotary cosines and sines and the attention mask for a batch; computed once, shared by all layers."""

    cos: Tensor  # [b or 1, 1, s, d]
    sin: Tensor  # [b or 1, 1, s, d]
    mask: Tensor | None  # bool [b or 1, 1, s, t], True = attends; None = causal from position 0


def rotate(x: Tensor, positions: Positions) -> Tensor:
    """Apply the rotary embedding to [b, heads, s, d] (halves convention of Hugging Face checkpoints)."""
    x = x.to(positions.cos.dtype)  # products of two dtypes take three times as long
    turned, half = x * positions.cos, x.shape[-1] // 2
    sine = positions.sin[..., :half]  # both halves rotate by the same angles
    turned[..., :half].addcmul_(x[..., half:], sine, value=-1)
    turned[..., half:].addcmul_(x[..., :half], sine)
    return turned


def locate(
    config: DecoderConfig,
    batch: int,
    length: int,
    *,
    past: int = 0,
    valid: Tensor | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Positions:
    """Positions for ``length`` new tokens after ``past`` cached ones.

    Args:
        valid: [b, t] with 0 where a token is padding (left or right); None when there is none. Positions count
            valid tokens only, so a left-padded row equals the same row alone.
    """
    total = past + length
    if valid is None:
        where = torch.arange(past, total, device=device)[None]
    else:
        where = (valid.long().cumsum(-1) - 1).clamp(min=0)[:, past:total]
    d_qk = config.layers[0].d_qk
    angles = where[..., None].float() * config.rope.inverse_frequencies(d_qk).to(where.device)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [b, 1, s, d]
    windowed = config.sliding_window is not None and total > config.sliding_window
    mask = None
    if valid is not None or (past > 0 and length > 1) or windowed:  # a single new token attends to all positions
        query = torch.arange(past, total, device=device)[:, None]
        key = torch.arange(total, device=device)[None]
        mask = key <= query
        if config.sliding_window is not None:
            mask = mask & (key > query - config.sliding_window)
        mask = mask[None, None]
        if valid is not None:
            mask = mask & valid.bool()[:, None, None, :total]
            mask = mask | (key == query)[None, None]  # padding attends to itself: no empty softmax
        mask = mask.expand(batch, 1, length, total)
    return Positions(angles.cos().to(dtype), angles.sin().to(dtype), mask)


class DecoderLayer(nn.Module):
    """Attention and MLP of one layer, or only the halves named in ``halves``."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    attention_norm: RMSNorm
    q_norm: RMSNorm
    k_norm: RMSNorm
    mlp_norm: RMSNorm

    def __init__(self, config: DecoderConfig, index: int, halves: Sequence[str] = ("attention", "mlp")) -> None:
        super().__init__()
        self.config, self.index = config, index
        dims = config.layers[index]
        names: tuple[str, ...] = ()
        if "attention" in halves:
            names += ATTENTION_LINEARS
            self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
            if config.qk_norm:
                self.q_norm = RMSNorm(dims.d_qk, config.norm_eps)
                self.k_norm = RMSNorm(dims.d_qk, config.norm_eps)
        if "mlp" in halves:
            names += MLP_LINEARS
            self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        for name in names:
            rows, columns = dims.shape(name, config.d_model)
            setattr(self, name, nn.Linear(columns, rows, bias=config.has_bias(name)))

    def mix(self, normed: Tensor, positions: Positions, cache: Cache | None = None) -> Tensor:
        """Concatenated outputs of the attention heads, before the output projection: [b, s, m] -> [b, s, h * r]."""
        b, s, _ = normed.shape
        dims = self.config.layers[self.index]
        query = self.q(normed).view(b, s, dims.heads, dims.d_qk)
        key = self.k(normed).view(b, s, dims.kv_heads, dims.d_qk)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        value = self.v(normed).view(b, s, dims.kv_heads, -1).transpose(1, 2)  # [b, kv, s, r]
        query, key = rotate(query.transpose(1, 2), positions), rotate(key.transpose(1, 2), positions)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        rank = value.shape[-1]
        if s == 1 and positions.mask is None:
            # The query heads of a group take the place of positions, so that keys and values need not be repeated.
            query = query.view(b, dims.kv_heads, dims.group, dims.d_qk)
            return F.scaled_dot_product_attention(query, key, value).reshape(b, 1, dims.heads * rank)
        # The fused kernels need one head size, so narrower values are padded with zeros for the call.
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            F.pad(value, (0, dims.d_qk - rank)),
            attn_mask=positions.mask,
            is_causal=positions.mask is None and s > 1,
            enable_gqa=dims.group > 1,
        )
        return mixed[..., :rank].transpose(1, 2).reshape(b, s, dims.heads * rank)

    def widen(self, normed: Tensor) -> Tensor:
        """The MLP's inner activation, [b, s, m] -> [b, s, f]."""
        return F.silu(self.gate(normed)) * self.up(normed)

    def attend(self, x: Tensor, positions: Positions, cache: Cache | None = None) -> Tensor:
        """The attention half on the residual stream, [b, s, m] -> [b, s, m]."""
        return x + self.o(self.mix(self.attention_norm(x), positions, cache))

    def transform(self, x: Tensor) -> Tensor:
        """The MLP half on the residual stream, [b, s, m] -> [b, s, m]."""
        return x + self.down(self.widen(self.mlp_norm(x)))

    def run(self, half: str, x: Tensor, positions: Positions) -> Tensor:
        """One half (``attention`` or ``mlp``) on the residual stream, [b, s, m] -> [b, s, m]."""
        return self.attend(x, positions) if half == "attention" else self.transform(x)

    def forward(self, x: Tensor, positions: Positions, cache: Cache | None = None) -> Tensor:
        """Attention and MLP on the residual stream, [b, s, m] -> [b, s, m]."""
        return self.transform(self.attend(x, positions, cache))


class Decoder(nn.Module):
    """Embedding, layers, final norm, head (None when tied to the embedding)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.d_model)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(len(config.layers)))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(config.d_model, config.vocab, bias=False)

    def hidden(
        self, tokens: Tensor, *, valid: Tensor | None = None, cache: Cache | None = None, past: int = 0
    ) -> Tensor:
        """Residual stream after the last layer and the final norm, int64 [b, s] -> [b, s, m]."""
        x = self.embed(tokens)
        positions = locate(self.config, *tokens.shape, past=past, valid=valid, device=tokens.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, positions, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the LM head, [b, s, m] -> [b, s, vocab]."""
        return F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)

    def forward(
        self, tokens: Tensor, *, valid: Tensor | None = None, cache: Cache | None = None, past: int = 0
    ) -> Tensor:
        """Logits of every position, int64 [b, s] -> [b, s, vocab]."""
        return self.logits(self.hidden(tokens, valid=valid, cache=cache, past=past))
