"""Error of every choice of every unit, measured: the input of ``budget.joint``.

As in ``bit_errors``, each unit is quantized alone in the dense model, fitted on the first half of every sample and
judged on the second half, and its error is weighted with the Fisher information of the loss, so that the errors of all
units, and the error curves of the widths, are in one unit (twice a loss increase in nats).

- o and down: the output error is linear in the weight's error D, so it follows from the second moment C of their
  inputs, ``tr(F D C D^T)``, without another forward pass (unless a norm follows them).
- The head: an error d of the logits costs ``sum p d^2 - (sum p d)^2`` per token, with the model's probabilities p: the
  Fisher information of the logits, which is exact.
- The embedding: the error of the first half layer's output. A tied table has both errors of the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flatq.calibration.block import Block
from flatq.calibration.grams import Gram
from flatq.calibration.sensitivity import Sensitivity
from flatq.calibration.states import AUTO, Execution, embedded, pieces
from flatq.calibration.walk import dense_blocks
from flatq.machine.precision import forward_precision
from flatq.model.grid import Grid, QuantizedWeight
from flatq.model.names import Stem
from flatq.model.weights import Weights, head_stem, load_head, load_last_norm
from flatq.quantize.bit_errors import (
    all_outputs,
    inside,
    mean_square,
    moments,
    moved,
    outputs,
    read_by,
    solved_together,
)
from flatq.quantize.choices import Choice, ChoiceUnit
from flatq.quantize.stage import quantize_table, quantized_together
from flatq.recipe.blocks import GptqSpec

TOKENS, LENGTH = 4096, 512  # calibration tokens used, in rows of
LOGITS = 512  # tokens on which the head is judged
LOGITS_AT_ONCE = 128
CLOSED = True  # whether errors of o and down follow from second moments

Errors = dict[str, dict[str, float]]


def choice_errors(
    weights: Weights,
    tokens: Tensor,
    units: Sequence[ChoiceUnit],
    spec: GptqSpec,
    fisher: Sensitivity | Tensor | None,
    work: Path,
    *,
    execution: Execution = AUTO,
) -> Errors:
    """Error of each choice, by the name of the unit and of the choice.

    With several processes rank 0 measures, on the samples of all of them: they are few.

    Args:
        weights: of the dense model.
        tokens: calibration tokens, int64 [n, s]; the first ``TOKENS`` are used.
        units: of all layers, and the tables.
        spec: settings of GPTQ; its bits and groups are not used.
        fisher: [2 * layers, m, m] from ``output_sensitivity``; None uses unweighted output errors.
        work: folder for the hidden states.
        execution: settings of the forward passes.
    """
    some, found = pieces(tokens, LENGTH, TOKENS), Errors()
    of_layers = [unit for unit in units if Stem.parse(unit.name) is not None]
    tables = {unit.name: unit for unit in units if Stem.parse(unit.name) is None}
    last = 2 * len(weights.config.layers) - 1
    blocks = dense_blocks(weights, some, work, name="choices", execution=execution, moments=frozenset())
    for number, block in enumerate(blocks):
        block.observe()  # also computes the inputs of the next block
        metric = None if fisher is None else fisher[number].to(block.device)
        mine = [unit for unit in of_layers if inside(block, unit.name)]
        inputs = block.inputs()
        found |= _block_errors(block, inputs, mine, spec, metric)
        if number == 0 and "embed" in tables and not weights.config.tied_head:
            coded = {choice.name: _table_of(weights, choice, "embed") for choice in tables["embed"].choices}
            found["embed"] = _embedding_errors(block, inputs, some, coded, metric)
        elif number == 0 and "embed" in tables:
            first = block, inputs.clone(), metric  # the file of the states is overwritten
        if number == last and (stem := head_stem(weights.config)) in tables:
            head = _Head.of(weights, block, inputs)
            coded = {choice.name: head.quantized(choice.grids[stem], spec) for choice in tables[stem].choices}
            found[stem] = head.errors(coded)
            if weights.config.tied_head:
                entering = _embedding_errors(first[0], first[1], some, coded, first[2])
                found[stem] = {name: error + entering[name] for name, error in found[stem].items()}
    return found


def _block_errors(
    block: Block, inputs: Tensor, units: Sequence[ChoiceUnit], spec: GptqSpec, fisher: Tensor | None
) -> Errors:
    """The entries of the units of one block."""
    fitted, judged = moments(block, inputs, 2)
    before = outputs(block, inputs)
    found = Errors()
    for unit in units:
        names = [Stem.of(stem).linear for stem in unit.stems]
        gram = read_by(block, names[0])
        found[unit.name] = {}
        for choice in unit.choices:
            coded = _coded(block, choice, fitted[gram], spec)
            if CLOSED and gram == "inner" and not block.layer.config.post_norms:
                change = coded[names[0]] - getattr(block.layer, names[0]).weight if coded else None
                error = 0.0 if change is None else _linear_error(change, judged[gram], fisher)
            else:
                error = moved(block, inputs, coded, before, fisher)
            found[unit.name][choice.name] = error
    return found


def _coded(block: Block, choice: Choice, moment: Tensor, spec: GptqSpec) -> dict[str, Tensor]:
    """Dequantized weights of a choice's linears, those of one grid solved together; without unquantized ones."""
    groups: dict[Grid, list[str]] = {}
    for stem, grid in choice.grids.items():
        if grid is not None:
            groups.setdefault(grid, []).append(Stem.of(stem).linear)
    found: dict[str, Tensor] = {}
    for grid, names in groups.items():
        found |= solved_together(block, names, moment, grid, spec)
    return found


def _linear_error(change: Tensor, moment: Tensor, fisher: Tensor | None) -> float:
    """``tr(F D C D^T)`` for the change D of a projection into the residual stream, [m, i], and C [i, i]."""
    spread = change.to(moment) @ moment @ change.to(moment).T
    return float(spread.trace() if fisher is None else (spread * fisher.to(spread)).sum())


def _table_of(weights: Weights, choice: Choice, stem: str) -> QuantizedWeight | Tensor:
    grid = choice.grids[stem]
    name = f"{stem}.weight"
    return weights.tensor(name) if grid is None else quantize_table(weights, name, grid)


def _embedding_errors(
    block: Block, inputs: Tensor, tokens: Tensor, coded: Mapping[str, QuantizedWeight | Tensor], fisher: Tensor | None
) -> dict[str, float]:
    """Errors of the first block's output, by choice."""
    before = outputs(block, inputs)
    return {name: mean_square(outputs(block, embedded(tokens, table)), before, fisher) for name, table in coded.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    """The LM head with its inputs: the second moment of the first halves, and tokens of the second halves [t, m]."""

    matrix: Tensor
    moment: Tensor
    judged: Tensor
    cap: float | None

    @classmethod
    def of(cls, weights: Weights, block: Block, inputs: Tensor) -> _Head:
        """From the last block."""
        norm, head = load_last_norm(weights, device=block.device), load_head(weights, device=block.device)
        gram, judged = Gram(weights.config.d_model, device=block.device), list[Tensor]()
        with forward_precision("float32"):
            for y in all_outputs(block, inputs):
                normed, middle = norm(y), y.shape[1] // 2
                gram.update(normed[:, :middle])
                judged.append(normed[:, middle:].flatten(0, 1))
            every = torch.cat(judged)
            some = every[:: max(1, len(every) // LOGITS)][:LOGITS]
            return cls(head.weight, gram.mean(), some, head.cap)

    def quantized(self, grid: Grid | None, spec: GptqSpec) -> QuantizedWeight | Tensor:
        """The matrix solved with GPTQ."""
        return self.matrix if grid is None else quantized_together([self.matrix], self.moment, grid, spec).weight

    def errors(self, coded: Mapping[str, QuantizedWeight | Tensor]) -> dict[str, float]:
        """Mean over tokens of the logits' error under their Fisher information, by choice."""
        return {name: self._error(table) for name, table in coded.items()}

    @torch.inference_mode()
    def _error(self, table: QuantizedWeight | Tensor) -> float:
        if not isinstance(table, QuantizedWeight):
            return 0.0
        change, total = table.dequantize().sub_(self.matrix), 0.0
        for x in self.judged.split(LOGITS_AT_ONCE):
            logits = x @ self.matrix.T
            error = x @ change.T
            if self.cap is not None:
                bent = torch.tanh(logits / self.cap)
                logits, error = self.cap * bent, error * (1 - bent.square())
            chances = logits.softmax(-1)
            mean = (chances * error).sum(-1)
            total += float((chances * error.square()).sum() - mean.square().sum())
        return total / len(self.judged)
