"""The configuration of a decoder: widths of every layer and switches, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flatq.model.dims import LINEARS, LayerDims
from flatq.model.rope import Rope


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The configuration of a decoder: widths and settings, without weights.

    ``sliding_window`` is the number of positions a query sees (itself included) in every layer, or None.
    """

    family: str
    d_model: int
    vocab: int
    layers: tuple[LayerDims, ...]
    rope: Rope
    norm_eps: float
    tied_head: bool
    max_positions: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def with_layers(self, layers: Sequence[LayerDims]) -> DecoderConfig:
        """The same configuration with other layer widths."""
        return replace(self, layers=tuple(layers))

    def has_bias(self, linear: str) -> bool:
        """Whether one of the seven linears has a bias."""
        if linear in ("q", "k", "v"):
            return self.qkv_bias
        return self.o_bias if linear == "o" else self.mlp_bias

    def decoder_parameters(self) -> int:
        """Number of weights in all decoder linears; ``keep_ratio`` is a fraction of this number."""
        return sum(dims.parameters(self.d_model) for dims in self.layers)

    def parameters(self) -> int:
        """Number of all weights; a tied head is counted once."""
        norms = self.d_model * (2 * len(self.layers) + 1)
        qk_norms = sum(2 * dims.d_qk for dims in self.layers) if self.qk_norm else 0
        biases = sum(
            dims.shape(name, self.d_model)[0] for dims in self.layers for name in LINEARS if self.has_bias(name)
        )
        tables = self.vocab * self.d_model * (1 if self.tied_head else 2)
        return self.decoder_parameters() + norms + qk_norms + biases + tables

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; ``from_dict`` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecoderConfig:
        """Inverse of ``to_dict``."""
        known = dict(data)
        known["layers"] = tuple(LayerDims(**dims) for dims in data["layers"])
        known["rope"] = Rope(**data["rope"])
        return cls(**known)
