"""The walk: compress block after block, each on the inputs that it receives in the compressed model.

A block is half a layer (attention or MLP). ``walk`` yields it with its inputs for all calibration tokens. The loop body
changes the block; then the walk runs the inputs through the changed block. So errors always propagate to the following
blocks.

Hidden states are in two memory-mapped files that alternate: a block reads one and writes the other. ``state.json`` is
advanced to the next block only after the block's weights and outputs are on disk, so a killed run resumes with the
block that was interrupted, and its result has the same bytes.

A stage may request a ``reference``: the hidden states of the dense model, kept in two further files. An MLP then also
measures its ``drift``: the product of its inner activation with the error of its output with respect to the dense
model. With ``lag``, attention measures it too, and every block measures the same product for its inputs.

With several processes (see ``machine.distributed``) each process runs its share of the samples. Only rank 0 executes
the loop body; the other ranks take part in ``Block.observe`` and ``Block.inputs`` and receive the changed block.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, NonNegativeInt
from torch import Tensor

from flatq.calibration.block import MOMENTS, Block, Reference
from flatq.calibration.half_layers import half_layers
from flatq.calibration.states import AUTO, Execution, HiddenStates, batch_tokens, stored_as
from flatq.errors import ArtifactError
from flatq.files import file_digest, read_json, write_checksummed
from flatq.machine import distributed
from flatq.machine.progress import progress
from flatq.model.balance import balance
from flatq.model.decoder import DecoderConfig, locate
from flatq.model.grid import QuantizedWeight
from flatq.model.weights import HALVES, Weights

log = logging.getLogger(__name__)


class Progress(BaseModel):
    """``state.json``: the number of blocks whose weights and outputs are on disk.

    ``states`` has the SHA-256 of the files with the inputs of the next block, by name.
    """

    blocks_done: NonNegativeInt
    states: dict[str, str] = {}


def walk(
    weights: Weights,
    tokens: Tensor,
    work: Path,
    save: Callable[[Block], None],
    *,
    embed: Tensor | QuantizedWeight | None = None,
    execution: Execution = AUTO,
    reference: bool = False,
    lag: bool = False,
    unchanged: bool = False,
    moments: frozenset[str] = MOMENTS,
) -> Iterator[Block]:
    """Yield every block in order; ``save`` is called with each block after the loop body has changed it.

    Args:
        tokens: calibration tokens, int64 [samples, seq].
        embed: the embedding of the deployed model, if it differs from the model's own.
        work: folder for the hidden states and the resume state; may hold those of a killed run.
        reference: also compute the hidden states of the dense model; the loop body must observe every block.
        lag: as ``reference``, and also measure the difference of the blocks' inputs from the dense model's.
        unchanged: the loop body observes every block and changes none, so one pass per block is enough.
        moments: which Grams to measure of every block, see ``Block.observe``.
    """
    config, reference = weights.config, reference or lag
    work.mkdir(parents=True, exist_ok=True)
    feeds = [_feed(config, tokens, work / f"states-{turn}", execution) for turn in (0, 1)]
    dense = [_feed(config, tokens, work / f"dense-{turn}", execution) for turn in (0, 1)] if reference else []
    start = distributed.broadcast(blocks_done(work))
    if start == 0:
        feeds[0].embed(tokens, weights.tensor("embed.weight") if embed is None else embed)
        if reference:
            dense[0].embed(tokens, weights.tensor("embed.weight"))
    del embed  # not held through the walk
    for done, index, half, layer in half_layers(weights, device=execution.device, start=start):
        now, then = done % 2, (done + 1) % 2
        notes = balance(layer, half)
        block = Block(
            index,
            half,
            layer,
            feeds[now],
            lambda batch: locate(config, batch, tokens.shape[1], device=torch.device(execution.device)),
            execution.precision,
            execution.device,
            Reference(dense[now], dense[then], lag) if reference else None,
            feeds[then] if unchanged else None,
            moments,
            ahead=feeds[then],
            notes=notes,
        )
        if distributed.first():
            yield block
            if reference and not block.grams:
                raise ValueError(f"{block.place}: not observed, so the dense model's hidden states were not computed")
            save(block)
            block.together("advance")
        else:
            while (command := distributed.broadcast("")) != "advance":
                block.answer(command)
        if not unchanged:
            distributed.broadcast_layer(block.layer, execution.device)
            block.advance(feeds[then])
        feeds[then].flush()
        if reference:
            dense[then].flush()
        distributed.barrier()
        if distributed.first():
            written = [] if unchanged else [feed.path for feed in (feeds[then], *dense[then : then + 1])]
            digests = {path.name: file_digest(path) for path in written}
            write_checksummed(work / "state.json", {"blocks_done": done + 1, "states": digests})


def _feed(config: DecoderConfig, tokens: Tensor, path: Path, execution: Execution) -> HiddenStates:
    dtype = stored_as(execution.states, tokens.numel(), config.d_model)
    return HiddenStates(path, (*tokens.shape, config.d_model), dtype, batch_tokens(config, execution.working_set_bytes))


def last_states(weights: Weights, tokens: Tensor, work: Path, execution: Execution) -> HiddenStates:
    """The residual stream after the last block, from a finished walk over the same folder, [samples, seq, m]."""
    return _feed(weights.config, tokens, work / f"states-{len(weights.config.layers) * len(HALVES) % 2}", execution)


def dense_blocks(
    weights: Weights,
    tokens: Tensor,
    work: Path,
    *,
    name: str,
    execution: Execution = AUTO,
    moments: frozenset[str] = MOMENTS,
) -> Iterator[Block]:
    """Every block of the unchanged model, with its inputs for ``tokens``.

    The loop body must observe every block. A killed walk starts from the beginning.

    Args:
        weights: of the model.
        tokens: int64 [samples, seq].
        work: parent of the folder for the hidden states, which is deleted at the end.
        name: of that folder, and of the progress bar.
        execution: settings of the forward passes.
        moments: see ``walk``.
    """
    _remove(work / name)
    with progress(name, len(weights.config.layers) * len(HALVES)) as advance:
        for block in walk(
            weights, tokens, work / name, lambda _: None, execution=execution, unchanged=True, moments=moments
        ):
            yield block
            advance()
    _remove(work / name)


def _remove(folder: Path) -> None:
    """Delete a folder on rank 0; all processes wait for it."""
    if distributed.first():
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()


def damaged_states(work: Path) -> list[str]:
    """Names of the files with hidden states that were changed or lost since a killed walk wrote them."""
    if not blocks_done(work):
        return []
    stated = read_json(work / "state.json", Progress, "", checksummed=True).states
    files = {name: work / Path(name).name for name in stated}
    return [name for name, file in files.items() if not file.is_file() or file_digest(file) != stated[name]]


def blocks_done(work: Path) -> int:
    """How many blocks a killed run had finished in this folder; 0, and a warning, if its note of that is damaged."""
    state = work / "state.json"
    if not state.exists():
        return 0
    try:
        return read_json(state, Progress, "the walk begins with the first block", checksummed=True).blocks_done
    except ArtifactError as damaged:
        log.warning("%s", damaged)
        state.unlink(missing_ok=True)
        return 0
