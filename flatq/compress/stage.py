"""FLAT on a model: the rank plan before the walk, and what happens to each block during it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from flatq.compress.allocate import iprs, share_of_the_rest, uniform, widths
from flatq.compress.heads import head_basis, project_heads, spread_over_queries
from flatq.compress.mlp import leading_channels, nystroem, output_error, ridge_leverage
from flatq.decoder import DecoderConfig, LayerDims
from flatq.recipe import FlatSpec
from flatq.walk import Block


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The widths that the model will have."""

    layers: tuple[LayerDims, ...]
    requested: float
    achieved: float
    importance: tuple[float, ...] = ()


def plan_ranks(config: DecoderConfig, spec: FlatSpec, importance: Sequence[float]) -> RankPlan:
    """Widths of every layer for a wanted share of the decoder's parameters.

    Args:
        importance: one number per layer; needed by ``allocation: iprs`` only.

    Raises:
        RecipeError: the share cannot be reached.
    """
    if spec.keep_ratio == 1:
        return RankPlan(config.layers, 1.0, 1.0, tuple(importance))
    share = share_of_the_rest(config.layers, config.d_model, spec.keep_ratio)
    shares = iprs(importance, share) if spec.allocation == "iprs" else uniform(len(config.layers), share)
    layers = widths(
        config.layers,
        config.d_model,
        shares,
        spec.keep_ratio,
        rank_multiple=spec.rank_multiple,
        width_multiple=spec.width_multiple,
    )
    achieved = config.with_layers(layers).decoder_parameters() / config.decoder_parameters()
    return RankPlan(layers, spec.keep_ratio, achieved, tuple(importance))


class FlatStage:
    """Narrows each block to its planned widths, and its Grams with it."""

    def __init__(self, spec: FlatSpec, plan: RankPlan) -> None:
        self.spec, self.plan = spec, plan

    def apply(self, block: Block) -> None:
        """Observe the block, then narrow it."""
        wanted = self.plan.layers[block.index]
        if block.half == "attention":
            if wanted.d_v < block.dims.d_v:
                self._narrow_values(block, wanted.d_v)
        elif wanted.d_ff < block.dims.d_ff:
            self._narrow_mlp(block, wanted.d_ff)

    def _narrow_values(self, block: Block, rank: int) -> None:
        grams, layer = block.observe(), block.layer
        values = grams["values"].total / grams["values"].count  # [kv, d, d], also for a single head
        basis = head_basis(values, rank)
        narrowed = project_heads(layer.v.weight, layer.v.bias, layer.o.weight, basis)
        block.narrow("v", narrowed.v, narrowed.v_bias)
        block.narrow("o", narrowed.o, layer.o.bias)
        block.errors["value"] = basis.discarded
        grams["inner"] = grams["inner"].congruence(spread_over_queries(basis.encode, block.dims.group))
        grams["values"] = grams["values"].congruence(basis.encode)

    def _narrow_mlp(self, block: Block, width: int) -> None:
        grams, layer = block.observe(), block.layer
        gram, down = grams["inner"].mean(), layer.down.weight
        keep = leading_channels(ridge_leverage(gram, self.spec.ridge), width)
        corrected = nystroem(down, gram, keep)
        block.errors["mlp"] = output_error(down, gram, corrected, keep)
        for name in ("gate", "up"):
            linear: nn.Linear = getattr(layer, name)
            block.narrow(name, linear.weight[keep], None if linear.bias is None else linear.bias[keep])
        block.narrow("down", corrected, layer.down.bias)
        grams["inner"] = grams["inner"].select(keep)
