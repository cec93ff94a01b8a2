"""Measurements for a plan of widths and bits: once per model, text and choices, whatever the limit.

Each is a phase of the run folder. A run folder belongs to one recipe and its work folder is removed at the end, so a
folder for several runs (``Job.measurements``) keeps the results too, under a key of everything that they depend on. A
plan for another limit then takes seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from torch import Tensor

from flatq.budget.joint import Measured
from flatq.budget.problem import Problem
from flatq.calibration.sensitivity import FILE, Sensitivity, output_sensitivity
from flatq.compress.allocate import Curves
from flatq.compress.error_curves import error_curves
from flatq.job import Job
from flatq.kept import entry_of, kept, read
from flatq.quantize.choice_errors import choice_errors
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source

T = TypeVar("T")
SOLVER = ("act_order", "clip_search", "damping", "block_size")  # keys of the gptq stage that change an error
ERRORS = dict[str, dict[str, float]]


def keys_of(recipe: Recipe, source: Source, tokens: Tensor, problem: Problem) -> dict[str, dict[str, Any]]:
    """The measurements of a plan, and for each all that it depends on, as ``flatq.kept`` wants it.

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
        found["curves"] = about | {"ridge": recipe.flat.ridge, "judged": "held-out rows"}
    if recipe.gptq is not None:
        units = [[unit.stems, [(c.name, *map(str, c.grids.values())) for c in unit.choices]] for unit in problem.units]
        found["choices"] = about | {"units": units} | {key: getattr(recipe.gptq, key) for key in SOLVER}
    return found


def known(folder: Path, keys: dict[str, dict[str, Any]]) -> Measured | None:
    """What earlier runs measured; None if something is missing."""
    curves = ([],) if "curves" not in keys else read(entry_of(folder, "curves", keys["curves"]), list[Curves])
    errors = ({},) if "choices" not in keys else read(entry_of(folder, "choices", keys["choices"]), ERRORS)
    return None if curves is None or errors is None else Measured(curves[0], errors[0])


def measure(job: Job, problem: Problem) -> Measured:
    """Curves of every layer if the recipe narrows, errors of every choice if it quantizes."""
    recipe, source, tokens = job.recipe, job.source, job.tokens.calibration
    work, execution = job.folder.work, job.execution
    keys = keys_of(recipe, source, tokens, problem)

    def curves() -> list[Curves]:
        assert recipe.flat is not None
        measure_sensitivity(job, problem)
        fisher = Sensitivity(source.config, work)
        ridge = recipe.flat.ridge
        return error_curves(source, tokens, fisher, work, ridge=ridge, held_out=True, execution=execution)

    def errors() -> ERRORS:
        assert recipe.gptq is not None
        measure_sensitivity(job, problem)
        fisher = Sensitivity(source.config, work)
        return choice_errors(source, tokens, problem.units, recipe.gptq, fisher, work, execution=execution)

    found = Measured([], {})
    if "curves" in keys:
        found = Measured(_measured(job, "curves", keys["curves"], curves, list[Curves]), {})
    if "choices" in keys:
        found = Measured(found.curves, _measured(job, "choices", keys["choices"], errors, ERRORS))
    return found


def measure_sensitivity(job: Job, problem: Problem | None = None) -> None:
    """Measure the Fisher information of the residual stream, unless an earlier plan or run did.

    Args:
        problem: of a plan with a budget; without it the measurement is kept as any other of the dense model.
    """

    def compute() -> None:
        output_sensitivity(job.source, job.tokens.calibration, job.folder.work, execution=job.execution)

    if problem is None:
        job.measured("sensitivity", compute, NoneType, file=FILE)
    else:
        about = keys_of(job.recipe, job.source, job.tokens.calibration, problem)["sensitivity"]
        _measured(job, "sensitivity", about, compute, NoneType, job.folder.work / FILE)


def _measured(
    job: Job, name: str, about: dict[str, Any], compute: Callable[[], T], kind: type[T], file: Path | None = None
) -> T:
    """A phase whose result is also kept in, or taken from, the folder for several runs."""
    work = partial(kept, job.measurements, name, about, compute, kind, file)
    return job.folder.phase(name, work, kind, file=file)
