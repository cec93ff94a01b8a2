"""Limits of speed in the block ``budget``: what a plan is charged, and that it keeps the limit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from flatq.budget.bought import bought
from flatq.budget.joint import guessed, plan_jointly
from flatq.budget.limits import matrices_of
from flatq.budget.problem import Problem, problem_of
from flatq.errors import ExportError, RecipeError
from flatq.export.planned import planned_exports
from flatq.export.speed import Grids, Seconds, SpeedLoad, SpeedModel
from flatq.model.decoder import DecoderConfig, LayerDims
from flatq.model.grid import Grid
from flatq.plan import decide
from flatq.recipe.grammar import Recipe
from flatq_onnx import OnnxExporter
from tests.models import tiny_config

HEAD = "version: 1\nmodel: some/model\nstages: [flat: {rank_multiple: 4, width_multiple: 16}, gptq: {}]\n"
CONFIG = tiny_config(d_v=(16,) * 3, d_ff=(96,) * 3)
RATE = {2: 1.0, 4: 2.0, 8: 3.0}


class Invented(SpeedModel):
    """A runtime whose products take as many nanoseconds as they have weights, times a rate of the bits."""

    def __init__(self, config: DecoderConfig, load: SpeedLoad) -> None:
        self.config, self.load = config, load

    def linears(self, dims: LayerDims, grids: Grids) -> Seconds:
        """See ``SpeedModel.linears``."""
        total = 1e-6
        for name, grid in grids.items():
            rows, columns = dims.shape(name, self.config.d_model)
            total += 1e-9 * rows * columns * (9 if grid is None else RATE[grid.bits])
        return Seconds(total, total * self.load.prompt)

    def rest(self, half: str, dims: LayerDims) -> Seconds:
        """See ``SpeedModel.rest``."""
        width = dims.d_v * self.load.context if half == "attention" else dims.d_ff
        return Seconds(1e-8 * width, 1e-7 * width)

    def ends(self, grids: Grids) -> Seconds:
        """See ``SpeedModel.ends``."""
        grid = grids["embed"]
        return Seconds(*[1e-9 * self.config.vocab * self.config.d_model * (9 if grid is None else RATE[grid.bits])] * 2)


@pytest.fixture(autouse=True)
def invented(monkeypatch: pytest.MonkeyPatch) -> list[SpeedLoad]:
    """The exporter's predictions are those of ``Invented``; returns the loads that were asked for."""
    loads: list[SpeedLoad] = []

    def speed_model(self: OnnxExporter, config: DecoderConfig, options: Any, load: SpeedLoad) -> SpeedModel:
        loads.append(load)
        return Invented(config, load)

    monkeypatch.setattr(OnnxExporter, "speed_model", speed_model)
    return loads


def problem(limit: str, exports: str = "[onnx: {}]") -> Problem:
    recipe = Recipe.parse(f"{HEAD}budget: {{{limit}, group_sizes: [16, 32]}}\nexports: {exports}")
    return problem_of(recipe, CONFIG, planned_exports(recipe), 4)


@pytest.mark.parametrize("key", ["decode_tokens_per_second", "prefill_ms"])
def test_the_parts_of_a_model_add_up_to_its_prediction(key: str) -> None:
    prices = problem(f"{key}: 1000").prices
    narrow = CONFIG.with_layers(
        [replace(CONFIG.layers[0], d_v=8), CONFIG.layers[1], replace(CONFIG.layers[2], d_ff=32)]
    )
    for config in (CONFIG, narrow):
        grids = {stem: Grid(4, 32) for stem in matrices_of(config)} | {"layers.1.o": Grid(8, 32), "embed": Grid(8, 32)}
        exact = prices.exact(config, grids)
        assert exact > 0
        assert prices.rest(config, grids) == pytest.approx(0, abs=1e-12 * exact + 1e-15)


@pytest.mark.parametrize(
    ("limit", "load"),
    [
        ("decode_tokens_per_second: 1000", SpeedLoad(192, 128, 0)),
        ("decode_tokens_per_second: 1000, context: 77, threads: 3", SpeedLoad(77, 128, 3)),
        ("prefill_ms: 9, prompt: 55", SpeedLoad(192, 55, 0)),
    ],
)
def test_the_keys_of_the_limit_reach_the_prediction(limit: str, load: SpeedLoad, invented: list[SpeedLoad]) -> None:
    problem(limit)
    assert invented == [load]


@pytest.mark.parametrize("key", ["decode_tokens_per_second", "prefill_ms"])
def test_a_plan_keeps_the_limit_and_no_slower_one_loses_less(key: str) -> None:
    of = problem(f"{key}: 1")
    least = plan_jointly(of, guessed(of), 1e9)
    slowest, losses = least.ranks.achieved, list[float]()
    for share in (0.8, 0.6, 0.4):
        given = 1 / (share * slowest) if key == "decode_tokens_per_second" else 1000 * share * slowest
        some = problem(f"{key}: {given!r}")
        plan = plan_jointly(some, guessed(some))
        assert plan.ranks.achieved <= share * slowest * (1 + 1e-12)
        assert plan.ranks.achieved == pytest.approx(
            some.prices.exact(CONFIG.with_layers(plan.ranks.layers), plan.grids)
        )
        losses.append(plan.predicted)
    assert losses == sorted(losses)


def test_a_speed_that_no_plan_reaches_names_the_fastest_possible() -> None:
    of = problem("decode_tokens_per_second: 999999")
    with pytest.raises(RecipeError) as refused:
        plan_jointly(of, guessed(of))
    words = str(refused.value)
    assert "decode_tokens_per_second: 999999 cannot be reached: the fastest model that the stages can make" in words
    possible = float(words.partition("choose ")[2].split()[0])
    some = problem(f"decode_tokens_per_second: {possible}")
    assert 1 / plan_jointly(some, guessed(some)).ranks.achieved >= possible
    assert possible > 100, "the fastest, not just any"
    of = problem("prefill_ms: 0.001")
    with pytest.raises(RecipeError, match=r"predicted at .* ms \(export onnx, 128 tokens\); choose .* or more"):
        plan_jointly(of, guessed(of))


def test_a_plan_says_its_speed() -> None:
    of = problem("decode_tokens_per_second: 2000")
    line = bought(of, plan_jointly(of, guessed(of)), measured=False)[0]
    assert line.startswith("budget: ")
    assert line.endswith(" tokens/s of 2000 tokens/s (export onnx at a context of 192)")
    of = problem("prefill_ms: 50")
    assert bought(of, plan_jointly(of, guessed(of)), measured=False)[0].endswith(
        " ms of 50 ms (export onnx, 128 tokens)"
    )


@pytest.mark.parametrize(
    ("limit", "phases"),
    [("decode_tokens_per_second: 2000", ["plan"]), ("prefill_ms: 50", ["plan"]), ("size: 70kB", [])],
)
def test_a_resumed_run_keeps_the_plan_of_kernels_that_were_measured_before(
    limit: str, phases: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of, kept = problem(limit), list[str]()

    def phase(name: str, work: Any, kind: type[Any]) -> Any:
        kept.append(name)
        return TypeAdapter(kind).validate_json(TypeAdapter(kind).dump_json(work()))

    monkeypatch.setattr(decide, "measure", lambda job, some: guessed(some))
    job: Any = SimpleNamespace(folder=SimpleNamespace(phase=phase))
    assert decide._planned(job, of) == plan_jointly(of, guessed(of))
    assert kept == phases


def test_an_exporter_that_cannot_predict_is_named() -> None:
    with pytest.raises(RecipeError, match=r"budget\.prefill_ms: exports\.gguf: this exporter cannot predict speed"):
        problem("prefill_ms: 50", "[gguf: {}]")


def test_a_refusal_of_the_exporter_is_one_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> SpeedModel:
        raise ExportError("onnx: no")

    monkeypatch.setattr(OnnxExporter, "speed_model", refuse)
    with pytest.raises(RecipeError, match=r"decode_tokens_per_second: exports\.onnx: onnx: no"):
        problem("decode_tokens_per_second: 50")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("{prefill_ms: 5, size: 1MB}", "size and prefill_ms given; exactly one of"),
        ("{prefill_ms: 5, context: 9}", "budget.context: only read with decode_bytes or memory or decode_tokens"),
        ("{size: 1MB, threads: 9}", "budget.threads: only read with decode_tokens_per_second or prefill_ms"),
        ("{decode_tokens_per_second: 5, prompt: 9}", "budget.prompt: only read with prefill_ms"),
        ("{decode_tokens_per_second: 0}", "0 is not allowed; a number in (0, 1000000.0]"),
    ],
)
def test_a_mistake_names_the_way_out(budget: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe.parse(f"{HEAD}budget: {budget}\nexports: [onnx: {{}}]")
    assert message in str(refused.value)


def test_without_an_export_there_is_no_speed() -> None:
    with pytest.raises(RecipeError, match="the speed of an export is predicted, and there is none"):
        Recipe.parse(f"{HEAD}budget: {{prefill_ms: 5}}")
