"""GPTQ on a model: which linear gets which grid, and what happens to each block during the walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from flatq.calibration.block import Block
from flatq.calibration.grams import Gram, finite
from flatq.errors import NumericsError
from flatq.linalg import drift_correction
from flatq.model.grid import Grid, QuantizedWeight, round_to_nearest
from flatq.model.names import Stem
from flatq.model.weights import Weights, dense
from flatq.quantize.gptq import WEIGHTS_AT_ONCE, GptqResult, gptq
from flatq.recipe.blocks import GptqSpec

# Linears that read the same activation are solved together, on one factor of one Gram.
READERS = {
    "attention": (("input", ("q", "k", "v")), ("inner", ("o",))),
    "mlp": (("input", ("gate", "up")), ("inner", ("down",))),
}


def quantize_table(weights: Weights, name: str, grid: Grid) -> QuantizedWeight:
    """An embedding, rounded to nearest with the clip factor searched (each row is read by itself)."""
    return round_to_nearest(dense(weights.tensor(name)), grid, search=True)


class GptqStage:
    """Quantizes the linears of each block on the Grams that the earlier stages left.

    With ``correction`` a weight first moves towards what gives the dense model's outputs on the inputs that it will
    really get (asymmetric calibration): q, k, v and gate, up towards theirs on the dense model's inputs, o and down
    towards the dense residual stream. The walk must measure drift and lag then.

    Args:
        spec: how.
        grids: which linears, each to its grid.
    """

    def __init__(self, spec: GptqSpec, grids: Mapping[str, Grid]) -> None:
        self.spec, self.grids = spec, grids

    def apply(self, block: Block) -> None:
        """Observe the block if no stage did, then replace its linears by codes."""
        grams = block.observe()
        groups, problems = [], []
        for gram, names in READERS[block.half]:
            for grid, some in self._by_grid(block.index, names):
                weights: list[Tensor] = [getattr(block.layer, name).weight for name in some]
                for name, weight in zip(some, weights, strict=True):
                    if not finite(weight):
                        raise NumericsError(f"{block.place} {name}: the weight is not finite before quantization")
                if self.spec.correction:
                    weights = corrected(block, gram, weights, self.spec.correction)
                groups.append(some)
                problems.append((weights, grams[gram], grid))
        for group, result in zip(groups, self._solved(problems), strict=True):
            _place(block, group, result, self.spec.damping)

    def _solved(self, problems: Sequence[tuple[Sequence[Tensor], Gram, Grid]]) -> list[GptqResult]:
        """Two problems at a time, each with half of the threads: a sweep over columns keeps one busy and no more."""

        def solve(problem: tuple[Sequence[Tensor], Gram, Grid]) -> GptqResult:
            weights, gram, grid = problem
            return quantized_together(weights, gram.mean(), grid, self.spec)

        threads = torch.get_num_threads()
        if threads == 1 or any(gram.total.device.type != "cpu" for _, gram, _ in problems):
            return [solve(problem) for problem in problems]
        try:
            with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(threads // 2,)) as pool:
                return list(pool.map(solve, problems))
        finally:
            torch.set_num_threads(threads)  # MKL counts for the whole process

    def _by_grid(self, index: int, names: tuple[str, ...]) -> list[tuple[Grid, list[str]]]:
        """Linears that share their grid, which are solved in one call; those without one are left as they are."""
        found: dict[Grid, list[str]] = {}
        for name in names:
            grid = self.grids.get(str(Stem(index, name)))
            if grid is not None:
                found.setdefault(grid, []).append(name)
        return list(found.items())


@torch.inference_mode()
def corrected(block: Block, gram: str, weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """Weights that take back a share of the drift from the dense model, as far as their input foresees it.

    Source: GPTAQ (arXiv 2504.02692), asymmetric calibration.
    Differs from it: o and down answer for the residual stream and not for their own product alone; a share, and a fit
    that distrusts what few tokens say, in place of the whole correction folded into the sweep.

    Args:
        gram: of the activation that the weights read, ``input`` or ``inner``.
        weights: each [o, i].
        share: 0 to 1; 1 takes back all that the fit foresees.
    """
    seen, drift = block.observe()[gram], block.drift
    if gram == "input" and block.lag is not None:
        drift = block.lag @ torch.cat(list(weights)).T
    elif gram == "input" or drift is None:
        raise ValueError("the walk has not measured what to correct")
    found = drift_correction(seen.mean(), drift / seen.count).to(weights[0].dtype)
    parts = found.split([len(weight) for weight in weights])
    return [weight + share * part for weight, part in zip(weights, parts, strict=True)]


def quantized_together(
    weights: Sequence[Tensor], moment: Tensor, grid: Grid, spec: GptqSpec, *, at_once: int = WEIGHTS_AT_ONCE
) -> GptqResult:
    """GPTQ of weights that read the same activation, their rows stacked (with contiguous columns)."""
    together = torch.cat([weight.T for weight in weights], 1).T if len(weights) > 1 else weights[0]
    return gptq(
        together,
        moment,
        grid,
        damping=spec.damping,
        act_order=spec.act_order,
        clip_search=spec.clip_search,
        block_size=spec.block_size,
        at_once=at_once,
    )


def _place(block: Block, names: list[str], result: GptqResult, damping: float) -> None:
    """Put codes in place of linears that read the same activation."""
    block.notes += notes_on("+".join(names), result, damping)
    row, part = 0, result.weight
    for name in names:
        rows = slice(row, row + getattr(block.layer, name).weight.shape[0])
        block.quantize(name, QuantizedWeight(part.codes[rows], part.scale[rows], part.zero[rows], part.grid))
        block.errors[name] = result.error_of(rows)
        row = rows.stop


def notes_on(names: str, result: GptqResult, damping: float) -> list[str]:
    """What a user should know of a solve that did not go as asked, in words."""
    notes = []
    if result.damping is None:
        notes.append(f"{names}: every damping failed, rounded to nearest")
    elif result.damping > damping * 1.5:
        notes.append(f"{names}: needed damping {result.damping:g}")
    if result.dead:
        notes.append(f"{names}: {result.dead} input columns never carried anything")
    return notes
