"""Predicted speed of an export on this machine, as a sum over the halves of layers, the embedding and the head.

An exporter with a runtime measures its kernels once (``Exporter.speed_model``); the time of any plan of widths and bits
is then a sum of a few numbers, so that a plan can be chosen by it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from flatq.model.config import DecoderConfig
from flatq.model.dims import LayerDims
from flatq.model.grid import Grid
from flatq.quantize.bits import UNITS

Grids = Mapping[str, Grid | None]


@dataclass(frozen=True, slots=True)
class Seconds:
    """Predicted times of an export, or of a part of it.

    Attributes:
        decode: one token with a cache of the load's context.
        prefill: the load's prompt.
    """

    decode: float = 0.0
    prefill: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.decode + other.decode, self.prefill + other.prefill)


@dataclass(frozen=True, slots=True)
class SpeedLoad:
    """What a prediction is for.

    Attributes:
        context: positions in the cache while a token is decoded.
        prompt: tokens of the prefill.
        threads: of the runtime; 0 is its default.
    """

    context: int = 192
    prompt: int = 128
    threads: int = 0


class SpeedModel(ABC):
    """Additive times of one model's export, for any widths and grids; a grid of None is an unquantized linear.

    No width is priced below the smallest measured one: the fixed cost of a node is a floor that no plan goes below.
    """

    @abstractmethod
    def linears(self, dims: LayerDims, grids: Grids) -> Seconds:
        """Linears of a layer with the same input: q, k, v; or o; or gate, up; or down.

        Args:
            dims: the planned widths of the layer.
            grids: by name of the linear.
        """

    @abstractmethod
    def rest(self, half: str, dims: LayerDims) -> Seconds:
        """All of a half layer but its linears: norms, rotary embedding, attention, activation.

        Args:
            half: ``attention`` or ``mlp``.
            dims: the planned widths of the layer.
        """

    @abstractmethod
    def ends(self, grids: Grids) -> Seconds:
        """Everything outside of layers; ``grids`` of ``embed`` and ``head``, of which a tied head has none."""

    def predict(self, config: DecoderConfig, grids: Mapping[str, Grid]) -> Seconds:
        """The whole model.

        Args:
            config: the planned widths.
            grids: grid of each quantized linear, by stem (``layers.0.q``, ``embed``).
        """
        total = self.ends({name: grids.get(name) for name in ("embed", "head")})
        for index, dims in enumerate(config.layers):
            total = total + self.rest("attention", dims) + self.rest("mlp", dims)
            for unit in UNITS:
                total = total + self.linears(dims, {name: grids.get(f"layers.{index}.{name}") for name in unit})
        return total
