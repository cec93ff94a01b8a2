"""The rotary embedding in a GGUF file: keys, and tables of divisors, as keys of a ``config.json``.

llama.cpp's converter stores Llama 3's rule as a tensor of divisors, from which the parameters are recovered; other
divisors are kept as they are. Phi-3's LongRoPE is two such tensors, of which llama.cpp chooses by the context length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatq.errors import UnsupportedModel
from flatq.model.rope import Rope

ROPE_DIVISORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_DIVISORS, LONG, SHORT)


@dataclass(frozen=True, slots=True)
class Described:
    """What a file says about its model.

    Attributes:
        path: the file.
        architecture: ``general.architecture``, with which the model's keys begin.
        value: the value of a key; None if the file does not have it.
        vector: a tensor with one axis, float32; None if the file does not have it.
    """

    path: Path
    architecture: str
    value: Callable[[str], Any]
    vector: Callable[[str], Tensor | None]

    def key(self, name: str) -> Any:
        """The value of one of the model's keys, without the architecture's name."""
        return self.value(f"{self.architecture}.{name}")


def rope_keys(file: Described, *, ntk_alpha: bool) -> dict[str, Any]:
    """Keys of config.json about the rule of the frequencies.

    Args:
        file: the file.
        ntk_alpha: see ``Family``.

    Raises:
        UnsupportedModel: a rule that GGUF files of supported models do not have.
    """
    kind, scaling = file.key("rope.scaling.type"), file.key("rope.scaling.attn_factor")
    factor = file.key("rope.scaling.factor") or file.key("rope.scale_linear")
    long, short = file.vector(LONG), file.vector(SHORT)
    if long is not None and short is not None and kind in (None, "none", "longrope"):
        return {
            "rope_scaling": {
                "rope_type": "longrope",
                "long_factor": _shortest(long),
                "short_factor": _shortest(short),
                "attention_factor": scaling,
            },
            "original_max_position_embeddings": file.key("rope.scaling.original_context_length"),
        }
    if kind is None:
        kind = "linear" if factor not in (None, 1.0) else "none"
    alpha = file.key("rope.scaling.alpha")
    if alpha and ntk_alpha and kind == "none":
        return {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "alpha": alpha}}
    if kind not in ("none", "linear") or scaling not in (None, 1.0):
        raise UnsupportedModel(
            f"{file.path}: {file.architecture}.rope.scaling is {kind!r}, in GGUF files only 'linear' without "
            "attn_factor, and tables of LongRoPE, are supported; use the Hugging Face folder of this model"
        )
    return {"rope_scaling": None if kind == "none" else {"rope_type": kind, "factor": factor}}


def _shortest(numbers: Tensor) -> list[float]:
    """1.1 instead of 1.100000023841858."""
    return [float(str(number)) for number in numbers.numpy().ravel()]


def with_divisors(file: Described, rope: Rope, d_qk: int, positions: int) -> Rope:
    """The rope with the file's table of divisors, if there is one.

    Args:
        file: the file.
        rope: what its keys say.
        d_qk: channels of a head.
        positions: the model's context length.

    Raises:
        UnsupportedModel: the table does not fit the head, or there is another rule beside it.
    """
    divisors = file.vector(ROPE_DIVISORS)
    if divisors is None:
        return rope
    plain = rope.inverse_frequencies(d_qk)
    if rope.scaling is None and divisors.shape == plain.shape:
        # All Llama 3.x releases; their factor (8 or 32) is the largest divisor.
        guess = replace(
            rope,
            scaling="llama3",
            factor=float(divisors.max()),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        )
        if torch.allclose(plain / divisors, guess.inverse_frequencies(d_qk), rtol=1e-5, atol=0.0):
            return guess
        if bool((divisors > 0).all()):
            numbers = tuple(float(number) for number in divisors)
            return replace(rope, scaling="longrope", divisors=numbers, original_max_positions=positions)
    raise UnsupportedModel(
        f"{file.path}: {ROPE_DIVISORS} of shape {list(divisors.shape)} beside rope scaling {rope.scaling}: use the "
        "Hugging Face folder of this model"
    )
