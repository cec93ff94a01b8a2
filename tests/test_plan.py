"""What is said before anything is computed: sizes are exact, memory and time are at least plausible."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flatq.artifact import Artifact, tokenizer_in
from flatq.compress.plan import RankPlan
from flatq.errors import ArtifactError, RecipeError
from flatq.export.bench import BenchResult, Spread, bench_table
from flatq.export.protocols import exporter_named
from flatq.machine.speed import Speed, measured_speed
from flatq.model.decoder import DecoderConfig
from flatq.plan import describe as planning
from flatq.plan import forecast, preview
from flatq.plan.describe import explanation
from flatq.plan.forecast import forecasts, working_bytes
from flatq.plan.operations import operations
from flatq.plan.sizes import artifact_bytes, cautions, disk_bytes, too_few_tokens
from flatq.recipe.grammar import Recipe
from flatq.report.render import read_report
from flatq.sources.source import open_model
from flatq.verbs import checked_options
from tests.conftest import FLAT, GPTQ, ONNX, MakeRecipe, flatq, usual_recipe
from tests.models import tiny_config

HEAD = "version: 1\nmodel: some/model\n"
BOTH = Recipe.parse(HEAD + "stages: [{flat: {keep_ratio: 0.7}}, {gptq: {group_size: 32, embedding: {bits: 8}}}]")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("stages: [{flat: {keep_ratio: 0.7}}]", ["keeps 70% of the decoder's parameters, curves allocation"]),
        ("stages: [{gptq: {bits: 3, group_size: -1}}]", ["3 bit symmetric, one group per row"]),
        ("stages: [{gptq: {symmetric: false, embedding: {}}}]", ["4 bit asymmetric, groups of 128, embedding 8 bit"]),
        ("exports: [{onnx: {name: mine, precision: fp32}}]", ["export       mine: onnx precision=fp32"]),
        ("exports: [{onnx: {}}]\nbench: {prompt: 7, new_tokens: 9}", ["prompt 7, 9 new tokens"]),
    ],
)
def test_a_recipe_in_words(recipe: str, words: list[str]) -> None:
    lines = "\n".join(explanation(Recipe.parse(HEAD + recipe)))
    assert "some/model" in lines
    assert all(word in lines for word in words)


def test_a_plan_needs_only_the_configuration(make_recipe: MakeRecipe, model_copy: Path) -> None:
    for file in model_copy.iterdir():
        if file.name != "config.json":
            file.unlink()
    shown = flatq("plan", make_recipe(model=str(model_copy), exports=ONNX))
    assert shown.exit_code == 0, shown.stderr
    dense = open_model(str(model_copy), need_weights=False).config
    assert f"{dense.parameters():,}" in shown.stdout
    assert f"{dense.decoder_parameters():,}" in shown.stdout
    for words in (
        "export reduced",
        "export gqa",
        "export fp32",
        "disk of the run",
        "compress",
        "all but exports",
        "equal shares",
    ):
        assert words in shown.stdout


@pytest.mark.parametrize("stages", [[FLAT], [GPTQ], [FLAT, GPTQ]], ids=["flat", "gptq", "both"])
def test_every_choice_of_stages_has_a_plan(stages: list[object], make_recipe: MakeRecipe) -> None:
    assert flatq("plan", make_recipe(stages=stages)).exit_code == 0


def test_a_plan_hears_the_exporter_s_objections(make_recipe: MakeRecipe) -> None:
    shown = flatq("plan", make_recipe(stages=[FLAT], exports=ONNX[:1]))
    assert shown.exit_code == 2
    assert "exports.reduced: onnx: precision: int4 writes the codes" in shown.stderr


def test_a_run_leaves_nothing_that_a_plan_did_not_foresee(exported_run: tuple[Path, Path]) -> None:
    recipe, out = Recipe.load(exported_run[0]), exported_run[1]
    artifact = Artifact.open(out)
    shards = sum(path.stat().st_size for path in artifact.root.glob("*.safetensors"))
    assert 0.5 * shards < artifact_bytes(artifact.config, recipe, 4) < 2 * shards
    assert disk_bytes(artifact.config, recipe, 4) > shards


def test_memory_and_disk_grow_with_model_and_text(tiny_model: Path) -> None:
    dense = open_model(str(tiny_model)).config
    wider = dense.with_layers([type(d)(d.heads, d.kv_heads, d.d_qk, d.d_v, 4096) for d in dense.layers])
    longer = BOTH.model_copy(update={"calibration": BOTH.calibration.model_copy(update={"samples": 1024})})
    assert working_bytes(dense, BOTH)["compress"] < working_bytes(wider, BOTH)["compress"]
    assert working_bytes(dense, BOTH) == working_bytes(dense, longer), "hidden states are on disk"
    assert working_bytes(dense, BOTH) == working_bytes(dense.with_layers(dense.layers * 9), BOTH)
    assert disk_bytes(dense, BOTH, 4) < disk_bytes(dense, longer, 4)


def test_too_little_text_for_the_width_is_said_beforehand_and_in_the_report(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_model: Path, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibration = usual_recipe(tiny_model, text_file)["calibration"]
    little = make_recipe("little", calibration={**calibration, "samples": 1})
    for words in (flatq("plan", little).stdout, reported(little, tmp_path / "little"), caplog.text):
        assert "fewer than the" in " ".join(words.split())
    assert "fewer than the" not in reported(make_recipe(), tmp_path / "enough")


@pytest.mark.parametrize(
    ("samples", "options", "said"),
    [
        (12, {"method": "paper"}, ""),
        (2, {"method": "paper"}, "are fewer than 4 times the 96 inputs"),
        (1, {"method": "paper"}, "ruins the model"),
        (1, {}, "fewer than the 96 inputs"),
        (2, {}, ""),
        (1, {"method": "paper", "shrinkage": 0.1}, "fewer than the 96 inputs"),
        (1, {"shrinkage": 0.0}, "ruins the model"),
    ],
)
def test_few_tokens_are_warned_of_or_refused_as_was_measured(
    make_recipe: MakeRecipe, samples: int, options: dict[str, Any], said: str
) -> None:
    calibration = {"dataset": "python-docs", "samples": samples, "seq_len": 64}
    stages = [{"flat": {"keep_ratio": 0.8, **options}}]
    recipe, dense = Recipe.load(make_recipe(calibration=calibration, stages=stages)), tiny_config(d_ff=(96, 64))
    words = cautions(recipe, dense) + too_few_tokens(recipe, dense)
    assert said in " ".join(words)
    assert bool(words) == bool(said)
    assert bool(too_few_tokens(recipe, dense)) == (said == "ruins the model")


def reported(recipe: Path, out: Path) -> str:
    """The report of a run, as Markdown."""
    assert flatq("run", recipe, "--out", out).exit_code == 0
    return (out / "report.md").read_text()


CHOOSING = [{"gptq": {"average_bits": 3.5, "group_size": 16}}]


@pytest.mark.parametrize(
    ("stages", "planned"), [([FLAT, GPTQ], ["sensitivity", "curves"]), (CHOOSING, ["sensitivity", "bits"])]
)
def test_a_forecast_names_the_phases_of_the_run_in_their_order(
    stages: list[Any], planned: list[str], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(stages=stages)
    assert flatq("run", recipe, "--out", tmp_path / "out", "--forecast").exit_code == 0
    report = read_report(tmp_path / "out" / "report.json")
    assert list(report.forecast) == ["baseline", *planned, "compress", "evaluate"]
    assert list(report.timing)[1:6] == list(report.forecast), "after the forecast itself"
    assert all(said.seconds > 0 for said in report.forecast.values())
    for phase, said in report.forecast.items():
        assert said.peak_rss_bytes == pytest.approx(report.memory[phase], rel=0.5)
    shown = (tmp_path / "out" / "report.md").read_text()
    assert "| compress |" in shown


def estimated(recipe: Recipe, config: DecoderConfig, **options: Any) -> dict[str, float]:
    """Seconds by phase."""
    found = forecasts(recipe, config, [replace(dims, d_ff=dims.d_ff // 2) for dims in config.layers], **options)
    return {phase: said.seconds for phase, said in found.items()}


def test_time_grows_with_layers_tokens_and_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "measured_speed", lambda *_: Speed(1e9, 1e9, 1e10))
    config = tiny_config(heads=8, kv_heads=4, d_ff=(256, 256), d_model=256)
    longer = BOTH.model_copy(update={"calibration": BOTH.calibration.model_copy(update={"samples": 512})})
    once, deep = estimated(BOTH, config), estimated(BOTH, config.with_layers(config.layers * 4))
    assert deep["compress"] > 3 * once["compress"]
    assert estimated(longer, config)["compress"] > 3 * once["compress"], "four times the tokens"
    assert estimated(longer, config)["baseline"] == once["baseline"]
    wide = tiny_config(heads=8, kv_heads=4, d_ff=(1024, 1024), d_model=256)
    assert estimated(BOTH, wide)["curves"] > 2.5 * once["curves"]


def test_the_products_of_a_phase_are_those_of_its_shapes() -> None:
    """Of a model without attention scores to speak of: two operations for each weight and token."""
    config = tiny_config(heads=1, kv_heads=1, d_qk=2, d_v=(2,), d_ff=(4096,), d_model=64)
    tokens = {"self-text": 0} | dict.fromkeys(("baseline", "sensitivity", "curves", "compress", "evaluate"), 1000)
    plan = [replace(dims, d_ff=2048) for dims in config.layers]
    found = operations(BOTH, config, plan, tokens, ranges=False)
    assert found["baseline"].solve == pytest.approx(2 * 1000 * config.parameters(), rel=0.01)
    assert found["evaluate"].solve < 0.6 * found["baseline"].solve
    assert found["baseline"].forward == 0, "scored in float32"


def test_ranges_of_keys_and_values_are_counted_if_an_export_wants_them() -> None:
    config = tiny_config()
    without = list(estimated(BOTH, config))
    assert without == ["baseline", "sensitivity", "curves", "compress", "evaluate"]
    assert list(estimated(BOTH, config, ranges=True)) == [*without, "cache-ranges"]
    assert list(working_bytes(config, BOTH, ranges=True)) == [*without, "cache-ranges"]


def test_a_rate_is_measured_once_and_in_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATQ_CACHE", str(tmp_path))
    measured_speed.cache_clear()
    began = time.perf_counter()
    first = measured_speed("cpu", "float32")
    assert time.perf_counter() - began < 5, "0.2 seconds, on a machine that others share more"
    assert first is measured_speed("cpu", "float32")
    assert min(first.forward, first.solve, first.moved) > 1e6
    measured_speed.cache_clear()
    assert first == measured_speed("cpu", "float32"), "another process reads it from the cache"
    (kept,) = tmp_path.rglob("*.json")
    kept.write_text(kept.read_text().replace('"at": ', '"at": -'))
    measured_speed.cache_clear()
    assert first != measured_speed("cpu", "float32"), "rates of another day are measured again"
    measured_speed.cache_clear()


def test_a_wide_model_is_planned_at_once(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Nothing of a 7B model is computed or allocated for it."""
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "silu", "torch_dtype": "float16",
    }  # fmt: skip
    (tmp_path / "7b").mkdir()
    (tmp_path / "7b" / "config.json").write_text(json.dumps(settings))
    recipe = make_recipe(model=str(tmp_path / "7b"), stages=[{"flat": {"keep_ratio": 0.7}}])
    began = time.perf_counter()
    shown = flatq("plan", recipe)
    assert shown.exit_code == 0, shown.stderr
    assert time.perf_counter() - began < 10, "one second where nobody else computes"
    assert "about" in shown.stdout


@pytest.mark.parametrize(("device", "share"), [("cpu", 0), ("cuda", 1), ("cuda:1", 1)])
def test_what_a_phase_holds_is_held_by_the_gpu_if_there_is_one(
    device: str, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    monkeypatch.setattr(forecast, "measured_speed", lambda *_: Speed(1e9, 1e9, 1e9))
    found = forecasts(BOTH, config, config.layers, device=device)["compress"]
    assert found.peak_device_bytes == share * working_bytes(config, BOTH)["compress"]
    shown = planning.forecast(BOTH, config, RankPlan(config.layers, 1.0, 1.0), [], 4, {"compress": found})
    assert ("memory of the GPU" in shown) == bool(share)


def test_options_that_an_exporter_refuses_are_named() -> None:
    onnx = exporter_named("onnx")
    assert checked_options(onnx, {"precision": "fp32"}).model_dump()["precision"] == "fp32"
    with pytest.raises(RecipeError) as raised:
        checked_options(onnx, {"precision": "int5", "wings": 2})
    assert sorted(problem.split(":")[0] for problem in raised.value.problems) == [
        "--option precision",
        "--option wings",
    ]


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no usable tokenizer"):
        tokenizer_in(tmp_path)


def test_a_bench_table_has_a_row_for_each_runner() -> None:
    spread = Spread(2.0, 1.0, 3.0)
    results = [
        BenchResult(name, "CPUExecutionProvider", 1, 1, 4, 2, 1, 0.5, spread, spread, spread, 10**8, 10**9, None)
        for name in ("dense", "mine")
    ]
    table = bench_table(results)
    assert "dense" in table
    assert "mine" in table
    assert "2.0 (1.0-3.0)" in table


def test_a_bench_table_says_what_a_device_holds() -> None:
    spread = Spread(10.0, 9.0, 11.0)
    result = BenchResult(
        "a", "CUDAExecutionProvider", 1, 1, 4, 2, 1, 0.5, spread, spread, spread, 10**8, 10**9, 3 * 10**9
    )
    assert "+ 3" in (table := bench_table([result]))
    assert "device" in table


def test_check_opens_no_model(make_recipe: MakeRecipe) -> None:
    recipe = Recipe.load(make_recipe(model="/nowhere/at/all", exports=ONNX))
    assert any("/nowhere/at/all" in line for line in preview.check(recipe))
