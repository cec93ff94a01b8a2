"""The block ``budget``: what is measured for it, runs that share measurements, mistakes, and the plan in words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flatq.artifact import Artifact
from flatq.budget.bought import bought
from flatq.budget.joint import JointPlan, guessed, plan_jointly, plan_of_loss
from flatq.budget.problem import problem_of
from flatq.compress.allocate import Curves
from flatq.compress.plan import RankPlan
from flatq.errors import RecipeError
from flatq.model.grid import Grid
from flatq.needs import NEEDS, changes, facts, needs
from flatq.pipeline.fit import MARGIN, WALKS, Walk, next_target, search
from flatq.quantize.choice_errors import choice_errors
from flatq.quantize.choices import Choice, ChoiceUnit, layer_units, table_units
from flatq.recipe.blocks import GptqSpec
from flatq.recipe.grammar import Recipe
from tests.conftest import MakeRecipe, flatq
from tests.models import EXACT, RandomWeights, tiny_config

HEAD = "version: 1\nmodel: some/model\n"
STAGES: list[dict[str, Any]] = [{"flat": {"rank_multiple": 4, "width_multiple": 16}}, {"gptq": {}}]
GROUPS = [16, 32, 64]
FEW = {"group_sizes": [16, 32], "bits": [2, 4]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget: {}\nstages: [gptq: {}]", "budget: no limit given; exactly one of size: 60MB"),
        ("budget: {size: 1MB, memory: 2MB}\nstages: [gptq: {}]", "budget: size and memory given; exactly one of"),
        ("budget: {size: 1MB, context: 7}\nstages: [gptq: {}]", "only read with decode_bytes or memory"),
        ("budget: {size: 1MB}\nexports: [onnx: {}]", "budget: nothing to spend it on; add `- flat: {}`"),
        (
            "budget: {size: 1MB, export: omnx}\nstages: [gptq: {}]\nexports: [onnx: {}, gguf: {name: b}]",
            "budget.export: 'omnx' is no export of this recipe; those are: onnx, b",
        ),
        (
            "budget: {size: 1MB}\nstages: [flat: {keep_ratio: 0.5}, gptq: {}]",
            "stages[0].flat.keep_ratio: the block `budget` is the limit; remove this key, or the block",
        ),
        (
            "budget: {size: 1MB}\nstages: [flat: {allocation: iprs}]",
            "allocation: a budget is spent by error curves; remove this key, or use `curves`",
        ),
        ("budget: {size: 1MB}\nstages: [flat: {method: paper}]", "add `allocation: curves`, or remove this key"),
        (
            "budget: {size: 1MB}\nstages: [gptq: {bits: 4}]",
            "stages[0].gptq.bits: the block `budget` chooses it; remove this key, restrict the choice with `bits`",
        ),
        ("budget: {size: 1MB}\nstages: [gptq: {average_bits: 4}]", "gptq.average_bits: the block `budget` chooses it"),
        ("budget: {size: 1MB}\nstages: [gptq: {group_size: 32}]", "gptq.group_size: the block `budget` chooses it"),
        (
            "budget: {size: 1MB}\nbaselines: [quantized]\nstages: [gptq: {}]",
            "baselines: quantized is the model at the bits of the gptq stage, which a budget chooses",
        ),
        ("stages: [flat: {}]", "no budget given; exactly one of keep_ratio"),
    ],
)
def test_a_mistake_in_a_budget_names_the_way_out(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe.parse(HEAD + text)
    assert message in str(refused.value)


def test_all_mistakes_of_a_budget_are_told_at_once() -> None:
    text = "budget: {context: 3}\nstages: [flat: {size: 1MB}, gptq: {bits: 3, symmetric: false}]\nbench: {prompt: 0}"
    with pytest.raises(RecipeError) as refused:
        Recipe.parse(HEAD + text)
    places = [problem.split(": ")[1] for problem in refused.value.problems]
    assert {"budget", "budget.context", "stages[0].flat.size", "bench.prompt"} <= set(places)
    assert {"stages[1].gptq.bits", "stages[1].gptq.symmetric"} <= set(places)


def test_recipes_without_a_budget_keep_their_digest() -> None:
    plain = Recipe.parse(HEAD + "stages: [gptq: {}]")
    spelt = Recipe.parse(HEAD + "stages: [gptq: {}]\nbudget: null")
    limited = [Recipe.parse(HEAD + f"stages: [gptq: {{}}]\nbudget: {{size: {size}}}") for size in ("1MB", "2MB")]
    assert plain.digest() == spelt.digest()
    assert len({plain.digest(), *(recipe.digest() for recipe in limited)}) == 3
    again = Recipe.model_validate(limited[0].model_dump())
    assert again.model_dump() == limited[0].model_dump()


SPEC = GptqSpec()
GRIDS = [Grid(2, 16, False), Grid(4, 16, False), Grid(8, 64, True)]


def units_of(config: Any, tables: list[Grid | None] | None = None) -> list[ChoiceUnit]:
    some: dict[str, list[Grid | None]] = dict.fromkeys(("embed", "head"), tables or [*GRIDS])
    return [unit for _, _, unit in layer_units(config, SPEC, GRIDS)] + table_units(config, SPEC, some)


@pytest.mark.parametrize("switches", [{}, {"tied_head": False, "post_norms": True, "logit_cap": 5.0}])
def test_the_error_of_every_choice_falls_with_its_bits(switches: dict[str, Any], tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config(**switches))
    tokens = torch.randint(0, 128, (24, 32), generator=torch.Generator().manual_seed(0))
    units = units_of(weights.config)
    found = choice_errors(weights, tokens, units, SPEC, None, tmp_path, execution=EXACT)
    assert set(found) == {unit.name for unit in units}
    for name, costs in found.items():
        assert list(costs) == ["2-16-zeros", "4-16-zeros", "8-64"], name
        two, four, eight = costs.values()
        assert two > 4 * four > 16 * eight > 0, name


def test_the_closed_form_is_the_error_of_the_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = RandomWeights(config := tiny_config())
    tokens = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(1))
    fisher = noise @ noise.mT
    units = [unit for unit in units_of(config) if unit.name.endswith((".o", ".down"))]
    short = choice_errors(weights, tokens, units, SPEC, fisher, tmp_path / "a", execution=EXACT)
    monkeypatch.setattr(
        "flatq.quantize.choice_errors._linear_error", lambda *_: pytest.fail("post norms forbid the closed form")
    )
    norms = replace(config, post_norms=True)
    choice_errors(RandomWeights(norms), tokens, units, SPEC, fisher, tmp_path / "b", execution=EXACT)
    monkeypatch.undo()
    monkeypatch.setattr("flatq.quantize.choice_errors.CLOSED", False)
    long = choice_errors(weights, tokens, units, SPEC, fisher, tmp_path / "c", execution=EXACT)
    for unit in units:
        for choice, error in long[unit.name].items():
            assert short[unit.name][choice] == pytest.approx(error, rel=2e-3), (unit.name, choice)


def test_a_table_that_stays_has_no_error_and_a_tied_one_both(tmp_path: Path) -> None:
    tokens = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))

    def errors(tied: bool) -> dict[str, dict[str, float]]:
        weights = RandomWeights(tiny_config(tied_head=tied))
        if not tied:
            weights.tensors["head.weight"] = weights.tensors["embed.weight"]
        units = units_of(weights.config, [None, GRIDS[0]])[-2 + tied :]
        return choice_errors(weights, tokens, units, SPEC, None, tmp_path / f"{tied}", execution=EXACT)

    tied, untied = errors(True), errors(False)
    assert tied["embed"]["none"] == untied["embed"]["none"] == untied["head"]["none"] == 0
    assert tied["embed"]["2-16-zeros"] > untied["head"]["2-16-zeros"] > 0


def test_unquantized_linears_of_a_unit_have_no_part_in_its_error(tmp_path: Path) -> None:
    tokens = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    stems = tuple(f"layers.0.{name}" for name in "qkv")
    grids: dict[str, dict[str, Grid | None]] = {
        "all": dict.fromkeys(stems, GRIDS[0]),
        "q": dict.fromkeys(stems) | {stems[0]: GRIDS[0]},
        "no": dict.fromkeys(stems),
    }
    unit = ChoiceUnit(stems, tuple(Choice(name, some) for name, some in grids.items()))
    found = choice_errors(RandomWeights(tiny_config()), tokens, [unit], SPEC, None, tmp_path, execution=EXACT)
    errors = found["layers.0.q"]
    assert errors["all"] > errors["q"] > errors["no"] == 0


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatq.report.render.render", lambda *_, **__: "")
    monkeypatch.setattr("os.fsync", lambda _: None)


def run_of(recipe: Path, out: Path, *more: str | Path) -> dict[str, Any]:
    shown = flatq("run", recipe, "--out", out, *more)
    assert shown.exit_code == 0, shown.stderr
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_another_limit_is_planned_from_the_measurements_of_the_first(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured again; the export meets its limit, and the report says what was bought."""
    sizes = {}
    for name, limit in (("a", 62_000), ("b", 55_000)):
        recipe = make_recipe(name, stages=STAGES, budget=FEW | {"size": f"{limit / 1000:g}kB"}, exports=[{"onnx": {}}])
        report = run_of(recipe, tmp_path / name, "--measurements", tmp_path / "kept")
        artifact = Artifact.open(tmp_path / name)
        sizes[name] = report["exports"][0]["bytes"]
        assert artifact.manifest["plan"]["achieved"] <= limit
        assert any(line.startswith("budget: ") and "(export onnx)" in line for line in report["notes"])
        for what in ("error_curves", "choice_errors", "output_sensitivity"):
            monkeypatch.setattr(f"flatq.budget.measure.{what}", lambda *_, **__: pytest.fail("measured again"))
    assert sizes["b"] < sizes["a"]
    planned = flatq("plan", recipe, "--measurements", tmp_path / "kept")
    assert next(line for line in report["notes"] if line.startswith("budget: ")) in planned.stdout
    other = flatq("plan", recipe, "--measurements", tmp_path / "none")
    assert "holds no measurements of this model, text and choices" in other.stdout
    assert artifact.bytes() != sizes["b"], "files of the export, not of the artifact"
    kept = {path.name.split("-")[0] for path in (tmp_path / "kept").iterdir()}
    assert kept == {"baseline", "curves", "choices", "dense", "sensitivity"}


def test_a_damaged_measurement_is_made_again_and_an_interrupted_run_resumes(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(stages=STAGES[1:], budget=FEW | {"size": "62kB"})
    with monkeypatch.context() as patch:
        patch.setattr("flatq.pipeline.run.compressed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert flatq("run", recipe, "--out", tmp_path / "a", "--measurements", tmp_path / "kept").exit_code == 130
    assert (tmp_path / "a" / "work" / "phases" / "choices.json").is_file()
    (kept,) = (tmp_path / "kept").glob("choices-*.json")
    whole = kept.read_text()
    kept.write_text(whole.replace("1", "2", 1))
    resumed = run_of(recipe, tmp_path / "a", "--measurements", tmp_path / "kept")
    again = run_of(recipe, tmp_path / "b", "--measurements", tmp_path / "kept")
    assert resumed["result"]["perplexity"] == again["result"]["perplexity"]
    assert json.loads(kept.read_text())["result"] == json.loads(whole)["result"]


def test_a_changed_limit_keeps_what_was_measured_and_other_prices_do_not() -> None:
    def known(budget: str, exports: str = "[onnx: {}]") -> dict[str, Any]:
        stages = "[flat: {}, gptq: {}]"
        return facts(Recipe.parse(f"{HEAD}stages: {stages}\nbudget: {{{budget}}}\nexports: {exports}"))

    def affected(other: dict[str, Any]) -> set[str]:
        before = known("size: 60MB")
        return {phase for phase in NEEDS if needs(phase, before) != needs(phase, other)}

    walked = {"plan", "compress", "recover", "evaluate", "baseline-same_bytes", "cache-ranges"}
    assert affected(known("size: 70MB")) == affected(known("memory: 70MB, context: 7")) == walked
    assert affected(known("size: 60MB, bits: [4]")) == walked | {"choices"}
    assert affected(known("size: 60MB", "[gguf: {}]")) == walked | {"choices"}
    without = facts(Recipe.parse(f"{HEAD}stages: [flat: {{keep_ratio: 0.8}}, gptq: {{}}]\nexports: [onnx: {{}}]"))
    assert affected(without) == walked | {"choices", "curves"}, "curves of a budget are judged on held-out rows"
    said = changes(known("size: 60MB"), known("size: 60MB", "[gguf: {}]"))
    assert said == ["exports.gguf: added", "exports.onnx: removed"]


def problem(flat: str = "{rank_multiple: 4, width_multiple: 16}", layers: int = 3) -> Any:
    recipe = Recipe.parse(f"{HEAD}stages: [flat: {flat}, gptq: {{}}]\nbudget: {{size: 60kB, group_sizes: [16, 32]}}")
    return problem_of(recipe, tiny_config(d_v=(16,) * layers, d_ff=(96,) * layers), [], 4)


def test_a_plan_says_what_it_bought() -> None:
    of = problem(layers=4)
    dims = list(of.config.layers)
    dims[1:3] = [replace(dims[0], d_ff=80)] * 2
    grids = {stem: Grid(4, 32, False) for _, _, unit in of.layers for stem in unit.stems}
    grids |= {"layers.2.down": Grid(8, 32, True), "embed": Grid(8, 32, True)}
    plan = JointPlan(RankPlan(tuple(dims), 60_000, 59_000, "size"), grids, 0.2, 0.05)
    assert bought(of, plan) == [
        "budget: 59 kB of 60 kB (artifact); predicted loss 0.200 nats per token, 25% of it from narrowing",
        "value heads: no layer narrowed",
        "MLP narrowed in layers 1 to 2: 80 of 96",
        "q, k, v: 4 bits in groups of 32 with zero points",
        "o: 4 bits in groups of 32 with zero points",
        "gate, up: 4 bits in groups of 32 with zero points",
        "down: 4 bits in groups of 32 with zero points in layers 0 to 1, 3; 8 bits in groups of 32 in layer 2",
        "embedding and head: 8 bits in groups of 32",
    ]


def test_a_plan_says_that_narrowing_does_not_pay() -> None:
    of = problem()
    dear = [Curves(tuple(1e9 * n for n in range(16)), tuple(1e9 * n for n in range(90)))] * 3
    lines = bought(of, plan_jointly(of, replace(guessed(of), curves=dear)))
    assert lines[1] == "narrowing does not pay at this budget: fewer bits lose less"


def test_many_different_widths_are_summed_up() -> None:
    of = problem(layers=6)
    dims = [replace(each, d_ff=16 * (index + 1)) for index, each in enumerate(of.config.layers)]
    plan = JointPlan(RankPlan(tuple(dims), 60_000, 59_000, "size"), {}, 0.2, 0.05)
    assert bought(of, plan, measured=False) == [
        "budget: 59 kB of 60 kB (artifact)",
        "value heads: no layer narrowed",
        "MLP narrowed in layers 0 to 4: 16 to 80 of 96",
    ]


def test_check_and_plan_know_a_budget(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(stages=STAGES, budget={"size": "60kB", "group_sizes": GROUPS}, exports=[{"onnx": {}}])
    checked = flatq("check", recipe)
    assert checked.exit_code == 0, checked.stderr
    assert "budget       files of 60kB, spent by predicted loss" in checked.stdout
    assert "of 2/3/4/8 bits in groups of 16/32/64" in checked.stdout
    planned = flatq("plan", recipe)
    assert planned.exit_code == 0, planned.stderr
    assert "choices" in planned.stdout
    assert "widths and bits depend on measurements during the run" in planned.stdout
    small = make_recipe("small", stages=STAGES, budget={"size": "1kB", "group_sizes": GROUPS}, exports=[{"onnx": {}}])
    assert "budget.size: 1kB cannot be reached: the smallest model" in flatq("check", small).stderr


def stub(predicted: float) -> JointPlan:
    dims = replace(tiny_config().layers[0], d_ff=int(1e6 * predicted))
    return JointPlan(RankPlan((dims,), 0, 1 / predicted, "max_damage"), {}, predicted, 0.0)


@given(st.floats(0.02, 2), st.floats(0.3, 20), st.floats(0.6, 1.6))
@example(0.021484375, 18.0, 0.609375)
def test_the_search_for_a_damage_ends_close_below_it(wanted: float, scale: float, power: float) -> None:
    """However far predictions are from what is measured, as long as they grow together."""
    walks = search(wanted, stub, lambda _, plan: scale * plan.predicted**power)
    kept = [walk.damage for walk in walks if walk.damage <= wanted]
    assert len(walks) <= WALKS
    assert kept
    assert max(kept) > 0.5 * wanted
    assert [walk.number for walk in walks] == list(range(len(walks)))


def test_the_next_walk_is_aimed_between_the_nearest_two_by_the_logarithm_of_their_damage() -> None:
    walks = [Walk(0, stub(0.4), 0.4), Walk(1, stub(0.1), 0.0)]
    share = math.log(MARGIN * 0.2 / 0.002) / math.log(0.4 / 0.002)  # no damage counts as a hundredth of the limit
    assert next_target(0.2, walks) == pytest.approx(0.1 * 4**share)


def test_a_search_ends_where_plans_stay_the_same() -> None:
    walks = search(0.1, lambda _: stub(0.01), lambda number, plan: 0.02)
    assert len(walks) == 1


def test_a_damage_that_no_walk_keeps_is_refused_with_one_that_is(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatq.pipeline.fit._damage", lambda _, number, *__: 0.9 - 0.1 * number)
    recipe = make_recipe(stages=STAGES[1:], budget={"max_damage": 0.01, "group_sizes": [32], "bits": [2, 4]})
    shown = flatq("run", recipe, "--out", tmp_path / "a")
    assert shown.exit_code == 2
    said = " ".join(shown.stderr.split())
    assert "budget.max_damage: 0.01 was kept by none of" in said
    assert "or more, or give more calibration text" in said


def test_the_smallest_plan_of_a_predicted_loss() -> None:
    of = problem()
    some = guessed(of)
    losses = [plan_jointly(of, some, limit).predicted for limit in (40_000, 60_000)]
    for loss in (losses[1], sum(losses) / 2, losses[0]):
        plan = plan_of_loss(of, some, loss)
        assert plan.predicted <= loss
        assert plan.ranks.requested == plan.ranks.achieved
        smaller = plan_jointly(of, some, 0.99 * plan.ranks.achieved)
        assert smaller.predicted > 0.9 * loss
    assert plan_of_loss(of, some, 0.0).predicted == plan_jointly(of, some, 1e9).predicted
