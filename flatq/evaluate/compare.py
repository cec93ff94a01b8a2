"""Several models in one table and one figure, from what was measured before; nothing is run here.

It reads ``report.json`` of runs, ``export.json`` of exports, the manifest of an artifact, and the results that
``flatq eval --tasks`` left beside them. Reports are read as plain JSON, because those of other versions of flatq have
other keys. What is not there is "not measured".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from flatq.artifact import MANIFEST, Artifact
from flatq.errors import ArtifactError, RecipeError
from flatq.evaluate.subjects import DENSE
from flatq.evaluate.tasks import TaskResult, known_results
from flatq.export.baseline import BASELINE
from flatq.export.bench import rendered
from flatq.export.folder import DESCRIPTION
from flatq.units import number, size

ABSENT = "not measured"
HELD_OUT = "held-out text"  # what reports with a single text measured on
WEIGHTS = ("*.onnx", "*.onnx.data", "*.onnx_data", "*.data", "*.gguf", "*.safetensors", "*.bin")


@dataclass(frozen=True)
class Entry:
    """One model, as far as it was measured.

    Attributes:
        name: path, and what of it.
        bytes: of its weights; of all files for an export.
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
    """A run is its dense model, its artifact and its exports; everything else is one model.

    Raises:
        RecipeError: nothing there is a model.
    """
    if (path / "report.json").is_file():
        return list(_of_run(path))
    if (path / DESCRIPTION).is_file():
        return [_of_export(path)]
    if (path / MANIFEST).is_file() or (path / "artifact" / MANIFEST).is_file():
        return [_of_artifact(path)]
    return [Entry(str(path), _foreign_bytes(path))]


def _of_run(path: Path) -> Iterator[Entry]:
    report = _json(path / "report.json")
    bench = {entry["name"]: entry for entry in report.get("bench", [])}
    done = known_results(path / "tasks")
    dense, result = report.get("baseline"), report["result"]
    texts = report.get("quality", [])
    if dense:
        scores = {text["text"]: text["baseline_perplexity"] for text in texts} or _single(dense)
        yield Entry(
            f"{path} {DENSE}",
            dense["bytes"],
            scores,
            dict.fromkeys(scores, 0.0),
            bench.get(BASELINE),
            done.get(DENSE, []),
        )
    own = _by_text(texts) if texts else (_single(result), _damage(_single(dense or {}), _single(result)))
    yield Entry(f"{path} artifact", result["bytes"], *own, None, done.get("artifact", []))
    for export in report.get("exports", []):
        if export.get("error"):
            continue  # there is no file
        name = export["name"]
        scores, lost = _by_text(export.get("quality", []))
        yield Entry(f"{path} {name}", export["bytes"], scores, lost, bench.get(name), done.get(name, []))


def _of_export(path: Path) -> Entry:
    """An export folder; of one in a run, all that the run's report says of it."""
    run = path.absolute().parent.parent
    if path.absolute().parent.name == "exports" and (run / "report.json").is_file():
        for entry in _of_run(run):
            if entry.name == f"{run} {path.absolute().name}":
                return Entry(str(path), entry.bytes, entry.perplexity, entry.damage, entry.bench, entry.tasks)
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != DESCRIPTION)
    return Entry(str(path), total, tasks=known_results(path.parent / "tasks").get(path.name, []))


def _of_artifact(path: Path) -> Entry:
    artifact = Artifact.open(path, check=False)  # only sizes are read
    run = artifact.root.parent
    if (run / "report.json").is_file():
        entry = next(entry for entry in _of_run(run) if entry.name == f"{run} artifact")
        return Entry(str(path), entry.bytes, entry.perplexity, entry.damage, entry.bench, entry.tasks)
    return Entry(str(path), artifact.bytes(), tasks=known_results(run / "tasks").get("artifact", []))


def _foreign_bytes(path: Path) -> int:
    """Size of another program's weights; what they are good for, only a run can tell.

    Raises:
        RecipeError: there are none.
    """
    files = {path} if path.is_file() else {file for pattern in WEIGHTS for file in path.glob(pattern)}
    if not files or (path.is_file() and path.suffix not in (".gguf", ".onnx", ".safetensors")):
        raise RecipeError(
            f"{path}: holds no model; give a run, artifact or export folder of flatq, or a folder with .onnx, .gguf or "
            ".safetensors files"
        )
    return sum(file.stat().st_size for file in files)


def _single(measure: Mapping[str, Any]) -> dict[str, float]:
    found = measure.get("perplexity")
    return {} if found is None else {HELD_OUT: found}


def _damage(dense: Mapping[str, float], result: Mapping[str, float]) -> dict[str, float]:
    return {text: math.log(result[text] / dense[text]) for text in result if text in dense}


def _by_text(texts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    scores = {text["text"]: float(text["perplexity"]) for text in texts}
    return scores, {text["text"]: float(text["damage"]) for text in texts}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as wrong:
        raise ArtifactError(f"{path}: cannot be read ({wrong}); run the recipe again with --fresh") from wrong


def comparison(entries: Sequence[Entry]) -> str:
    """The table: a row for each model, columns for what at least one of them was measured on."""
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
