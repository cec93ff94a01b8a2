"""Models side by side: what was measured is shown, what was not is said."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from flatq.errors import RecipeError
from flatq.evaluate.compare import ABSENT, HELD_OUT, comparison, entries_of
from flatq.evaluate.figure import draw
from flatq.evaluate.tasks import TaskResult, Value
from flatq.files import write_json
from tests.conftest import flatq


@pytest.fixture
def run(exported_run: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the finished run, whose report a test may change: ``run.json``, which has its digest, is gone."""
    root = Path(shutil.copytree(exported_run[1], tmp_path / "run"))
    (root / "run.json").unlink()
    return root


def test_a_run_is_dense_artifact_and_exports(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    dense, artifact, *exports = entries_of(run)
    assert [entry.name for entry in (dense, artifact)] == [f"{run} dense", f"{run} artifact"]
    assert [entry.name for entry in exports] == [f"{run} {name}" for name in ("reduced", "gqa", "fp32")]
    assert [entry.bytes for entry in exports] == [export["bytes"] for export in report["exports"]]
    assert (dense.bytes, artifact.bytes) == (report["baseline"]["bytes"], report["result"]["bytes"])
    text = next(iter(artifact.perplexity))
    assert artifact.damage[text] == pytest.approx(math.log(artifact.perplexity[text] / dense.perplexity[text]))


def test_a_report_that_was_changed_is_refused(exported_run: tuple[Path, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(exported_run[1], tmp_path / "run"))
    report = root / "report.json"
    report.write_text(report.read_text().replace('"bytes": 1', '"bytes": 2'))
    shown = flatq("compare", root)
    assert shown.exit_code == 3
    assert "damaged files: report.json" in shown.stderr


def test_what_was_not_measured_is_said_so(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    report["quality"], report["baseline"] = [], None
    write_json(run / "report.json", report)
    artifact = entries_of(run)[0]
    assert list(artifact.perplexity) == [HELD_OUT]
    assert artifact.damage == {}
    assert ABSENT in comparison([artifact])


def test_quality_per_text_speed_and_tasks_are_shown(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    report["quality"] = [
        {"text": "prose", "baseline_perplexity": 4.0, "perplexity": 8.0, "damage": 0.6931},
        {"text": "code", "baseline_perplexity": 2.0, "perplexity": 3.0, "damage": 0.4055},
    ]
    speed = {"median": 123.4, "low": 1.0, "high": 200.0}
    report["bench"] = [{"name": "gqa", "prefill_tokens_per_second": speed, "decode_tokens_per_second": speed}]
    write_json(run / "report.json", report)
    result = TaskResult(
        task="mine", subject="gqa", settings={}, samples=9, values=[Value(metric="acc", value=0.375, stderr=0.05)]
    )
    (run / "tasks" / "gqa").mkdir(parents=True)
    write_json(run / "tasks" / "gqa" / "mine.json", result.model_dump(mode="json"))
    entries = {entry.name.split()[-1]: entry for entry in entries_of(run)}
    assert entries["dense"].perplexity == {"prose": 4.0, "code": 2.0}
    assert entries["artifact"].damage == {"prose": 0.6931, "code": 0.4055}
    assert entries["gqa"].tasks == [result]
    row = comparison([entries["gqa"]])
    assert "123.4" in row
    assert "0.375 ± 0.05" in row
    [alone] = entries_of(run / "exports" / "gqa")
    assert (alone.bytes, alone.bench, alone.tasks) == (
        entries["gqa"].bytes,
        entries["gqa"].bench,
        entries["gqa"].tasks,
    )


def test_artifacts_exports_and_foreign_graphs_have_bytes(run: Path, tmp_path: Path) -> None:
    [inside] = entries_of(run / "artifact")
    moved = shutil.move(run / "artifact", tmp_path / "alone")
    [artifact] = entries_of(Path(moved))
    assert inside.perplexity
    assert not artifact.perplexity
    assert artifact.bytes == inside.bytes
    foreign = tmp_path / "theirs"
    foreign.mkdir()
    (foreign / "model.onnx").write_bytes(b"x" * 30)
    (foreign / "model.onnx.data").write_bytes(b"x" * 70)
    (foreign / "readme.txt").write_bytes(b"x")
    [other] = entries_of(foreign)
    assert other.bytes == 100
    assert comparison([other]).count(ABSENT) == 3


def test_no_model_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    shown = flatq("compare", tmp_path)
    assert shown.exit_code == 2
    assert "has no model" in shown.stderr


@pytest.mark.parametrize(("name", "start"), [("out.svg", b"<?xml"), ("out.png", b"\x89PNG")])
def test_the_figure_is_written(run: Path, tmp_path: Path, name: str, start: bytes) -> None:
    shown = flatq("compare", run, run / "exports" / "gqa", "--figure", tmp_path / name)
    assert shown.exit_code == 0, shown.stderr
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_figure_needs_an_ending_and_a_perplexity(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\.svg or \.png"):
        draw(entries_of(run), tmp_path / "out.pdf")
    moved = Path(shutil.move(run / "exports" / "gqa", tmp_path / "gqa"))
    with pytest.raises(RecipeError, match="no model here has a measured perplexity"):
        draw(entries_of(moved), tmp_path / "out.svg")
