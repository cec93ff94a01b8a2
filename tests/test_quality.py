"""Quality of runs: in the report, in the exports' own runtimes, through `flatq eval`; ruined models and failures."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flatq.calibration.divergence import DenseStates, divergence
from flatq.calibration.tokens import EvaluationText
from flatq.errors import ExportError, NumericsError, RecipeError
from flatq.export.baseline import BASELINE
from flatq.export.generate import DecoderRunner
from flatq.export.planned import PlannedExport
from flatq.export.protocols import exporter_named
from flatq.export.quality import first_rows, runner_divergence
from flatq.model.footprint import weight_bytes
from flatq.pipeline.baselines import QuantizedBaseline, nearest_in_bytes
from flatq.pipeline.evaluate import checked_dataset
from flatq.pipeline.quality import export_quality, stop_if_ruined
from flatq.quantize.grids import planned_grids
from flatq.recipe.blocks import GptqSpec
from flatq.recipe.grammar import Recipe
from flatq.report.render import read_report
from tests.conftest import FLAT, ONNX, MakeRecipe, flatq, manifest_of
from tests.models import RandomWeights, tiny_config

HEAD = "version: 1\nmodel: some/model\nstages: [{gptq: {}}]\n"


def test_a_runner_is_judged_as_the_model_that_it_runs(tmp_path: Path) -> None:
    tokens = torch.randint(128, (4, 20), generator=torch.Generator().manual_seed(0))
    dense, other = DenseStates(RandomWeights(tiny_config()), tmp_path), RandomWeights(tiny_config(), seed=1)
    found, expected = runner_divergence(dense, DecoderRunner(other), tokens), divergence(dense, other, tokens)
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert found.damage == pytest.approx(expected.damage, abs=1e-4)
    assert found.top1 == expected.top1
    assert found.tokens == expected.tokens == 4 * 19


def test_a_runner_with_other_logits_is_refused(tmp_path: Path) -> None:
    class Short(DecoderRunner):
        def logits(self, tokens: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
            return super().logits(tokens, valid)[:, :-1]

    dense = DenseStates(RandomWeights(tiny_config()), tmp_path)
    with pytest.raises(ExportError, match=r"mine: the runtime returned logits of shape \[1, 7, 128\]"):
        runner_divergence(dense, Short(dense.weights), torch.zeros(1, 8, dtype=torch.int64), name="mine")


@pytest.mark.parametrize(("most", "rows"), [(1, 1), (63, 1), (64, 1), (200, 3), (10_000, 5)])
def test_few_tokens_are_whole_rows(most: int, rows: int) -> None:
    assert len(first_rows(torch.zeros(5, 64), most)) == rows


def test_the_report_holds_the_quality_of_artifact_and_exports(exported_run: tuple[Path, Path]) -> None:
    report = read_report(exported_run[1] / "report.json")
    assert len(report.quality) >= 1
    for text in report.quality:
        assert text.damage == pytest.approx(np.log(text.perplexity / text.baseline_perplexity))
        assert text.kl > 0
        assert 0 <= text.top1 <= 1
    assert report.headline is not None
    assert report.result.perplexity == report.headline.perplexity
    assert report.baseline is not None
    assert report.baseline.perplexity == report.headline.baseline_perplexity
    floats = next(export for export in report.exports if export.name == "fp32")
    assert [text.text for text in floats.quality] == [text.text for text in report.quality]
    for ours, theirs in zip(report.quality, floats.quality, strict=True):
        if ours.tokens == theirs.tokens:
            assert theirs.perplexity == pytest.approx(ours.perplexity, rel=1e-3)
            assert theirs.kl == pytest.approx(ours.kl, rel=1e-2)
    assert report.recipe_text == exported_run[0].read_text()


def test_the_card_states_the_headline(exported_run: tuple[Path, Path]) -> None:
    report, said = read_report(exported_run[1] / "report.json"), manifest_of(exported_run[1])["quality"]
    assert report.headline is not None
    assert said["perplexity"] == round(report.headline.perplexity, 4)
    assert report.headline.text in said["measured on"]
    assert "KL divergence from the original" in said


def test_eval_gives_the_reports_numbers_for_artifact_and_export(exported_run: tuple[Path, Path]) -> None:
    _, out = exported_run
    report = read_report(out / "report.json")
    for place, measured in ((out, report.quality), (out / "exports" / "reduced", report.exports[0].quality)):
        shown = flatq("eval", place)
        assert shown.exit_code == 0, shown.stderr
        for line, text in zip(shown.stdout.splitlines(), measured, strict=True):
            assert line.startswith(text.text)
            assert f"perplexity {text.baseline_perplexity:.4g} -> {text.perplexity:.4g}" in line
            assert f"KL {text.kl:.3f}" in line


def test_every_runtime_has_the_artifact_s_perplexity(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    exports: list[dict[str, Any]] = [{"onnx": {"precision": "fp32"}}, {"safetensors": {}}]
    if importlib.util.find_spec("llama_cpp") is not None:
        exports.append({"gguf": {"precision": "f16"}})
    recipe = make_recipe(exports=exports, bench=None, evaluation={"dataset": "held-out", "tokens": 512, "seq_len": 64})
    shown = flatq("run", recipe, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.stderr
    report = read_report(tmp_path / "out" / "report.json")
    [artifact] = report.quality
    assert len(report.exports) == len(exports)
    for export in report.exports:
        [found] = export.quality
        assert found.tokens == artifact.tokens
        assert found.perplexity == pytest.approx(artifact.perplexity, rel=1e-3), export.name


def test_eval_reads_a_path_alone(exported_run: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine.txt"
    other.write_text(text_file.read_text()[:4000])
    shown = flatq("eval", exported_run[1], "--path", other, "--tokens", 64, "--seq-len", 32)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("mine: perplexity")


def test_eval_reads_the_field_of_a_record(exported_run: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    words = text_file.read_text()
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": words[:4000], "text": None}))
    (tmp_path / "b.txt").write_text(words[:4000])
    asked = ("--tokens", 64, "--seq-len", 32)
    one = flatq("eval", exported_run[1], "--path", tmp_path / "a.jsonl", "--field", "content", *asked)
    two = flatq("eval", exported_run[1], "--path", tmp_path / "b.txt", *asked)
    assert one.exit_code == two.exit_code == 0
    assert one.stdout.removeprefix("a:") == two.stdout.removeprefix("b:")
    for refused in (("--path", tmp_path / "b.txt", "--field", "content"), ("--field", "content")):
        shown = flatq("eval", exported_run[1], *refused)
        assert shown.exit_code == 2
        assert "--field content: is the key of the text in a .jsonl file" in shown.stderr


def test_eval_refuses_a_misspelt_dataset_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"--dataset wikitxt2: not known.*did you mean wikitext2\?"):
        checked_dataset("wikitxt2", None)
    with pytest.raises(RecipeError, match=r"did you mean wikitext2\?"):
        checked_dataset("wiki", None)
    with pytest.raises(RecipeError, match=r"--dataset zzz: (?!.*did you mean)"):
        checked_dataset("zzz", None)
    with pytest.raises(RecipeError, match="give the file with --path"):
        checked_dataset("text", None)
    with pytest.raises(RecipeError, match="is not used with --dataset c4"):
        checked_dataset("c4", Path("a.txt"))


@pytest.mark.parametrize(
    ("dataset", "path", "field", "found"),
    [
        (None, None, None, None),
        (None, "a.txt", None, "text"),
        (None, "a.jsonl", "content", "text"),
        ("text", "a.jsonl", "content", "text"),
        ("c4", None, None, "c4"),
        (None, None, "content", "--field content: is the key"),
        (None, "a.txt", "content", "--field content: is the key"),
        ("text", "a.txt", "content", "--field content: is the key"),
        ("c4", "a.jsonl", "content", "is not used with --dataset c4"),
        ("text", None, None, "give the file with --path"),
    ],
)
def test_a_data_set_a_path_and_a_field_belong_together(
    dataset: str | None, path: str | None, field: str | None, found: str | None
) -> None:
    place = Path(path) if path else None
    if found is not None and " " in found:
        with pytest.raises(RecipeError, match=found):
            checked_dataset(dataset, place, field)
    else:
        assert checked_dataset(dataset, place, field) == found


def test_a_ruined_model_stops_before_the_exports(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, stages = tmp_path / "out", [{"flat": {**FLAT["flat"], "keep_ratio": 0.8}}]
    shown = flatq("run", make_recipe(stages=stages, exports=ONNX[2:], stop_above=1e-9), "--out", out)
    assert shown.exit_code == 3
    words = " ".join(shown.stderr.split())
    for said in (
        "the compressed model is ruined",
        "stop_above allows 1e-09",
        "Nothing was exported",
        "stop_above: null",
    ):
        assert said in words
    assert "artifact: " in caplog.text
    assert not (out / "exports").exists()
    assert not (out / "report.json").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 3, "group_size": 32}, "3 bit, groups of 32"),
        ({"bits": 8, "group_size": -1}, "8 bit, one group per row"),
        ({"average_bits": 3.5, "group_size": 64}, "3.5 (on average) bit, groups of 64"),
    ],
)
def test_a_baseline_is_described_by_bits_and_groups(settings: dict[str, float], words: str) -> None:
    assert QuantizedBaseline("quantized", GptqSpec.model_validate(settings), context=1).words == words


def lost(text: str, damage: float) -> dict[str, object]:
    return {"text": text, "damage": damage, "perplexity": 20.0, "baseline_perplexity": 10.0}


def test_the_text_that_lost_most_decides_whether_a_model_is_ruined(caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe.parse(f"{HEAD}stop_above: 0.5\n")
    stop_if_ruined(recipe, [lost("one", 0.1), lost("two", 0.5)])
    with pytest.raises(NumericsError, match=r" two .*20,.* 10\D.*0\.510 .*0\.5\D"):
        stop_if_ruined(recipe, [lost("one", 0.1), lost("two", 0.51), lost("three", 0.2)])
    assert not caplog.records


def test_without_a_limit_a_ruined_model_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe.parse(f"{HEAD}stop_above: null\n")
    stop_if_ruined(recipe, [lost("one", 1.0)])
    assert not caplog.records
    stop_if_ruined(recipe, [lost("one", 1.01)])
    assert " one " in caplog.text
    assert "stop_above: null" in caplog.text


def test_an_export_that_cannot_be_opened_has_no_quality(tmp_path: Path) -> None:
    dense = DenseStates(RandomWeights(tiny_config()), tmp_path)
    texts = [EvaluationText("one", torch.zeros(1, 8, dtype=torch.int64), calibrated=False)]
    exporter = exporter_named("onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(exporter), "open", lambda *_: None)
        item = PlannedExport("x", "onnx", exporter, exporter.Options())
        assert export_quality(dense, item, tmp_path, texts) == []
    assert export_quality(dense, replace(item, verify=False), tmp_path / "none", texts) == []


def test_a_failed_export_leaves_a_report_and_the_other_exports(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = make_recipe(exports=[ONNX[0], ONNX[2]]), tmp_path / "out"
    from flatq.pipeline import run as pipeline

    deliver = pipeline.deliver

    def failing(item: object, *rest: object) -> object:
        if item.name == "reduced":  # type: ignore[attr-defined]
            raise ExportError("reduced: the logit of token 3 differs")
        return deliver(item, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "deliver", failing)
        shown = flatq("run", recipe, "--out", out)
    assert shown.exit_code == 3
    assert "the logit of token 3 differs" in shown.stderr
    failed, good = json.loads((out / "report.json").read_text())["exports"]
    assert failed["error"] == "reduced: the logit of token 3 differs"
    assert good["files"]
    assert good["error"] is None
    assert "FAILED" in (out / "report.md").read_text()
    assert flatq("run", recipe, "--out", out).exit_code == 0
    assert [export.error for export in read_report(out / "report.json").exports] == [None, None]


@pytest.mark.slow
def test_quantized_baselines_are_built_and_evaluated_in_the_same_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    bench = {"provider": "cpu", "prompt": 4, "new_tokens": 3, "repeats": 1, "threads": 1}
    recipe = make_recipe(baselines=["dense", "quantized", "same_bytes"], exports=[{"onnx": {}}], bench=bench)
    out = tmp_path / "out"
    shown = flatq("run", recipe, "--out", out)
    assert shown.exit_code == 0, shown.stderr
    report = read_report(out / "report.json")
    assert report.baseline is not None
    alone, same = report.baselines
    assert (alone.name, same.name) == ("quantized", "same_bytes")
    assert alone.parameters == same.parameters == report.baseline.parameters
    assert alone.bytes > report.result.bytes
    assert abs(same.bytes / report.result.bytes - 1) < abs(alone.bytes / report.result.bytes - 1)
    for baseline in report.baselines:
        assert [text.text for text in baseline.quality] == [text.text for text in report.quality]
        assert all(text.kl > 0 for text in baseline.quality)
    assert [entry.name for entry in report.bench][:3] == [BASELINE, "onnx", "quantized"]
    said = (out / "report.md").read_text()
    assert "Narrowing, compared with quantization alone" in said
    assert f"({alone.description}): onnx decode" in said


def test_the_baseline_at_the_same_bytes_is_the_nearest_there_is() -> None:
    dense, spec = tiny_config(), GptqSpec(bits=4, group_size=16)
    sizes = {
        (bits, group): weight_bytes(dense, planned_grids(dense, GptqSpec(bits=bits, group_size=group)), 4)
        for bits in (2, 3, 4, 8)
        for group in (16, 32, 64, -1)
    }
    for wanted, target in sizes.items():
        found = nearest_in_bytes(spec, dense, target, 4)
        assert sizes[found.bits, found.group_size] == sizes[wanted]
    assert found.symmetric == spec.symmetric
