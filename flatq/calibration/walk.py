"""One block after another, each with the inputs that the deployed model will give it.

A block is half a layer (attention, or MLP). ``walk`` yields it with its inputs for all calibration tokens; what the
loop body does to the block decides what the following blocks see, because on resumption the walk sends the inputs
through the changed block. Error propagation is not a switch here, it is how the loop works.

Hidden states live in two memory-mapped files that take turns: a block reads one and writes the other. Only when the
block's weights are on disk and its outputs are complete does ``state.json`` name the next block, so a run killed
anywhere goes on with the block it was in and ends with the same bytes.

A stage may ask for a ``reference``: the hidden states of the dense model, walked along in two files of their own. An
MLP then also measures its ``drift``: what it would have to add to its output for the stream to be the dense one's
again, as far as its inner activation can foresee that. If asked, every block does, and the ``lag`` of its inputs, too.

With several processes (see ``machine.distributed``) each sends its own samples through the block. Only the first one's
loop body runs; the others take part in what it observes, and receive the block that it has changed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flatq.calibration.block import MOMENTS, Block, Reference
from flatq.calibration.half_layers import half_layers
from flatq.calibration.states import AUTO, Execution, HiddenStates, batch_tokens, stored_as
from flatq.errors import ArtifactError
from flatq.files import read_json, write_checksummed
from flatq.machine import distributed
from flatq.machine.progress import progress
from flatq.model.decoder import DecoderConfig, locate
from flatq.model.grid import QuantizedWeight
from flatq.model.weights import HALVES, Weights

log = logging.getLogger(__name__)


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
        reference: walk the dense model along; the loop body must observe every block.
        lag: walk it along and measure how the blocks' inputs lag behind it, too.
        unchanged: the loop body observes every block and changes none, so each goes by once and not twice.
        moments: which Grams are wanted of every block, see ``Block.observe``.
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
        )
        if distributed.first():
            yield block
            if reference and not block.grams:
                raise ValueError(f"{block.place}: not observed, so the dense model was not walked along")
            save(block)
            block.together("advance")
        else:
            while distributed.broadcast("") == "observe":
                block.observe()
        if not unchanged:
            distributed.broadcast_layer(block.layer, execution.device)
            block.advance(feeds[then])
        feeds[then].flush()
        if reference:
            dense[then].flush()
        distributed.barrier()
        if distributed.first():
            write_checksummed(work / "state.json", {"blocks_done": done + 1})


def _feed(config: DecoderConfig, tokens: Tensor, path: Path, execution: Execution) -> HiddenStates:
    dtype = stored_as(execution.states, tokens.numel(), config.d_model)
    return HiddenStates(path, (*tokens.shape, config.d_model), dtype, batch_tokens(config, execution.working_set))


def last_states(weights: Weights, tokens: Tensor, work: Path, execution: Execution) -> HiddenStates:
    """The residual stream after the last block, once a walk over the same folder has ended, [samples, seq, m]."""
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
    """Every block of the model as it is, with the inputs that ``tokens`` give it.

    The loop body has to observe every block. Nothing is kept of a killed walk, so it begins anew.

    Args:
        work: below it is a folder for the hidden states, gone at the end.
        name: of the folder, and of the progress that is shown.
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
    """Once, and nobody goes on before it is done."""
    if distributed.first():
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()


def blocks_done(work: Path) -> int:
    """How many blocks a killed run had finished in this folder; 0, and a warning, if its note of that is damaged."""
    state = work / "state.json"
    if not state.exists():
        return 0
    try:
        return read_json(state, dict[str, int], "the walk begins with the first block", checksummed=True)["blocks_done"]
    except ArtifactError as damaged:
        log.warning("%s", damaged)
        state.unlink(missing_ok=True)
        return 0
