"""GPTQ on a model: which linear gets which grid, and what happens to each block during the walk."""

from __future__ import annotations

import torch

from flatq.decoder import LINEARS, DecoderConfig
from flatq.errors import NumericsError
from flatq.quantize.gptq import CLIPS, GptqResult, gptq
from flatq.quantize.grid import Grid, QuantizedWeight, round_to_nearest
from flatq.specs import GptqSpec
from flatq.walk import Block
from flatq.weights import Weights, dense

# Linears that read the same activation are solved together, on one factor of one Gram.
READERS = {
    "attention": (("input", ("q", "k", "v")), ("inner", ("o",))),
    "mlp": (("input", ("gate", "up")), ("inner", ("down",))),
}


def planned_grids(config: DecoderConfig, spec: GptqSpec | None) -> dict[str, Grid]:
    """Grid of every weight that will be quantized, by stem (``layers.3.q``, ``embed``, ``head``)."""
    if spec is None:
        return {}
    grid = Grid(spec.bits, spec.group_size, spec.symmetric)
    grids = {f"layers.{index}.{name}": grid for index in range(len(config.layers)) for name in LINEARS}
    if spec.embedding is not None:
        table = Grid(spec.embedding.bits, spec.embedding.group_size, True)
        grids |= dict.fromkeys(("embed",) if config.tied_head else ("embed", "head"), table)
    return grids


def objections(config: DecoderConfig, spec: GptqSpec | None) -> list[str]:
    """Groups that are wider than the weights they should divide, in words."""
    found: dict[str, list[str]] = {}
    for stem, grid in planned_grids(config, spec).items():
        columns = config.d_model
        if stem.startswith("layers."):
            _, index, name = stem.split(".")
            columns = config.layers[int(index)].shape(name, config.d_model)[1]
        if grid.group_size > columns:
            kind = stem.rsplit(".", 1)[-1]
            found.setdefault(f"{kind} ({columns} inputs)", []).append(stem)
    if not found or spec is None:
        return []
    return [
        f"stages.gptq.group_size: {spec.group_size} is wider than {', '.join(found)}; "
        f"choose at most {_widest(config)}, or -1 for one group per row"
    ]


def _widest(config: DecoderConfig) -> int:
    narrowest = min(dims.shape(name, config.d_model)[1] for dims in config.layers for name in LINEARS)
    return max((size for size in (16, 32, 64, 128, 256, 512, 1024) if size <= narrowest), default=-1)


def quantize_table(weights: Weights, name: str, grid: Grid) -> QuantizedWeight:
    """Embedding or head, rounded to nearest with the clip factor searched (each row is read by itself)."""
    return round_to_nearest(dense(weights.tensor(name)), grid, clips=(1.0, *CLIPS))


class GptqStage:
    """Quantizes the linears of each block on the Grams that the earlier stages left."""

    def __init__(self, spec: GptqSpec) -> None:
        self.spec = spec
        self.grid = Grid(spec.bits, spec.group_size, spec.symmetric)

    def apply(self, block: Block) -> None:
        """Observe the block if no stage did, then replace its linears by codes."""
        grams = block.observe()
        for gram, names in READERS[block.half]:
            linears = [getattr(block.layer, name) for name in names]
            for name, linear in zip(names, linears, strict=True):
                if not torch.isfinite(linear.weight).all():
                    raise NumericsError(f"{block.place} {name}: the weight is not finite before quantization")
            moment = grams[gram].mean()
            result = self._solve(torch.cat([linear.weight for linear in linears]), moment)
            self._report(block, "+".join(names), result)
            row = 0
            for name, linear in zip(names, linears, strict=True):
                stop = row + linear.weight.shape[0]
                part = result.weight
                block.quantize(
                    name, QuantizedWeight(part.codes[row:stop], part.scale[row:stop], part.zero[row:stop], part.grid)
                )
                block.errors[name] = result.error_of(slice(row, stop))
                row = stop

    def _solve(self, stacked: torch.Tensor, gram: torch.Tensor) -> GptqResult:
        spec = self.spec
        return gptq(
            stacked,
            gram,
            self.grid,
            damping=spec.damping,
            act_order=spec.act_order,
            clip_search=spec.clip_search,
            block_size=spec.block_size,
        )

    def _report(self, block: Block, names: str, result: GptqResult) -> None:
        if result.damping is None:
            block.notes.append(f"{names}: every damping failed, rounded to nearest")
        elif result.damping > self.spec.damping * 1.5:
            block.notes.append(f"{names}: needed damping {result.damping:g}")
        if result.dead:
            block.notes.append(f"{names}: {result.dead} input columns never carried anything")
