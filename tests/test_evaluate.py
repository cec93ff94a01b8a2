"""``flatq eval`` where something is missing or asked for in part: what is compared then, and on which text."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flatq.artifact import MANIFEST, tokenizer_in
from flatq.calibration.perplexity import perplexity
from flatq.errors import ArtifactError, ExportError, RecipeError
from flatq.export.folder import DESCRIPTION, description_of
from flatq.export.quality import TOKENS
from flatq.files import write_checksummed
from flatq.pipeline.evaluate import ALL_TOKENS, SEQ_LEN, evaluate
from flatq.pipeline.texts import tokens_of
from flatq.recipe.grammar import Recipe
from flatq.sources.source import open_model
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
    assert "self-text" in made.report["timing"]
    for line, text in zip(evaluate(str(made.root)), made.report["quality"], strict=True):
        assert line.startswith(text["text"])
        assert f"perplexity {text['baseline_perplexity']:.4g} -> {text['perplexity']:.4g}, " in line


def test_the_files_are_checked_unless_that_is_left_out(made: Made, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made.root, tmp_path / "run"))
    places, usual = (root, root / "exports" / "onnx"), [evaluate(str(made.root), tokens=130)]
    usual.append(evaluate(str(made.root / "exports" / "onnx"), tokens=130))
    settings = root / "artifact" / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    for place, lines in zip(places, usual, strict=True):
        with pytest.raises(ArtifactError, match=r"tokenizer_config\.json"):
            evaluate(str(place))
        assert evaluate(str(place), tokens=130, check=False) == lines
    graph = root / "exports" / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x80\x7d\x00")  # a field that no reader of protobuf knows
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        evaluate(str(places[1]), tokens=130)
    assert evaluate(str(places[1]), tokens=130, check=False) == usual[1]


def test_an_export_that_was_copied_elsewhere_is_judged_without_its_run(made: Made, tmp_path: Path) -> None:
    alone = shutil.copytree(made.root / "exports" / "onnx", tmp_path / "onnx")
    assert evaluate(str(alone)) == evaluate(str(made.root / "exports" / "onnx"))


@pytest.fixture
def orphan(made: Made, runs: Runs, tmp_path: Path) -> Path:
    """An export elsewhere, whose run and dense model are gone."""
    return orphaned(made, runs, tmp_path)


def orphaned(made: Made, runs: Runs, place: Path) -> Path:
    alone = Path(shutil.copytree(made.root / "exports" / "onnx", place / "onnx"))
    described = description_of(alone)
    recipe = described.recipe.replace(str(runs.model), str(place / "gone"))
    write_checksummed(alone / DESCRIPTION, described.model_copy(update={"recipe": recipe}).model_dump())
    return alone


def test_an_export_without_its_run_and_its_dense_model_is_scored_alone(
    made: Made, orphan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = evaluate(str(orphan))
    name, _, value = line.partition(": perplexity ")
    assert name == "corpus"
    assert float(value) == pytest.approx(scored(made, TOKENS // 64), rel=1e-3)
    monkeypatch.setattr("flatq_onnx.OnnxExporter.open", lambda *_, **__: None)
    with pytest.raises(ExportError, match="'onnx'"):
        evaluate(str(orphan))


def test_a_text_of_a_dense_model_that_is_gone_is_replaced_and_that_is_said(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibration = {"dataset": "self", "path": None, "samples": 4, "seq_len": 32}
    evaluation = {"dataset": None, "tokens": 128, "seq_len": 32}
    exports = [{"onnx": {"precision": "fp32"}}]
    made = runs(calibration=calibration, evaluation=evaluation, stages=[GPTQ], exports=exports)
    (line,) = evaluate(str(orphaned(made, runs, tmp_path)), tokens=128)
    assert line.startswith("python-docs: perplexity")
    assert "python-docs is used instead" in caplog.text


def test_a_pretrained_model_is_scored_on_a_text_of_the_usual_length(tiny_model: Path) -> None:
    written = {"dataset": "python-docs", "tokens": ALL_TOKENS, "seq_len": SEQ_LEN}
    assert evaluate(str(tiny_model)) == evaluate(str(tiny_model), **written)
    assert evaluate(str(tiny_model), tokens=100) == evaluate(str(tiny_model), tokens=100, seq_len=100)


def test_a_pretrained_model_without_all_its_weights_is_refused(model_copy: Path) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"layers\.2\.up\.weight is missing"):
        evaluate(str(model_copy))


def test_all_of_a_short_text_is_scored_but_the_sixteen_tokens_of_an_example(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    tokenizer, text = open_model(str(tiny_model)).tokenizer(), text_file.read_text()
    short = tokenizer.decode(tokenizer(text)["input_ids"][:48])
    assert len(tokenizer(short)["input_ids"]) == 48
    (tmp_path / "short.txt").write_text(short)
    (line,) = evaluate(str(tiny_model), path=tmp_path / "short.txt", tokens=32, seq_len=32)
    assert line.startswith("short: perplexity")
    with pytest.raises(RecipeError, match="leaves 15 tokens for calibration"):
        evaluate(str(tiny_model), path=tmp_path / "short.txt", tokens=33, seq_len=33)
