"""The widths of a decoder layer, as models, rank plans, artifacts and exporters use them."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION_LINEARS = ("q", "k", "v", "o")
MLP_LINEARS = ("gate", "up", "down")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS


@dataclass(frozen=True, slots=True)
class LayerDims:
    """The widths of one decoder layer."""

    heads: int
    kv_heads: int
    d_qk: int
    d_v: int
    d_ff: int

    @property
    def group(self) -> int:
        """Query heads per key/value head; 1 is multi-head attention."""
        return self.heads // self.kv_heads

    def shape(self, linear: str, d_model: int) -> tuple[int, int]:
        """Weight shape (out_features, in_features) of one of the layer's seven linears."""
        return {
            "q": (self.heads * self.d_qk, d_model),
            "k": (self.kv_heads * self.d_qk, d_model),
            "v": (self.kv_heads * self.d_v, d_model),
            "o": (d_model, self.heads * self.d_v),
            "gate": (self.d_ff, d_model),
            "up": (self.d_ff, d_model),
            "down": (d_model, self.d_ff),
        }[linear]

    def parameters(self, d_model: int) -> int:
        """Number of weights in the seven linears (biases and norms are not counted, as in the paper)."""
        return d_model * ((self.heads + self.kv_heads) * (self.d_qk + self.d_v) + 3 * self.d_ff)
