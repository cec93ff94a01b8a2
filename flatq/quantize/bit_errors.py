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
    fitted, before = _fitted(block, inputs), outputs(block, inputs)
    return {
        unit.stems[0]: _errors(block, unit, inputs, fitted, before, grids, fisher, spec)
        for unit in units
        if _inside(block, unit)
    }


def _inside(block: Block, unit: Unit) -> bool:
    first = Stem.of(unit.stems[0])
    return first.layer == block.index and any(first.linear in names for _, names in READERS[block.half])


def _errors(
    block: Block,
    unit: Unit,
    inputs: Tensor,
    fitted: Mapping[str, Tensor],
    before: list[Tensor],
    grids: Mapping[str, Grid],
    fisher: Tensor | None,
    spec: GptqSpec,
) -> dict[str, float]:
    names = [Stem.of(stem).linear for stem in unit.stems]
    gram = next(gram for gram, readers in READERS[block.half] if names[0] in readers)
    linears: list[nn.Linear] = [getattr(block.layer, name) for name in names]
    whole = [linear.weight for linear in linears]
    costs = {}
    for bits in sorted(set(spec.bit_choices)):
        grid = replace(grids[unit.stems[0]], bits=bits)
        coded = quantized_together(whole, fitted[gram], grid, spec).weight.dequantize()
        for linear, part in zip(linears, coded.split([len(weight) for weight in whole]), strict=True):
            linear.weight = nn.Parameter(part, requires_grad=False)
        moved = [after - y for after, y in zip(outputs(block, inputs), before, strict=True)]
        for linear, weight in zip(linears, whole, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
        costs[str(bits)] = sum(squared_norm(e, fisher) for e in moved) / sum(len(e) for e in moved)
    return costs


def batches(block: Block, inputs: Tensor) -> Iterator[Tensor]:
    """Inputs of a block, float32 [b, s, m] on its device, in batches."""
    for batch in torch.split(inputs, max(1, block.feed.batch_tokens // inputs.shape[1])):
        yield batch.to(block.device, torch.float32)
        block.feed.forget()


def _fitted(block: Block, inputs: Tensor) -> dict[str, Tensor]:
    """Second moments of the linears' inputs, [i, i], over the first half of every sample."""
    grams: dict[str, Gram] = {}
    with forward_precision(block.precision, block.device):
        for batch in batches(block, inputs):
            for name, x in block.activations(batch).items():
                grams.setdefault(name, Gram(x.shape[-1], device=x.device)).update(x[:, : x.shape[1] // 2])
        return {name: gram.mean() for name, gram in grams.items()}


def outputs(block: Block, inputs: Tensor) -> list[Tensor]:
    """The block's outputs for the second half, [tokens, m] per batch; float32, as bfloat16 is coarser than 8 bits."""
    return [y[:, y.shape[1] // 2 :].flatten(0, 1) for y in all_outputs(block, inputs)]


def all_outputs(block: Block, inputs: Tensor) -> list[Tensor]:
    """The block's outputs, float32 [b, s, m] per batch."""
    with forward_precision("float32"):
        return [block.layer.run(block.half, x, block.positions(x.shape[0])) for x in batches(block, inputs)]


def squared_norm(error: Tensor, fisher: Tensor | None) -> float:
    """Sum of ``e F e^T`` over the rows of ``error``, [tokens, m]."""
    moved = error if fisher is None else error @ fisher
    return float((moved * error).sum())
