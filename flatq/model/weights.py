"""Weights by name, one tensor at a time: the common interface of a checkpoint, a GGUF file and an artifact.

Names are those of ``Decoder.state_dict()``: ``embed.weight``, ``layers.3.q.weight``, ``layers.3.q.bias``,
``layers.3.attention_norm.weight``, ``norm.weight``, ``head.weight`` (absent when tied).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatq.model.decoder import Decoder, DecoderConfig, DecoderLayer, RMSNorm, capped
from flatq.model.grid import QuantizedWeight

HALVES = ("attention", "mlp")


class Weights(Protocol):
    """A model that is read tensor by tensor."""

    @property
    def config(self) -> DecoderConfig:
        """The decoder configuration."""
        ...

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """Read one tensor; a quantized linear as codes, scales and zeros."""
        ...


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a decoder, by name."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Decoder(config).state_dict().items()}


def half_names(config: DecoderConfig, index: int, half: str) -> list[str]:
    """Names of the tensors of one half (``attention`` or ``mlp``) of a layer."""
    with torch.device("meta"):
        layer = DecoderLayer(config, index, halves=(half,))
    return [f"layers.{index}.{name}" for name in layer.state_dict()]


def dense(tensor: Tensor | QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor in a float dtype, dequantized if necessary."""
    return tensor.dequantize(dtype) if isinstance(tensor, QuantizedWeight) else tensor.to(dtype)


def head_stem(config: DecoderConfig) -> str:
    """Name of the LM-head table, without ``.weight``: ``embed`` if tied, else ``head``."""
    return "embed" if config.tied_head else "head"


@dataclass(frozen=True, eq=False)
class Head:
    """The LM head: its matrix, float [vocab, d_model], and the cap of its logits."""

    weight: Tensor
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits, [..., d_model] -> [..., vocab], in the type of ``hidden``."""
        return capped(F.linear(hidden, self.weight.to(hidden.dtype)), self.cap)

    def __len__(self) -> int:
        return len(self.weight)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the capped logits with respect to those without a cap, [..., vocab]; None without a cap."""
        return None if self.cap is None else 1 - (logits / self.cap).square()


def load_head(weights: Weights, *, device: str = "cpu") -> Head:
    """The LM head, dequantized, float32."""
    matrix = dense(weights.tensor(f"{head_stem(weights.config)}.weight")).to(device)
    return Head(matrix, weights.config.logit_cap)


def load_last_norm(weights: Weights, *, device: str = "cpu") -> RMSNorm:
    """The final norm, in front of the LM head."""
    norm = RMSNorm(weights.config.d_model, weights.config.norm_eps)
    norm.weight = nn.Parameter(dense(weights.tensor("norm.weight")), requires_grad=False)
    return norm.to(device)


def load_half(
    weights: Weights, index: int, half: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> DecoderLayer:
    """Load one half (``attention`` or ``mlp``) of a layer, dequantized, in evaluation mode."""
    with torch.device("meta"):
        layer = DecoderLayer(weights.config, index, halves=(half,))
    _fill(layer, weights, f"layers.{index}.", dtype, device)
    return layer


def load_decoder(weights: Weights, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
    """Load the whole decoder into memory, dequantized."""
    with torch.device("meta"):
        decoder = Decoder(weights.config)
    _fill(decoder, weights, "", dtype, device)
    return decoder


def _fill(module: nn.Module, weights: Weights, prefix: str, dtype: torch.dtype, device: str) -> None:
    state: Mapping[str, Tensor] = {
        name: dense(weights.tensor(prefix + name), dtype).to(device) for name in module.state_dict()
    }
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)
    module.eval()


def halves(config: DecoderConfig) -> list[tuple[int, str]]:
    """Every half layer in the order of a forward pass: (index of the layer, ``attention`` or ``mlp``)."""
    return [(index, half) for index in range(len(config.layers)) for half in HALVES]
