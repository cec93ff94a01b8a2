"""Tasks of EleutherAI's lm-eval for one or several models; the result of each task is a file, so runs can be resumed.

    OUT/SUBJECT/TASK.json

A result is reused only for the same model files, settings, lm-eval version and local task files.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from flatq.errors import ArtifactError, FlatqError, RecipeError
from flatq.evaluate.subjects import Subject
from flatq.export.bench import rendered
from flatq.files import file_digest, read_json, write_json
from flatq.machine.environment import version_of
from flatq.recipe.grammar import Recipe
from flatq.units import number

log = logging.getLogger(__name__)
INSTALL = "pip install 'flatq[eval]'"
LONGEST = 2048  # positions; the logits of a longer window would need gigabytes
SUITES: dict[str, dict[str, int | None]] = {  # lm-eval's task names; number of few-shot examples, None: the task's
    "flat-paper": {
        "wikitext": None,
        "arc_easy": None,
        "arc_challenge": None,
        "piqa": None,
        "winogrande": None,
        "hellaswag": None,
        "boolq": None,
        "openbookqa": None,
        "mathqa": None,
        "commonsense_qa": None,
        "mmlu": 5,
    }
}


@dataclass(frozen=True)
class TaskSet:
    """Tasks with the same settings.

    Attributes:
        tasks: names with their numbers of examples, see ``tasks_wanted``.
        limit: first documents of each task only; None takes all.
        folder: with local task files.
    """

    tasks: Mapping[str, int | None]
    limit: int | None
    folder: Path | None


class Value(BaseModel):
    """One metric; ``stderr`` is None if lm-eval gives none."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    metric: str
    value: float
    stderr: float | None


class TaskResult(BaseModel):
    """One task of one model.

    Attributes:
        settings: everything that the result depends on.
        samples: number of documents, including those of subtasks.
        subtasks: metrics of the tasks inside a group.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: str
    subject: str
    settings: dict[str, str | int | None]
    samples: int
    values: list[Value]
    subtasks: dict[str, list[Value]] = {}


def tasks_of(recipe: Recipe) -> list[TaskSet]:
    """The tasks of a recipe, a set for each text of its evaluation that names some."""
    found = []
    for text in recipe.evaluation:
        names = [name for name in text.tasks if name not in SUITES]
        wanted = {name: shots for suite in text.tasks if suite in SUITES for name, shots in SUITES[suite].items()}
        if text.tasks:
            folder = Path(text.task_folder).expanduser() if text.task_folder else None
            found.append(TaskSet(wanted | {name: wanted.get(name) for name in names}, text.task_limit, folder))
    return found


def absent_for_tasks(recipe: Recipe) -> list[str]:
    """What the tasks of a recipe need and this machine lacks, with the command that installs it."""
    if not recipe.tasks or importlib.util.find_spec("lm_eval") is not None:
        return []
    return [f"evaluation.tasks: the package lm-eval is not installed; install it with `{INSTALL}`"]


def tasks_wanted(names: Sequence[str], suite: str | None) -> dict[str, int | None]:
    """Task names with their number of few-shot examples; None is the task's default.

    Raises:
        RecipeError: the suite is unknown, or no task is given.
    """
    if suite is not None and suite not in SUITES:
        raise RecipeError(f"--suite {suite}: is unknown; suites: {', '.join(SUITES)}")
    wanted = dict(SUITES[suite]) if suite else {}
    wanted |= {name: wanted.get(name) for name in names}
    if not wanted:
        raise RecipeError("--tasks: names no task; give names of lm-eval, separated by commas, or --suite flat-paper")
    return wanted


def require_lm_eval() -> None:
    """Fail early if lm-eval is missing.

    Raises:
        RecipeError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(f"--tasks: the package lm-eval is not installed; install it with `{INSTALL}`")


def task_manager(names: Sequence[str], folder: Path | None = None) -> Any:
    """Lm-eval's index of tasks, read from its YAML files without network.

    Args:
        names: the tasks that must exist.
        folder: with local task files; if they define all ``names``, lm-eval's own tasks are not indexed (slow).

    Raises:
        RecipeError: lm-eval is not installed, the folder does not exist, or a task is unknown.
    """
    require_lm_eval()
    if folder is not None and not folder.is_dir():
        raise RecipeError(f"--include-path {folder}: is no folder; give the one that holds your task files")
    from lm_eval.tasks import TaskManager

    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = _whole_index(folder)
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        near = {name: difflib.get_close_matches(name, known, n=3) for name in unknown}
        raise RecipeError(
            [
                f"--tasks {name}: lm-eval {version_of('lm_eval')} has no such task"
                + (f"; did you mean {' or '.join(found)}?" if found else "; `lm-eval ls tasks` lists them")
                for name, found in near.items()
            ]
        )
    return manager


@cache
def _whole_index(folder: Path | None) -> Any:
    """Lm-eval's own tasks and those of the folder; reading thousands of files takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None)


def run_tasks(
    subjects: Sequence[Subject],
    tasks: Mapping[str, int | None],
    out: Path,
    *,
    limit: int | None = None,
    folder: Path | None = None,
) -> list[TaskResult]:
    """Run every task for every model, unless ``out`` has its result.

    Args:
        subjects: the models, loaded one after the other.
        tasks: names and numbers of few-shot examples, see ``tasks_wanted``.
        out: folder of the results.
        limit: number of first documents of each task; None is all.
        folder: with local task files.
    """
    local = _digest_of(folder)
    results = []
    for subject in subjects:
        settings: dict[str, str | int | None] = {
            "model": subject.digest,
            "limit": limit,
            "context": min(LONGEST, subject.positions),
            "lm_eval": version_of("lm_eval"),
            "local_tasks": local,
        }
        planned = {
            name: (out / subject.name / f"{name}.json", settings | {"num_fewshot": shots})
            for name, shots in tasks.items()
        }
        found = {name: known(*place) for name, place in planned.items()}
        missing = {name: planned[name] for name, result in found.items() if result is None}
        if missing:
            found |= _computed(subject, missing, task_manager(list(tasks), folder))
        results += [result for result in found.values() if result is not None]
    return results


def _computed(
    subject: Subject, missing: Mapping[str, tuple[Path, dict[str, str | int | None]]], manager: Any
) -> dict[str, TaskResult]:
    """Run the missing tasks; each result is written when the task is finished."""
    from flatq.evaluate.harness import HarnessModel

    context = min(LONGEST, subject.positions)
    runner = subject.open()
    try:
        model = HarnessModel(
            runner,
            subject.tokenizer(),
            vocab=subject.vocab,
            context=context,
            prefix=subject.prefix,
            ends=subject.ends,
        )
        done = {}
        for name, (path, settings) in missing.items():
            log.info("%s: %s", subject.name, name)
            done[name] = _one(model, subject.name, name, settings, manager)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, done[name].model_dump(mode="json"))
        return done
    finally:
        runner.close()


def _one(model: Any, subject: str, name: str, settings: dict[str, str | int | None], manager: Any) -> TaskResult:
    from lm_eval.evaluator import simple_evaluate

    try:
        found = simple_evaluate(
            model,
            tasks=[name],
            num_fewshot=settings["num_fewshot"],
            limit=settings["limit"],
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except OSError as gone:  # network errors and missing files
        raise FlatqError(
            f"task {name}: its data cannot be loaded ({gone}); lm-eval downloads them once, or give local data with "
            "--include-path; finished tasks are kept"
        ) from gone
    values = {task: values_of(raw) for task, raw in found["results"].items()}
    own = values.pop(name, []) or values_of(found.get("groups", {}).get(name, {}))
    samples = sum(int(count["effective"]) for count in found["n-samples"].values())
    return TaskResult(task=name, subject=subject, settings=settings, samples=samples, values=own, subtasks=values)


def values_of(raw: Mapping[str, Any]) -> list[Value]:
    """Metrics from lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}``."""
    values = []
    for key, value in raw.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = raw.get(f"{metric}_stderr,{filtered}")
        spread = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        values.append(Value(metric=name, value=float(value), stderr=spread))
    return values


def known(path: Path, settings: Mapping[str, Any]) -> TaskResult | None:
    """A finished result with these settings; None if there is none."""
    if not path.exists():
        return None
    try:
        result = read_json(path, TaskResult, "the task runs again")
    except ArtifactError as damaged:
        log.warning("%s", damaged)
        return None
    return result if result.settings == settings else None


def known_results(out: Path) -> dict[str, list[TaskResult]]:
    """All results in a folder, by model."""
    found: dict[str, list[TaskResult]] = {}
    for path in sorted(out.glob("*/*.json")):
        try:
            result = read_json(path, TaskResult, "it is left out")
        except ArtifactError as damaged:
            log.warning("%s", damaged)
        else:
            found.setdefault(path.parent.name, []).append(result)
    return found


def _digest_of(folder: Path | None) -> str | None:
    if folder is None:
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    listed = "".join(f"{path.relative_to(folder)} {file_digest(path)}\n" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def task_cells(results: Sequence[TaskResult]) -> tuple[list[str], list[list[str]]]:
    """Heads of the columns, and a row for each metric with a column for each model; of two models their difference."""
    subjects = list(dict.fromkeys(result.subject for result in results))
    cells: dict[tuple[str, str, int], dict[str, Value]] = {}
    for result in results:
        for value in result.values:
            cells.setdefault((result.task, value.metric, result.samples), {})[result.subject] = value
    rows = []
    for (task, metric, samples), by in cells.items():
        row = [task, metric, str(samples), *(_cell(by.get(subject)) for subject in subjects)]
        if len(subjects) == 2:
            pair = [by[subject].value for subject in subjects if subject in by]
            row.append(f"{pair[1] - pair[0]:+.4g}" if len(pair) == 2 else "not measured")
        rows.append(row)
    return ["task", "metric", "documents", *subjects, *(["difference"] if len(subjects) == 2 else [])], rows


def task_table(results: Sequence[TaskResult]) -> str:
    """``task_cells`` for a terminal."""
    heads, rows = task_cells(results)
    table = Table(show_header=True)
    for head in heads:
        table.add_column(head, justify="left" if head in ("task", "metric") else "right")
    for row in rows:
        table.add_row(*row)
    return rendered(table)


def _cell(value: Value | None) -> str:
    if value is None:
        return "not measured"
    return number(value.value) + (f" ± {value.stderr:.2g}" if value.stderr is not None else "")
