"""FLAT on a model: the rank plan before the walk, and what happens to each block during it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from flatq.calibration.sensitivity import Sensitivity, weighted
from flatq.calibration.walk import Block
from flatq.compress.allocate import Curves, Multiples, iprs, share_of_the_rest, spend, summed, uniform, widths
from flatq.compress.budget import budget_of, together
from flatq.compress.heads import (
    head_basis,
    orthonormal,
    output_basis,
    project_heads,
    refit_output,
    spread_over_queries,
)
from flatq.compress.mlp import (
    drift_correction,
    eliminate,
    leading_channels,
    nystroem,
    output_error,
    ridge_leverage,
    shrunk,
)
from flatq.model.decoder import DecoderConfig, LayerDims
from flatq.model.weights import HALVES
from flatq.recipe.blocks import FlatSpec, GptqSpec


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The widths that the model will have.

    ``requested`` and ``achieved`` are what ``budget`` says: a share of the decoder's parameters (``keep_ratio``), or
    bytes (``size``, ``decode_bytes``).
    """

    layers: tuple[LayerDims, ...]
    requested: float
    achieved: float
    budget: str = "keep_ratio"
    importance: tuple[float, ...] = ()


def plan_ranks(
    config: DecoderConfig,
    spec: FlatSpec,
    importance: Sequence[float] = (),
    curves: Sequence[Curves] = (),
    *,
    gptq: GptqSpec | None = None,
    itemsize: int = 4,
) -> RankPlan:
    """Widths of every layer for a wanted budget.

    Args:
        importance: one number per layer, for ``allocation: iprs``.
        curves: one per layer, for ``allocation: curves``. Without what its allocation needs, a plan has equal shares.
        gptq: the stage that follows, for budgets in bytes.
        itemsize: bytes of a number that is not quantized.

    Raises:
        RecipeError: the budget cannot be reached.
    """
    layers, allocation = config.layers, spec.parts.allocation
    wanted = budget = budget_of(config, spec, gptq, itemsize)
    whole = max(dims.d_v for dims in layers)
    multiples = Multiples(whole if spec.parts.values == "whole" else spec.rank_multiple, spec.width_multiple)
    if spec.uniform:
        layers, budget = together(layers, budget)
        curves = [summed(curves)] if curves else ()
    share = share_of_the_rest(layers, budget, multiples)
    if share == 1:
        planned = layers
    elif allocation == "curves" and curves:
        planned = spend(layers, budget, curves, multiples)
    else:
        shares = iprs(importance, share) if allocation == "iprs" and importance else uniform(len(layers), share)
        planned = widths(layers, budget, shares, multiples)
    layers = planned * len(config.layers) if spec.uniform else planned
    requested, achieved = wanted.limit / wanted.unit, wanted.total(layers) / wanted.unit
    return RankPlan(layers, requested, achieved, wanted.key, tuple(importance))


def uneven(config: DecoderConfig, spec: FlatSpec) -> DecoderConfig:
    """The model with value heads that differ, as an allocation layer by layer leaves them; unchanged if none will.

    Which layer keeps how much follows from the weights, but that they will not keep the same is known before.
    """
    same = spec.uniform or spec.parts.allocation == "uniform" or spec.parts.values == "whole" or spec.keep_ratio == 1
    first, *others = config.layers
    if same or first.d_v <= spec.rank_multiple:
        return config
    lower = (first.d_v - 1) // spec.rank_multiple * spec.rank_multiple
    return config.with_layers([replace(first, d_v=lower), *others])


class FlatStage:
    """Narrows each block to its planned widths, and its Grams with it."""

    def __init__(self, spec: FlatSpec, plan: RankPlan, fisher: Sensitivity | Tensor | None = None) -> None:
        self.parts, self.ridge, self.plan, self.fisher = spec.parts, spec.ridge, plan, fisher
        self.corrects = spec.corrects

    def apply(self, block: Block) -> None:
        """Observe the block (the dense model that is walked along goes by with it), then narrow it."""
        block.observe()
        wanted = self.plan.layers[block.index]
        if block.half == "attention":
            if wanted.d_v < block.dims.d_v:
                self._narrow_values(block, wanted.d_v)
        elif wanted.d_ff < block.dims.d_ff:
            self._narrow_mlp(block, wanted.d_ff)
        if self.corrects and block.half == "mlp":  # attention's output projection gains nothing by it
            self._correct(block)

    def _correct(self, block: Block) -> None:
        """Have ``down`` take back part of what this and the earlier blocks have done to the stream."""
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
        values = grams["values"].total / grams["values"].count  # [kv, d, d], also for a single head
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
        del gram  # of a 70B model, 3 GB; so the mean is taken once more
        block.errors["mlp"] = output_error(down, grams["inner"].mean(), corrected, keep)
        for name in ("gate", "up"):
            linear: nn.Linear = getattr(layer, name)
            block.narrow(name, linear.weight[keep], None if linear.bias is None else linear.bias[keep])
        block.narrow("down", corrected, layer.down.bias)
        grams["inner"] = grams["inner"].select(keep)
        if block.drift is not None:
            block.drift = block.drift[keep]
