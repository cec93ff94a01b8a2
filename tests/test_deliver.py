"""Exports appear when their runtime has agreed, and not before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flatq.artifact import Artifact
from flatq.errors import ArtifactError, ExportError, RecipeError
from flatq.export.deliver import deliver, opened, reopened, side_by_side
from flatq.export.folder import DESCRIPTION
from flatq.export.planned import PlannedExport, planned_exports
from flatq.export.protocols import exporter_named
from flatq.model.grid import Grid
from flatq.recipe.grammar import BenchSpec, Recipe
from tests.conftest import flatq
from tests.models import tiny_artifact, tiny_config

HEAD = "version: 1\nmodel: some/model\nstages: [{gptq: {}}]\n"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return tiny_artifact(tmp_path / "run" / "artifact", tiny_config(d_v=(16, 8)), grid=Grid(4, 16))


@pytest.fixture(autouse=True)
def _parent(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()


def onnx(**options: Any) -> PlannedExport:
    exporter = exporter_named("onnx")
    return PlannedExport("mine", "onnx", exporter, exporter.Options(**options))


def test_every_wrong_option_and_unknown_format_is_told_at_once() -> None:
    recipe = Recipe.parse(HEAD + "exports: [{onnx: {precison: int4}}, {onxx: {}}, {onnx: {name: b, attention: wide}}]")
    with pytest.raises(RecipeError) as raised:
        planned_exports(recipe)
    assert len(raised.value.problems) == 3
    assert "did you mean 'precision'" in raised.value.problems[0]


def test_names_and_formats_are_kept_apart() -> None:
    first, second = planned_exports(Recipe.parse(HEAD + "exports: [{onnx: {name: a}}, {onnx: {precision: fp32}}]"))
    assert (first.name, first.format, second.name, second.format) == ("a", "onnx", "onnx", "onnx")


def test_an_export_describes_itself_and_can_be_opened_again(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "run" / "exports" / "mine"
    report = deliver(onnx(precision="int4"), artifact, out, torch.arange(64).view(2, 32))
    assert json.loads((out / DESCRIPTION).read_text())["artifact"] == "../../artifact"
    model = {"model.onnx", "flatq_onnx.json"}
    assert set(report["files"]) == {*model, "README.md"}
    assert report["bytes"] == sum((out / file).stat().st_size for file in model)
    assert report["verify"] is not None
    item, root = reopened(out)
    assert root == artifact.root
    assert item.options == onnx(precision="int4").options
    runner = opened(out, "cpu")
    assert runner.provider == "CPUExecutionProvider"
    runner.close()


def test_a_run_folder_may_be_moved(artifact: Artifact, tmp_path: Path) -> None:
    deliver(onnx(), artifact, tmp_path / "run" / "exports" / "mine", None)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert reopened(tmp_path / "moved" / "exports" / "mine")[1] == tmp_path / "moved" / "artifact"


def test_a_runtime_that_disagrees_fails_the_export_and_leaves_nothing(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_artifact(tmp_path / "other", artifact.config, grid=Grid(4, 16), seed=1)
    write = type(onnx().exporter).write
    monkeypatch.setattr(type(onnx().exporter), "write", lambda self, _, out, options: write(self, other, out, options))
    with pytest.raises(ExportError, match="mine"):
        deliver(onnx(), artifact, tmp_path / "run" / "exports" / "mine", None)
    assert list((tmp_path / "run" / "exports").iterdir()) == []


def test_what_a_killed_export_left_is_replaced(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "run" / "exports" / "mine"
    for left in (out, out.with_name("mine.partial")):
        left.mkdir(parents=True)
        (left / "stale").touch()
    deliver(onnx(), artifact, out, None)
    assert not list(out.parent.rglob("stale"))
    assert [path.name for path in out.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "onnx"}', '{"format": "onnx", "options": 3}'])
def test_a_folder_that_is_no_export(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / DESCRIPTION).write_text(content)
    fault = "no export folder of flatq" if content is None else r"export\.json: is damaged"
    with pytest.raises(ArtifactError, match=fault):
        reopened(tmp_path)


def test_nothing_to_measure_measures_nothing() -> None:
    assert side_by_side({}, BenchSpec(), 128) == []


def test_one_more_format_from_the_command_line(artifact: Artifact, tmp_path: Path) -> None:
    shown = flatq("export", artifact.root.parent, "--format", "onnx", "--out", tmp_path / "new", "-o", "precision=fp32")
    assert shown.exit_code == 0, shown.stderr
    assert str(tmp_path / "new" / "model.onnx") in shown.stdout.split()
    again = flatq("export", artifact.root.parent, "--format", "onnx", "--out", tmp_path / "new")
    assert again.exit_code == 2
    assert "exists; choose another place" in again.stderr


@pytest.mark.skipif("cuda" in exporter_named("onnx").providers(), reason="this machine has CUDA")
def test_cuda_is_missed_before_anything_is_computed(tmp_path: Path) -> None:
    file = tmp_path / "fast.yaml"
    file.write_text(HEAD + "exports: [{onnx: {}}]\nbench: {provider: cuda}\n")
    shown = flatq("check", file)
    assert shown.exit_code == 2
    assert shown.stderr.count("\n") == 1
    assert "fast.yaml:5: bench.provider: cuda is not available in the installed runtime of onnx" in shown.stderr


@pytest.mark.slow
def test_graphs_of_other_programs_are_measured_beside_ours(artifact: Artifact, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "run" / "ours", tmp_path / "theirs"
    deliver(onnx(attention="gqa"), artifact, ours, None)
    theirs.mkdir()
    (theirs / "model.onnx").write_bytes((ours / "model.onnx").read_bytes())
    few = ("--new-tokens", "2", "--repeats", "1", "--threads", "1")
    shown = flatq("bench", ours, "--against", theirs, "--prompt", "3", "--prompt", "5", *few)
    assert shown.exit_code == 0, shown.stderr
    assert "prompt 3, new_tokens 2, batch 1" in shown.stdout
    assert "prompt 5, new_tokens 2, batch 1" in shown.stdout
    refused = flatq("bench", ours, "--against", tmp_path)
    assert refused.exit_code == 3
    assert "holds no .onnx file" in refused.stderr
