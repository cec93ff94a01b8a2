"""Build the artifact from the dense model and a plan: one walk, each finished block is written immediately."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel
from torch import Tensor, nn

from flatq.artifact import ENERGIES, finish, save_shard, shard_name
from flatq.calibration.block import Block
from flatq.calibration.walk import blocks_done, damaged_states, last_states, walk
from flatq.compress.plan import RankPlan
from flatq.errors import ArtifactError
from flatq.files import file_digest, read_json, write_checksummed
from flatq.job import Job
from flatq.machine import distributed
from flatq.machine.progress import progress
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid, QuantizedWeight
from flatq.model.names import Stem
from flatq.model.weights import HALVES, halves, head_stem
from flatq.quantize.embedding_and_head import EMBEDDING, ENDS, head_moment, save_first, save_last, saved_first
from flatq.quantize.stage import READERS
from flatq.sources.source import Source
from flatq.stages import dense_states_needed, stages_of

log = logging.getLogger(__name__)


class Finished(BaseModel):
    """``work/blocks/N.json``: a block's report, and the digests of its two files."""

    report: dict[str, Any]
    shard: str
    energies: str


def build(job: Job, plan: RankPlan, grids: Mapping[str, Grid], provenance: Mapping[str, Any]) -> None:
    """Compress and quantize block by block; resumes an interrupted run of the same folder.

    Args:
        job: the artifact is built in ``folder.partial`` and renamed to ``folder.walked`` at the end.
        plan: widths of the compressed model.
        grids: grid of every weight to quantize, by stem.
        provenance: written to the manifest; must be the same for two runs of one recipe.
    """
    recipe, source, partial, work = job.recipe, job.source, job.folder.partial, job.folder.work
    tokens, execution = job.tokens.calibration, job.execution
    config = source.config.with_layers(plan.layers)
    if distributed.first():
        partial.mkdir(exist_ok=True)
        _start_over_if_damaged(partial, work)
        save_first(source, grids, partial)
    distributed.barrier()
    _walk(job, plan, grids)
    solves = head_stem(config) in grids
    moment = head_moment(source, last_states(source, tokens, work, execution), execution) if solves else None
    if distributed.first():
        head = save_last(source, grids, moment, recipe.gptq, partial)
        save_shard(partial / ENERGIES, energies(work))
        manifest = {**provenance, "plan": asdict(plan), "blocks": block_reports(work), "head": head}
        _finish(source, config, grids, manifest, partial, job.folder.walked)
    distributed.barrier()


def _walk(job: Job, plan: RankPlan, grids: Mapping[str, Grid]) -> None:
    """Apply the stages to every block, and write each block when it is finished."""
    source, partial, work = job.source, job.folder.partial, job.folder.work
    stages = stages_of(job.recipe, plan, grids, source.config, work)
    reference, lag = dense_states_needed(job.recipe)

    def save(block: Block) -> None:
        _save_block(block, source, partial, work)

    with progress("compress", len(halves(source.config))) as advance:
        advance(blocks_done(work))
        for block in walk(
            source,
            job.tokens.calibration,
            work,
            save,
            embed=saved_first(source, grids, partial),
            execution=job.execution,
            reference=reference,
            lag=lag,
        ):
            for stage in stages:
                stage.apply(block)
            block.observe()  # no-op after a stage that observed; the energies are always saved
            advance()


def _finish(
    source: Source,
    config: DecoderConfig,
    grids: Mapping[str, Grid],
    manifest: Mapping[str, Any],
    partial: Path,
    root: Path,
) -> None:
    """Write tokenizer, index, configuration and manifest."""
    first = [EMBEDDING] if (partial / EMBEDDING).exists() else []
    files = [*first, *(shard_name(index, half) for index, half in halves(config)), ENDS]
    for pattern in ("*.partial", ".tmp*"):  # of a process that was killed; the second are of the safetensors library
        for stray in partial.glob(pattern):
            stray.unlink()
    source.carry_tokenizer(partial)
    settings = {**source.settings(), "dtype": str(source.dtype).removeprefix("torch.")}
    finish(partial, root, config=config, grids=grids, settings=settings, manifest=manifest, weight_files=files)


def block_reports(work: Path) -> list[dict[str, Any]]:
    """Reports of the finished blocks, in order: layer and half, shapes, errors, notes."""
    return [_finished(path).report for path in _notes(work)]


def _notes(work: Path) -> Iterator[Path]:
    """The JSON files of the finished blocks, in order; one by one, because a damaged count may be huge."""
    return (_note_of(work, *divmod(number, len(HALVES))) for number in range(blocks_done(work)))


def _note_of(work: Path, layer: int, half: int) -> Path:
    """The JSON file of a finished block; its energies are in the same folder."""
    return work / "blocks" / f"{layer:05d}-{half}.json"


def _finished(path: Path) -> Finished:
    return read_json(path, Finished, "the walk starts over at the first block", checksummed=True)


def _start_over_if_damaged(partial: Path, work: Path) -> None:
    """Restart the walk, with a warning, if a file of a finished block was changed since it was written."""
    if states := damaged_states(work):
        log.warning("%s: is missing or damaged; the walk starts over at the first block", work / states[0])
        (work / "state.json").unlink()
    for path in _notes(work):
        try:
            noted = _finished(path)
            shard = partial / shard_name(noted.report["layer"], noted.report["half"])
            for file, digest in ((shard, noted.shard), (path.with_suffix(".safetensors"), noted.energies)):
                if not file.is_file() or file_digest(file) != digest:
                    raise ArtifactError(f"{file}: is missing or damaged; the walk starts over at the first block")
        except ArtifactError as damaged:
            log.warning("%s", damaged)
            (work / "state.json").unlink()
            return


def _save_block(block: Block, source: Source, partial: Path, work: Path) -> None:
    """Write a block's tensors and report; unquantized parameters are rounded to their stored precision."""
    tensors: dict[str, Tensor | QuantizedWeight] = {}
    for name, parameter in block.layer.named_parameters():
        linear = name.removesuffix(".weight")
        full = f"layers.{block.index}.{name}"
        if linear in block.quantized:
            tensors[full] = block.quantized[linear]
            continue
        stored = parameter.detach().to(source.dtype_of(full))
        parameter.data = stored.float()
        tensors[full] = stored
    shard = partial / shard_name(block.index, block.half)
    save_shard(shard, tensors)
    noted = _note_of(work, block.index, HALVES.index(block.half))
    noted.parent.mkdir(exist_ok=True)
    save_shard(noted.with_suffix(".safetensors"), _energies(block))
    report = {
        "layer": block.index,
        "half": block.half,
        "shapes": {name: module.weight.shape for name, module in _linears(block)},
        "errors": block.errors,
        "notes": block.notes,
    }
    digests = {"shard": file_digest(shard), "energies": file_digest(noted.with_suffix(".safetensors"))}
    write_checksummed(noted, {"report": report, **digests})


def energies(work: Path) -> dict[str, Tensor]:
    """Mean square of every input of every linear, float32, by stem (``layers.3.down``), from the blocks' files."""
    found: dict[str, Tensor] = {}
    for path in _notes(work):
        found |= safetensors.torch.load_file(path.with_suffix(".safetensors"))
    return found


def _energies(block: Block) -> dict[str, Tensor]:
    readers = {name: gram for gram, names in READERS[block.half] for name in names}
    return {str(Stem(block.index, name)): block.grams[gram].energy().clone() for name, gram in readers.items()}


def _linears(block: Block) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in block.layer.named_children() if isinstance(module, nn.Linear)]
