"""Which llama.cpp architecture a model is written as, and what each of them demands.

llama.cpp has no rank-reduced Llama, so a narrowed model borrows an architecture whose graph computes the same thing:

- the family's own (``llama``, ``qwen2``, ``qwen3``), if every layer still has the model's widths;
- ``deci``, made for models that were pruned by architecture search: one MLP width per layer, rope factors, biases, tied
  heads. Its values must be as wide as its keys, so value heads are filled up with zeros (nothing is saved on v and o);
- ``mimo2``, whose values may be narrower than its keys: the V cache shrinks by rank / head size. One rank and one MLP
  width for all layers, no rope factors, no biases, and a head of its own. It insists on a sliding window in some layer,
  and a window no shorter than the context is full attention.

No architecture takes a different value width in every layer. ``step35`` (narrow values with rope factors) was left
out: it needs an invented layer that only a lenient loader accepts.
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
    """How a model is dressed.

    Attributes:
        name: ``general.architecture``.
        paired: rows of q and k have rotary partners side by side.
        written: the widths in the file.
    """

    name: str
    paired: bool
    written: DecoderConfig


def narrowed(config: DecoderConfig) -> bool:
    """Whether layers differ, or values are narrower than keys."""
    return len(set(config.layers)) > 1 or config.layers[0].d_v != config.layers[0].d_qk


def architecture(config: DecoderConfig, options: GgufOptions) -> Architecture:
    """The architecture that these options mean for this model."""
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
