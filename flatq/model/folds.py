"""Changes of weights while they are read, by which a family becomes the decoder's plain form.

A fold is exact and reaches every exporter: only what cannot be folded is a switch of the decoder. Folded tensors are
float32, because the change of a rounded number cannot be rounded again without loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flatq.model.config import DecoderConfig

Change = Callable[[Tensor, DecoderConfig, Mapping[str, Any]], Tensor]


@dataclass(frozen=True, slots=True)
class Fold:
    """One change.

    Attributes:
        names: names of the tensors, of those in a layer without ``layers.N.``.
        change: of a float32 tensor; the mapping is the model's config.json.
    """

    names: tuple[str, ...]
    change: Change


def folded(folds: Sequence[Fold], name: str, tensor: Tensor, config: DecoderConfig, keys: Mapping[str, Any]) -> Tensor:
    """The tensor after all folds that name it, float32; unchanged if there is none."""
    for fold in folds:
        if is_folded([fold], name):
            tensor = fold.change(tensor.float(), config, keys)
    return tensor


def is_folded(folds: Sequence[Fold], name: str) -> bool:
    """Whether a fold changes the tensor ``name``."""
    inside = name.split(".", 2)[2] if name.startswith("layers.") else name
    return any(inside in fold.names for fold in folds)


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
QUERY_SCALE = Fold(("q.weight", "q.bias"), _query_scale)
QUERY_NORM_SCALE = Fold(("q_norm.weight",), _query_scale)
