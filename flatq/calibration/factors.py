"""Factors of a compressed model's scales and norm gains, which fold into what is stored; codes stay as they are.

A linear has one factor for each row and one for each column; a quantized linear has one for each group of columns, and
both fold into its scales. A norm has one for each gain. Factors are kept as logarithms, so 0 changes nothing and no
sign changes.

The factors are folded when a tensor is read, in the type in which it is stored: scales are float16, gains and weights
without codes keep their type. So the forward pass sees what is written at the end, bit for bit.

Left out: one factor for each scale. There are fifteen times as many, which a short training overfits
(docs/decisions/0043).

Axes: o out_features, i in_features, G groups, m d_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from flatq.model.decoder import LINEARS, DecoderConfig
from flatq.model.grid import Grid, QuantizedWeight, as_half
from flatq.model.weights import Weights, tensor_shapes

ROWS, COLUMNS = ".rows", ".columns"


def factor_shapes(config: DecoderConfig, grids: Mapping[str, Grid]) -> dict[str, tuple[int, ...]]:
    """Shapes of all factors by name: of a norm its gain's name, of a linear its stem with ``ROWS`` or ``COLUMNS``.

    Biases, routers of experts, the embedding and the LM head have none.

    Args:
        config: of the compressed model.
        grids: of its quantized weights, by stem.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        stem = name.removesuffix(".weight")
        if stem.endswith("norm"):
            found[name] = shape
        elif stem.rpartition(".")[2] in LINEARS and name.endswith(".weight"):
            columns = grids[stem].groups(shape[1]) if stem in grids else shape[1]
            found |= {stem + ROWS: shape[:1], stem + COLUMNS: (columns,)}
    return found


@dataclass(frozen=True, slots=True)
class Factored:
    """A compressed model with factors folded into its tensors; satisfies ``Weights``.

    Attributes:
        weights: the model.
        logs: logarithms of the factors, float32, by the names of ``factor_shapes``.
    """

    weights: Weights
    logs: Mapping[str, Tensor]

    @property
    def config(self) -> DecoderConfig:
        """Of the model."""
        return self.weights.config

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """One tensor as it is stored with the factors."""
        stored, stem = self.weights.tensor(name), name.removesuffix(".weight")
        if isinstance(stored, Tensor) and name in self.logs:
            return (stored.float() * self.logs[name].exp()).to(stored.dtype)
        if not name.endswith(".weight") or stem + ROWS not in self.logs:
            return stored
        factors = (self.logs[stem + ROWS][:, None] + self.logs[stem + COLUMNS]).exp()
        if isinstance(stored, QuantizedWeight):
            return replace(stored, scale=as_half(stored.scale.float() * factors).half())
        return (stored.float() * factors).to(stored.dtype)


def slopes(name: str, weight: Tensor, gradient: Tensor, grids: Mapping[str, Grid]) -> dict[str, Tensor]:
    """Gradients of the logarithms of a tensor's factors, by name.

    ``w = e^f u`` has the derivative ``w`` with respect to f, so each is the sum of ``w dL/dw`` over what it scales.
    Rounding to the stored type is passed through unchanged (straight-through).

    Args:
        name: of the tensor.
        weight: its values, decoded, [m] or [o, i].
        gradient: of the loss with respect to them, the same shape.
        grids: of the quantized weights, by stem.
    """
    along, stem = weight * gradient, name.removesuffix(".weight")
    if along.ndim == 1:
        return {name: along}
    columns = along.sum(0)
    if stem in grids:
        width, groups = grids[stem].width(len(columns)), grids[stem].groups(len(columns))
        columns = F.pad(columns, (0, groups * width - len(columns))).view(groups, width).sum(1)
    return {stem + ROWS: along.sum(1), stem + COLUMNS: columns}
