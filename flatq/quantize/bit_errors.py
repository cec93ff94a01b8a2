"""What fewer bits cost, linear by linear: quantize one unit alone, run its block, see how far the output moves.

The move is weighed by how much the loss minds it at that point of the residual stream (the sensitivity that FLAT's
curves use), so errors of q and k, which pass a softmax, of gate and up, which pass a product, and of layers early and
late are all changes of the loss and can share one budget. Errors are measured on the dense model, each unit alone: that
they add up is an assumption.

GPTQ is fitted to the first half of every sample and judged by the second. The tokens that it was fitted to flatter what
reads many channels: ``down`` would get the fewest bits and is what needs them most (docs/decisions/0019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

TOKENS = 4096  # of the calibration tokens


def bit_errors(
    weights: Weights,
    tokens: Tensor,
    spec: GptqSpec,
    fisher: Sensitivity | Tensor | None,
    work: Path,
    *,
    execution: Execution = AUTO,
) -> dict[str, dict[str, float]]:
    """Cost of each of ``bit_choices`` for each unit, as ``bits.choose`` wants it.

    Args:
        tokens: calibration tokens, int64 [n, s]; the first ``TOKENS`` are used.
        fisher: [2 * layers, m, m] of ``output_sensitivity``; None compares plain output errors.

    With several processes the first one measures, on its own samples.

    Returns:
        By first stem of a unit; bits as text, ready for JSON.
    """
    (_, units), grids = free_units(weights.config, spec), planned_grids(weights.config, spec)
    found: dict[str, dict[str, float]] = {}
    some = pieces(tokens, tokens.shape[1], TOKENS)
    blocks = dense_blocks(weights, some, work, name="bits", execution=execution, moments=frozenset())
    for number, block in enumerate(blocks):
        block.observe()  # sends the inputs of the next block on their way
        found |= _block_errors(block, units, grids, spec, None if fisher is None else fisher[number])
    return found


def _block_errors(
    block: Block,
    units: Sequence[Unit],
    grids: Mapping[str, Grid],
    spec: GptqSpec,
    fisher: Tensor | None,
) -> dict[str, dict[str, float]]:
    """What ``bit_errors`` finds in one block.

    Args:
        units: of the whole model.
        grids: of every linear of the model; which bits they have does not matter.
    """
    fisher = None if fisher is None else fisher.to(block.device)
    fitted, before = _fitted(block), _outputs(block)
    return {
        unit.stems[0]: _errors(block, unit, fitted, before, grids, fisher, spec)
        for unit in units
        if _inside(block, unit)
    }


def _inside(block: Block, unit: Unit) -> bool:
    first = Stem.of(unit.stems[0])
    return first.layer == block.index and any(first.linear in names for _, names in READERS[block.half])


def _errors(
    block: Block,
    unit: Unit,
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
        moved = [after - y for after, y in zip(_outputs(block), before, strict=True)]
        for linear, weight in zip(linears, whole, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
        costs[str(bits)] = sum(_weighed(e, fisher) for e in moved) / sum(len(e) for e in moved)
    return costs


def _fitted(block: Block) -> dict[str, Tensor]:
    """Second moments of what the linears read, [i, i], over the first half of every sample."""
    grams: dict[str, Gram] = {}
    with forward_precision(block.precision, block.device):
        for batch in block.feed.batches():
            for name, x in block.activations(block.feed.states[batch].to(block.device, torch.float32)).items():
                grams.setdefault(name, Gram(x.shape[-1], device=x.device)).update(x[:, : x.shape[1] // 2])
        return {name: gram.mean() for name, gram in grams.items()}


def _outputs(block: Block) -> list[Tensor]:
    """What the block makes of the other half, [tokens, m] per batch; 8 bits round less than bfloat16, hence float32."""
    made = []
    with forward_precision("float32"):
        for batch in block.feed.batches():
            x = block.feed.states[batch].to(block.device, torch.float32)
            y = block.layer.run(block.half, x, block.positions(x.shape[0]))
            made.append(y[:, y.shape[1] // 2 :].flatten(0, 1))
    return made


def _weighed(error: Tensor, fisher: Tensor | None) -> float:
    moved = error if fisher is None else error @ fisher
    return float((moved * error).sum())
