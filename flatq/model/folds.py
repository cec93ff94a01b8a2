"""Changes of weights while they are read, by which a family becomes the decoder's plain form.

A fold is exact and reaches every exporter: only what cannot be folded is a switch of the decoder. A tensor whose
numbers change is float32 from then on, because the change of a rounded number cannot be rounded again without loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flatq.model.config import DecoderConfig
from flatq.model.rope import Rope

Change = Callable[[Tensor, DecoderConfig, Mapping[str, Any]], Tensor]


@dataclass(frozen=True, slots=True)
class Fold:
    """One change.

    Attributes:
        names: names of the tensors, of those in a layer without ``layers.N.``.
        change: of a tensor, which is float32 unless the change is exact; the mapping is the model's config.json.
        exact: the change rounds nothing (an order of rows, a power of two), so the tensor keeps its type.
        layers: only in these layers; None is all of them.
    """

    names: tuple[str, ...]
    change: Change
    exact: bool = False
    layers: frozenset[int] | None = None

    def applies(self, name: str) -> bool:
        """Whether it changes the tensor ``name``."""
        if not name.startswith("layers."):
            return name in self.names
        _, index, inside = name.split(".", 2)
        return inside in self.names and (self.layers is None or int(index) in self.layers)


def folded(folds: Sequence[Fold], name: str, tensor: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
    """The tensor after all folds that name it, float32 unless all are exact; unchanged if there is none."""
    for fold in folds:
        if fold.applies(name):
            tensor = fold.change(tensor if fold.exact else tensor.float(), config, keys)
    return tensor


def is_folded(folds: Sequence[Fold], name: str) -> bool:
    """Whether a fold changes the numbers of the tensor ``name``, so that it is float32."""
    return any(fold.applies(name) and not fold.exact for fold in folds)


def _from_one(weight: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
    return 1 + weight


def _scaled_embedding(weight: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
    return weight * math.sqrt(config.d_model)


def _tied_norm(weight: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
    return weight / math.sqrt(config.d_model) if config.tied_head else weight


def _query_scale(weight: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
    d_qk = config.layers[0].d_qk
    return weight * math.sqrt(d_qk / keys.get("query_pre_attn_scalar", d_qk))


NORMS = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm", "q_norm", "k_norm", "norm")
ONE_PLUS = Fold(tuple(f"{norm}.weight" for norm in NORMS), _from_one)
# The head of a tied model is scaled with the embedding, which the final norm reverts.
EMBEDDING_SCALE = (Fold(("embed.weight",), _scaled_embedding), Fold(("norm.weight",), _tied_norm))
QUERIES = ("q.weight", "q.bias")
QUERY_SCALE = Fold(QUERIES, _query_scale)
QUERY_NORM_SCALE = Fold(("q_norm.weight",), _query_scale)

# Granite multiplies the embedding, both outputs, the scores and the logits. The residual stream is divided by the
# multiplier of the outputs times the power of two that keeps the stream's size, so that o and down change exactly.


def _power(keys: Mapping[str, Any]) -> float:
    return float(2.0 ** round(-math.log2(keys.get("residual_multiplier", 1.0))))


def _embedding_gain(keys: Mapping[str, Any]) -> float:
    return float(keys.get("embedding_multiplier", 1.0) / stream_unit(keys))


def stream_unit(keys: Mapping[str, Any]) -> float:
    """Granite's residual stream divided by that of the folded model."""
    return float(keys.get("residual_multiplier", 1.0) * _power(keys))


def _multiplied_embedding(weight: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
    return weight * _embedding_gain(keys)


def _multiplied_output(weight: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
    return weight / _power(keys)


def _multiplied_query(weight: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
    d_qk = config.layers[0].d_qk
    return weight * (keys.get("attention_multiplier", 1.0) * math.sqrt(d_qk))


def _divided_logits(weight: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
    tied = _embedding_gain(keys) if config.tied_head else 1.0
    return weight / (keys.get("logits_scaling", 1.0) * tied)


MULTIPLIERS = (
    Fold(("embed.weight",), _multiplied_embedding),
    Fold(("o.weight", "o.bias", "down.weight", "down.bias"), _multiplied_output, exact=True),
    Fold(QUERIES, _multiplied_query),
    Fold(("norm.weight",), _divided_logits),
)


def with_unit_stream(config: DecoderConfig, keys: Mapping[str, Any]) -> DecoderConfig:
    """The norms' epsilon for the residual stream that ``MULTIPLIERS`` makes."""
    return replace(config, norm_eps=config.norm_eps / stream_unit(keys) ** 2)


def rope_folds(config: DecoderConfig, factors: Sequence[float], *, interleaved: bool) -> tuple[Fold, ...]:
    """Folds of a rotary embedding: pairs in halves of the head, and the factor of the scores in the queries.

    Args:
        config: of the decoder.
        factors: factor of each layer's scores.
        interleaved: the two rows of a pair are adjacent in the checkpoint.
    """
    found: list[Fold] = []
    d_qk = config.layers[0].d_qk
    order = rows_in_halves(d_qk, config.rope.width(d_qk), interleaved=interleaved)
    if order.tolist() != list(range(d_qk)):
        moved = (*QUERIES, "k.weight", "k.bias", "q_norm.weight", "k_norm.weight")
        found.append(Fold(moved, _moved(order), exact=True))
    scaled = ("q_norm.weight",) if config.qk_norm else QUERIES
    for factor in sorted({*factors} - {1.0}):
        layers = frozenset(index for index, own in enumerate(factors) if own == factor)
        found.append(Fold(scaled, _scaled_pairs(config.kind(min(layers)).rope, factor), layers=layers))
    return tuple(found)


def _moved(order: Tensor) -> Change:
    def change(tensor: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
        return _by_head(tensor, len(order))[:, order].reshape(tensor.shape)

    return change


def _scaled_pairs(rope: Rope | None, factor: float) -> Change:
    """Scales the channels of each head that rotate."""

    def change(tensor: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
        d_qk = config.layers[0].d_qk
        assert rope is not None, "only rotated layers have a factor"
        gains = torch.where(rope.inverse_frequencies(d_qk) > 0, factor, 1.0).repeat(2)  # [d]
        heads = _by_head(tensor, d_qk)
        return (heads * gains.reshape(1, d_qk, *[1] * (heads.dim() - 2))).reshape(tensor.shape)

    return change


def _by_head(tensor: Tensor, d_qk: int) -> Tensor:
    """[heads * d, ...] -> [heads, d, ...]."""
    return tensor.reshape(-1, d_qk, *tensor.shape[1:])


def rows_in_halves(d_qk: int, width: int, *, interleaved: bool) -> Tensor:
    """Order of a head's rows with which row i and row i + d_qk / 2 are a pair, int64 [d_qk].

    Args:
        d_qk: rows of a head.
        width: the first so many rows rotate; the pairs of the others stand still.
        interleaved: whether pairs are adjacent rows in the checkpoint, or row i and row i + width / 2.
    """
    rows = torch.arange(d_qk)
    pairs = rows[:width].view(-1, 2).T if interleaved else rows[:width].view(2, -1)  # [2, width / 2]
    still = rows[width:].view(2, -1)
    return torch.cat([pairs, still], 1).flatten()
