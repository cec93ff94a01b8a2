"""Architectures of GGUF files that flatq reads and does not write: Phi-3, Granite and GLM-4.

llama.cpp's converter leaves them nearly as they are in a Hugging Face folder: fused matrices, partial rotary embeddings
and GLM-4's adjacent rotary pairs as tensors, Granite's multipliers as keys. So their weights become a plain decoder's
by the same folds; only Granite's rows of q and k are in another order.

Phi-3's window is read as transformers applies it; llama.cpp knows the key and applies no window.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from flatq.sources.gguf_rope import Described

FUSED = {"attn_qkv": ("q", "k", "v"), "ffn_up": ("gate", "up")}


@dataclass(frozen=True, slots=True)
class Other:
    """How the files of one architecture are read.

    Attributes:
        model_type: the row of ``families``.
        permuted: rows of q and k have rotary pairs interleaved.
        keys: further GGUF keys (below the architecture's name) and their names in config.json.
    """

    model_type: str
    permuted: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)

    def read(self, file: Described, d_qk: int, *, partial: bool) -> dict[str, Any]:
        """Further keys of config.json.

        Args:
            file: the file.
            d_qk: channels of a head.
            partial: whether the family has heads of which only the first channels rotate.
        """
        found = {name: value for key, name in self.keys.items() if (value := file.key(key)) is not None}
        if "sliding_window" in found:
            found["sliding_window"] = found["sliding_window"] or None  # 0 is none
        if "attention_multiplier" in self.keys.values() and not found.get("attention_multiplier"):
            found["attention_multiplier"] = d_qk**-0.5  # as llama.cpp without the key
        if partial:
            found["partial_rotary_factor"] = _share(file.key("rope.dimension_count") or d_qk, d_qk)
        return found


OTHERS: Mapping[str, Other] = {
    "phi3": Other("phi3", keys={"attention.sliding_window": "sliding_window"}),
    "granite": Other(
        "granite",
        permuted=True,
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "glm4": Other("glm4"),
}


def fused_parts(name: str, names: Container[str]) -> tuple[str, ...]:
    """Our tensors whose rows are in the GGUF tensor ``name``, in their order; none if it is not a fused one.

    Args:
        name: such as ``blk.0.attn_qkv.weight``.
        names: of all tensors of the file; beside ``ffn_gate`` ``ffn_up`` is not fused.
    """
    block, _, inside = name.removeprefix("blk.").partition(".")
    stem, _, kind = inside.rpartition(".")
    if not name.startswith("blk.") or stem not in FUSED:
        return ()
    if stem == "ffn_up" and f"blk.{block}.ffn_gate.{kind}" in names:
        return ()
    return tuple(f"layers.{block}.{part}.{kind}" for part in FUSED[stem])


def _share(rotated: Any, d_qk: int) -> Any:
    """The factor of ``d_qk`` that gives ``rotated`` when it is rounded down."""
    if not isinstance(rotated, int):
        return rotated  # the configuration's check names it
    share = rotated / d_qk
    return share if int(d_qk * share) == rotated else math.nextafter(share, 1.0)
