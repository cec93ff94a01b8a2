"""The stage ``recover``: scales and norm gains trained towards the dense model's predictions, codes untouched."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flatq.artifact import Artifact
from flatq.calibration import distillation
from flatq.calibration.distillation import DENSE, Distillation, Distilled, drawn_rows, share_of_rate
from flatq.calibration.factors import COLUMNS, ROWS, Factored, factor_shapes, slopes
from flatq.calibration.tokens import token_batches
from flatq.errors import RecipeError
from flatq.model.grid import Grid, QuantizedWeight
from flatq.model.weights import load_decoder, tensor_shapes
from flatq.pipeline.run import run
from flatq.plan.forecast import working_bytes
from flatq.plan.operations import operations
from flatq.plan.sizes import disk_bytes
from flatq.recipe.blocks import CalibrationSpec, FlatSpec, GptqSpec
from flatq.recipe.grammar import Recipe
from flatq.recipe.recovery import RecoverSpec
from flatq.report.findings import findings
from flatq.report.schema import Report
from tests.conftest import MakeRecipe, digests, flatq
from tests.models import EXACT, SWITCHES, RandomWeights, tiny_artifact, tiny_config
from tests.structured import Runs

TOKENS = torch.randint(0, 128, (12, 16), generator=torch.Generator().manual_seed(0))
MIXED = {"layers.1.gate": Grid(4, -1, False), "layers.1.up": Grid(3, 32, False)}
EXPERTS = {"experts": 4, "experts_per_token": 2}
CODED = [
    {"flat": {"keep_ratio": 0.75, "rank_multiple": 2, "width_multiple": 8}},
    {"gptq": {"bits": 3, "group_size": 16}},
]


class Killed(Exception):
    """Stands for a process that ends in the middle of a step."""


def coded(root: Path, **switches: Any) -> tuple[Artifact, RandomWeights]:
    """A model of which one linear has no codes, and the model that it was made from."""
    config = tiny_config(**switches)
    artifact = tiny_artifact(root / "artifact", config, grid=Grid(3, 16), overrides=MIXED)
    return artifact, RandomWeights(config)


def training(
    root: Path, artifact: Artifact, dense: RandomWeights, grids: Mapping[str, Grid] | None = None
) -> Distillation:
    (root / "work").mkdir(parents=True, exist_ok=True)
    return Distillation(artifact, artifact.grids if grids is None else grids, dense, TOKENS, root / "work", EXACT)


@pytest.mark.parametrize("family", [None, "experts", "gemma2", "olmo2", "qwen2"])
def test_a_step_has_the_gradients_of_the_whole_model(tmp_path: Path, family: str | None) -> None:
    switches = (SWITCHES | {None: {}, "experts": EXPERTS})[family] | {"other_kinds": (), "kind_of": ()}
    artifact, dense = coded(tmp_path, **switches)
    rows, made = torch.tensor([1, 2, 5]), training(tmp_path, artifact, dense)
    made.rows_at_once = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "LOGITS", 7)
        made._step(rows, made._final(dense, TOKENS, DENSE), 0.0)
    whole, wanted = load_decoder(artifact), load_decoder(dense)(TOKENS[rows]).log_softmax(-1)
    whole.requires_grad_()
    found = whole(TOKENS[rows]).log_softmax(-1)
    (F.kl_div(found, wanted, reduction="sum", log_target=True) / rows.numel() / TOKENS.shape[1]).backward()
    seen = set()
    for name, part in whole.named_parameters():
        if name.endswith((".bias", "router.weight")) or not name.startswith(("layers.", "norm.")):
            continue
        assert part.grad is not None
        for key, slope in slopes(name, part.detach(), part.grad, artifact.grids).items():
            torch.testing.assert_close(
                made.moments[key][0] / 0.1, slope, rtol=1e-3, atol=1e-3 * float(slope.abs().max())
            )
            seen.add(key)
    assert seen == made.logs.keys()


def test_slopes_are_the_derivatives_of_what_the_factors_fold_into(tmp_path: Path) -> None:
    artifact, _ = coded(tmp_path)
    grids = {stem: grid for stem, grid in artifact.grids.items() if stem != "layers.0.v"}
    plain = {name: artifact.tensor(name) for name in artifact.names()}
    v = plain["layers.0.v.weight"]
    assert isinstance(v, QuantizedWeight)
    weights = RandomWeights(artifact.config)
    weights.tensors = {**plain, "layers.0.v.weight": v.dequantize()}  # type: ignore[dict-item]
    logs = {name: torch.zeros(shape) for name, shape in factor_shapes(artifact.config, grids).items()}
    assert {f"layers.0.v{ROWS}", f"layers.0.v{COLUMNS}"} < logs.keys()
    for name in ("layers.0.v.weight", "layers.1.gate.weight", "layers.1.up.weight", "layers.0.mlp_norm.weight"):
        stored = Factored(weights, logs).tensor(name)
        before = stored.dequantize() if isinstance(stored, QuantizedWeight) else stored
        pull = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
        for key, slope in slopes(name, before, pull, grids).items():
            step = torch.zeros_like(logs[key])
            step.view(-1)[-1] = 0.125  # some float16 scales away
            moved = Factored(weights, logs | {key: step}).tensor(name)
            after = moved.dequantize() if isinstance(moved, QuantizedWeight) else moved
            change = float(((after - before) * pull).sum()) / float(torch.tensor(0.125).expm1())
            assert change == pytest.approx(float(slope.view(-1)[-1]), rel=1e-2)


def test_factors_of_one_leave_every_bit_and_codes_have_float16_scales(tmp_path: Path) -> None:
    artifact, _ = coded(tmp_path, tied_head=False)
    shapes = factor_shapes(artifact.config, artifact.grids)
    assert not {"embed.weight", "head.weight"} & shapes.keys()
    for value in (0.0, 0.01):
        model = Factored(artifact, {name: torch.full(shape, value) for name, shape in shapes.items()})
        for name in tensor_shapes(artifact.config):
            stored, found = artifact.tensor(name), model.tensor(name)
            if isinstance(stored, QuantizedWeight):
                assert isinstance(found, QuantizedWeight)
                assert torch.equal(found.codes, stored.codes)
                assert torch.equal(found.zero, stored.zero)
                assert found.scale.dtype == torch.float16
                assert torch.equal(found.scale, stored.scale) == (value == 0)
            else:
                assert isinstance(found, Tensor)
                assert torch.equal(found, stored) == (value == 0 or name in ("embed.weight", "head.weight"))


def test_no_steps_train_nothing(tmp_path: Path) -> None:
    artifact, dense = coded(tmp_path)
    made = training(tmp_path, artifact, dense)
    found = made.run(0, 32, 0.01, seed=0)
    assert found == Distilled(found.before, found.before, 0)
    assert found.before > 0
    assert not any(bool(log.any()) for log in made.best.values())


def test_a_state_that_is_worse_on_the_rows_held_out_is_not_kept(tmp_path: Path) -> None:
    artifact, dense = coded(tmp_path)
    made = training(tmp_path, artifact, dense)
    found = made.run(6, 32, 3.0, seed=0)
    assert found.step == 0
    assert found.after == found.before
    assert not any(bool(log.any()) for log in made.best.values())
    assert any(bool(log.any()) for log in made.logs.values())


def test_the_dense_model_has_nothing_to_recover(tmp_path: Path) -> None:
    dense = RandomWeights(tiny_config())
    made = training(tmp_path, dense, dense, {})  # type: ignore[arg-type]
    assert made.run(2, 32, 0.01, seed=0).before == pytest.approx(0, abs=1e-6)


def test_every_row_is_drawn_once_before_the_next_order() -> None:
    rows = torch.arange(3, 14)
    drawn = torch.cat([drawn_rows(rows, 4, step, seed=5) for step in range(11)])
    for turn in drawn.view(4, 11):
        assert torch.equal(turn.sort().values, rows)
    assert not torch.equal(drawn[:11], drawn[11:22])
    assert not torch.equal(drawn[:11], torch.cat([drawn_rows(rows, 4, step, seed=6) for step in range(3)])[:11])


def test_the_rate_rises_and_falls() -> None:
    shares = [share_of_rate(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.2, rel=0.01)
    assert max(shares) == shares[4] > 0.99
    assert shares[50] == pytest.approx(0.5)
    assert 0 < shares[99] < 0.001
    assert share_of_rate(0, 1) == 1


def staged(runs: Runs, **recover: Any) -> list[dict[str, Any]]:
    return [*CODED, {"recover": {"steps": 24, "samples": 24, "tokens": 256, "learning_rate": 0.01} | recover}]


def test_it_is_trained_on_other_rows_than_the_walk_sees_and_none_that_is_judged(runs: Runs) -> None:
    usual, tokenizer = Recipe.parse(runs.recipe(stages=CODED)), runs.source().tokenizer()
    given = (usual.calibration, usual.evaluation, tokenizer)
    without, tokens = token_batches(*given), token_batches(*given, recovery=9)
    assert without.recovery is None
    assert torch.equal(tokens.calibration, without.calibration)
    assert tokens.recovery is not None
    assert tokens.recovery.shape == (9, usual.calibration.seq_len)
    seen, judged, drawn = (
        {tuple(row) for row in text.tolist()} for text in (tokens.calibration, tokens.heldout, tokens.recovery)
    )
    assert len(drawn) == 9
    assert not drawn & (seen | judged)
    assert tokens.description["recovery"]["sequences"] == 9
    with pytest.raises(RecipeError, match=r"\(with the 9999 samples of recover\) leaves"):
        token_batches(*given, recovery=9999)


def test_it_recovers_and_only_scales_and_gains_change(runs: Runs) -> None:
    without, made = runs(stages=CODED), runs(stages=staged(runs))
    before, after = (each.report["quality"][0]["damage"] for each in (without, made))
    assert after < 0.8 * before
    recovery = made.report["recovery"]
    assert recovery["after"] < 0.9 * recovery["before"]
    assert [text["damage"] for text in recovery["quality"]] == [before]
    assert without.report["recovery"] is None
    report = Report.model_validate(made.report)
    assert report.recovery is not None
    assert [
        line for line in findings(report).gains if line.startswith("recover (distillation, a kind of training) on ")
    ]
    refused = report.model_copy(update={"recovery": report.recovery.model_copy(update={"step": 0})})
    assert "recover: no step lowered the divergence" in " ".join(findings(refused).notes)
    assert made.artifact.names() == without.artifact.names()
    for name in made.artifact.names():
        one, other = without.artifact.tensor(name), made.artifact.tensor(name)
        if isinstance(one, QuantizedWeight):
            assert isinstance(other, QuantizedWeight)
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.zero, other.zero)
            assert not torch.equal(one.scale, other.scale)
        else:
            assert isinstance(one, Tensor)
            assert isinstance(other, Tensor)
            assert torch.equal(one, other) == (not name.endswith("norm.weight"))


@pytest.mark.parametrize("at", [3, 20])
def test_a_killed_run_ends_with_the_same_bytes(runs: Runs, at: int) -> None:
    made = runs(stages=staged(runs))
    out, recipe = runs.out / f"killed-{at}", Recipe.parse(runs.recipe(stages=staged(runs)))
    step, count = Distillation._step, [0]

    def counted(self: Distillation, *args: Any) -> None:
        if count[0] == at:
            raise Killed
        count[0] += 1
        step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flatq.report.render.render", lambda *_, **__: "")
        with patch.context() as killing:
            killing.setattr(Distillation, "_step", counted)
            with pytest.raises(Killed):
                run(recipe, out, device="cpu")
        count[0] = -1000
        with patch.context() as counting:
            counting.setattr(Distillation, "_step", counted)
            run(recipe, out, device="cpu")
    assert count[0] + 1000 == 24 - at // 10 * 10, "steps that were saved are not repeated"
    assert digests(out / "artifact") == digests(made.root / "artifact")
    assert json.loads((out / "report.json").read_text())["recovery"] == made.report["recovery"]
    assert not (out / "work").exists()


def planned(steps: int | None, tokens: int = 1024, bits: bool = True, **calibration: Any) -> Recipe:
    stages = [GptqSpec()] if bits else [FlatSpec(keep_ratio=0.9)]
    trained = [] if steps is None else [RecoverSpec(steps=steps, tokens=tokens)]
    text = CalibrationSpec(dataset="self", **{"samples": 8, "seq_len": 64} | calibration)
    return Recipe(version=1, model={"path": "x"}, calibration=text, stages=(*stages, *trained))


def test_the_forecast_knows_the_steps() -> None:
    config = tiny_config()
    tokens = {"self-text": 0} | dict.fromkeys(
        ("sensitivity", "curves", "baseline", "compress", "recover", "evaluate"), 512
    )

    def counted(*args: Any, **named: Any) -> float:
        return operations(planned(*args, **named), config, config.layers, tokens, ranges=False)["recover"].forward

    assert "recover" not in operations(planned(None), config, config.layers, tokens, ranges=False)
    ten, thirty = counted(10), counted(30)
    a_token = (thirty - ten) / 20 / 1024
    least = 8 * config.decoder_parameters() + 6 * config.vocab * config.d_model
    assert least < a_token < 1.5 * least, "four forward passes and three products with a head"
    assert ten - counted(0) == pytest.approx(10 * 1024 * a_token)
    assert counted(30, 64) - counted(10, 64) == counted(30, 1) - counted(10, 1), "a step is at least one row"
    assert counted(10, 2048) > 1.9 * ten
    moved = [operations(planned(n), config, config.layers, tokens, ranges=False)["recover"].moved for n in (10, 30)]
    assert moved[1] - moved[0] > 20 * config.decoder_parameters() * 24
    assert list(operations(planned(1, bits=False), config, config.layers, tokens, ranges=False))[-3:] == [
        "compress",
        "recover",
        "evaluate",
    ]


def test_the_forecast_of_memory_and_disk_knows_the_stage() -> None:
    config = tiny_config()
    needed = working_bytes(config, planned(10))
    assert list(needed)[-3:] == ["compress", "recover", "evaluate"]
    assert "recover" not in working_bytes(config, planned(None))
    assert working_bytes(config, planned(10, 4096))["recover"] > needed["recover"]
    without, small, large = (disk_bytes(config, each, 4) for each in (planned(None), planned(9), planned(9, 2048)))
    assert small - without > without / 2, "the walk's artifact is there, too"
    assert large - small == 5 * 1024 * 64 * 4, "hidden states between all blocks"


def test_check_and_plan_name_the_stage(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(stages=[{"gptq": {"bits": 4, "group_size": 16}}, {"recover": {"steps": 7, "tokens": 99}}])
    shown = flatq("check", recipe)
    assert "7 steps of 99 tokens" in " ".join(shown.output.split())
    assert re.search(r"recover\W+[\d.]+ .?B\W+about", flatq("plan", recipe).output)


def test_exports_of_a_recovered_model_hold_its_scales(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    stages = [
        {"gptq": {"bits": 4, "group_size": 32}},
        {"recover": {"steps": 8, "samples": 16, "tokens": 512, "learning_rate": 0.003}},
    ]
    exports = [{"onnx": {"precision": "int4"}}, {"safetensors": {"format": "gptq"}}]
    shown = flatq("run", make_recipe(stages=stages, exports=exports), "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recovery"]["step"] > 0
    assert [export["verify"]["exact"]["max_abs"] < 1e-4 for export in report["exports"]] == [True] * 2
    page = (tmp_path / "out" / "report.md").read_text()
    assert "before recover" in page
    assert "recover (distillation, a kind of training) on " in page
