"""One decoder for every supported family, with separate widths for every layer.

Model libraries assume one head size for q, k and v, so their forward passes do not work with narrower value heads. The
families differ only in a few settings, so one configurable decoder replaces a copy of the model code per family; parity
tests compare it with transformers.

Multi-head attention is grouped-query attention with one query head per group, so there is a single code path.

Axes: b batch, s new positions, t all positions (past and new), h query heads, kv key/value heads,
d d_qk, r d_v, m d_model, f d_ff.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatq.model.config import DecoderConfig
from flatq.model.dims import ATTENTION_LINEARS, LINEARS, MLP_LINEARS, LayerDims
from flatq.model.experts import Router, summed, widened
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
    """Rotary cosines and sines and the attention mask for a batch; computed once per kind of layer."""

    cos: Tensor | None  # [b or 1, 1, s, d]; None = no rotation
    sin: Tensor | None  # [b or 1, 1, s, d]
    mask: Tensor | None  # bool [b or 1, 1, s, t], True = attends; None = causal from position 0


def rotate(x: Tensor, positions: Positions) -> Tensor:
    """Apply the rotary embedding to [b, heads, s, d] (halves convention of Hugging Face checkpoints)."""
    if positions.cos is None or positions.sin is None:
        return x
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
) -> tuple[Positions, ...]:
    """Positions for ``length`` new tokens after ``past`` cached ones, for each of the kinds of layers.

    Args:
        valid: [b, t] with 0 where a token is padding (left or right); None when there is none. Positions count
            valid tokens only, so a left-padded row equals the same row alone.
    """
    if valid is None:
        where = torch.arange(past, past + length, device=device)[None]
    else:
        where = (valid.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + length]
    masks = {
        window: _mask(batch, length, past, valid, window, device) for window in {kind.window for kind in config.kinds}
    }
    found = []
    for kind in config.kinds:
        if kind.rope is None:
            found.append(Positions(None, None, masks[kind.window]))
            continue
        angles = where[..., None].float() * kind.rope.inverse_frequencies(config.layers[0].d_qk).to(where.device)
        angles = torch.cat([angles, angles], dim=-1)[:, None]  # [b, 1, s, d]
        found.append(Positions(angles.cos().to(dtype), angles.sin().to(dtype), masks[kind.window]))
    return tuple(found)


def _mask(
    batch: int, length: int, past: int, valid: Tensor | None, window: int | None, device: torch.device | None
) -> Tensor | None:
    """See ``Positions.mask``; arguments of ``locate``."""
    total = past + length
    windowed = window is not None and total > window
    if valid is None and (past == 0 or length == 1) and not windowed:
        return None  # a single new token attends to all positions
    query = torch.arange(past, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    mask = mask[None, None]
    if valid is not None:
        mask = mask & valid.bool()[:, None, None, :total]
        mask = mask | (key == query)[None, None]  # padding attends to itself: no empty softmax
    return mask.expand(batch, 1, length, total)


def capped(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``, or ``x`` without a cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


def _capped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    """Attention with capped scores, which the fused kernels do not have; axes as in ``attention``."""
    b, heads, s, d = query.shape
    groups = query.reshape(b, key.shape[1], -1, s, d)  # [b, kv, g, s, d]
    with torch.autocast(query.device.type, enabled=False):  # scores of 8 bits are too coarse
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = capped(groups.to(dtype) @ key.to(dtype).mT[:, :, None] * d**-0.5, cap)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
        elif s > 1:
            future = torch.ones(s, s, dtype=torch.bool, device=query.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        mixed = scores.softmax(-1) @ value.to(dtype)[:, :, None]
    return mixed.view(b, heads, s, -1).to(value.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cap: float | None) -> Tensor:
    """Outputs of the heads, [b, h, s, d], [b, kv, t, d], [b, kv, t, r] -> [b, h, s, r]."""
    (b, heads, s, d), (_, kv_heads, _, rank) = query.shape, value.shape
    if cap is not None:  # row by row, because all scores are in memory
        rows = (query, key, value, query if mask is None else mask.expand(b, -1, -1, -1))
        return torch.cat(
            [
                _capped_attention(q, k, v, None if mask is None else seen, cap)
                for q, k, v, seen in zip(*(part.split(1) for part in rows), strict=True)
            ]
        )
    if s == 1 and mask is None:
        # The query heads of a group take the place of positions, so that keys and values need not be repeated.
        query = query.view(b, kv_heads, heads // kv_heads, d)
        return F.scaled_dot_product_attention(query, key, value).reshape(b, heads, 1, rank)
    # The fused kernels need one head size, so narrower values are padded with zeros for the call.
    mixed = F.scaled_dot_product_attention(
        query,
        key,
        F.pad(value, (0, d - rank)),
        attn_mask=mask,
        is_causal=mask is None and s > 1,
        enable_gqa=heads > kv_heads,
    )
    return mixed[..., :rank]


PRE_NORM = {"attention": "attention_norm", "mlp": "mlp_norm"}
POST_NORM = {"attention": "attention_post_norm", "mlp": "mlp_post_norm"}
ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class DecoderLayer(nn.Module):
    """Attention and MLP of one layer, or only the halves named in ``halves``."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    q_norm: RMSNorm
    k_norm: RMSNorm
    router: Router

    def __init__(self, config: DecoderConfig, index: int, halves: Sequence[str] = ("attention", "mlp")) -> None:
        super().__init__()
        self.config, self.index = config, index
        self._add_half("attention", halves, ATTENTION_LINEARS)
        if "attention" in halves and config.qk_norm:
            queries, keys = config.qk_norm_widths(config.layers[index])
            self.q_norm, self.k_norm = RMSNorm(queries, config.norm_eps), RMSNorm(keys, config.norm_eps)
        self._add_half("mlp", halves, MLP_LINEARS)
        if "mlp" in halves and config.experts:
            self.router = Router(config.d_model, config.experts, config.experts_per_token, normed=config.normed_routing)

    def _add_half(self, half: str, halves: Sequence[str], linears: Sequence[str]) -> None:
        config = self.config
        if half not in halves:
            return
        for wanted, norms in ((config.pre_norms, PRE_NORM), (config.post_norms, POST_NORM)):
            if wanted:
                setattr(self, norms[half], RMSNorm(config.d_model, config.norm_eps))
        for name in linears:
            rows, columns = config.layers[self.index].shape(name, config.d_model)
            setattr(self, name, nn.Linear(columns, rows, bias=config.has_bias(name)))

    def enter(self, half: str, x: Tensor) -> Tensor:
        """Input of a half's first linears, from the residual stream, [b, s, m] -> [b, s, m]."""
        return getattr(self, PRE_NORM[half])(x) if self.config.pre_norms else x

    def leave(self, half: str, x: Tensor, output: Tensor) -> Tensor:
        """The residual stream with a half's output (of o or down) added to it, [b, s, m] -> [b, s, m]."""
        return x + (getattr(self, POST_NORM[half])(output) if self.config.post_norms else output)

    def heads(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, s, h, d] and keys [b, s, kv, d], after norms that precede the rotation; values [b, s, kv, r]."""
        lead, dims, config = normed.shape[:-1], self.config.layers[self.index], self.config
        query, key = self.q(normed), self.k(normed)
        if config.qk_norm and config.wide_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(*lead, dims.heads, dims.d_qk), key.view(*lead, dims.kv_heads, dims.d_qk)
        if config.qk_norm and not (config.wide_qk_norm or config.norm_after_rope):
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, self.v(normed).view(*lead, dims.kv_heads, -1)

    def mix(self, normed: Tensor, positions: Sequence[Positions], cache: Cache | None = None) -> Tensor:
        """Concatenated outputs of the attention heads, before the output projection: [b, s, m] -> [b, s, h * r]."""
        here = positions[self.config.number_of_kind(self.index)]
        query, key, value = (part.transpose(1, 2) for part in self.heads(normed))
        query, key = rotate(query, here), rotate(key, here)
        if self.config.norm_after_rope:
            query, key = self.q_norm(query), self.k_norm(key)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        return attention(query, key, value, here.mask, self.config.attention_cap).transpose(1, 2).flatten(2)

    def widen(self, normed: Tensor) -> Tensor:
        """The MLP's inner activation, times the routing weights of experts, [b, s, m] -> [b, s, f]."""
        activation = ACTIVATION[self.config.activation]
        if self.config.experts:
            return widened(normed, self.router(normed), self.gate, self.up, activation)
        return activation(self.gate(normed)) * self.up(normed)

    def output(self, half: str, x: Tensor, positions: Sequence[Positions], cache: Cache | None = None) -> Tensor:
        """Output of a half's last linear (o or down), from the residual stream, [b, s, m] -> [b, s, m]."""
        entered = self.enter(half, x)
        return self.close(half, self.mix(entered, positions, cache) if half == "attention" else self.widen(entered))

    def close(self, half: str, inner: Tensor) -> Tensor:
        """A half's last linear (o or down) on its input, [b, s, i] -> [b, s, m]."""
        if half == "mlp" and self.config.experts and type(self.down) is nn.Linear and self.down.bias is None:
            return summed(inner, self.down.weight, self.config.experts)
        last: Tensor = (self.o if half == "attention" else self.down)(inner)
        return last

    def run(self, half: str, x: Tensor, positions: Sequence[Positions], cache: Cache | None = None) -> Tensor:
        """One half (``attention`` or ``mlp``) on the residual stream, [b, s, m] -> [b, s, m]."""
        return self.leave(half, x, self.output(half, x, positions, cache))

    def forward(self, x: Tensor, positions: Sequence[Positions], cache: Cache | None = None) -> Tensor:
        """Attention and MLP on the residual stream, [b, s, m] -> [b, s, m]."""
        return self.run("mlp", self.run("attention", x, positions, cache), positions)


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
        logits = F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)
        return capped(logits, self.config.logit_cap)

    def forward(
        self, tokens: Tensor, *, valid: Tensor | None = None, cache: Cache | None = None, past: int = 0
    ) -> Tensor:
        """Logits of every position, int64 [b, s] -> [b, s, vocab]."""
        return self.logits(self.hidden(tokens, valid=valid, cache=cache, past=past))
