"""The llama.cpp architecture that a model is written as.

llama.cpp has no rank-reduced Llama, so a narrowed model is written as an existing architecture with the same graph:

- the family's own (``llama``, ``qwen3``, ``gemma3``), if all MLPs have one width, or if no other architecture has the
  switches of the model. Then value heads are padded with zeros to the width of keys, and all MLPs to the widest one, so
  ``uniform: true`` in the flat stage keeps what it removes;
- ``deci``, made for models pruned by architecture search: MLP widths per layer, rope factors, biases, tied heads. Its
  values must be as wide as its keys, so value heads are padded with zeros (nothing is saved on v and o);
- ``qwen3moe``, and ``llama`` for Mixtral, with experts: one MLP width for all, so narrower ones are padded with zeros;
- ``openelm``, with norms of queries and keys and MLP widths per layer, for Qwen3 with a tied head;
- ``mimo2``, whose values may be narrower than its keys: the V cache shrinks by rank / head size. It needs one rank and
  one MLP width for all layers, no rope factors, no biases, and an untied head. It requires a sliding window in some
  layer; a window at least as long as the context is full attention.

No architecture supports value widths per layer. ``step35`` (narrow values with rope factors) is not used because it
needs an additional dummy layer, which only some loaders accept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flatq.export import FAMILIES, LINEARS, DecoderConfig, Rope
from flatq_gguf.options import GgufOptions

RANK_MULTIPLE = 32  # V cache types are quantized in blocks of 32
GEMMA2_27B, GEMMA3_27B = 46, 62  # layers, by which llama.cpp recognises these two models
FULL_WINDOW = 1 << 20  # positions; longer than any context of these families


@dataclass(frozen=True, slots=True)
class Graph:
    """What an architecture of llama.cpp computes. Source: src/models of llama.cpp, as in llama-cpp-python 0.3.36.

    Attributes:
        by_layer: MLP widths per layer.
        qk_norm: none, ``heads``, ``rotated heads`` for norms that follow the rotary embedding, or ``width`` for norms
            over all heads together.
        biases: linears that may have one.
        caps: fields of the configuration for caps that it applies; ``caps_required`` if it needs them.
        windows: a window, and a base of the rotary embedding, for some layers.
        always_windows: it needs the keys of windows even if no layer has one.
        one_theta: layers with a window have the rotary base of the others.
        still: every 4th layer has no rotary embedding.
        factors: rope factors per frequency.
        tied: whether the head must be tied to the embedding; None if it may.
        scaled: the embedding is multiplied by the root of d_model.
        square: heads * d_qk must be d_model.
        fused: queries, keys and values are rows of one matrix.
        experts: MLPs must be (True) or may be (None) mixtures of experts, whose routing weights add up to 1.
    """

    by_layer: bool = False
    activation: str = "silu"
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: str = "none"
    biases: tuple[str, ...] = LINEARS
    caps: tuple[str, ...] = ()
    caps_required: bool = False
    windows: bool = False
    always_windows: bool = False
    one_theta: bool = False
    still: bool = False
    factors: bool = False
    tied: bool | None = None
    scaled: bool = False
    square: bool = False
    fused: bool = False
    experts: bool | None = False

    @property
    def like_llama(self) -> bool:
        """Whether ``deci`` computes the same."""
        return (self.activation, self.pre_norms, self.post_norms, self.qk_norm) == ("silu", True, False, "none") and (
            not (self.caps or self.windows or self.still)
        )


QKV = ("q", "k", "v")
GEMMA = Graph(activation="gelu_tanh", biases=QKV, scaled=True)
GRAPHS: Mapping[str, Graph] = {
    "llama": Graph(factors=True, experts=None),
    "deci": Graph(by_layer=True, factors=True),
    "mimo2": Graph(biases=()),
    "qwen2": Graph(biases=QKV, square=True),
    "qwen3": Graph(biases=QKV, qk_norm="heads"),
    "qwen3moe": Graph(biases=QKV, qk_norm="heads", experts=True),
    "openelm": Graph(by_layer=True, biases=(), qk_norm="heads", tied=True, fused=True),
    "hunyuan-dense": Graph(biases=(), qk_norm="rotated heads"),
    "smollm3": Graph(biases=QKV, still=True),
    "gemma": replace(GEMMA, tied=True),
    "gemma2": replace(
        GEMMA,
        post_norms=True,
        windows=True,
        always_windows=True,
        caps=("attention_cap", "logit_cap"),
        caps_required=True,
        tied=True,
    ),
    "gemma3": replace(GEMMA, post_norms=True, windows=True, caps=("logit_cap",), qk_norm="heads"),
    "olmo2": Graph(
        biases=QKV,
        pre_norms=False,
        post_norms=True,
        qk_norm="width",
        windows=True,
        one_theta=True,
        tied=False,
        square=True,
    ),
}


# Architectures of families with experts, and whether rotary pairs are interleaved.
OF_EXPERTS: Mapping[str, tuple[str, bool]] = {"qwen3_moe": ("qwen3moe", False), "mixtral": ("llama", True)}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The architecture of a file.

    Attributes:
        name: ``general.architecture``.
        paired: whether rotary pairs are interleaved in the rows of q and k.
        written: the widths in the file.
    """

    name: str
    paired: bool
    written: DecoderConfig

    def factor(self, name: str) -> float:
        """Factor of a tensor in the file.

        Where llama.cpp multiplies the embedding, the residual stream is larger by the same factor, so the outputs of
        attention and MLP must be, too: their norms take the factor. (Beside the larger stream the norms' epsilon weighs
        less: a relative change of epsilon / 2, below float32 for Gemma's 1e-6.) Without such norms the embedding is
        divided, and the final norm multiplied because the head is the embedding.
        """
        tensor, root = name.split(".")[-2], math.sqrt(self.written.d_model)
        dims = self.written.layers[0]
        if self.name == "gemma3" and tensor == "q_norm" and len(self.written.layers) == GEMMA3_27B:
            return math.sqrt(self.written.d_model // dims.heads / dims.d_qk)
        if not self.graph.scaled:
            return 1.0
        if self.graph.post_norms:
            return root if tensor.endswith("post_norm") else 1.0
        return {"embed": 1 / root, "norm": root}.get(tensor, 1.0)

    @property
    def graph(self) -> Graph:
        """What it computes."""
        return GRAPHS[self.name]


def architecture(config: DecoderConfig, options: GgufOptions) -> Architecture:
    """The architecture for a model with these options."""
    multiple, family = options.ffn_multiple * config.mlp_parts, FAMILIES[config.family]
    layers = [replace(dims, d_ff=math.ceil(dims.d_ff / multiple) * multiple) for dims in config.layers]
    widest = max(dims.d_ff for dims in layers)
    equal = config.with_layers([replace(dims, d_ff=widest) for dims in layers])
    if config.experts:
        return Architecture(*OF_EXPERTS.get(config.family, ("llama", True)), _padded(equal))
    if options.layout == "compact":
        return Architecture("mimo2", False, equal)
    own = family.gguf if family.gguf in GRAPHS else "llama"
    graph, padded = GRAPHS[own], _padded(config.with_layers(layers))
    unlike = len(set(padded.layers)) > 1 or not (native_rope(config.rope) or graph.factors)
    if options.layout == "deci" or (unlike and graph.like_llama):
        return Architecture("deci", True, padded)
    if own == "qwen3" and unlike and config.tied_head and not config.qkv_bias and not config.o_bias:
        return Architecture("openelm", False, padded)
    return Architecture(own, family.gguf_permuted, _padded(equal))


def _padded(config: DecoderConfig) -> DecoderConfig:
    """Values as wide as keys."""
    return config.with_layers([replace(dims, d_v=dims.d_qk) for dims in config.layers])


def native_rope(rope: Rope) -> bool:
    """Whether llama.cpp computes these frequencies from keys of the file; else the file holds factors of them."""
    rule = rope.scaling in (None, "linear") or (rope.scaling == "yarn" and rope.truncate)
    return rule and rope.rotated == 1
