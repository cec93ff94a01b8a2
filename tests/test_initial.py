"""``flatq init``: its recipe says what it does, fits the size and the format, and runs unchanged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatq.errors import RecipeError
from flatq.plan import initial, initial_texts
from flatq.plan.initial import file_name, initial_recipe
from flatq.recipe.grammar import Recipe
from flatq.report.render import read_report
from tests.conftest import flatq

SMALL = ((8, 64),)  # calibration tokens of a test


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial_texts, "TIERS", SMALL)
    monkeypatch.setattr(initial_texts, "JUDGED", 512)
    monkeypatch.setattr(initial_texts, "OWN", 256)


def test_the_recipe_of_a_tiny_model_runs_unchanged(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "_runs", lambda target: False)  # no bench, which takes half of the time
    file = tmp_path / "tiny.yaml"
    shown = flatq("init", tiny_model, "--to", "gguf", "-o", file)
    assert (shown.exit_code, shown.stdout.strip()) == (0, str(file)), shown.stderr
    assert flatq("run", file, "--out", tmp_path / "out").exit_code == 0
    report = read_report(tmp_path / "out" / "report.json")
    assert [export.name for export in report.exports] == ["gguf"]
    assert [text.calibrated for text in report.quality] == [False, True], "the first text was not calibrated on"


@pytest.mark.parametrize("limit", [None, "80kB"])
def test_every_key_of_the_recipe_has_a_comment_before_it(tiny_model: Path, limit: str | None) -> None:
    lines = initial_recipe(str(tiny_model), limit=limit).splitlines()
    keys = [number for number, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    blocks = ("calibration:", "stages:", "- gptq:", "exports:", "dataset:", "- {dataset")
    for number in keys:
        explained = lines[number - 1].strip().startswith("#")
        assert explained or lines[number].strip().startswith(blocks), lines[number]


def test_an_existing_file_is_not_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    shown = flatq("init", tiny_model, "-o", tmp_path / "mine.yaml")
    assert shown.exit_code == 2
    assert "exists; choose another file" in shown.stderr
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "limit", "to", "name"),
    [
        ("package:llm/Some Model.gguf", "60MB", "onnx", "Some-Model-onnx-60MB.yaml"),
        ("owner/name", None, None, "name.yaml"),
        ("models/tiny/", "1.5GB", None, "tiny-1.5GB.yaml"),
    ],
)
def test_the_file_is_named_after_the_goal(model: str, limit: str | None, to: str | None, name: str) -> None:
    assert file_name(model, limit, to) == name


@pytest.mark.parametrize(
    ("to", "grid", "coded"),
    [("onnx", (4, 64, False), True), ("gguf", (4, 32, True), False), ("safetensors", (4, 64, False), False)],
)
def test_a_format_gets_what_it_can_store(tiny_model: Path, to: str, grid: tuple[int, int, bool], coded: bool) -> None:
    """llama.cpp's blocks hold 32 columns, and its writer rounds the embedding to 8 bits anyway."""
    recipe = Recipe.parse(initial_recipe(str(tiny_model), to=to))
    spec = recipe.gptq
    assert recipe.flat is None
    assert spec is not None
    assert (spec.bits, spec.group_size, spec.symmetric) == grid
    assert (spec.embedding is not None) == coded


@pytest.mark.parametrize(("to", "narrows"), [("onnx", True), ("gguf", True), ("safetensors", True)])
def test_a_size_is_the_budget_of_all_stages(tiny_model: Path, to: str, narrows: bool) -> None:
    recipe = Recipe.parse(initial_recipe(str(tiny_model), limit="120kB", to=to))
    assert recipe.budget is not None
    assert (recipe.budget.size, recipe.budget.export) == ("120kB", to)
    assert (recipe.flat is not None, recipe.gptq is not None) == (narrows, True)


def test_a_format_without_other_widths_gets_a_budget_of_bits(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatq_onnx import OnnxExporter

    real = OnnxExporter.check

    def check(self: Any, config: Any, grids: Any, options: Any) -> list[str]:
        ranks = {dims.d_v for dims in config.layers}
        return ["one rank for all layers"] if len(ranks) > 1 else real(self, config, grids, options)

    monkeypatch.setattr(OnnxExporter, "check", check)
    recipe = Recipe.parse(initial_recipe(str(tiny_model), limit="80kB", to="onnx"))
    assert (recipe.flat, recipe.gptq is not None) == (None, True)


def test_an_impossible_size_is_an_error_before_a_file_is_written(tiny_model: Path, tmp_path: Path) -> None:
    shown = flatq("init", tiny_model, "--size", "9kB", "--to", "onnx", "-o", tmp_path / "a.yaml")
    assert shown.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"limit": "60"}, None),
        ({"limit": "much"}, "--size: 'much' is not a size above 0"),
        ({"to": "onyx"}, "no exporter is named 'onyx'"),
    ],
)
def test_a_wrong_option_is_named(tiny_model: Path, given: dict[str, str], words: str | None) -> None:
    with pytest.raises(RecipeError, match=words):
        initial_recipe(str(tiny_model), **given)  # type: ignore[arg-type]


def test_a_model_that_does_not_fit_into_memory_does_not_generate_text(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial_texts.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=1000))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = initial_recipe(str(tiny_model))
    assert Recipe.parse(text).calibration.dataset == "python-docs"
    assert "does not fit into this machine's free memory" in text


def test_as_many_tokens_as_the_forecast_allows(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial_texts, "TIERS", ((256, 512), (16, 64), (8, 64)))
    for longest, samples in ((1e9, 256), (0.0, 8)):
        monkeypatch.setattr(initial, "LONGEST", longest)
        assert Recipe.parse(initial_recipe(str(tiny_model))).calibration.samples == samples


def test_without_a_runtime_the_export_is_not_verified_and_the_reason_is_given(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatq_gguf import GgufExporter

    monkeypatch.setattr(
        GgufExporter, "missing", lambda _, options, *, opening=True: ["llama.cpp is absent"] if opening else []
    )
    text = initial_recipe(str(tiny_model), to="gguf")
    recipe = Recipe.parse(text)
    assert not recipe.exports[0].verify
    assert recipe.bench is None
    assert "llama.cpp is absent" in text


@pytest.mark.parametrize("value", ["a: b", "yes # no", "- x", "010", "null", "{a}", "it's", "plain/path.gguf", "C:\\x"])
def test_a_value_is_read_as_it_was_written(value: str) -> None:
    assert initial.read(f"a: {initial._scalar(value)}").value == {"a": value}
    assert initial.read(f"{{a: {initial._scalar(value)}}}").value == {"a": value}
