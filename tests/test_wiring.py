"""Every key of the recipe reaches the numbers that it is about: changed alone, it changes these tensors, this way.

A key that is read and then ignored breaks no law and no shape: the run ends well, with other numbers than were asked
for. So each key has a case here, on a small model with structure, and a new key without a case fails.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from flatq.budget.joint import JointPlan, guessed, plan_jointly
from flatq.budget.limits import prices_of
from flatq.calibration.perplexity import final_hidden
from flatq.errors import NumericsError, RecipeError
from flatq.export.planned import planned_exports
from flatq.export.speed import SpeedLoad, SpeedModel
from flatq.model.decoder import LINEARS, DecoderConfig
from flatq.model.footprint import decode_bytes
from flatq.model.grid import round_to_nearest
from flatq.recipe import blocks
from flatq.recipe.budget import BudgetSpec
from flatq.recipe.grammar import Recipe
from flatq.recipe.recovery import RecoverSpec
from flatq.sources.source import open_model
from flatq_onnx import OnnxExporter
from tests.conftest import flatq
from tests.structured import LAYERS, Made, Runs
from tests.test_speed_limits import Invented, problem

FLAT: dict[str, Any] = {"keep_ratio": 0.75, "rank_multiple": 2, "width_multiple": 8}
EVEN = FLAT | {"allocation": "uniform", "correction": 0}  # the first layer is narrowed, and nothing came before it
GPTQ: dict[str, Any] = {"bits": 3, "group_size": 16}
Case = Callable[[Runs], None]
CASES: dict[str, Case] = {}
SPECS = {
    "model": blocks.ModelSpec,
    "calibration": blocks.CalibrationSpec,
    "calibration.mix": blocks.MixedSpec,
    "evaluation": blocks.EvaluationSpec,
    "budget": BudgetSpec,
    "flat": blocks.FlatSpec,
    "gptq": blocks.GptqSpec,
    "recover": RecoverSpec,
    "gptq.embedding": blocks.EmbeddingSpec,
    "gptq.overrides": blocks.OverrideSpec,
    "exports": blocks.ExportSpec,
    "bench": blocks.BenchSpec,
}
NOT_KEYS = {"version", "stages", *(block.split(".")[0] for block in SPECS)}


def keys_of(recipe: type[BaseModel], specs: Mapping[str, type[BaseModel]]) -> list[str]:
    """``flat.ridge``, ..., and the keys of the recipe that are no blocks."""
    alone = [key for key in recipe.model_fields if key not in NOT_KEYS]
    return [f"{block}.{key}" for block, spec in specs.items() for key in spec.model_fields] + alone


KEYS = keys_of(Recipe, SPECS)


def case(key: str) -> Callable[[Case], Case]:
    def note(check: Case) -> Case:
        CASES[key] = check
        return check

    return note


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_what_it_is_about(key: str, runs: Runs) -> None:
    assert key in CASES, f"{key} is a key of the recipe without a case in {Path(__file__).name}; write one"
    CASES[key](runs)


def test_there_is_no_case_for_a_key_that_is_gone() -> None:
    assert not set(CASES) - set(KEYS)


def test_every_block_is_looked_at() -> None:
    named = {spec.__name__ for spec in SPECS.values()}
    assert {name for name in vars(blocks) if name.endswith("Spec")} - {"Spec", "TextSpec"} <= named


class MoreFlat(blocks.FlatSpec):
    novelty: int = 0


class MoreRecipe(Recipe):
    new_block: int = 0


def test_a_new_key_without_a_case_fails(runs: Runs) -> None:
    new = [key for key in keys_of(MoreRecipe, SPECS | {"flat": MoreFlat}) if key not in CASES]
    assert new == ["flat.novelty", "new_block"]
    for key in new:
        with pytest.raises(AssertionError, match=rf"{key} is a key of the recipe without a case"):
            test_a_key_changes_what_it_is_about(key, runs)


def flat(runs: Runs, base: dict[str, Any] = FLAT, **changed: Any) -> Made:
    settings = base | changed
    return runs(stages=[{"flat": {key: value for key, value in settings.items() if value is not None}}])


def gptq(runs: Runs, **changed: Any) -> Made:
    return runs(stages=[{"gptq": GPTQ | changed}])


def pairs(runs: Runs, stage: Callable[..., Made], key: str, *values: Any, **base: Any) -> list[Made]:
    return [stage(runs, **base, **{key: value}) for value in values]


def same(one: Made, other: Made, *names: str) -> bool:
    return all(torch.equal(one.weight(name), other.weight(name)) for name in names)


def of_layer(index: int, *linears: str) -> list[str]:
    return [f"layers.{index}.{linear}" for linear in linears or LINEARS]


def kept_channels(runs: Runs, made: Made, layer: int = 0) -> Tensor:
    """Which MLP channels of the pretrained model are left, found by their gate rows, int64 [d_ff]."""
    rows = runs.source().tensor(f"layers.{layer}.gate.weight").float()
    exactly = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(made.weight(f"layers.{layer}.gate").float(), rows, compute_mode=exactly)
    assert float(distance.min(1).values.max()) < 1e-6
    return distance.argmin(1)


def strayed(runs: Runs, made: Made) -> float:
    """How far the final hidden states are from the dense model's on the calibration text, relative."""
    source = runs.source()
    tokens = runs.tokens().calibration
    wanted = final_hidden(source, tokens)
    return float((final_hidden(made.artifact, tokens) - wanted).norm() / wanted.norm())


def total_error(made: Made, layer: int = 0) -> float:
    return sum(made.errors(layer).values())


# ---- model


@case("model.path")
def _(runs: Runs) -> None:
    whole = [{"flat": {"keep_ratio": 1.0}}]
    other = runs.out / "other-model"
    shutil.copytree(runs.model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    here, there = runs(stages=whole), runs(stages=whole, model=str(other))
    assert torch.equal(there.weight("layers.0.down"), 2 * here.weight("layers.0.down"))
    assert same(here, there, "layers.0.up")


@case("model.revision")
def _(runs: Runs) -> None:
    asked: list[Any] = []

    def downloaded(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options["revision"]))
        return str(runs.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", downloaded)
        for revision in (None, "v2"):
            open_model("someone/model", revision=revision)
            model = {"path": "someone/model", "revision": revision}
            runs(model=model, stages=[{"flat": {"keep_ratio": 1.0}}])
    assert asked.count(("someone/model", "v2")) == 2
    assert asked.count(("someone/model", None)) == 2


@case("model.dtype")
def _(runs: Runs) -> None:
    for dtype in ("float16", "float32"):
        made = runs(model={"path": str(runs.model), "dtype": dtype}, stages=[{"flat": {"keep_ratio": 1.0}}])
        stored = made.artifact.tensor("layers.0.q.weight")
        assert isinstance(stored, Tensor)
        assert stored.dtype == getattr(torch, dtype)


@case("model.context_length")
def _(runs: Runs) -> None:
    whole = runs(stages=[{"flat": {"keep_ratio": 1.0}}]).artifact.config
    made = runs(
        model={"path": str(runs.model), "context_length": whole.max_positions // 2},
        stages=[{"flat": {"keep_ratio": 1.0}}],
    )
    assert made.artifact.config == replace(whole, max_positions=whole.max_positions // 2)


# ---- calibration and evaluation


def calibrated(runs: Runs, **changed: Any) -> tuple[dict[str, Any], Made]:
    """What the manifest says of the calibration text, and the run: the values of the first layer depend on the text."""
    made = runs(calibration=changed, stages=[{"flat": EVEN}])
    return made.artifact.manifest["tokens"]["calibration"], made


def text_key(runs: Runs, **changed: Any) -> dict[str, Any]:
    said, plain = calibrated(runs)
    other, made = calibrated(runs, **changed)
    assert other["sha256"] != said["sha256"]
    assert not same(plain, made, "layers.0.v")
    return other


@case("calibration.dataset")
def _(runs: Runs) -> None:
    assert text_key(runs, dataset="python-docs", path=None)["dataset"] == "python-docs"


def lines_of(runs: Runs) -> str:
    """A .jsonl file with two texts and a chat in every line."""
    file = runs.out / "lines.jsonl"
    text = runs.text.read_text().split(". ")
    halves = zip(text[: len(text) // 2], text[len(text) // 2 :], strict=False)
    file.write_text("\n".join(json.dumps(line(one, other)) for one, other in halves))
    return str(file)


def line(one: str, other: str) -> dict[str, Any]:
    return {"text": one, "other": other, "messages": [{"role": "user", "content": other}]}


@case("calibration.path")
def _(runs: Runs) -> None:
    assert text_key(runs, path=lines_of(runs))["path"] == lines_of(runs)


@case("calibration.field")
def _(runs: Runs) -> None:
    found = [calibrated(runs, path=lines_of(runs), field=field) for field in ("text", "other")]
    assert found[0][0]["sha256"] != found[1][0]["sha256"]
    assert not same(found[0][1], found[1][1], "layers.0.v")


@case("calibration.chat_template")
def _(runs: Runs) -> None:
    assert text_key(runs, path=lines_of(runs), chat_template=True)["chat_template"] is True


def mixed(runs: Runs, **changed: Any) -> list[dict[str, Any]]:
    """What the manifest says of the parts of a mixture whose first part is changed."""
    parts = [
        {"dataset": "text", "path": str(runs.text), "share": 1.0, **changed},
        {"dataset": "python-docs", "share": 1.0},
    ]
    parts[0] = {key: value for key, value in parts[0].items() if value is not None}
    said = text_key(runs, dataset=None, path=None, mix=parts)
    return list(said["parts"])


@case("calibration.mix")
def _(runs: Runs) -> None:
    assert [(part["dataset"], part["sequences"]) for part in mixed(runs)] == [("text", 12), ("python-docs", 12)]


@case("calibration.mix.dataset")
def _(runs: Runs) -> None:
    file = {"dataset": "text", "path": lines_of(runs), "share": 1.0}
    for dataset in ("text", "python-docs"):
        first = {"dataset": dataset, "share": 1.0} | ({"path": str(runs.text)} if dataset == "text" else {})
        said = text_key(runs, dataset=None, path=None, mix=[first, file])
        assert [part["dataset"] for part in said["parts"]] == [dataset, "text"]


@case("calibration.mix.path")
def _(runs: Runs) -> None:
    assert mixed(runs, path=lines_of(runs))[0]["path"] == lines_of(runs)


@case("calibration.mix.field")
def _(runs: Runs) -> None:
    parts = [mixed(runs, path=lines_of(runs), field=field)[0] for field in ("text", "other")]
    assert parts[0]["sha256"] != parts[1]["sha256"]


@case("calibration.mix.chat_template")
def _(runs: Runs) -> None:
    assert mixed(runs, path=lines_of(runs), chat_template=True)[0]["chat_template"] is True


@case("calibration.mix.share")
def _(runs: Runs) -> None:
    assert [part["sequences"] for part in mixed(runs, share=3.0)] == [18, 6]


@case("calibration.samples")
def _(runs: Runs) -> None:
    assert text_key(runs, samples=12)["sequences"] == 12


@case("calibration.seq_len")
def _(runs: Runs) -> None:
    assert text_key(runs, seq_len=32)["seq_len"] == 32


@case("calibration.seed")
def _(runs: Runs) -> None:
    assert text_key(runs, seed=1)["tokens_available"] == calibrated(runs)[0]["tokens_available"]


def rounds(runs: Runs, key: str) -> None:
    """bfloat16 changes the second moments a little, and nothing of the text."""
    (said, exact), (other, rounded) = calibrated(runs, **{key: "float32"}), calibrated(runs, **{key: "bfloat16"})
    assert said == other
    one, two = exact.weight("layers.0.down"), rounded.weight("layers.0.down")
    assert 1e-6 < float((one - two).norm() / one.norm()) < 0.3


@case("calibration.precision")
def _(runs: Runs) -> None:
    rounds(runs, "precision")


@case("calibration.states")
def _(runs: Runs) -> None:
    rounds(runs, "states")


def evaluated(runs: Runs, **changed: Any) -> tuple[dict[str, Any], Made]:
    made = runs(evaluation=changed, stages=[{"flat": EVEN}])
    return made.artifact.manifest["tokens"]["heldout"], made


def judged_key(runs: Runs, base: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    """Another evaluation text judges the same weights."""
    said, plain = evaluated(runs, **base or {})
    other, made = evaluated(runs, **changed)
    assert other["sha256"] != said["sha256"]
    assert plain.perplexity != made.perplexity
    assert plain.report["baseline"]["perplexity"] != made.report["baseline"]["perplexity"]
    return other


@case("evaluation.dataset")
def _(runs: Runs) -> None:
    assert judged_key(runs, dataset="python-docs")["dataset"] == "python-docs"
    strange = evaluated(runs, dataset="python-docs")[1]
    assert strange.perplexity > 3 * evaluated(runs)[1].perplexity, "a language that the model never saw"


@case("evaluation.path")
def _(runs: Runs) -> None:
    assert judged_key(runs, dataset="text", path=lines_of(runs))["path"] == lines_of(runs)


@case("evaluation.field")
def _(runs: Runs) -> None:
    given = {"dataset": "text", "path": lines_of(runs)}
    assert judged_key(runs, given | {"field": "text"}, **given, field="other")["field"] == "other"


@case("evaluation.chat_template")
def _(runs: Runs) -> None:
    given = {"dataset": "text", "path": lines_of(runs)}
    assert judged_key(runs, given, **given, chat_template=True)["chat_template"] is True


@case("evaluation.name")
def _(runs: Runs) -> None:
    usual, named = evaluated(runs), evaluated(runs, name="mine")
    assert (usual[0]["name"], named[0]["name"]) == ("corpus", "mine")
    assert usual[1].perplexity == named[1].perplexity


@case("evaluation.tokens")
def _(runs: Runs) -> None:
    assert judged_key(runs, tokens=1024)["sequences"] == 1024 // 64
    assert evaluated(runs, tokens=1024)[1].report["result"]["perplexity_tokens"] == 1024 // 64 * 63


@case("evaluation.seq_len")
def _(runs: Runs) -> None:
    judged_key(runs, seq_len=16)
    short, usual = evaluated(runs, seq_len=16)[1], evaluated(runs)[1]
    assert short.perplexity > usual.perplexity, "less context, harder to predict"
    assert short.report["result"]["perplexity_tokens"] == 2048 // 16 * 15


# ---- budget


def budgeted(runs: Runs, **changed: Any) -> Made:
    """Planned from one set of measurements, as far as the choices are the same."""
    spec = {"group_sizes": [16, 32], "bits": [2, 4]} | changed
    return runs(stages=[{"flat": {"rank_multiple": 2, "width_multiple": 8}}, {"gptq": {}}], budget=spec)


def spent(made: Made) -> dict[str, float]:
    found: dict[str, float] = made.artifact.manifest["plan"]
    return found


@case("budget.size")
def _(runs: Runs) -> None:
    small, large = (budgeted(runs, size=size) for size in ("66kB", "80kB"))
    for limit, made in ((66, small), (80, large)):
        assert 0.98 * limit < made.artifact.bytes() / 1000 <= limit
        assert spent(made)["achieved"] == made.artifact.bytes()
    assert large.perplexity < small.perplexity


@case("budget.decode_bytes")
def _(runs: Runs) -> None:
    made = budgeted(runs, decode_bytes="85kB", context=64)
    assert 0.95 * 85 < spent(made)["achieved"] / 1000 <= 85
    cached = sum(64 * d.kv_heads * (d.d_qk + d.d_v) * 2 for d in made.dims)
    assert spent(made)["achieved"] == made.artifact.bytes() + cached, "a tied table is read whole"


@case("budget.memory")
def _(runs: Runs) -> None:
    made = budgeted(runs, memory="90kB", context=64)
    assert 0.95 * 90 < spent(made)["achieved"] / 1000 <= 90
    assert spent(made)["budget"] == "memory"


@case("budget.max_damage")
def _(runs: Runs) -> None:
    made = [budgeted(runs, max_damage=limit) for limit in (0.4, 0.1)]
    for limit, each in zip((0.4, 0.1), made, strict=True):
        lost = max(text["damage"] for text in each.report["quality"])
        assert 0.3 * limit < lost <= limit
        assert any(line.startswith(f"max_damage {limit}: {lost:.3f} nats lost") for line in each.report["notes"])
        assert len([phase for phase in each.report["timing"] if phase.startswith("fit-")]) <= 5
    assert made[0].artifact.bytes() < made[1].artifact.bytes()


@case("budget.context")
def _(runs: Runs) -> None:
    short, usual = (budgeted(runs, decode_bytes="85kB", context=context) for context in (32, 64))
    assert short.artifact.bytes() > usual.artifact.bytes(), "a shorter cache leaves more for weights"


def with_speed(limit: str) -> tuple[SpeedLoad, JointPlan]:
    """The load that an exporter is asked to predict for a limit, and the plan within its predictions."""
    loads: list[SpeedLoad] = []

    def speed_model(self: OnnxExporter, config: DecoderConfig, options: Any, load: SpeedLoad) -> SpeedModel:
        loads.append(load)
        return Invented(config, load)

    with mock.patch.object(OnnxExporter, "speed_model", speed_model):
        some = problem(limit)
    return loads[0], plan_jointly(some, guessed(some))


@case("budget.decode_tokens_per_second")
def _(runs: Runs) -> None:
    slow, fast = (with_speed(f"decode_tokens_per_second: {rate}")[1].ranks.achieved for rate in (1500, 2500))
    assert fast <= 1 / 2500 < slow <= 1 / 1500


@case("budget.prefill_ms")
def _(runs: Runs) -> None:
    slow, fast = (with_speed(f"prefill_ms: {limit}")[1].ranks.achieved for limit in (36, 30))
    assert fast <= 0.030 < slow <= 0.036


@case("budget.prompt")
def _(runs: Runs) -> None:
    assert with_speed("prefill_ms: 60, prompt: 55")[0].prompt == 55


@case("budget.threads")
def _(runs: Runs) -> None:
    assert with_speed("prefill_ms: 60, threads: 3")[0].threads == 3


@case("budget.export")
def _(runs: Runs) -> None:
    """The planner's part; what an exporter's prices do to a plan is in tests/laws/test_joint_laws.py."""
    recipe = Recipe.parse(
        runs.recipe(
            stages=[{"gptq": {}}],
            budget={"size": "80kB", "export": "b"},
            exports=[{"onnx": {"name": "a"}}, {"safetensors": {"name": "b"}}],
        )
    )
    assert recipe.budget is not None
    assert prices_of(recipe.budget, planned_exports(recipe), 4).where == "export b"


@case("budget.bits")
def _(runs: Runs) -> None:
    made = budgeted(runs, size="80kB")
    assert {grid.bits for grid in made.artifact.grids.values()} == {2, 4}
    assert {grid.bits for grid in budgeted(runs, size="80kB", bits=[4]).artifact.grids.values()} == {4}


@case("budget.group_sizes")
def _(runs: Runs) -> None:
    made = budgeted(runs, size="80kB", group_sizes=[32])
    assert {grid.group_size for grid in made.artifact.grids.values()} == {32}
    assert {grid.group_size for grid in budgeted(runs, size="80kB").artifact.grids.values()} == {16, 32}


# ---- flat


@case("flat.keep_ratio")
def _(runs: Runs) -> None:
    made = pairs(runs, flat, "keep_ratio", 1.0, 0.75, 0.6)
    kept = [
        each.report["result"]["decoder_parameters"] / each.report["baseline"]["decoder_parameters"] for each in made
    ]
    assert kept == pytest.approx([1, 0.75, 0.6], abs=0.01)
    assert made[0].perplexity < made[1].perplexity < made[2].perplexity
    assert ["sensitivity" in each.report["timing"] for each in made] == [False, True, True], "nothing to choose"
    for name in (name for index in range(LAYERS) for name in of_layer(index)):
        assert torch.equal(made[0].weight(name), pretrained(runs, name)), "what keeps its width is left as it is"


@case("flat.size")
def _(runs: Runs) -> None:
    for size, made in zip((480, 420), pairs(runs, flat, "size", "480kB", "420kB", keep_ratio=None), strict=True):
        assert 0.98 * size < made.report["result"]["bytes"] / 1000 <= size


@case("flat.decode_bytes")
def _(runs: Runs) -> None:
    made = pairs(runs, flat, "decode_bytes", "560kB", "510kB", keep_ratio=None, context=64)
    for wanted, each in zip((560, 510), made, strict=True):
        assert 0.98 * wanted < each.report["result"]["decode_bytes"] / 1000 <= wanted


@case("flat.context")
def _(runs: Runs) -> None:
    short, long = pairs(runs, flat, "context", 64, 128, keep_ratio=None, decode_bytes="510kB")
    assert [each.report["result"]["decode_context"] for each in (short, long)] == [64, 128]
    assert sum(dims.d_v for dims in long.dims) < sum(dims.d_v for dims in short.dims)


@case("flat.method")
def _(runs: Runs) -> None:
    default, paper = pairs(runs, flat, "method", "default", "paper")
    assert default.perplexity - default.report["baseline"]["perplexity"] < 0.7 * (
        paper.perplexity - paper.report["baseline"]["perplexity"]
    )
    assert default.dims != paper.dims


def test_the_default_method_is_made_of_these_parts(runs: Runs) -> None:
    """A default that is left out is the default that is written down, and the result is the same model."""
    parts = {"allocation": "curves", "channels": "elimination", "values": "output", "refit": True}
    written = flat(runs, **parts, shrinkage=0.1, correction=0.5)
    plain = flat(runs)
    assert plain.dims == written.dims
    assert same(plain, written, *(name for index in range(LAYERS) for name in of_layer(index)))
    parts = {"allocation": "iprs", "channels": "leverage", "values": "pca", "refit": False}
    written, paper = flat(runs, **parts, shrinkage=0.0, correction=0.0), flat(runs, method="paper")
    assert same(paper, written, *(name for index in range(LAYERS) for name in of_layer(index)))


@case("flat.allocation")
def _(runs: Runs) -> None:
    curves, iprs, uniform = pairs(runs, flat, "allocation", "curves", "iprs", "uniform")
    assert max(dims.d_ff for dims in uniform.dims) - min(dims.d_ff for dims in uniform.dims) <= FLAT["width_multiple"]
    for other in (iprs, uniform):
        assert curves.dims != other.dims
        assert curves.perplexity < other.perplexity
    importance = iprs.artifact.manifest["plan"]["importance"]
    kept = [dims.parameters(64) for dims in iprs.dims]
    assert sorted(range(LAYERS), key=importance.__getitem__) == sorted(range(LAYERS), key=kept.__getitem__)
    assert not curves.artifact.manifest["plan"]["importance"]
    assert [bool(made.report["layers"][0]["curves"]) for made in (curves, iprs, uniform)] == [True, False, False]


@case("flat.channels")
def _(runs: Runs) -> None:
    eliminated, leading = pairs(runs, flat, "channels", "elimination", "leverage")
    assert set(kept_channels(runs, eliminated).tolist()) != set(kept_channels(runs, leading).tolist())
    assert eliminated.perplexity < leading.perplexity


@case("flat.values")
def _(runs: Runs) -> None:
    output, pca, whole = pairs(runs, flat, "values", "output", "pca", "whole", base=EVEN)
    assert output.dims == pca.dims
    assert pca.errors(0)["value"] < 0.98 * output.errors(0)["value"], "no basis keeps more of the values than theirs"
    assert all(dims.d_v == 16 for dims in whole.dims)
    for name in of_layer(0, "v", "o"):
        assert torch.equal(whole.weight(name), pretrained(runs, name)), "what is not narrowed is left as it is"
    assert not same(output, pca, "layers.0.v")


@case("flat.refit")
def _(runs: Runs) -> None:
    plain, fitted = pairs(runs, flat, "refit", False, True)
    assert plain.dims == fitted.dims
    plain, fitted = pairs(runs, flat, "refit", False, True, base=EVEN)
    assert same(plain, fitted, *of_layer(0, "q", "k", "v"))
    assert not same(plain, fitted, "layers.0.o")
    assert strayed(runs, fitted) < 0.98 * strayed(runs, plain)


@case("flat.uniform")
def _(runs: Runs) -> None:
    single, alike = pairs(runs, flat, "uniform", False, True)
    assert len(set(alike.dims)) == 1
    assert len(set(single.dims)) > 1


@case("flat.rank_multiple")
def _(runs: Runs) -> None:
    made = pairs(runs, flat, "rank_multiple", 2, 8, allocation="uniform")
    assert [{dims.d_v % 8 for dims in each.dims} == {0} for each in made] == [False, True]


@case("flat.width_multiple")
def _(runs: Runs) -> None:
    made = pairs(runs, flat, "width_multiple", 8, 32)
    assert [{dims.d_ff % 32 for dims in each.dims} == {0} for each in made] == [False, True]


@case("flat.shrinkage")
def _(runs: Runs) -> None:
    down, distance = runs.source().tensor("layers.0.down.weight").float(), []
    made = pairs(runs, flat, "shrinkage", 0.0, 0.1, 10.0, base=EVEN)
    for each in made:
        plain = down[:, kept_channels(runs, each)]
        distance.append(float((each.weight("layers.0.down") - plain).norm() / plain.norm()))
    assert distance[2] < 0.3 * distance[0], "plain selection is what a doubted fit comes back to"
    assert distance[2] < distance[1] < 0.95 * distance[0]
    for other in made[1:]:
        assert not same(made[0], other, "layers.0.o")
    assert same(made[1], flat(runs, base=EVEN), *of_layer(0))


@case("flat.correction")
def _(runs: Runs) -> None:
    none, half, full = pairs(runs, flat, "correction", 0.0, 0.5, 1.0, allocation="uniform")
    assert same(none, half, *of_layer(0, "q", "k", "v", "o", "gate", "up"))
    downs = [each.weight("layers.0.down").double() for each in (none, half, full)]
    assert float((downs[2] - downs[0]).norm() / downs[0].norm()) > 0.01
    torch.testing.assert_close(downs[1] - downs[0], (downs[2] - downs[0]) / 2, rtol=1e-3, atol=1e-5)
    assert strayed(runs, half) < 0.98 * strayed(runs, none)
    assert same(half, flat(runs, allocation="uniform"), *of_layer(LAYERS - 1))


@case("flat.ridge")
def _(runs: Runs) -> None:
    energies = flat(runs, keep_ratio=1.0).artifact.energies()["layers.0.down"]
    usual, doubted = pairs(runs, flat, "ridge", 1e-5, 100.0, base=EVEN | {"channels": "leverage", "shrinkage": 0})
    strongest = set(energies.topk(doubted.dims[0].d_ff).indices.tolist())
    few, many = (len(strongest & set(kept_channels(runs, each).tolist())) for each in (usual, doubted))
    assert few + 1 < len(strongest) - 1 <= many, "with much ridge a score is an energy"
    usual, doubted = pairs(runs, flat, "ridge", 0.01, 100.0)
    assert usual.dims != doubted.dims, "the curves are measured with it, too"


# ---- gptq


@case("gptq.bits")
def _(runs: Runs) -> None:
    for bits, made in zip((3, 4), pairs(runs, gptq, "bits", 3, 4), strict=True):
        assert int(made.codes("layers.0.q").codes.max()) == 2**bits - 1
    three, four = pairs(runs, gptq, "bits", 3, 4)
    assert all(four.errors(0)[name] < 0.5 * error for name, error in three.errors(0).items())
    assert four.perplexity < three.perplexity


def bits_of(made: Made) -> dict[str, int]:
    return {stem: grid.bits for stem, grid in made.artifact.grids.items()}


@case("gptq.average_bits")
def _(runs: Runs) -> None:
    made = pairs(runs, gptq, "average_bits", 3.5, 5.0)
    for wanted, each in zip((3.5, 5.0), made, strict=True):
        sizes = {stem: each.weight(stem).numel() for stem in bits_of(each)}
        spent = sum(bits * sizes[stem] for stem, bits in bits_of(each).items()) / sum(sizes.values())
        assert wanted - 0.3 < spent <= wanted
        assert len(set(bits_of(each).values())) > 1
    assert made[1].perplexity < made[0].perplexity


@case("gptq.bit_choices")
def _(runs: Runs) -> None:
    made = pairs(runs, gptq, "bit_choices", [3, 4, 8], [2, 8], average_bits=4.0)
    assert set(bits_of(made[0]).values()) <= {3, 4, 8}
    assert set(bits_of(made[1]).values()) == {2, 8}


@case("gptq.group_size")
def _(runs: Runs) -> None:
    small, large, row = pairs(runs, gptq, "group_size", 16, 64, -1)
    assert [each.codes("layers.0.down").scale.shape[1] for each in (small, large, row)] == [8, 2, 1]
    assert total_error(small) < total_error(large) < total_error(row)


@case("gptq.symmetric")
def _(runs: Runs) -> None:
    fixed, free = pairs(runs, gptq, "symmetric", True, False)
    assert set(fixed.codes("layers.0.q").zero.unique().tolist()) == {4}
    assert len(free.codes("layers.0.q").zero.unique()) > 2


@case("gptq.act_order")
def _(runs: Runs) -> None:
    stored, ordered = pairs(runs, gptq, "act_order", False, True)
    for name in of_layer(0, "q", "k", "v"):
        assert torch.equal(stored.codes(name).scale, ordered.codes(name).scale), "groups are static"
        assert not torch.equal(stored.codes(name).codes, ordered.codes(name).codes)
    assert total_error(ordered) < 0.98 * total_error(stored)


@case("gptq.clip_search")
def _(runs: Runs) -> None:
    covering, searched = pairs(runs, gptq, "clip_search", False, True)
    for name in of_layer(0, "q", "k", "v"):
        plain = round_to_nearest(pretrained(runs, name), covering.artifact.grids[name])
        assert torch.equal(covering.codes(name).scale, plain.scale), "the scale covers the largest of its group"
        assert float((searched.codes(name).scale != plain.scale).float().mean()) > 0.5
    assert total_error(searched) < 0.95 * total_error(covering)


def pretrained(runs: Runs, name: str) -> Tensor:
    """A weight as it was before."""
    return runs.source().tensor(f"{name}.weight").float()


@case("gptq.damping")
def _(runs: Runs) -> None:
    near = []
    for made in pairs(runs, gptq, "damping", 0.0001, 0.01, 0.99, clip_search=False):
        rounded = round_to_nearest(pretrained(runs, "layers.0.q"), made.artifact.grids["layers.0.q"])
        assert torch.equal(rounded.scale, made.codes("layers.0.q").scale)
        near.append(float((rounded.codes == made.codes("layers.0.q").codes).float().mean()))
    assert near[0] < near[1] < near[2] - 0.02, "the more damping, the nearer to round-to-nearest"


@case("gptq.block_size")
def _(runs: Runs) -> None:
    one, many = pairs(runs, gptq, "block_size", 1, 64)
    assert one.errors(0) != many.errors(0), "sums are taken in another order"
    assert one.errors(0) == pytest.approx(many.errors(0), rel=0.02)
    codes = [each.codes("layers.0.q").codes for each in (one, many)]
    assert float((codes[0] == codes[1]).float().mean()) > 0.999


@case("gptq.correction")
def _(runs: Runs) -> None:
    none, half = pairs(runs, gptq, "correction", 0.0, 0.5)
    alike = {name: float((none.codes(name).codes == half.codes(name).codes).float().mean()) for name in bits_of(none)}
    assert min(alike[name] for name in of_layer(0, "q", "k", "v", "o")) > 0.99, "nothing was changed before them"
    assert max(alike[name] for name in of_layer(1)) < 0.99
    assert strayed(runs, half) < 0.98 * strayed(runs, none)


@case("gptq.tune_steps")
def _(runs: Runs) -> None:
    stage, rows = GPTQ | {"bits": 2, "symmetric": False}, {"samples": 96}
    without, tuned = (runs(stages=[{"gptq": stage | {"tune_steps": s}}], calibration=rows) for s in (0, 120))
    alike = {n: float((without.codes(n).codes == tuned.codes(n).codes).float().mean()) for n in bits_of(without)}
    assert 0.5 < min(alike.values()) < 0.99
    assert strayed(runs, tuned) < 0.95 * strayed(runs, without)
    assert tuned.errors(0) != without.errors(0)


# ---- recover


def recovered(runs: Runs, **changed: Any) -> Made:
    stage = {"steps": 6, "samples": 16, "tokens": 256, "learning_rate": 0.01} | changed
    return runs(stages=[{"gptq": GPTQ}, {"recover": stage}])


def moved(runs: Runs, made: Made) -> float:
    """Mean change of the logarithm of a scale of layer 0."""
    names = of_layer(0)
    pairs = [(gptq(runs).codes(name).scale.float(), made.codes(name).scale.float()) for name in names]
    return float(torch.stack([(after / before).log().abs().mean() for before, after in pairs]).mean())


@case("recover.steps")
def _(runs: Runs) -> None:
    none, some = pairs(runs, recovered, "steps", 0, 6)
    assert none.artifact.manifest["recover"]["step"] == 0
    assert moved(runs, none) == 0
    assert moved(runs, some) > 0
    assert some.perplexity < none.perplexity == gptq(runs).perplexity


@case("recover.samples")
def _(runs: Runs) -> None:
    few, many = pairs(runs, recovered, "samples", 10, 16)
    assert few.artifact.manifest["recover"]["before"] != many.artifact.manifest["recover"]["before"]


@case("recover.tokens")
def _(runs: Runs) -> None:
    one, four = pairs(runs, recovered, "tokens", 1, 256)
    assert not same(one, four, "layers.0.q"), "one sequence a step, and four"


@case("recover.learning_rate")
def _(runs: Runs) -> None:
    slow, usual = pairs(runs, recovered, "learning_rate", 0.001, 0.01)
    assert 0 < moved(runs, slow) < 0.3 * moved(runs, usual)


@case("gptq.overrides")
def _(runs: Runs) -> None:
    made = gptq(runs, overrides={"*.down": {"bits": 8}, "layers.0.down": {"bits": 4}})
    wanted = dict.fromkeys(bits_of(gptq(runs)), 3)
    wanted |= {f"layers.{index}.down": 8 for index in range(LAYERS)} | {"layers.0.down": 4}
    assert bits_of(made) == wanted


@case("gptq.embedding")
def _(runs: Runs) -> None:
    plain, coded = pairs(runs, gptq, "embedding", None, {"bits": 4})
    assert set(coded.artifact.grids) - set(plain.artifact.grids) == {"embed"}
    assert coded.report["result"]["bytes"] < plain.report["result"]["bytes"]


@case("gptq.embedding.bits")
def _(runs: Runs) -> None:
    four, eight = (gptq(runs, embedding={"bits": bits}) for bits in (4, 8))
    assert [int(each.codes("embed").codes.max()) for each in (four, eight)] == [15, 255]
    assert eight.report["head"]["error"] < 0.1 * four.report["head"]["error"]


@case("gptq.embedding.group_size")
def _(runs: Runs) -> None:
    small, large = (gptq(runs, embedding={"bits": 4, "group_size": size}) for size in (16, 64))
    assert [each.codes("embed").scale.shape[1] for each in (small, large)] == [4, 1]
    assert small.report["head"]["error"] < large.report["head"]["error"]


@case("gptq.overrides.bits")
def _(runs: Runs) -> None:
    made, plain = gptq(runs, overrides={"*.v": {"bits": 8}}), gptq(runs)
    assert {stem for stem, bits in bits_of(made).items() if bits == 8} == {f"layers.{i}.v" for i in range(LAYERS)}
    assert made.errors(0)["v"] < 0.01 * plain.errors(0)["v"]
    assert made.errors(0)["q"] == pytest.approx(plain.errors(0)["q"], rel=1e-3)


@case("gptq.overrides.group_size")
def _(runs: Runs) -> None:
    made = gptq(runs, overrides={"*.v": {"group_size": 32}})
    assert [made.codes(name).scale.shape[1] for name in of_layer(0, "v", "q")] == [2, 4]


@case("gptq.overrides.symmetric")
def _(runs: Runs) -> None:
    made = gptq(runs, overrides={"*.v": {"symmetric": False}})
    assert len(made.codes("layers.0.v").zero.unique()) > 2
    assert len(made.codes("layers.0.q").zero.unique()) == 1


@case("gptq.overrides.quantize")
def _(runs: Runs) -> None:
    made = gptq(runs, overrides={"*.v": {"quantize": False}})
    assert isinstance(made.artifact.tensor("layers.0.v.weight"), Tensor)
    assert torch.equal(made.weight("layers.0.v"), runs.source().tensor("layers.0.v.weight").float())
    assert "layers.0.v" not in made.artifact.grids


# ---- tasks: one run of both kinds of models on a local task

TASKS = Path(__file__).parent / "data" / "tasks"


def tasked(runs: Runs) -> list[dict[str, Any]]:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'flatq[eval]')")
    given = {"tasks": ["tiny_choice"], "task_limit": 3, "task_folder": str(TASKS)}
    with contextlib.chdir(TASKS):  # the task file names its data below the current folder
        made = runs(stages=STAGES, evaluation={"tokens": 128, "seq_len": 64, **given}, exports=[{"onnx": {}}])
    found: list[dict[str, Any]] = made.report["tasks"]
    return found


@case("evaluation.tasks")
def _(runs: Runs) -> None:
    assert [(row["task"], row["subject"]) for row in tasked(runs)] == [
        ("tiny_choice", subject) for subject in ("dense", "artifact", "onnx")
    ]
    assert benched(runs)[0].report["tasks"] == []


@case("evaluation.task_limit")
def _(runs: Runs) -> None:
    assert {row["samples"] for row in tasked(runs)} == {3}


@case("evaluation.task_folder")
def _(runs: Runs) -> None:
    assert all(row["settings"]["local_tasks"] for row in tasked(runs))


# ---- exports and bench: two runs, in which all keys differ

FIRST = {"provider": "cpu", "prompt": 4, "new_tokens": 3, "batch": 1, "repeats": 1, "threads": 1, "baseline": False}
SECOND = {"provider": "auto", "prompt": 6, "new_tokens": 4, "batch": 2, "repeats": 2, "threads": 2, "baseline": True}
STAGES = [{"gptq": {"bits": 4, "group_size": 16}}]


def benched(runs: Runs) -> list[Made]:
    first = runs(stages=STAGES, exports=[{"onnx": {"precision": "int4"}}], bench=FIRST)
    return [first, runs(stages=STAGES, exports=[{"onnx": {"name": "mine", "precision": "fp32"}}], bench=SECOND)]


@case("exports.format")
def _(runs: Runs) -> None:
    first = benched(runs)[0]
    other = runs(stages=STAGES, exports=[{"safetensors": {}}])
    files = [
        {file.suffix for each in made.report["exports"] for file in map(Path, each["files"])} for made in (first, other)
    ]
    assert ".onnx" in files[0] - files[1]
    assert ".safetensors" in files[1] - files[0]


@case("exports.options")
def _(runs: Runs) -> None:
    first, second = benched(runs)
    assert second.report["exports"][0]["bytes"] > 1.5 * first.report["exports"][0]["bytes"], "fp32 against int4"


@case("exports.verify")
def _(runs: Runs) -> None:
    unseen = runs(stages=STAGES, exports=[{"onnx": {"precision": "int4", "verify": False}}])
    assert unseen.report["exports"][0]["verify"] is None
    assert benched(runs)[0].report["exports"][0]["verify"] is not None


@case("exports.name")
def _(runs: Runs) -> None:
    assert [[path.name for path in (made.root / "exports").iterdir()] for made in benched(runs)] == [["onnx"], ["mine"]]


def echoed(key: str) -> Case:
    def check(runs: Runs) -> None:
        for made, given in zip(benched(runs), (FIRST, SECOND), strict=True):
            assert {row[key] for row in made.report["bench"]} == {given[key]}

    return check


for each in ("prompt", "new_tokens", "batch", "repeats", "threads"):
    CASES[f"bench.{each}"] = echoed(each)


@case("bench.provider")
def _(runs: Runs) -> None:
    assert all("CPU" in row["provider"] for row in benched(runs)[0].report["bench"])
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match=r"bench\.provider: cuda"):
            runs(stages=STAGES, exports=[{"onnx": {}}], bench={"provider": "cuda"})


@case("bench.baseline")
def _(runs: Runs) -> None:
    assert [len(made.report["bench"]) for made in benched(runs)] == [1, 2]


# ---- keys of the recipe itself


@case("baselines")
def _(runs: Runs) -> None:
    stages = [{"flat": {"decode_bytes": "260kB", "context": 64, "correction": 0}}, {"gptq": GPTQ}]
    for asked in (["dense"], ["dense", "same_bytes"], ["dense", "quantized"]):
        made = runs(stages=stages, baselines=asked)
        assert [rival["name"] for rival in made.report["baselines"]] == asked[1:]
    (rival,), alone = made.report["baselines"], gptq(runs)
    assert rival["quality"][0]["perplexity"] == alone.perplexity, "the same model without narrowing"
    assert rival["bytes"] == alone.report["result"]["bytes"]
    assert rival["decode_bytes"] == decode_bytes(alone.artifact.config, alone.artifact.grids, 4, context=64)


@case("stop_above")
def _(runs: Runs) -> None:
    made = flat(runs, keep_ratio=0.6)
    lost = made.report["quality"][0]["damage"]
    stages = [{"flat": FLAT | {"keep_ratio": 0.6}}]
    assert runs(stages=stages, stop_above=1.01 * lost).perplexity == made.perplexity
    with pytest.raises(NumericsError, match="stop_above"):
        runs(stages=stages, stop_above=0.99 * lost)


# ---- what a run says of itself


def test_the_reported_perplexities_are_those_of_the_dense_model_and_of_the_artifact(runs: Runs) -> None:
    made = flat(runs, keep_ratio=0.6)
    recipe = Recipe.parse(made.artifact.manifest["recipe"])
    options = ["--dataset", "text", "--path", runs.text, "--tokens", recipe.evaluation[0].tokens]
    options += ["--seq-len", recipe.evaluation[0].seq_len]
    said = [made.report["baseline"]["perplexity"], made.perplexity]
    for place, wanted in zip((runs.model, made.root), said, strict=True):
        shown = flatq("eval", place, *map(str, options))
        assert shown.exit_code == 0, shown.stderr
        *_, found = re.findall(r"(?:perplexity|->) ([\d.]+)", shown.stdout)  # of an artifact: dense -> its own
        assert float(found) == pytest.approx(wanted, rel=6e-4)
    assert said[1] > 1.01 * said[0]
    noted = made.artifact.manifest["quality"]
    assert [noted["perplexity of the original"], noted["perplexity"]] == pytest.approx(said, abs=1e-4)


def test_eval_looks_at_the_text_that_it_is_given(runs: Runs, tmp_path: Path) -> None:
    def shown(*options: object) -> float:
        answer = flatq("eval", runs.model, "--seq-len", "64", *map(str, options))
        assert answer.exit_code == 0, answer.stderr
        return float(answer.stdout.split()[-1])

    usual = ("--dataset", "text", "--path", runs.text)
    assert shown("--tokens", "1024") > 3 * shown(*usual, "--tokens", "1024"), "the model never saw the Python docs"
    assert shown(*usual, "--tokens", "1024") != shown(*usual, "--tokens", "2048")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "nowhere"], "dataset"),
        (["--dataset", "text"], "path"),
    ],
)
def test_eval_objects_in_words(options: list[str], words: str, runs: Runs) -> None:
    answer = flatq("eval", runs.model, *options)
    assert answer.exit_code == 2
    assert words in answer.stderr


def test_eval_of_nothing_names_the_place(tmp_path: Path) -> None:
    answer = flatq("eval", tmp_path / "none")
    assert answer.exit_code == 2
    assert "none" in answer.stderr
