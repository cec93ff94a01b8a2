"""``flatq compare``: several models in one table and one figure, from existing measurements.

It reads ``report.json`` of runs, ``export.json`` of exports, the manifest of an artifact, and the task results of
``flatq eval --tasks``. Only the keys of a report that are shown are read, because other versions of flatq write other
keys. Missing values are shown as "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveFloat
from rich.table import Table

from flatq.artifact import MANIFEST, Artifact
from flatq.errors import RecipeError
from flatq.evaluate.subjects import DENSE
from flatq.evaluate.tasks import TaskResult, known_results
from flatq.export.baseline import BASELINE
from flatq.export.bench import rendered
from flatq.export.folder import DESCRIPTION
from flatq.files import read_json
from flatq.integrity import refuse_damaged_report
from flatq.phases import FRESH
from flatq.run_folder import REPORT
from flatq.units import number, size

ABSENT = "not measured"
HELD_OUT = "held-out text"  # name of the text in reports without ``quality``
WEIGHTS = ("*.onnx", "*.onnx.data", "*.onnx_data", "*.data", "*.gguf", "*.safetensors", "*.bin")


class Part(BaseModel):
    """A part of a report of any version."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Model(Part):
    """The dense model, or the result."""

    bytes: int
    perplexity: PositiveFloat | None = None


class Text(Part):
    """Quality on one text."""

    text: str
    baseline_perplexity: float
    perplexity: float
    damage: float


class Export(Part):
    """One export; a failed one has an error and no files."""

    name: str
    bytes: int
    error: str | None = None
    quality: list[Text] = []


class Speed(Part):
    """Tokens per second."""

    median: float


class Bench(Part):
    """One runner."""

    name: str
    prefill_tokens_per_second: Speed
    decode_tokens_per_second: Speed


class Measured(Part):
    """The keys of ``report.json`` that are read."""

    baseline: Model | None = None
    result: Model
    quality: list[Text] = []
    exports: list[Export] = []
    bench: list[Bench] = []


@dataclass(frozen=True)
class Entry:
    """One model with its measurements.

    Attributes:
        name: path, and which model of a run.
        bytes: size of its weights; of all files for an export.
        perplexity, damage: by text; damage is ``ln(perplexity / dense perplexity)``, nats per token.
        bench: a ``BenchResult`` as JSON.
        tasks: results of lm-eval.
    """

    name: str
    bytes: int
    perplexity: Mapping[str, float] = field(default_factory=dict)
    damage: Mapping[str, float] = field(default_factory=dict)
    bench: Mapping[str, Any] | None = None
    tasks: Sequence[TaskResult] = ()


def entries_of(path: Path) -> list[Entry]:
    """The entries of a path: for a run its dense model, artifact and exports; otherwise one model.

    Raises:
        RecipeError: the path contains no model.
    """
    if (path / REPORT).is_file():
        return list(_of_run(path))
    if (path / DESCRIPTION).is_file():
        return [_of_export(path)]
    if (path / MANIFEST).is_file() or (path / "artifact" / MANIFEST).is_file():
        return [_of_artifact(path)]
    return [Entry(str(path), _foreign_bytes(path))]


def _of_run(path: Path) -> Iterator[Entry]:
    refuse_damaged_report(path)
    report = read_json(path / REPORT, Measured, FRESH)
    bench = {entry.name: entry.model_dump() for entry in report.bench}
    done = known_results(path / "tasks")
    dense, result, texts = report.baseline, report.result, report.quality
    if dense:
        scores = {text.text: text.baseline_perplexity for text in texts} or _single(dense)
        none = dict.fromkeys(scores, 0.0)
        yield Entry(f"{path} {DENSE}", dense.bytes, scores, none, bench.get(BASELINE), done.get(DENSE, []))
    own = _by_text(texts) if texts else (_single(result), _damage(_single(dense), _single(result)))
    yield Entry(f"{path} artifact", result.bytes, *own, None, done.get("artifact", []))
    for export in report.exports:
        if not export.error:
            scores, lost = _by_text(export.quality)
            measured = bench.get(export.name), done.get(export.name, [])
            yield Entry(f"{path} {export.name}", export.bytes, scores, lost, *measured)


def _of_export(path: Path) -> Entry:
    """An export folder; if it belongs to a run, with the measurements of the run's report."""
    run = path.absolute().parent.parent
    if path.absolute().parent.name == "exports" and (run / REPORT).is_file():
        for entry in _of_run(run):
            if entry.name == f"{run} {path.absolute().name}":
                return Entry(str(path), entry.bytes, entry.perplexity, entry.damage, entry.bench, entry.tasks)
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != DESCRIPTION)
    return Entry(str(path), total, tasks=known_results(path.parent / "tasks").get(path.name, []))


def _of_artifact(path: Path) -> Entry:
    artifact = Artifact.open(path, check=False)  # only sizes are read
    run = artifact.root.parent
    if (run / REPORT).is_file():
        entry = next(entry for entry in _of_run(run) if entry.name == f"{run} artifact")
        return Entry(str(path), entry.bytes, entry.perplexity, entry.damage, entry.bench, entry.tasks)
    return Entry(str(path), artifact.bytes(), tasks=known_results(run / "tasks").get("artifact", []))


def _foreign_bytes(path: Path) -> int:
    """Size of the weight files of another program.

    Raises:
        RecipeError: there are none.
    """
    files = {path} if path.is_file() else {file for pattern in WEIGHTS for file in path.glob(pattern)}
    if not files or (path.is_file() and path.suffix not in (".gguf", ".onnx", ".safetensors")):
        raise RecipeError(
            f"{path}: has no model; give a run, artifact or export folder of flatq, or a folder with .onnx, .gguf or "
            ".safetensors files"
        )
    return sum(file.stat().st_size for file in files)


def _single(measure: Model | None) -> dict[str, float]:
    return {} if measure is None or measure.perplexity is None else {HELD_OUT: measure.perplexity}


def _damage(dense: Mapping[str, float], result: Mapping[str, float]) -> dict[str, float]:
    return {text: math.log(result[text] / dense[text]) for text in result if text in dense}


def _by_text(texts: Sequence[Text]) -> tuple[dict[str, float], dict[str, float]]:
    return {text.text: text.perplexity for text in texts}, {text.text: text.damage for text in texts}


def comparison(entries: Sequence[Entry]) -> str:
    """The table: a row for each model, a column for each measurement that at least one of them has."""
    texts = list(dict.fromkeys(text for entry in entries for text in entry.perplexity))
    done = [result for entry in entries for result in entry.tasks if result.values]
    tasks = list(dict.fromkeys((result.task, result.values[0].metric, result.samples) for result in done))
    table = Table(show_header=True)
    heads = [f"{text}: {what}" for text in texts for what in ("perplexity", "damage, nats")] or ["perplexity"]
    for head in (
        "",
        "bytes",
        *heads,
        "prefill tok/s",
        "decode tok/s",
        *(f"{t}: {metric}, {n} documents" for t, metric, n in tasks),
    ):
        table.add_column(head, justify="right" if head else "left", overflow="fold")
    for entry in entries:
        table.add_row(*_row(entry, texts, tasks))
    return rendered(table, width=max(110, 60 + 16 * len(table.columns)))


def _row(entry: Entry, texts: Sequence[str], tasks: Sequence[tuple[str, str, int]]) -> list[str]:
    cells = [entry.name, size(entry.bytes)]
    for text in texts:
        cells += [_shown(entry.perplexity.get(text)), _shown(entry.damage.get(text), "+.3f")]
    cells += [] if texts else [ABSENT]
    for speed in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        cells.append(_shown(entry.bench[speed]["median"] if entry.bench else None, ".1f"))
    values = {(r.task, value.metric, r.samples): value for r in entry.tasks for value in r.values}
    for wanted in tasks:
        value = values.get(wanted)
        spread = f" ± {value.stderr:.2g}" if value and value.stderr is not None else ""
        cells.append(_shown(value.value if value else None) + spread)
    return cells


def _shown(value: float | None, form: str = "") -> str:
    if value is None:
        return ABSENT
    return format(value, form) if form else number(value)
