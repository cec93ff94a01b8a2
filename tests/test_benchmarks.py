"""The quality harness on a tiny model: its baselines' laws, its rows, its way of going on."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError, create_model
from typer.testing import CliRunner, Result

from flatq.artifact import Artifact
from flatq.calibration.perplexity import perplexity
from flatq.calibration.walk import walk
from flatq.model.dims import LayerDims
from flatq.pipeline import run as pipeline
from flatq.recipe.blocks import CalibrationSpec, EvaluationSpec, FlatSpec
from flatq.recipe.grammar import Recipe
from tests.models import EXACT, RandomWeights, tiny_config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import baselines
import budget
import quality
import quality_grid as grid
import quality_lab
import quality_summary
import quality_tables as tables
import results_page

TOKENS = torch.randint(128, (4, 24), generator=torch.Generator().manual_seed(0))
HELDOUT = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(1))
FLAT = {"rank_multiple": 4, "width_multiple": 16}


def compressed(weights: RandomWeights, stage: baselines.Stage, layers: tuple[LayerDims, ...], work: Path) -> Any:
    """What a baseline makes of the weights."""
    made = RandomWeights(weights.config.with_layers(layers))
    made.tensors = dict(weights.tensors)

    def save(block: Any) -> None:
        made.tensors |= {f"layers.{block.index}.{name}": p.detach() for name, p in block.layer.named_parameters()}

    for block in walk(weights, TOKENS, work, save, execution=EXACT):
        stage.apply(block)
    return made


def score(weights: Any) -> float:
    return perplexity(weights, HELDOUT).value


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_selecting_every_channel_changes_nothing(by_norm: bool, kv_heads: int, tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config(kv_heads=kv_heads, qkv_bias=True, mlp_bias=True))
    stage = baselines.Selection(weights.config.layers, by_norm=by_norm)
    assert score(compressed(weights, stage, weights.config.layers, tmp_path)) == pytest.approx(score(weights))


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_removing_channels_that_weigh_nothing_changes_nothing(by_norm: bool, kv_heads: int, tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config(kv_heads=kv_heads))
    dims = weights.config.layers[0]
    # Truncation keeps the first, so the dead ones are the last; by norm it does not matter where they are.
    values = torch.arange(16) % 4 != 1 if by_norm else torch.arange(16) < 12
    channels = torch.arange(96) % 3 != 1 if by_norm else torch.arange(96) < 64
    for index in range(2):
        name = f"layers.{index}."
        weights.tensors[name + "v.weight"][~values.repeat(kv_heads)] = 0
        weights.tensors[name + "o.weight"][:, ~values.repeat(dims.heads)] = 0
        for linear in ("gate", "up"):
            weights.tensors[name + linear + ".weight"][~channels] = 0
        weights.tensors[name + "down.weight"][:, ~channels] = 0
    layers = tiny_config(kv_heads=kv_heads, d_v=(12, 12), d_ff=(64, 64)).layers
    made = compressed(weights, baselines.Selection(layers, by_norm=by_norm), layers, tmp_path)
    assert made.tensors["layers.1.o.weight"].shape == (64, 48)
    assert score(made) == pytest.approx(score(weights), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 9), features=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_whitened_truncation_is_the_papers_formula(out: int, features: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, features, generator=generator, dtype=torch.float64)
    x = torch.randn(40, features, generator=generator, dtype=torch.float64)
    rank = min(rank, out, features)
    root = baselines.square_root(x.T @ x / 40, "here")
    u, s, vt = torch.linalg.svd(w @ root, full_matrices=False)
    wanted = u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)
    torch.testing.assert_close(baselines.nearest_of_rank(w, rank, root), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_whitening_has_the_smaller_output_error_and_the_plain_svd_the_smaller_weight_error(rank: int) -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(16, 12, generator=generator)
    x = torch.randn(200, 12, generator=generator) * torch.logspace(-1, 1, 12)
    plain = baselines.nearest_of_rank(w, rank)
    whitened = baselines.nearest_of_rank(w, rank, baselines.square_root(x.T @ x, "here"))
    assert torch.linalg.matrix_rank(whitened) <= rank
    assert (x @ (w - whitened).T).norm() <= (x @ (w - plain).T).norm() + 1e-3
    assert (w - plain).norm() <= (w - whitened).norm() + 1e-5


@pytest.mark.parametrize("whiten", [False, True])
def test_low_rank_spends_its_budget(whiten: bool, tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config())
    stage = baselines.LowRank(0.5, whiten=whiten)
    made = compressed(weights, stage, weights.config.layers, tmp_path)
    for name in ("q", "o", "gate", "down"):
        w = made.tensors[f"layers.1.{name}.weight"]
        assert torch.linalg.matrix_rank(w, rtol=1e-4) == stage.rank(tuple(w.shape))
    share = stage.parameters(weights.config) / weights.config.decoder_parameters()
    assert share == pytest.approx(0.5, abs=0.02)


def test_a_stream_that_is_not_cut_loses_nothing() -> None:
    weights = RandomWeights(tiny_config())
    sliced = baselines.slicegpt(weights, TOKENS, HELDOUT, 1.0, precision="float32")
    assert sliced.perplexity == pytest.approx(score(weights), rel=1e-4)
    assert sliced.parameters == weights.config.decoder_parameters()


def test_slicing_a_stream_that_lives_in_fewer_directions_loses_nothing() -> None:
    weights = RandomWeights(tiny_config())
    width = baselines.sliced_width(weights.config, 0.7)
    axes = torch.linalg.qr(torch.randn(64, width, generator=torch.Generator().manual_seed(5))).Q
    weights.tensors["embed.weight"] = weights.tensors["embed.weight"] @ axes @ axes.T
    for name in [name for name in weights.names() if name.endswith(("o.weight", "down.weight"))]:
        weights.tensors[name] = axes @ axes.T @ weights.tensors[name]
    sliced = baselines.slicegpt(weights, TOKENS, HELDOUT, 0.7, precision="float32")
    assert sliced.width == width
    assert sliced.perplexity == pytest.approx(score(weights), rel=1e-3)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_a_sliced_decoder_holds_its_budget_with_its_skip_matrices(keep: float) -> None:
    config = tiny_config()
    parameters = baselines.sliced_parameters(config, baselines.sliced_width(config, keep))
    assert parameters / config.decoder_parameters() == pytest.approx(keep, abs=0.02)


def test_new_values_of_the_recipe_appear_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = create_model(
        "Grown", __base__=FlatSpec, method=(Literal["paper", "new"], "new"), trick=(bool | None, None), other=(int, 3)
    )
    monkeypatch.setattr(grid, "FlatSpec", grown)
    labels = [variant.label for variant in grid.variants()]
    assert {"paper iprs", "paper uniform", "new iprs", "new uniform", *grid.BASELINES} <= set(labels)
    levers = {variant.label for variant in grid.variants(levers=True)} - set(labels)
    assert {"new trick=True", "new trick=False"} <= levers
    assert not any("other" in label or "keep_ratio" in label for label in levers)


@pytest.mark.parametrize("method", grid.choices("method"))
def test_a_lever_changes_what_its_method_does(method: str) -> None:
    own = grid.Variant(method).flat(0.8)
    levers = [v for v in grid.variants(levers=True) if v.method == method and v.allocation is None]
    assert levers
    made = [lever.flat(0.8) for lever in levers]
    assert all((lever.parts, lever.uniform) != (own.parts, own.uniform) for lever in made)


def test_every_setting_names_another_row(text_file: Path) -> None:
    def keys(**changed: Any) -> set[str]:
        usual: dict[str, Any] = {
            "texts": [str(text_file)],
            "score_text": None,
            "keep_ratios": [0.8],
            "tokens": [1024],
            "seeds": [1],
        }
        made = grid.rows([grid.Variant("paper", "iprs")], **{**usual, **changed})
        return {grid.key_of(row.settings("model")) for row in made}

    changes: list[dict[str, Any]] = [
        {"texts": ["python-docs"]},
        {"score_text": "python-docs"},
        {"keep_ratios": [0.7]},
        {"tokens": [2048]},
        {"seeds": [2]},
        {"seq_len": 512},
        {"score_tokens": 4096},
        {"score_seq_len": 256},
    ]
    all_keys = keys().union(*(keys(**change) for change in changes))
    assert len(all_keys) == 1 + len(changes)
    assert len(keys(gptq=True)) == 3
    assert keys(score_text=str(text_file)) == keys()  # the same as not naming it


def test_a_text_counts_by_content_and_its_place_stays_private(tmp_path: Path) -> None:
    here, there = tmp_path / "a.txt", tmp_path / "elsewhere" / "a.txt"
    there.parent.mkdir()
    here.write_text("one")
    there.write_text("one")
    assert grid.text_identity("text", str(here)) == grid.text_identity("text", str(there))
    assert str(tmp_path) not in grid.text_identity("text", str(here))
    there.write_text("two")
    assert grid.text_identity("text", str(here)) != grid.text_identity("text", str(there))


def harness(model: Path, text: Path, out: Path, *more: str) -> Result:
    """What the command line answers, at a size that fits the tiny model."""
    sizes = {"--seq-len": 64, "--tokens": 512, "--score-tokens": 256, "--score-seq-len": 64, "--keep": 0.8}
    arguments = [str(part) for pair in sizes.items() for part in pair]
    options = [part for key, value in FLAT.items() for part in ("--set", f"{key}={value}")]
    usual = ["--model", str(model), "--text", str(text), "--out", str(out), *arguments, *options]
    return CliRunner().invoke(quality.app, [*usual, *more])


@pytest.fixture(scope="module")
def measured(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quality") / "results" / "quality.json"
    shown = harness(
        tiny_model,
        text_file,
        out,
        "--gptq",
        *(f"--only={name}" for name in ("paper iprs", "default curves", *grid.BASELINES)),
    )
    assert shown.exit_code == 0, shown.output
    return out


def test_every_row_has_its_number(measured: Path, tiny_model: Path) -> None:
    rows = json.loads(measured.read_text())["rows"].values()
    labels = {(row["method"], row["allocation"], row["gptq"] is not None) for row in rows}
    assert {("none", None, True), ("paper", "iprs", False), ("paper", "iprs", True)} <= labels
    assert {(name, None, False) for name in grid.BASELINES} <= labels
    for row in rows:
        assert "refused" not in row, row["refused"]
        assert row["share"] == pytest.approx(1 if row["method"] == "none" else 0.8, abs=0.03)
        assert row["perplexity"] == pytest.approx(row["dense_perplexity"] * torch.tensor(row["damage"]).exp().item())
        assert row["compress_seconds"] > 0
    assert str(tiny_model.parent) not in measured.read_text()


@pytest.mark.parametrize("gptq", [False, True])
@pytest.mark.parametrize(("method", "allocation"), [("paper", "iprs"), ("default", "curves")])
def test_a_flat_row_is_what_flatq_run_would_make(
    method: str, allocation: str, gptq: bool, measured: Path, make_recipe: Any, tmp_path: Path
) -> None:
    flat = {"flat": {"keep_ratio": 0.8, "method": method, "allocation": allocation, **FLAT}}
    file = make_recipe(stages=[flat, {"gptq": {"bits": 4, "group_size": 32}}] if gptq else [flat])
    recipe = Recipe.load(file)
    calibration = recipe.calibration.model_copy(update={"precision": "auto"})
    run = pipeline.run(recipe.model_copy(update={"calibration": calibration}), tmp_path / "run", device="cpu")
    report = json.loads((run / "report.json").read_text())
    rows = json.loads(measured.read_text())["rows"].values()
    row = next(row for row in rows if row["label"].startswith(f"{method} {allocation}") and bool(row["gptq"]) == gptq)
    share = Artifact.open(run).config.decoder_parameters() / report["baseline"]["decoder_parameters"]
    assert row["share"] == share
    judged = next(text for text in report["quality"] if text["calibrated"])  # the harness scores the same text
    assert row["perplexity"] == pytest.approx(judged["perplexity"], rel=1e-6)
    assert row["dense_perplexity"] == pytest.approx(judged["baseline_perplexity"], rel=1e-6)


def test_the_table_and_the_plot_stand_beside_the_rows(measured: Path) -> None:
    table = measured.with_suffix(".md").read_text()
    assert "| svd-llm | 80% |" in table
    assert "With GPTQ on top" in table
    assert measured.with_suffix(".svg").read_text().startswith("<?xml")


def test_a_second_call_measures_nothing(
    measured: Path, tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = measured.read_bytes()
    monkeypatch.setattr(quality_lab.Laboratory, "measure", lambda *_: pytest.fail("measured again"))
    shown = harness(tiny_model, text_file, measured, "--gptq", "--only=paper iprs", "--only=svd")
    assert shown.exit_code == 0, shown.output
    assert measured.read_bytes() == before


def test_a_killed_run_keeps_its_rows_and_goes_on(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def measure(_: Any, row: grid.Row) -> dict[str, Any]:
        if made == ["truncation"]:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(row.variant.label)
        return {**result(), **row.settings("m"), "label": row.variant.label, "code": quality_lab.code_digest()}

    monkeypatch.setattr(quality_lab.Laboratory, "measure", measure)
    out, only = tmp_path / "quality.json", ("--only=truncation", "--only=magnitude")
    assert harness(tiny_model, text_file, out, *only).exit_code != 0
    assert len(json.loads(out.read_text())["rows"]) == 1
    assert harness(tiny_model, text_file, out, *only).exit_code == 0
    assert made == ["truncation", "killed", "magnitude"]


def test_rows_of_older_code_are_kept_unless_asked_for(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def measure(_: Any, row: grid.Row) -> dict[str, Any]:
        made.append(row.variant.label)
        return {**result(), **row.settings("m"), "label": row.variant.label, "code": "old"}

    monkeypatch.setattr(quality_lab.Laboratory, "measure", measure)
    for more in ((), (), ("--redo-stale",)):
        assert harness(tiny_model, text_file, tmp_path / "q.json", "--only=magnitude", *more).exit_code == 0
    assert len(made) == 2


def test_a_budget_that_cannot_be_reached_is_a_row_that_says_why(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q.json"
    shown = harness(tiny_model, text_file, out, "--only=paper uniform", "--keep", "0.05")
    assert shown.exit_code == 0, shown.output
    refused = [row for row in json.loads(out.read_text())["rows"].values() if row["damage"] is None]
    assert ["cannot be reached" in row["refused"] for row in refused] == [True]
    assert "refused: stages.flat.keep_ratio" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--grid", "medium"), "allowed: small, full"),
        (("--only", "nothing-like-it"), "there are: default curves"),
        (("--set", "ridge"), "not KEY=VALUE"),
        (("--text", "no-such-file.txt"), "or a .txt or .jsonl file"),
    ],
)
def test_a_wrong_argument_is_a_sentence_with_a_way_out(
    arguments: tuple[str, ...], words: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    shown = harness(tiny_model, text_file, tmp_path / "q.json", *arguments)
    assert shown.exit_code == 2
    assert words in shown.output


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 99, "rows": {}}'])
def test_a_file_of_something_else_is_refused_and_left_alone(
    content: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q.json"
    out.write_text(content)
    shown = harness(tiny_model, text_file, out, "--only=magnitude")
    assert shown.exit_code == 3
    assert out.read_text() == content


def result(**changed: Any) -> dict[str, Any]:
    """A finished row."""
    row = grid.Row(
        grid.Variant("paper", "iprs"),
        0.8,
        CalibrationSpec(dataset="python-docs"),
        EvaluationSpec(dataset="held-out"),
    )
    numbers = {"share": 0.8, "dense_perplexity": 10.0, "perplexity": 20.0, "damage": 0.7, "compress_seconds": 2.0}
    return {"label": "paper iprs", **row.settings("m"), "code": "c", "score_seconds": 1.0, **numbers, **changed}


def test_the_table_takes_means_over_seeds_and_compares_with_the_paper(tmp_path: Path) -> None:
    better = {"label": "better", "method": "better", "compress_seconds": 3.0}
    rows = [
        result(),
        result(seed=2, damage=0.5),
        result(**better, damage=0.2),
        result(**better, seed=2, damage=0.4),
        result(label="none", method="none", keep_ratio=1.0, gptq={"bits": 4}, damage=0.1),
        result(**better, gptq={"bits": 4}, damage=0.35),
    ]
    out = tmp_path / "q.json"
    tables.write({str(number): row for number, row in enumerate(rows)}, out)
    table = out.with_suffix(".md").read_text()
    assert "| better | 80% | 80.00% | 20.00 | 0.3000 (0.2000 to 0.4000) | 0.50 | 3.0 (1.50 x) | 2 |" in table
    assert "| better | 80% | 0.3000 | 0.1000 | 0.4000 | 0.3500 | -0.0500 |" in table


def test_the_results_page_has_one_quality_table_per_calibration_setting() -> None:
    better = {"label": "better", "method": "better"}
    rows = [
        result(damage=0.5),
        result(seed=2, damage=0.7),
        result(**better, damage=0.3),
        result(keep_ratio=0.5, damage=2.0),
        result(**better, gptq={"bits": 4}, damage=0.35),
        result(label="better refit=False", method="better", options={"refit": False}, damage=0.4),
    ]
    text = quality_summary.markdown({str(number): row for number, row in enumerate(rows)})
    assert "| damage | 20% removed | 50% removed |" in text
    assert "| better | 0.300 (0.50) |  |\n| paper iprs | 0.600 ± 0.141 (1.00) | 2.000 (1.00) |" in text
    assert "refit" not in text


def test_a_results_table_that_is_not_rectangular_is_refused() -> None:
    origin = {"machine": "m", "date": "2026-11-22", "commit": "abc", "command": "c", "note": ""}
    table = results_page.Table(section="s", title="t", columns=["", "a"], rows=[["x", 1000]], **origin)
    assert "| x | 1,000 |" in table.markdown()
    with pytest.raises(ValidationError, match="row 'x' has 3 cells for 2 columns"):
        results_page.Table(section="s", title="t", columns=["", "a"], rows=[["x", 1, 2]], **origin)
    with pytest.raises(ValidationError, match="date"):
        results_page.Table(section="s", title="t", columns=[""], rows=[], **{**origin, "date": "yesterday"})


def test_a_table_is_written_with_its_day_and_commit_and_read_again(tmp_path: Path) -> None:
    about: dict[str, Any] = {"section": "Speed", "title": "Two rows", "note": "", "machine": "any", "command": "make x"}
    results_page.write_table(tmp_path / "1.json", columns=["", "a"], rows=[["one", 1.5], ["two", 2]], **about)
    (read,) = results_page.read_tables(tmp_path).values()
    assert read.rows == [["one", 1.5], ["two", 2]]
    assert read.commit
    with pytest.raises(ValidationError, match="has 1 cells for 2 columns"):
        results_page.write_table(tmp_path / "2.json", columns=["", "a"], rows=[["one"]], **about)
    assert not (tmp_path / "2.json").exists()


def test_a_budget_s_table_ranks_its_predictions_and_names_what_is_missing() -> None:
    def row(kind: str, share: float, predicted: float, lost: float) -> dict[str, Any]:
        found = {"docs": 8 * math.exp(lost), "code": 16 * math.exp(2 * lost), "self": 99.0}
        about = {"kind": kind, "share": share, "predicted": predicted, "perplexity": found}
        return about | {"bytes": 75e6 * share, "planned": 75e6 * share, "tokens": 512}

    rows = [row("dense", 0, 0, 0), row("joint", 1.0, 0.1, 0.2), row("bits", 1.0, 0.2, 0.1), row("joint", 0.45, 3, 2)]
    rows.append(row("average", 1.0, math.nan, 0.5))
    found = budget.table(rows, argparse.Namespace(calibration="self", rows=1, samples=2))
    assert [line[0] for line in found["rows"]] == ["joint", "average", "bits", "joint"]
    assert found["rows"][0] == ["joint", 33.75, 0.0, "3.000", "2.000", "4.000", "0.000", "3.000"], (
        "self was calibrated on"
    )
    assert found["rows"][1][3] == "", "not all of its choices were measured"
    assert "predicted and mean damage: 0.50 (3 plans)" in found["note"]
    assert "widths at 33.7 MB" in found["note"]
    assert "bits at 33.7 MB" not in found["note"], "impossible"
