"""The FLAT stage: narrows each block of the walk to its planned widths."""

from __future__ import annotations

from torch import Tensor, nn

from flatq.calibration.block import Block
from flatq.calibration.sensitivity import Sensitivity, weighted
from flatq.compress.heads import (
    head_basis,
    orthonormal,
    output_basis,
    project_heads,
    refit_output,
    spread_over_queries,
)
from flatq.compress.mlp import eliminate, leading_channels, nystroem, output_error, ridge_leverage
from flatq.compress.plan import RankPlan
from flatq.linalg import drift_correction, shrunk
from flatq.model.weights import HALVES
from flatq.recipe.blocks import FlatSpec


class FlatStage:
    """Narrows each block, and its Grams, to the planned widths."""

    def __init__(self, spec: FlatSpec, plan: RankPlan, fisher: Sensitivity | Tensor | None = None) -> None:
        self.parts, self.ridge, self.plan, self.fisher = spec.parts, spec.ridge, plan, fisher
        self.corrects = spec.corrects

    def apply(self, block: Block) -> None:
        """Narrow the block on its Grams, then correct its drift from the dense model, if the walk tracks it."""
        wanted = self.plan.layers[block.index]
        if block.half == "attention":
            if wanted.d_v < block.dims.d_v:
                self._narrow_values(block, wanted.d_v)
        elif wanted.d_ff < block.dims.d_ff:
            self._narrow_mlp(block, wanted.d_ff)
        if self.corrects and block.half == "mlp":  # no measurable gain for attention's output projection
            self._correct(block)

    def _correct(self, block: Block) -> None:
        """Refit ``down`` to compensate a fraction of the error accumulated in the residual stream so far."""
        gram = block.observe()["inner"]
        if block.drift is None:
            raise ValueError("the walk has no reference to correct towards")
        down, found = block.layer.down, drift_correction(gram.mean(), block.drift / gram.count)
        block.narrow("down", down.weight.double() + self.parts.correction * found, down.bias)

    def _weighted(self, block: Block, w: Tensor) -> Tensor:
        number = len(HALVES) * block.index + HALVES.index(block.half)
        return weighted(w, None if self.fisher is None else self.fisher[number])

    def _narrow_values(self, block: Block, rank: int) -> None:
        grams, layer, dims = block.observe(), block.layer, block.dims
        values = grams["values"].total  # [kv, d, d], also for a single head; its scale does not matter
        inner = shrunk(grams["inner"].mean(), self.parts.shrinkage)
        if self.parts.values == "pca":
            basis = head_basis(values, rank)
        else:
            encode, _ = output_basis(inner, self._weighted(block, layer.o.weight), dims.kv_heads, dims.group)
            basis = orthonormal(encode[..., :rank], values)
        narrowed = project_heads(layer.v.weight, layer.v.bias, layer.o.weight, basis)
        o = refit_output(layer.o.weight, inner, basis.encode, dims.group) if self.parts.refit else narrowed.o
        block.narrow("v", narrowed.v, narrowed.v_bias)
        block.narrow("o", o, layer.o.bias)
        block.errors["value"] = basis.discarded
        spread = spread_over_queries(basis.encode, dims.group)
        grams["inner"] = grams["inner"].congruence(spread)
        if block.drift is not None:
            block.drift = spread.T.to(block.drift) @ block.drift
        grams["values"] = grams["values"].congruence(basis.encode)

    def _narrow_mlp(self, block: Block, width: int) -> None:
        grams, layer = block.observe(), block.layer
        down, gram = layer.down.weight, shrunk(grams["inner"].mean(), self.parts.shrinkage)
        if self.parts.channels == "leverage":
            keep = leading_channels(ridge_leverage(gram, self.ridge), width)
        else:
            keep = eliminate(self._weighted(block, down), gram, width, self.ridge).kept(len(gram))
        corrected = nystroem(down, gram, keep)
        del gram  # 3 GB for a 70B model; the mean is computed again below
        block.errors["mlp"] = output_error(down, grams["inner"].mean(), corrected, keep)
        for name in ("gate", "up"):
            linear: nn.Linear = getattr(layer, name)
            block.narrow(name, linear.weight[keep], None if linear.bias is None else linear.bias[keep])
        block.narrow("down", corrected, layer.down.bias)
        grams["inner"] = grams["inner"].select(keep)
        if block.drift is not None:
            block.drift = block.drift[keep]
