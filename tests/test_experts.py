"""Mixtures of experts: reading, statistics per expert, narrowing, GPTQ, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from flatq.calibration.grams import Gram
from flatq.calibration.routed import RoutedGram, scarce
from flatq.calibration.walk import walk
from flatq.compress.allocate import Curves
from flatq.compress.error_curves import error_curves
from flatq.compress.mlp import eliminate, leading_channels, nystroem, output_error, ridge_leverage
from flatq.compress.plan import RankPlan, plan_ranks, shifted, uneven_mlps
from flatq.compress.stage import FlatStage
from flatq.errors import ArtifactError, RecipeError, UnsupportedModel
from flatq.linalg import drift_correction, relative_energy, shrunk
from flatq.model.balance import balance
from flatq.model.decoder import ACTIVATION, Decoder, DecoderConfig
from flatq.model.dims import MLP_LINEARS
from flatq.model.footprint import weight_bytes
from flatq.model.grid import Grid, round_to_nearest
from flatq.model.hf_config import config_from_hf
from flatq.model.weights import load_decoder, load_half
from flatq.plan.describe import described
from flatq.plan.preview import check, plan
from flatq.plan.sizes import cautions
from flatq.quantize.gptq import gptq
from flatq.quantize.grids import objections, planned_grids
from flatq.quantize.stage import GptqStage
from flatq.recipe.blocks import FlatSpec, GptqSpec
from flatq.recipe.grammar import Recipe
from flatq.sources.source import open_model
from tests.models import EXACT, RandomWeights, tiny_artifact, tiny_config
from tests.parity.test_decoder_parity import tiny
from tests.test_families import ROWS

ROUTED: dict[str, Any] = {"experts": 4, "experts_per_token": 2, "normed_routing": True}
CONFIG = tiny_config(family="qwen3_moe", qk_norm=True, d_ff=(128, 128), **ROUTED)
GRID = Grid(4, 16, True)
TOKENS = torch.randint(0, 128, (6, 24), generator=torch.Generator().manual_seed(0))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(count: int, width: int) -> Tensor:
    """Second moments of ``count`` experts, [n, d, d]."""
    return torch.stack([(x := numbers(3 * width, width, seed=n)).T @ x / len(x) for n in range(count)])


def test_the_layer_is_the_weighted_sum_of_its_experts() -> None:
    layer = load_half(RandomWeights(CONFIG), 0, "mlp")
    x = numbers(2, 5, 64)
    likely = functional.linear(x, layer.router.weight).softmax(-1)
    share, chosen = likely.topk(2)
    share = share / share.sum(-1, keepdim=True)
    slices = zip(layer.gate.weight.chunk(4), layer.up.weight.chunk(4), layer.down.weight.chunk(4, 1), strict=True)
    outputs = torch.stack([(functional.silu(x @ g.T) * (x @ u.T)) @ d.T for g, u, d in slices], -2)  # [b, s, E, m]
    wanted = (outputs.gather(-2, chosen[..., None].expand(-1, -1, -1, 64)) * share[..., None]).sum(-2)
    torch.testing.assert_close(layer.down(layer.widen(x)), wanted)
    torch.testing.assert_close(layer.close("mlp", layer.widen(x)), wanted)


def test_linears_of_another_class_compute_every_expert_with_the_same_result() -> None:
    class Other(nn.Linear):
        """As a loader of quantized weights has it."""

    layer = load_half(RandomWeights(CONFIG), 0, "mlp")
    x = numbers(2, 5, 64)
    expected = layer.widen(x)
    other = Other(64, 128, bias=False)
    other.weight = layer.gate.weight
    closed = layer.close("mlp", expected)
    narrow = Other(128, 64, bias=False)
    narrow.weight = layer.down.weight
    layer.gate, layer.down = other, narrow
    torch.testing.assert_close(layer.widen(x), expected)
    torch.testing.assert_close(layer.close("mlp", expected), closed)
    assert (expected == 0).float().mean() >= 0.5


def test_experts_are_differentiated_as_one_wide_mlp() -> None:
    layer, x = load_half(RandomWeights(CONFIG), 0, "mlp"), numbers(2, 5, 64).requires_grad_()
    share = layer.router(layer.mlp_norm(x))
    inner = functional.silu(layer.gate(layer.mlp_norm(x))) * layer.up(layer.mlp_norm(x))
    plain = layer.down(inner * share.repeat_interleave(32, -1))
    pull = numbers(2, 5, 64, seed=1)
    (wanted,) = torch.autograd.grad(plain, x, pull)
    (found,) = torch.autograd.grad(layer.output("mlp", x, ()), x, pull)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral"])
def test_experts_are_read_one_by_one_or_stacked(tmp_path: Path, case: str) -> None:
    tiny(case).save_pretrained(tmp_path)
    source = open_model(str(tmp_path))
    source.validate()
    names = [f"layers.1.{linear}.weight" for linear in MLP_LINEARS]
    single = {name: source.tensor(name) for name in names}
    _stack(tmp_path / "model.safetensors", source.config.experts)
    stacked = open_model(str(tmp_path))
    stacked.validate()
    for name in names:
        assert torch.equal(stacked.tensor(name), single[name])


def _stack(file: Path, experts: int) -> None:
    tensors = load_file(file)
    path = "mlp" if any(".mlp.experts." in name for name in tensors) else "block_sparse_moe"
    linears = ("gate_proj", "up_proj", "down_proj") if path == "mlp" else ("w1", "w3", "w2")
    for layer in range(2):
        start = f"model.layers.{layer}.{path}.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{start}.{number}.{linear}.weight") for number in range(experts)])
            for linear in linears
        )
        tensors |= {f"{start}.gate_up_proj": torch.cat([gate, up], 1), f"{start}.down_proj": down}
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gone = tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    words = r"tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight is missing: the layer has 5 of 6 experts"
    with pytest.raises(ArtifactError, match=words):
        open_model(str(tmp_path)).validate()
    tensors |= {f"model.layers.1.mlp.experts.{number}.up_proj.weight": gone.clone() for number in (3, 6)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"experts\.6\.up_proj\.weight is of an expert beyond the 6 of config.json"):
        open_model(str(tmp_path)).validate()
    del tensors["model.layers.1.mlp.experts.6.up_proj.weight"]
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = gone[:, :3].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"layers\.1\.up\.weight has shape \[20, 3\]"):
        open_model(str(tmp_path)).validate()


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: 2 is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: \[0\] is not supported"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok 5: expected 1 to 4"),
        ("qwen3_moe", {"num_local_experts": 8}, "num_experts 4, num_local_experts 8: expected one number"),
        ("mixtral", {"num_local_experts": 1}, "num_local_experts 1: expected one number of experts, 2 or more"),
        ("mixtral", {"num_local_experts": None}, "expected one number of experts"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is null"),
        ("qwen3", {"num_experts": 4}, "num_experts: 4 changes what the model computes"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size: 8 changes"),
    ],
)
def test_experts_of_another_kind_are_refused_by_name(name: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        config_from_hf({**ROWS[name], **more})


def test_the_number_of_experts_has_two_names() -> None:
    stated = {key: value for key, value in ROWS["qwen3_moe"].items() if key != "num_experts"}
    config = config_from_hf({**stated, "num_local_experts": 4})
    assert config == config_from_hf(ROWS["qwen3_moe"])
    assert (config.experts, config.experts_per_token, config.layers[0].d_ff) == (4, 2, 96)
    assert "4 experts of d_ff 24, 2 per token" in described(config)


def test_a_configuration_without_whole_experts_is_no_configuration() -> None:
    with pytest.raises(ValueError, match="d_ff 66 is not 4 experts of one width"):
        tiny_config(d_ff=(66, 128), **ROUTED)
    with pytest.raises(ValueError, match="experts_per_token 5 of 4 experts"):
        tiny_config(**{**ROUTED, "experts_per_token": 5})
    with pytest.raises(ValueError, match="experts_per_token 0 of 4 experts"):
        tiny_config(experts=4)


def test_parameters_and_bytes_count_the_routers(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", CONFIG, grid=GRID)
    assert artifact.bytes() == weight_bytes(CONFIG, artifact.grids, 4)
    assert CONFIG.parameters() == sum(parameter.numel() for parameter in Decoder(CONFIG).parameters())


def test_a_router_is_rescaled_with_the_norm_that_it_reads() -> None:
    weights = RandomWeights(CONFIG)
    weights.tensors["layers.0.mlp_norm.weight"] *= 2.0**40
    for name in ("gate", "up", "router"):
        weights.tensors[f"layers.0.{name}.weight"] *= 2.0**-40
    layer, x = load_half(weights, 0, "mlp"), numbers(2, 5, 64)
    before = layer.output("mlp", x, ())
    assert balance(layer, "mlp") == [
        "mlp_norm and gate+up+router: rescaled by 2^-41 and its inverse, to numbers that float16 can hold; their "
        "product is unchanged"
    ]
    assert torch.equal(layer.output("mlp", x, ()), before)


def test_the_grams_of_an_expert_are_of_the_tokens_that_it_is_sent(tmp_path: Path) -> None:
    blocks = walk(RandomWeights(CONFIG), TOKENS, tmp_path, lambda _: None, execution=EXACT)
    block = next(block for block in blocks if block.half == "mlp" and block.observe())
    x = block.activations(block.feed.states[:])["input"].flatten(0, 1)
    share = block.layer.router(x)
    seen, inner = block.grams["input"], block.grams["inner"]
    assert isinstance(seen, RoutedGram)
    assert seen.tokens.tolist() == [int((share[:, expert] > 0).sum()) for expert in range(4)]
    assert int(seen.tokens.sum()) == 2 * len(x)
    slices = zip(block.layer.gate.weight.chunk(4), block.layer.up.weight.chunk(4), strict=True)
    for expert, (gate, up) in enumerate(slices):
        sent = x[share[:, expert] > 0]
        own = share[share[:, expert] > 0, expert, None]
        wide = own * functional.silu(sent @ gate.T) * (sent @ up.T)
        torch.testing.assert_close(seen.total[expert], (own * sent).T @ (own * sent), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inner.total[expert], wide.T @ wide, rtol=1e-4, atol=1e-4)
    shares = share[:, :, None] * x[:, None]
    torch.testing.assert_close(seen.energy(), shares.square().sum(1).mean(0), rtol=1e-4, atol=1e-5)
    assert inner.energy().shape == (128,)


def routed(counts: tuple[int, ...], width: int, *, shared: bool) -> RoutedGram:
    """A Gram of experts of which each is sent so many tokens, with weight 0.5."""
    gram = RoutedGram(width, len(counts), shared=shared)
    for expert, count in enumerate(counts):
        share = torch.zeros(count, len(counts))
        share[:, expert] = 0.5
        x = numbers(count, width, seed=expert)
        wide = torch.zeros(count, len(counts), width)
        wide[:, expert] = 0.5 * x
        gram.route(x if shared else wide.flatten(1), share)
    return gram


def test_lacking_tokens_are_those_of_the_mean() -> None:
    for shared in (True, False):
        gram = routed((40, 3, 0), 8, shared=shared)
        assert gram.lacking().tolist() == [0, 5, 8]
        usual = gram.total.sum(0) / 43
        if not shared:
            usual = torch.eye(8) * usual.diagonal().mean()
        wanted = torch.stack([gram.total[0], gram.total[1] + 5 * usual, 8 * usual]) / 43
        torch.testing.assert_close(gram.mean(), wanted)
        enough = routed((40, 8, 9), 8, shared=shared)
        torch.testing.assert_close(enough.mean(), enough.total / 57)
    assert not RoutedGram(8, 2, shared=True).mean().any()


def test_the_report_names_experts_that_were_sent_few_tokens(tmp_path: Path) -> None:
    grams: Mapping[str, Gram] = {
        "input": routed((40, 3, 0), 8, shared=True),
        "inner": routed((9, 8, 8), 8, shared=False),
    }
    assert scarce(grams) == [
        "gate+up: FEW TOKENS: of 3 experts 2 were sent fewer tokens than they have inputs (8); the layer's mean "
        "replaces those lacking: expert 1 (3), 2 (0)"
    ]
    many = {"inner": routed((0,) * 10, 4, shared=False)}
    assert scarce(many)[0].endswith("7 (0) and 2 more")
    weights = RandomWeights(CONFIG)
    for block in walk(weights, TOKENS[:1, :8], tmp_path, lambda _: None, execution=EXACT):
        block.observe()
        assert any("FEW TOKENS" in note for note in block.notes) == (block.half == "mlp")


def test_a_gram_completed_with_the_mean_is_better_than_few_tokens_and_than_rounding() -> None:
    """Expert 0 sees 8 tokens of 32 inputs; the others, whose inputs are alike, many."""
    mixing = numbers(32, 32, seed=5) * torch.logspace(0, -1.5, 32)[:, None]
    gram, w = RoutedGram(32, 4, shared=True), numbers(48, 32, seed=6)
    for expert, count in enumerate((8, 400, 400, 400)):
        share = torch.zeros(count, 4)
        share[:, expert] = 1
        gram.route(numbers(count, 32, seed=10 + expert) @ mixing, share)
    truth = mixing.T @ mixing

    def lost(weight: Tensor) -> float:
        return relative_energy(w - weight, w, truth)

    filled, bare = (gptq(w, one, GRID).weight.dequantize() for one in (gram.mean()[0], gram.total[0] / 8))
    assert lost(filled) < 0.8 * lost(round_to_nearest(w, GRID, search=True).dequantize())
    assert lost(filled) < 0.8 * lost(bare)


def test_gptq_of_experts_is_gptq_of_each() -> None:
    grams = moments(4, 32)
    gate, up = numbers(64, 32, seed=1), numbers(64, 32, seed=2)
    together = gptq(torch.cat([gate, up]), grams, GRID, parts=2)
    down = numbers(24, 128, seed=3)
    columns = gptq(down, grams, GRID)
    lost = torch.zeros(24, dtype=torch.float64)
    for expert in range(4):
        rows = slice(16 * expert, 16 * expert + 16)
        for whole, start in ((gate, 0), (up, 64)):
            alone = gptq(whole[rows], grams[expert], GRID)
            here = slice(start + rows.start, start + rows.stop)
            for part in ("codes", "scale", "zero"):
                assert torch.equal(getattr(together.weight, part)[here], getattr(alone.weight, part))
            torch.testing.assert_close(together.lost[here], alone.lost)
        alone = gptq(down[:, 32 * expert : 32 * expert + 32], grams[expert], GRID)
        assert torch.equal(columns.weight.codes[:, 32 * expert : 32 * expert + 32], alone.weight.codes)
        assert torch.equal(columns.weight.scale[:, 2 * expert : 2 * expert + 2], alone.weight.scale)
        lost += alone.lost
    torch.testing.assert_close(columns.lost, lost)
    assert columns.error_of() == pytest.approx(
        relative_energy(down - columns.weight.dequantize(), down, grams), rel=1e-3
    )
    assert columns.damping == 0.01
    with pytest.raises(ValueError, match="groups of 64 columns span experts of 32"):
        gptq(down, grams, Grid(4, 64, True))


def test_dead_inputs_of_experts_are_counted() -> None:
    grams = moments(2, 16)
    grams[1] = 0
    columns = gptq(numbers(8, 32), grams, GRID)
    assert (columns.dead, columns.damping) == (16, 0.01)
    assert gptq(numbers(8, 16), grams, GRID).dead == 0


def test_the_stage_solves_every_expert_on_its_tokens(tmp_path: Path) -> None:
    weights, spec = RandomWeights(CONFIG), GptqSpec(group_size=16)
    stage, mlps = GptqStage(spec, planned_grids(CONFIG, spec)), 0
    for block in walk(weights, TOKENS, tmp_path, lambda _: None, execution=EXACT):
        block.observe()
        whole = {name: getattr(block.layer, name).weight.clone() for name in MLP_LINEARS} if block.half == "mlp" else {}
        stage.apply(block)
        for name, weight in whole.items():
            gram = block.grams["inner" if name == "down" else "input"].mean()
            alone = gptq(weight, gram, GRID)
            assert torch.equal(block.quantized[name].codes, alone.weight.codes)
            assert block.errors[name] == pytest.approx(alone.error_of(), rel=1e-4)
            mlps += 1
    assert mlps == 6


def test_experts_are_narrowed_each_on_its_gram_to_one_width() -> None:
    grams, down = moments(4, 32), numbers(24, 128, seed=3)
    found = eliminate(down, grams, 64, 0.01)
    keep = found.kept(len(grams))
    by_leverage = leading_channels(ridge_leverage(grams, 0.01), 64)
    fitted = nystroem(down, grams, keep)
    lost = total = 0.0
    for expert in range(4):
        w = down[:, 32 * expert : 32 * expert + 32]
        alone = eliminate(w, grams[expert], 16, 0.01).kept(32)
        assert keep[16 * expert : 16 * expert + 16].tolist() == (alone + 32 * expert).tolist()
        scores = leading_channels(ridge_leverage(grams[expert], 0.01), 16)
        assert by_leverage[16 * expert : 16 * expert + 16].tolist() == (scores + 32 * expert).tolist()
        refitted = nystroem(w, grams[expert], alone)
        torch.testing.assert_close(fitted[:, 16 * expert : 16 * expert + 16], refitted)
        energy = float(((w @ grams[expert]) * w).sum())
        lost += output_error(w, grams[expert], refitted, alone) * energy
        total += energy
    assert output_error(down, grams, fitted, keep) == pytest.approx(lost / total, rel=1e-4)
    assert len(found.cost) == len(found.order) == 64
    assert float(found.cost[-1]) == pytest.approx(lost, rel=0.05)  # the ridge of the elimination is in its cost
    torch.testing.assert_close(shrunk(grams, 0.1)[2], shrunk(grams[2], 0.1))


def test_narrowed_grams_are_those_of_the_channels_that_are_kept() -> None:
    gram = routed((40, 30), 8, shared=False)
    kept = gram.select(torch.tensor([1, 2, 5, 8, 9, 15]))
    assert torch.equal(kept.total[1], gram.total[1][:, [0, 1, 7]][[0, 1, 7]])
    assert (kept.count, kept.tokens.tolist(), kept.features) == (70, [40, 30], 3)


def test_the_correction_of_experts_never_makes_the_stream_worse(tmp_path: Path) -> None:
    """Each is fitted to the whole error and adds its share of it; the mean of fits that help helps."""
    weights, seen = RandomWeights(CONFIG), 0
    for block in walk(weights, TOKENS, tmp_path, lambda _: None, execution=EXACT, reference=True):
        block.observe()
        if block.half == "attention":
            block.narrow("o", block.layer.o.weight / 2, None)
            continue
        assert block.drift is not None
        assert block.reference is not None
        inner = block.activations(block.feed.states[:])["inner"]
        error = block.reference.after.states[:] - block.run(block.feed.states[:])
        torch.testing.assert_close(block.drift, inner.flatten(0, 1).T @ error.flatten(0, 1) / 2, rtol=1e-3, atol=1e-2)
        found = drift_correction(block.grams["inner"].mean(), block.drift / block.grams["inner"].count)
        left = error - inner @ found.T.float()
        assert left.square().sum() < error.square().sum()
        seen += 1
    assert seen == 2


@pytest.mark.parametrize("settings", [{}, {"method": "paper"}, {"values": "whole", "correction": 0.0}])
def test_a_narrowed_model_has_experts_of_one_width(tmp_path: Path, settings: dict[str, Any]) -> None:
    weights = RandomWeights(CONFIG)
    dims = [replace(layer, d_v=8, d_ff=64) for layer in CONFIG.layers]
    stage = FlatStage(FlatSpec(keep_ratio=0.5, **settings), RankPlan(tuple(dims), 0.5, 0.5))
    for block in walk(weights, TOKENS, tmp_path, lambda _: None, execution=EXACT, reference=stage.corrects):
        stage.apply(block)
        if block.half == "mlp":
            assert block.layer.gate.weight.shape == (64, 64)
            assert 0 < block.errors["mlp"] < 1
            rows = [*map(tuple, weights.tensor(f"layers.{block.index}.up.weight").tolist())]
            kept = [rows.index(tuple(row)) // 32 for row in block.layer.up.weight.tolist()]
            assert kept == [expert for expert in range(4) for _ in range(16)]
            x = block.activations(block.feed.states[:])
            assert x["inner"].shape[-1] == 64
            energy = x["inner"].square().flatten(0, 1).mean(0)
            torch.testing.assert_close(block.grams["inner"].energy(), energy, rtol=1e-3, atol=1e-4)


def test_widths_are_planned_in_steps_of_all_experts(tmp_path: Path) -> None:
    curves = error_curves(RandomWeights(CONFIG), TOKENS, None, tmp_path, ridge=0.01, execution=EXACT)
    assert [len(curve.mlp) for curve in curves] == [1 + 4 * (32 - 3)] * 2
    assert curves[0].mlp[1] == curves[0].mlp[4] < curves[0].mlp[5]
    spec = FlatSpec(keep_ratio=0.6, width_multiple=8, values="whole")
    for measured in ([], [Curves(one.value, one.mlp) for one in curves]):
        planned = plan_ranks(CONFIG, spec, curves=measured).layers
        assert {dims.d_ff % 32 for dims in planned} == {0}
        assert planned != CONFIG.layers
        assert {dims.d_ff % 32 for dims in shifted(CONFIG, spec, planned).layers} == {0}
        assert shifted(CONFIG, spec, planned).layers != planned
    assert [dims.d_ff for dims in uneven_mlps(CONFIG, spec.model_copy(update={"width_multiple": 8})).layers] == [
        96,
        128,
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"group_size": 64}, "a group of down would span experts of 32 channels; choose 16 or 32 for down"),
        ({"group_size": -1}, "group_size: -1: a group of down would span experts"),
        ({"average_bits": 4.0}, "average_bits: 4.0 is not possible for the experts of qwen3_moe"),
        ({"correction": 0.5}, "correction: 0.5 is not possible"),
        ({"tune_steps": 10}, "tune_steps: 10 is not possible"),
        ({"group_size": 64, "overrides": {"*.down": {"group_size": 32}}}, None),
        ({"group_size": 16}, None),
    ],
)
def test_what_gptq_cannot_do_with_experts_is_refused_by_name(settings: dict[str, Any], words: str | None) -> None:
    said = objections(CONFIG, GptqSpec.model_validate({"group_size": 32, **settings}))
    assert [words in one for one in said] == [True] if words else said == []
    odd = tiny_config(d_ff=(36, 36), **ROUTED)
    assert "no group size divides it" in objections(odd, GptqSpec(group_size=16))[0]


def folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({**ROWS["qwen3_moe"], "moe_intermediate_size": 32, "max_position_embeddings": 512})
    )
    return path


def recipe(model: Path, **more: Any) -> Recipe:
    stages = [{"flat": {"keep_ratio": 0.9}}, {"gptq": {"group_size": 32}}]
    text = {"dataset": "python-docs", "samples": 16, "seq_len": 64}
    return Recipe.model_validate(
        {"version": 1, "model": {"path": str(model)}, "calibration": text, "stages": stages, **more}
    )


def test_check_and_plan_say_what_is_done_with_experts(tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    said = "\n".join(check(recipe(model)))
    assert "4 experts of d_ff 32, 2 per token" in said
    assert "routers stay unquantized" in said
    assert "all experts of a layer get one width" in said
    assert "all experts of a layer get one width" in plan(recipe(model))
    assert "one width" not in "\n".join(check(recipe(model, stages=[{"gptq": {"group_size": 32}}])))
    with pytest.raises(RecipeError, match=r"average_bits: 4\.0 is not possible for the experts"):
        check(recipe(model, stages=[{"gptq": {"group_size": 32, "average_bits": 4.0}}]))
    with pytest.raises(RecipeError, match="budget: bits and widths of the experts of qwen3_moe are not measured"):
        check(recipe(model, stages=[{"flat": {}}, {"gptq": {}}], budget={"size": "1MB"}))


def test_a_token_counts_for_the_experts_that_it_is_sent_to() -> None:
    config = tiny_config(d_ff=(4096, 4096), **ROUTED)  # 1024 inputs of down in an expert, half of the tokens each
    enough = Recipe.model_validate(
        {
            "version": 1,
            "model": {"path": "x"},
            "calibration": {"dataset": "python-docs", "samples": 32, "seq_len": 64},
            "stages": [{"gptq": {}}],
        }
    )
    assert cautions(enough, config) == []
    assert cautions(enough, replace(config, experts_per_token=1)) != []


def test_every_activation_is_one_of_experts_too() -> None:
    for name in ACTIVATION:
        config: DecoderConfig = replace(CONFIG, activation=name)
        assert load_decoder(RandomWeights(config))(TOKENS).isfinite().all()
