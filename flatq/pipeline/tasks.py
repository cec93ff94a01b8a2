"""The tasks of a recipe on the dense model, the artifact and every export, each in its own runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flatq.artifact import Artifact
from flatq.evaluate.subjects import compressed, exported, pretrained
from flatq.evaluate.tasks import run_tasks, task_manager, tasks_of
from flatq.export.folder import description_of
from flatq.export.planned import PlannedExport
from flatq.job import Job
from flatq.machine import distributed
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder


def require_tasks(recipe: Recipe, folder: RunFolder) -> None:
    """Refuse a task that lm-eval does not have, before hours of work; nothing is read if all tasks are finished.

    Raises:
        RecipeError: the unknown names, each with the nearest known ones, or a folder that is not there.
    """
    if distributed.on_first(lambda: folder.known("tasks", list[Any])) is not None:
        return
    for some in tasks_of(recipe):
        task_manager(list(some.tasks), some.folder)


def task_results(job: Job, artifact: Artifact, exports: Sequence[PlannedExport], *, complete: bool) -> list[Any]:
    """JSON-ready ``TaskResult`` of every task and model. A finished task is a file in the run folder.

    Args:
        job: the run.
        artifact: the compressed model.
        exports: those that were written.
        complete: all exports were; the phase is kept only then, because one that failed may succeed next time.
    """
    sets, folder = tasks_of(job.recipe), job.folder
    if not sets:
        return []
    provider = job.recipe.bench.provider if job.recipe.bench is not None else "auto"

    def measure() -> list[Any]:
        roots = [folder.exports / item.name for item in exports]
        subjects = [pretrained(job.source), compressed(artifact)]
        subjects += [exported(root, description_of(root, check=False), provider) for root in roots]
        return [
            result.model_dump(mode="json")
            for some in sets
            for result in run_tasks(subjects, some.tasks, folder.root / "tasks", limit=some.limit, folder=some.folder)
        ]

    return folder.phase("tasks", measure, list[Any]) if complete else measure()
