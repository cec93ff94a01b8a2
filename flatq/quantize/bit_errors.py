"""Quantization error per unit of linears and bit width, measured: quantize one unit, run its block, compare outputs.

The output error is weighted with the Fisher information of the loss at that point of the residual stream, as FLAT's
error curves are. Errors of q and k (before the softmax), of gate and up (before the product) and of early and late
layers are then estimates of the same quantity, the loss increase, and can share one budget. Each unit is quantized
alone in the dense model; that the errors add up is an assumption.

GPTQ is fitted on the first half of every sample and evaluated on the second half. Evaluated on the fitted tokens,
linears with many inputs look better than they are: ``down`` would get the fewest bits and needs the most
(docs/decisions/0019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flatq.calibration.block import Block
from flatq.calibration.grams import Gram
from flatq.calibration.sensitivity import Sensitivity
from flatq.calibration.states import AUTO, Execution, pieces
from flatq.calibration.walk import dense_blocks
from flatq.machine.precision import forward_precision
from flatq.model.grid import Grid
from flatq.model.names import Stem
from flatq.model.weights import Weights
from flatq.quantize.bits import Unit, free_units
from flatq.quantize.grids import planned_grids
from flatq.quantize.stage import READERS, quantized_together
from flatq.recipe.blocks import GptqSpec

TOKENS = 4096  # calibration tokens used


def bit_errors(
    weights: Weights,
    tokens: Tensor,
    spec: GptqSpec,
    fisher: Sensitivity | Tensor | None,
    work: Path,
    *,
    execution: Execution = AUTO,
) -> dict[str, dict[str, float]]:
    """Cost of each of ``bit_choices`` for each unit, the input of ``bits.choose``.

    With several processes rank 0 measures, on the samples of all of them: they are few.

    Args:
        tokens: calibration tokens, int64 [n, s]; the first ``TOKENS`` are used.
        fisher: [2 * layers, m, m] from ``output_sensitivity``; None uses unweighted output errors.

    Returns:
        Costs by the first stem of a unit, then by bits as text (JSON-ready).
    """
    (_, units), grids = free_units(weights.config, spec), planned_grids(weights.config, spec)
    found: dict[str, dict[str, float]] = {}
    some = pieces(tokens, tokens.shape[1], TOKENS)
    blocks = dense_blocks(weights, some, work, name="bits", execution=execution, moments=frozenset())
    for number, block in enumerate(blocks):
        block.observe()  # also computes the inputs of the next block
        found |= _block_errors(block, units, grids, spec, None if fisher is None else fisher[number])
    return found


def _block_errors(
    block: Block,
    units: Sequence[Unit],
    grids: Mapping[str, Grid],
    spec: GptqSpec,
    fisher: Tensor | None,
) -> dict[str, dict[str, float]]:
    """The entries of ``bit_errors`` for one block.

    Args:
        units: of the whole model.
        grids: of every linear of the model; their bits are not used.
    """
    fisher = None if fisher is None else fisher.to(block.device)
    inputs = block.inputs()
    (fitted,), before = moments(block, inputs, 1), outputs(block, inputs)
    return {
        unit.stems[0]: _errors(block, unit, inputs, fitted, before, grids[unit.stems[0]], fisher, spec)
        for unit in units
        if inside(block, unit.stems[0])
    }


def inside(block: Block, stem: str) -> bool:
    """Whether a linear belongs to a block."""
    first = Stem.of(stem)
    return first.layer == block.index and any(first.linear in names for _, names in READERS[block.half])


def read_by(block: Block, linear: str) -> str:
    """Name of the activation that a linear of the block reads."""
    return next(gram for gram, readers in READERS[block.half] if linear in readers)


def _errors(
    block: Block,
    unit: Unit,
    inputs: Tensor,
    fitted: Mapping[str, Tensor],
    before: list[Tensor],
    grid: Grid,
    fisher: Tensor | None,
    spec: GptqSpec,
) -> dict[str, float]:
    names = [Stem.of(stem).linear for stem in unit.stems]
    moment, costs = fitted[read_by(block, names[0])], {}
    for bits in sorted(set(spec.bit_choices)):
        coded = solved_together(block, names, moment, replace(grid, bits=bits), spec)
        costs[str(bits)] = moved(block, inputs, coded, before, fisher)
    return costs


def solved_together(
    block: Block, names: Sequence[str], moment: Tensor, grid: Grid, spec: GptqSpec
) -> dict[str, Tensor]:
    """Dequantized weights of linears that are solved as one matrix, by name."""
    whole = [getattr(block.layer, name).weight for name in names]
    coded = quantized_together(whole, moment, grid, spec).weight.dequantize()
    return dict(zip(names, coded.split([len(weight) for weight in whole]), strict=True))


def moved(
    block: Block, inputs: Tensor, coded: Mapping[str, Tensor], before: Sequence[Tensor], fisher: Tensor | None
) -> float:
    """``mean_square`` of what other weights, by name of the linear, change in the block's output."""
    whole = {name: getattr(block.layer, name).weight for name in coded}
    for name, weight in coded.items():
        getattr(block.layer, name).weight = nn.Parameter(weight, requires_grad=False)
    after = outputs(block, inputs)
    for name, weight in whole.items():
        getattr(block.layer, name).weight = weight
    return mean_square(after, before, fisher)


def mean_square(after: Sequence[Tensor], before: Sequence[Tensor], fisher: Tensor | None) -> float:
    """Mean over tokens of ``e F e^T`` for the difference e of two outputs, [tokens, m] per batch."""
    errors = [new - old for new, old in zip(after, before, strict=True)]
    return sum(_squared_norm(e, fisher) for e in errors) / sum(len(e) for e in errors)


def _batches(block: Block, inputs: Tensor) -> Iterator[Tensor]:
    """Inputs of a block, float32 [b, s, m] on its device, in batches."""
    for batch in torch.split(inputs, max(1, block.feed.batch_tokens // inputs.shape[1])):
        yield batch.to(block.device, torch.float32)
        block.feed.forget()


def moments(block: Block, inputs: Tensor, halves: int) -> list[dict[str, Tensor]]:
    """Second moments of the linears' inputs, [i, i], over the first half of every sample; with 2, over each half."""
    grams: list[dict[str, Gram]] = [{} for _ in range(halves)]
    with forward_precision(block.precision, block.device):
        for batch in _batches(block, inputs):
            for name, x in block.activations(batch).items():
                middle = x.shape[1] // 2
                for found, part in zip(grams, (x[:, :middle], x[:, middle:]), strict=False):
                    found.setdefault(name, Gram(x.shape[-1], device=x.device)).update(part)
        return [{name: gram.mean() for name, gram in found.items()} for found in grams]


def outputs(block: Block, inputs: Tensor) -> list[Tensor]:
    """The block's outputs for the second half, [tokens, m] per batch; float32, as bfloat16 is coarser than 8 bits."""
    return [y[:, y.shape[1] // 2 :].flatten(0, 1) for y in all_outputs(block, inputs)]


def all_outputs(block: Block, inputs: Tensor) -> list[Tensor]:
    """The block's outputs, float32 [b, s, m] per batch."""
    with forward_precision("float32"):
        return [block.layer.run(block.half, x, block.positions(x.shape[0])) for x in _batches(block, inputs)]


def _squared_norm(error: Tensor, fisher: Tensor | None) -> float:
    """Sum of ``e F e^T`` over the rows of ``error``, [tokens, m]."""
    moved = error if fisher is None else error @ fisher
    return float((moved * error).sum())
