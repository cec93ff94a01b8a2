"""``flatq eval`` where something is missing or asked for in part: what is compared then, and on which text."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from flatq.artifact import MANIFEST, tokenizer_in
from flatq.calibration.perplexity import perplexity
from flatq.errors import ArtifactError, ExportError, RecipeError
from flatq.export.quality import TOKENS
from flatq.files import write_checksummed
from flatq.pipeline.evaluate import evaluate
from flatq.pipeline.texts import tokens_of
from flatq.recipe.grammar import Recipe
from tests.structured import Made, Runs

GPTQ = {"gptq": {"bits": 3, "group_size": 16}}


@pytest.fixture
def made(runs: Runs) -> Made:
    """A run with an export, judged on 64 rows of 64 tokens."""
    exports = [{"onnx": {"precision": "fp32"}}]
    return runs(evaluation={"tokens": 4096}, stages=[GPTQ], exports=exports)


def copied(made: Made, place: Path, recipe: str = "") -> Path:
    """The run folder elsewhere, its artifact with another recipe or none."""
    root = Path(shutil.copytree(made.root, place))
    write_checksummed(root / "artifact" / MANIFEST, {**made.artifact.manifest, "recipe": recipe})
    return root


def without_dense_model(made: Made, runs: Runs, place: Path) -> Path:
    return copied(made, place, made.artifact.manifest["recipe"].replace(str(runs.model), str(place / "gone")))


def scored(made: Made, rows: int) -> float:
    """Perplexity of the artifact on the first rows of its own text."""
    recipe, tokenizer = Recipe.parse(made.artifact.manifest["recipe"]), tokenizer_in(made.artifact.root)
    text = tokens_of(recipe, tokenizer, made.artifact.config.vocab).evaluation[0]
    return perplexity(made.artifact, text.tokens[:rows]).value


def test_an_artifact_without_its_dense_model_is_scored_alone_and_says_so(
    made: Made, runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = without_dense_model(made, runs, tmp_path / "run")
    assert evaluate(str(root)) == [f"corpus: perplexity {scored(made, 64):.4f}"]
    assert f"{tmp_path}/run/gone" in caplog.text
    assert f"{scored(made, 64):.4f}" != f"{scored(made, 32):.4f}"


def test_an_export_without_its_dense_model_is_compared_with_its_artifact(
    made: Made, runs: Runs, tmp_path: Path
) -> None:
    root = without_dense_model(made, runs, tmp_path / "run")
    (line,) = evaluate(str(root / "exports" / "onnx"))
    assert line.endswith(")")
    assert "artifact" in line.rpartition("(")[2]
    assert f"perplexity {scored(made, TOKENS // 64):.4g} -> {scored(made, TOKENS // 64):.4g}" in line
    assert "KL 0.000" in line
    (line,) = evaluate(str(made.root / "exports" / "onnx"))
    assert line.startswith("corpus (kind calibrated on): perplexity")
    assert "KL 0.000" not in line
    assert "artifact" not in line


def test_an_artifact_that_no_recipe_made_is_scored_alone_on_a_text_of_its_own(made: Made, tmp_path: Path) -> None:
    root = copied(made, tmp_path / "run")
    (line,) = evaluate(str(root), tokens=512, seq_len=32)
    (beside,) = evaluate(str(made.root), dataset="python-docs", tokens=512, seq_len=32)
    found, wanted = (re.search(r"^python-docs: perplexity (?:.* -> )?([\d.]+)", text) for text in (line, beside))
    assert found is not None
    assert wanted is not None
    assert float(found[1]) == pytest.approx(float(wanted[1]), rel=1e-3)


def test_a_part_of_the_run_s_texts_can_be_asked_for_but_no_other_length(made: Made) -> None:
    (line,) = evaluate(str(made.root), tokens=130)
    assert f"-> {scored(made, 2):.4g}, " in line
    with pytest.raises(RecipeError, match=r"^--seq-len: "):
        evaluate(str(made.root), seq_len=32)


def test_a_damaged_artifact_is_told_and_not_taken_for_a_pretrained_model(made: Made, tmp_path: Path) -> None:
    root = copied(made, tmp_path / "run") / "artifact"
    (root / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        evaluate(str(root))


def test_an_export_whose_format_has_no_runtime_is_refused_with_its_artifact(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatq_onnx.OnnxExporter.open", lambda *_, **__: None)
    with pytest.raises(ExportError, match=rf"'onnx'.* {made.artifact.root}$"):
        evaluate(str(made.root / "exports" / "onnx"))


def test_a_text_that_the_model_wrote_is_written_again_for_eval(runs: Runs) -> None:
    calibration = {"dataset": "self", "path": None, "samples": 4, "seq_len": 32}
    made = runs(calibration=calibration, evaluation={"dataset": None, "tokens": 128, "seq_len": 32}, stages=[GPTQ])
    assert [text["calibrated"] for text in made.report["quality"]] == [True, False]
    for line, text in zip(evaluate(str(made.root)), made.report["quality"], strict=True):
        assert line.startswith(text["text"])
        assert f"perplexity {text['baseline_perplexity']:.4g} -> {text['perplexity']:.4g}, " in line
