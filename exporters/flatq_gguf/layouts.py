"""The llama.cpp architecture that a model is written as.

llama.cpp has no rank-reduced Llama, so a narrowed model is written as an existing architecture with the same graph:

- the family's own (``llama``, ``qwen2``, ``qwen3``), if no layer was narrowed;
- ``deci``, made for models pruned by architecture search: MLP widths per layer, rope factors, biases, tied heads. Its
  values must be as wide as its keys, so value heads are padded with zeros (nothing is saved on v and o);
- ``mimo2``, whose values may be narrower than its keys: the V cache shrinks by rank / head size. It needs one rank and
  one MLP width for all layers, no rope factors, no biases, and an untied head. It requires a sliding window in some
  layer; a window at least as long as the context is full attention.

No architecture supports value widths per layer. ``step35`` (narrow values with rope factors) is not used because it
needs an additional dummy layer, which only some loaders accept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flatq.export import FAMILIES, DecoderConfig
from flatq_gguf.options import GgufOptions

RANK_MULTIPLE = 32  # V cache types are quantized in blocks of 32
FULL_WINDOW = 1 << 20  # positions; longer than any context of these families


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


def narrowed(config: DecoderConfig) -> bool:
    """Whether layers differ, or values are narrower than keys."""
    return len(set(config.layers)) > 1 or config.layers[0].d_v != config.layers[0].d_qk


def architecture(config: DecoderConfig, options: GgufOptions) -> Architecture:
    """The architecture for a model with these options."""
    multiple = options.ffn_multiple
    layers = [replace(dims, d_ff=math.ceil(dims.d_ff / multiple) * multiple) for dims in config.layers]
    if options.layout == "compact":
        widest = max(dims.d_ff for dims in layers)
        return Architecture("mimo2", False, config.with_layers([replace(dims, d_ff=widest) for dims in layers]))
    family = FAMILIES[config.family]
    padded = config.with_layers([replace(dims, d_v=dims.d_qk) for dims in layers])
    if options.layout == "deci" or narrowed(config):
        return Architecture("deci", True, padded)
    return Architecture(family.gguf, family.gguf_permuted, padded)
