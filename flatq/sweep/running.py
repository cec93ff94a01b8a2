"""``flatq sweep``: run every combination of a grid, measure the dense model once, and write a table and a page.

    DIR/NAME/          the run folder of a combination, as ``flatq run`` leaves it
    DIR/shared/        measurements of the dense model, see ``flatq.kept``; may be deleted after the sweep
    DIR/sweep.json     the points, written after every run; sweep.md and sweep.html are rendered from it

A sweep that was ended at any moment is resumed by the same command: a finished run does nothing, an unfinished one
resumes. A combination that fails does not stop the others; it is in the table with its error, and is tried again by the
next call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flatq.errors import ArtifactError, FlatqError, RecipeError
from flatq.export.planned import planned_exports
from flatq.files import read_json, write_atomically, write_json
from flatq.machine import distributed
from flatq.pipeline.run import run
from flatq.recipe.grammar import Recipe
from flatq.report.render import read_report
from flatq.report.schema import Environment, Report
from flatq.run_folder import REPORT, RunFolder
from flatq.sweep.choice import Wish, picked
from flatq.sweep.grid import Axis, Combination
from flatq.sweep.page import write_page
from flatq.sweep.points import Point, Sweep, dense_of, points_of

log = logging.getLogger(__name__)
SHARED, RESULT, PICKED = "shared", "sweep.json", "picked.yaml"


class Failed(FlatqError):
    """Some combinations of a sweep failed; all others are in its table."""


def sweep(
    recipe: Recipe,
    axes: Sequence[Axis],
    combinations: Sequence[Combination],
    out: Path | None,
    *,
    wishes: Sequence[Wish] = (),
    **settings: Any,
) -> Path:
    """Run all combinations; returns the folder.

    Args:
        recipe: the base.
        axes: the grid, for the result.
        combinations: of the grid.
        out: the folder; None is ``runs/NAME-sweep-DIGEST``.
        wishes: conditions of the point whose recipe is written to ``picked.yaml``.
        settings: further arguments of ``run``: device, memory, verify.

    Raises:
        RecipeError: before any work, lists all mistakes; at the end if no point satisfies the conditions.
        Failed: at the end, if combinations failed.
    """
    root = out or Path("runs") / f"{recipe.name}-sweep-{recipe.digest()[:8]}"
    refuse(root, combinations, verify=settings.get("verify", True))
    root.mkdir(parents=True, exist_ok=True)
    started, points, reports = time.monotonic(), list[Point](), list[Report]()

    def result() -> Sweep:
        return Sweep(
            model=recipe.model.path,
            recipe_text=recipe.text,
            grid={axis.key: list(axis.values) for axis in axes},
            environment=Environment.collect(),
            points=points,
            runs=len(combinations),
            seconds=round(time.monotonic() - started, 1),
            **dense_of(reports),
        )

    for number, combination in enumerate(combinations, 1):
        log.info("run %d of %d: %s", number, len(combinations), combination.name)
        report, error = _one(combination, root, settings)
        reports += [report] if report is not None else []
        points += points_of(combination, report, error)
        write_json(root / RESULT, result().model_dump(mode="json"))
    write_page(result(), root)
    failed = [f"{point.label}: {point.error}" for point in points if point.error is not None]
    if wishes:
        _pick(root, points, wishes)
    if failed:
        raise Failed("\n".join([*failed, f"all other results are in {root}/sweep.md"]))
    return root


def refuse(root: Path, combinations: Sequence[Combination], *, verify: bool) -> None:
    """Refuse a sweep before any work.

    Raises:
        RecipeError: lists wrong options of exports, and folders that hold something else.
    """
    if distributed.launched():
        raise RecipeError("flatq sweep: runs in one process; start it without torchrun")
    problems: list[str] = []
    for combination in combinations:
        try:
            planned_exports(combination.recipe, verify=verify)
            RunFolder.open(root / combination.name, combination.recipe)
        except RecipeError as error:
            problems += [problem.replace("--fresh to replace it", "delete it") for problem in error.problems]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))


def _one(combination: Combination, root: Path, settings: dict[str, Any]) -> tuple[Report | None, str | None]:
    """Run a combination; its report, and its error if it failed."""
    folder, error = root / combination.name, None
    try:
        run(combination.recipe, folder, measurements=root / SHARED, **settings)
    except FlatqError as failed:
        log.error("%s: %s", combination.name, failed)
        error = " ".join(str(failed).split())
    except Exception as failed:  # the other combinations are run anyway, and the table has the error
        log.exception("%s", combination.name)
        error = f"{type(failed).__name__}: {failed}"
    if not (folder / REPORT).is_file():
        return None, error
    try:
        return read_report(folder / REPORT), error
    except ArtifactError as damaged:
        return None, error or str(damaged)


def _pick(root: Path, points: Sequence[Point], wishes: Sequence[Wish]) -> None:
    """Write the recipe of the best point that satisfies the conditions."""
    point = picked(points, wishes)
    wanted = ", ".join(wish.text for wish in wishes)
    text = (root / point.name / "recipe.yaml").read_text()
    write_atomically(root / PICKED, f"# Picked from {root} for {wanted}: {point.label}\n{text}".encode())
    log.warning("picked for %s: %s; its recipe is %s", wanted, point.label, root / PICKED)


def read_sweep(path: Path) -> Sweep:
    """Read a ``sweep.json``.

    Raises:
        ArtifactError: it is missing, damaged, or of another version.
    """
    return read_json(path, Sweep, "run the sweep again")
