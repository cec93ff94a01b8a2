"""Measurements for a plan of widths and bits: once per model, text and choices, whatever the limit.

Each is a phase of the run folder. A run folder belongs to one recipe and its work folder is removed at the end, so a
folder for several runs (``Job.measurements``) keeps the results too, under a key of everything that they depend on. A
plan for another limit then takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from flatq.calibration.sensitivity import FILE, Sensitivity, output_sensitivity
from flatq.compress.allocate import Curves
from flatq.compress.error_curves import error_curves
from flatq.errors import ArtifactError
from flatq.files import as_json, read_json, write_checksummed
from flatq.job import Job
from flatq.machine import distributed
from flatq.plan.joint import Measured
from flatq.plan.problem import Problem
from flatq.quantize.choice_errors import choice_errors
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source

log = logging.getLogger(__name__)
T = TypeVar("T")
SOLVER = ("act_order", "clip_search", "damping", "block_size")  # keys of the gptq stage that change an error


class Kept(BaseModel):
    """A file of the folder for several runs."""

    result: Any


def keys_of(recipe: Recipe, source: Source, tokens: Tensor, problem: Problem) -> dict[str, str]:
    """Names of the measurements' files: a digest of all that each depends on.

    Args:
        recipe: with the block ``budget``.
        source: the dense model.
        tokens: calibration tokens.
        problem: of the recipe.
    """
    text = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    about: dict[str, Any] = {
        "source": source.digests(),
        "tokens": [list(tokens.shape), text],
        "in": recipe.calibration.precision,
    }
    found = {"sensitivity": about}
    if recipe.flat is not None:
        found["curves"] = about | {"ridge": recipe.flat.ridge}
    if recipe.gptq is not None:
        units = [[unit.stems, [(c.name, *map(str, c.grids.values())) for c in unit.choices]] for unit in problem.units]
        found["choices"] = about | {"units": units} | {key: getattr(recipe.gptq, key) for key in SOLVER}
    return {name: f"{name}-{_digest(value)}" for name, value in found.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(as_json(value), sort_keys=True).encode()).hexdigest()[:16]


def known(folder: Path, keys: dict[str, str]) -> Measured | None:
    """What earlier runs measured; None if something is missing."""
    curves = [] if "curves" not in keys else _read(folder, keys["curves"], list[Curves])
    errors = {} if "choices" not in keys else _read(folder, keys["choices"], dict[str, dict[str, float]])
    return None if curves is None or errors is None else Measured(curves, errors)


def measure(job: Job, problem: Problem) -> Measured:
    """Curves of every layer if the recipe narrows, errors of every choice if it quantizes."""
    recipe, source, tokens = job.recipe, job.source, job.tokens.calibration
    work, execution = job.folder.work, job.execution
    keys = keys_of(recipe, source, tokens, problem)

    def curves() -> list[Curves]:
        assert recipe.flat is not None
        measure_sensitivity(job, keys)
        fisher = Sensitivity(source.config, work)
        return error_curves(source, tokens, fisher, work, ridge=recipe.flat.ridge, execution=execution)

    def errors() -> dict[str, dict[str, float]]:
        assert recipe.gptq is not None
        measure_sensitivity(job, keys)
        fisher = Sensitivity(source.config, work)
        return choice_errors(source, tokens, problem.units, recipe.gptq, fisher, work, execution=execution)

    found = Measured([], {})
    if "curves" in keys:
        found = Measured(_shared(job, keys["curves"], "curves", curves, list[Curves]), {})
    if "choices" in keys:
        kind = dict[str, dict[str, float]]
        found = Measured(found.curves, _shared(job, keys["choices"], "choices", errors, kind))
    return found


def measure_sensitivity(job: Job, keys: dict[str, str] | None = None) -> None:
    """Measure the Fisher information of the residual stream, unless an earlier plan or run did."""
    kept = None if job.measurements is None or keys is None else job.measurements / f"{keys['sensitivity']}.f32"
    target = job.folder.work / FILE

    def compute() -> None:
        if distributed.first():
            target.unlink(missing_ok=True)  # it may be a link to a kept file, see ``flatq.kept``
        distributed.barrier()
        if kept is not None and distributed.broadcast(kept.is_file()):
            if distributed.first():
                shutil.copyfile(kept, target)
            distributed.barrier()
            return
        output_sensitivity(job.source, job.tokens.calibration, job.folder.work, execution=job.execution)
        if kept is not None and distributed.first():
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            shutil.copyfile(target, partial)
            partial.replace(kept)

    if keys is None:
        job.measured("sensitivity", compute, NoneType, file=FILE)
    else:
        job.folder.phase("sensitivity", compute, NoneType)


def _shared(job: Job, key: str, name: str, compute: Callable[[], T], kind: type[T]) -> T:
    """A phase whose result is also kept in, or read from, the folder for several runs."""
    folder = job.measurements

    def read_or_compute() -> T:
        found = None
        if folder is not None:
            found = distributed.broadcast(_read(folder, key, kind) if distributed.first() else None)
        result = compute() if found is None else found
        if folder is not None and found is None and distributed.first():
            folder.mkdir(parents=True, exist_ok=True)
            written = TypeAdapter(kind).dump_python(result, mode="json")
            write_checksummed(folder / f"{key}.json", {"result": written})
        return result

    return job.folder.phase(name, read_or_compute, kind)


def _read(folder: Path, key: str, kind: type[T]) -> T | None:
    """A kept result; None if there is none, or it is damaged."""
    path = folder / f"{key}.json"
    if not path.is_file():
        return None
    try:
        kept = read_json(path, Kept, "it is measured again", checksummed=True)
    except ArtifactError as damaged:
        log.warning("%s", damaged)
        return None
    return TypeAdapter(kind).validate_python(kept.result)
