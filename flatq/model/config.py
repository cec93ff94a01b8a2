"""The configuration of a decoder: widths of every layer and switches, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from flatq.model.dims import LINEARS, LayerDims
from flatq.model.rope import Rope

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of layer sees positions.

    Attributes:
        rope: its rotary embedding; None rotates nothing.
        window: number of positions that a query sees (itself included); None is all.
    """

    rope: Rope | None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The configuration of a decoder: widths and settings, without weights.

    Attributes:
        rope, sliding_window: of the first kind of layer, which is the only one in most families.
        other_kinds: further kinds of layers.
        kind_of: kind of each layer, 0 for the first; empty if all layers are of the first kind.
        activation: one of ``ACTIVATIONS``; ``gelu_tanh`` is the approximation with tanh.
        pre_norms: norms of the inputs of attention and MLP.
        post_norms: norms of the outputs of attention and MLP, before they are added to the residual stream.
        qk_norm: norms of queries and keys, per head, before the rotary embedding.
        wide_qk_norm: these norms run over all heads together, with a gain per channel of each head.
        norm_after_rope: these norms, per head, follow the rotary embedding.
        attention_cap: ``cap * tanh(score / cap)`` replaces each attention score; None for none.
        logit_cap: the same for the logits.
        experts: number of experts that the MLP of every layer is divided into, evenly (``flatq.model.experts``); 0 is
            an MLP without a router.
        experts_per_token: number of experts that each token is sent to.
        normed_routing: the weights of a token's experts are divided by their sum.
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
    activation: str = "silu"
    pre_norms: bool = True
    post_norms: bool = False
    wide_qk_norm: bool = False
    attention_cap: float | None = None
    logit_cap: float | None = None
    other_kinds: tuple[Kind, ...] = ()
    kind_of: tuple[int, ...] = ()
    norm_after_rope: bool = False
    experts: int = 0
    experts_per_token: int = 0
    normed_routing: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        if self.kind_of and len(self.kind_of) != len(self.layers):
            raise ValueError(f"kind_of names the kinds of {len(self.kind_of)} layers, there are {len(self.layers)}")
        if self.experts_per_token > self.experts or (self.experts > 0) != (self.experts_per_token > 0):
            raise ValueError(f"experts_per_token {self.experts_per_token} of {self.experts} experts")
        if uneven := [dims.d_ff for dims in self.layers if self.experts and dims.d_ff % self.experts]:
            raise ValueError(f"d_ff {uneven[0]} is not {self.experts} experts of one width")

    def switches(self) -> list[str]:
        """Names of the switches that are not at their defaults; with none the model computes what a Llama does.

        An exporter that refuses every name it does not know also refuses the switches of later versions.
        """
        return [field.name for field in fields(self) if field.default not in (MISSING, getattr(self, field.name))]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """All kinds of layers."""
        return (Kind(self.rope, self.sliding_window), *self.other_kinds)

    def kind(self, index: int) -> Kind:
        """The kind of a layer."""
        return self.kinds[self.number_of_kind(index)]

    def number_of_kind(self, index: int) -> int:
        """Number of a layer's kind in ``kinds``."""
        return self.kind_of[index] if self.kind_of else 0

    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        return tuple(self.kind(index).window for index in range(len(self.layers)))

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
        biases = sum(
            dims.shape(name, self.d_model)[0] for dims in self.layers for name in LINEARS if self.has_bias(name)
        )
        tables = self.vocab * self.d_model * (1 if self.tied_head else 2)
        return self.decoder_parameters() + self.norm_parameters() + self.router_parameters() + biases + tables

    @property
    def mlp_parts(self) -> int:
        """Number of parts of one width that an MLP consists of: the experts, or 1."""
        return max(1, self.experts)

    def router_parameters(self) -> int:
        """Number of weights of all routers."""
        return self.experts * self.d_model * len(self.layers)

    def norm_parameters(self) -> int:
        """Number of gains of all norms."""
        each_half = int(self.pre_norms) + int(self.post_norms)
        qk_norms = sum(sum(self.qk_norm_widths(dims)) for dims in self.layers)
        return self.d_model * (2 * each_half * len(self.layers) + 1) + qk_norms

    def qk_norm_widths(self, dims: LayerDims) -> tuple[int, int]:
        """Widths of the norms of queries and keys in a layer; 0 without them."""
        if not self.qk_norm:
            return 0, 0
        return (dims.heads * dims.d_qk, dims.kv_heads * dims.d_qk) if self.wide_qk_norm else (dims.d_qk, dims.d_qk)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; ``from_dict`` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecoderConfig:
        """Inverse of ``to_dict``."""
        known = dict(data)
        known["layers"] = tuple(LayerDims(**dims) for dims in data["layers"])
        known["rope"] = Rope.from_dict(data["rope"])
        known["other_kinds"] = tuple(_kind(kind) for kind in data.get("other_kinds", ()))
        known["kind_of"] = tuple(data.get("kind_of", ()))
        return cls(**known)


def _kind(data: dict[str, Any]) -> Kind:
    return Kind(None if data["rope"] is None else Rope.from_dict(data["rope"]), data["window"])
