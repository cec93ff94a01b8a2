"""The GPTQ stage: quantizes the linears of each block of the walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from flatq.calibration.block import Block
from flatq.calibration.grams import Gram, finite
from flatq.calibration.training import OutputTraining
from flatq.errors import NumericsError
from flatq.linalg import drift_correction, relative_energy
from flatq.model.grid import Grid, QuantizedWeight, round_to_nearest
from flatq.model.names import Stem
from flatq.model.weights import HALVES, Weights, dense
from flatq.quantize.gptq import WEIGHTS_AT_ONCE, GptqResult, gptq
from flatq.quantize.tuned import TunedCodes
from flatq.recipe.blocks import GptqSpec

REMEDY = "check the source checkpoint for damage, or leave it as it is: `quantize: false` for its name in `overrides`"
# Linears that read the same activation are quantized together, with one factorization of one Gram.
READERS = {
    "attention": (("input", ("q", "k", "v")), ("inner", ("o",))),
    "mlp": (("input", ("gate", "up")), ("inner", ("down",))),
}


def quantize_table(weights: Weights, name: str, grid: Grid) -> QuantizedWeight:
    """An embedding, rounded to nearest with a search of the clip factor (each token reads a single row)."""
    try:
        return round_to_nearest(dense(weights.tensor(name)), grid, search=True)
    except NumericsError as unheld:
        raise NumericsError(f"{name}: {unheld}; {REMEDY}") from unheld


class GptqStage:
    """Quantizes the linears of each block, on the Grams that the earlier stages have updated.

    With ``correction`` a weight is first refitted to give the dense model's outputs on the inputs that it gets in the
    quantized model (asymmetric calibration): q, k, v, gate and up are fitted to their outputs on the dense model's
    inputs, o and down to the dense residual stream. The walk must then measure drift and lag.

    Args:
        spec: settings of GPTQ.
        grids: grid by stem; linears that are not in it stay unquantized.
    """

    def __init__(self, spec: GptqSpec, grids: Mapping[str, Grid]) -> None:
        self.spec, self.grids = spec, grids

    def apply(self, block: Block) -> None:
        """Measure the block's Grams if no earlier stage did, then quantize its linears."""
        grams = block.observe()
        groups, problems = [], []
        solved: dict[str, Tensor] = {}
        for gram, names in READERS[block.half]:
            for grid, some in self._by_grid(block.index, names).items():
                weights: list[Tensor] = [getattr(block.layer, name).weight for name in some]
                for name, weight in zip(some, weights, strict=True):
                    if not finite(weight):
                        raise NumericsError(f"{block.place} {name}: the weight is not finite before quantization")
                if self.spec.correction:
                    weights = corrected(block, gram, weights, self.spec.correction)
                groups.append(some)
                solved |= dict(zip(some, weights, strict=True))
                problems.append((weights, grams[gram], grid))
        training = OutputTraining(block) if self.spec.tune_steps and solved else None
        for group, result in zip(groups, self._solved(problems), strict=True):
            _place(block, group, result, self.spec.damping)
        if training is not None:
            tune(block, training, solved, self.spec.tune_steps)

    def _solved(self, problems: Sequence[tuple[Sequence[Tensor], Gram, Grid]]) -> list[GptqResult]:
        """Solve two problems in parallel, each with half of the threads: the column loop uses only one thread."""

        def solve(problem: tuple[Sequence[Tensor], Gram, Grid]) -> GptqResult:
            weights, gram, grid = problem
            return quantized_together(weights, gram.mean(), grid, self.spec)

        threads = torch.get_num_threads()
        if threads == 1 or any(gram.total.device.type != "cpu" for _, gram, _ in problems):
            return [solve(problem) for problem in problems]
        try:
            with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(threads // 2,)) as pool:
                return [*pool.map(solve, problems)]
        finally:
            torch.set_num_threads(threads)  # MKL's number of threads is global

    def _by_grid(self, index: int, names: tuple[str, ...]) -> dict[Grid, list[str]]:
        """Linears grouped by grid, each group for one call; those without a grid are left out."""
        found: dict[Grid, list[str]] = {}
        for name in names:
            grid = self.grids.get(str(Stem(index, name)))
            if grid is not None:
                found.setdefault(grid, []).append(name)
        return found


def tune(block: Block, training: OutputTraining, weights: Mapping[str, Tensor], steps: int) -> None:
    """Train the codes and scales of a quantized half layer towards its output before it was quantized.

    Args:
        block: with GPTQ's solution.
        training: made before the block was quantized.
        weights: what GPTQ quantized, [o, i], by name of the linear.
        steps: number of steps.
    """
    trained = TunedCodes(block.quantized, weights, steps)
    training.run(trained, steps, seed=len(HALVES) * block.index + HALVES.index(block.half))
    reads = {name: gram for gram, names in READERS[block.half] for name in names}
    for name, codes in trained.codes().items():
        block.quantize(name, codes)
        lost = weights[name] - codes.dequantize()
        block.errors[name] = relative_energy(lost, weights[name], block.grams[reads[name]].mean())


@torch.inference_mode()
def corrected(block: Block, gram: str, weights: Sequence[Tensor], share: float) -> list[Tensor]:
    """Weights refitted to compensate a fraction of the drift from the dense model (ridge regression on their inputs).

    Source: GPTAQ (arXiv 2504.02692), asymmetric calibration.
    Differs from it: o and down are fitted to the residual stream instead of to their own output; only a fraction is
    applied, from a regularized fit, before the column loop instead of inside it.

    Args:
        gram: name of the Gram of the weights' inputs, ``input`` or ``inner``.
        weights: each [o, i].
        share: fraction of the fitted correction that is applied, 0 to 1.
    """
    seen, drift = block.observe()[gram], block.drift
    if gram == "input" and block.lag is not None:
        drift = block.lag @ torch.cat([*weights]).T
    elif gram == "input" or drift is None:
        raise ValueError("the walk has not measured the drift to correct")
    found = drift_correction(seen.mean(), drift / seen.count).to(weights[0].dtype)
    parts = found.split([len(weight) for weight in weights])
    return [weight + share * part for weight, part in zip(weights, parts, strict=True)]


def quantized_together(
    weights: Sequence[Tensor], moment: Tensor, grid: Grid, spec: GptqSpec, *, at_once: int = WEIGHTS_AT_ONCE
) -> GptqResult:
    """GPTQ of weights that read the same activation, with their rows concatenated (column-major)."""
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
        parts=len(weights),
    )


def _place(block: Block, names: list[str], result: GptqResult, damping: float) -> None:
    """Replace linears that read the same activation by their quantized weights, and record errors and notes."""
    if result.unheld:
        raise NumericsError(f"{block.place} {'+'.join(names)}: {result.unheld}; {REMEDY}")
    block.notes += notes_on("+".join(names), result, damping)
    row, part = 0, result.weight
    for name in names:
        rows = slice(row, row + getattr(block.layer, name).weight.shape[0])
        block.quantize(name, QuantizedWeight(part.codes[rows], part.scale[rows], part.zero[rows], part.grid))
        block.errors[name] = result.error_of(rows)
        row = rows.stop


def notes_on(names: str, result: GptqResult, damping: float) -> list[str]:
    """Warnings about a result of GPTQ: fallback to rounding, increased damping, dead columns."""
    notes = []
    if result.dead == result.weight.shape[1]:
        return [f"{names}: DEAD: all inputs were always 0 on the calibration text, rounded to nearest"]
    if result.damping is None:
        notes.append(f"{names}: GPTQ failed with every damping, rounded to nearest")
    elif result.damping > damping:
        notes.append(f"{names}: damping was increased to {result.damping:g}")
    if result.dead:
        notes.append(f"{names}: {result.dead} input columns were always 0")
    return notes
