"""Numbers at the edge: too large, too small, zero; each is rescaled, or named, and none is silently used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flatq.errors import ExportError, NumericsError
from flatq.model.balance import balance
from flatq.model.decoder import locate
from flatq.model.grid import Grid, round_to_nearest
from flatq.model.weights import load_half, tensor_shapes
from flatq.quantize.gptq import gptq
from flatq.sources.source import Source, open_model
from flatq_gguf.tensors import HALF_SCALED, Planned, encoded
from flatq_onnx.builder import FLOAT16, Builder
from tests.conftest import FLAT, GPTQ, MakeRecipe, flatq
from tests.models import RandomWeights, tiny_config

LAYER = "model.layers.1."
UP, DOWN = LAYER + "mlp.up_proj.weight", LAYER + "mlp.down_proj.weight"
Change = Callable[[dict[str, Tensor]], None]


def changed(model: Path, change: Change) -> Path:
    """The checkpoint with other weights."""
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def opened(model: Path) -> Source:
    return open_model(str(model))


@pytest.mark.parametrize("value", [1e30, -1e16, float("nan"), float("inf")])
def test_one_such_number_in_any_tensor_is_named_before_it_is_used(
    value: float, tiny_model: Path, tmp_path: Path
) -> None:
    for name in load_file(tiny_model / "model.safetensors"):
        model = Path(shutil.copytree(tiny_model, tmp_path / name))
        source = opened(changed(model, lambda tensors, name=name: tensors[name].view(-1)[7:8].fill_(value)))  # type: ignore[misc]
        refused = {ours: words for ours in tensor_shapes(source.config) if (words := refusal(source, ours))}
        assert len(refused) == 1, name
        assert all(f"tensor {ours} holds" in words for ours, words in refused.items())


def refusal(source: Source, name: str) -> str:
    """Why a tensor is not read."""
    try:
        source.tensor(name)
    except NumericsError as wrong:
        return str(wrong)
    return ""


def test_a_run_ends_with_one_line_that_names_the_tensor(
    make_recipe: MakeRecipe, model_copy: Path, tmp_path: Path
) -> None:
    model = changed(model_copy, lambda tensors: tensors[UP].view(-1)[7:8].fill_(1e30))
    shown = flatq("run", make_recipe(model=str(model)), "--out", tmp_path / "out", "--device", "cpu")
    assert shown.exit_code == 3
    assert "tensor layers.1.up.weight holds 1e+30" in " ".join(shown.stderr.split())
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("power", [20, -24])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("half", "first", "second"),
    [
        ("mlp", ("up.weight",), ("down.weight",)),
        ("attention", ("v.weight", "v.bias"), ("o.weight",)),
        ("attention", ("q.weight", "q.bias"), ("k.weight", "k.bias")),
        ("attention", ("attention_norm.weight",), ("q.weight", "k.weight", "v.weight")),
        ("mlp", ("mlp_norm.weight",), ("gate.weight", "up.weight")),
    ],
)
def test_a_factor_that_moved_within_a_pair_is_taken_back_and_the_function_stays(
    half: str, first: tuple[str, ...], second: tuple[str, ...], qk_norm: bool, power: int
) -> None:
    if qk_norm and first[0] == "q.weight":
        pytest.skip("a norm follows: the factor changes nothing but numbers")
    config = tiny_config(qk_norm=qk_norm, qkv_bias=True)
    weights, moved = RandomWeights(config), RandomWeights(config)
    for names, factor in ((first, 2.0**power), (second, 2.0**-power)):
        for name in names:
            moved.tensors[f"layers.0.{name}"] = weights.tensors[f"layers.0.{name}"] * factor
    before = {name: tensor.clone() for name, tensor in moved.tensors.items()}
    layer, other = load_half(weights, 0, half), load_half(moved, 0, half)
    assert not balance(layer, half), "nothing to do in the model as it was"
    assert balance(other, half)
    x = torch.randn(2, 8, config.d_model, generator=torch.Generator().manual_seed(0))
    at = locate(config, 2, 8)
    assert torch.equal(other.run(half, x, at), load_half(moved, 0, half).run(half, x, at)), "to the last bit"
    largest = [float(parameter.abs().max()) for parameter in other.parameters()]
    assert 2.0**-12 < min(largest) <= max(largest) < 2.0**12
    assert all(torch.equal(before[name], moved.tensors[name]) for name in before), "the source is left as it is"


def moved_in_one_channel(pair: str, weights: RandomWeights, factor: float) -> None:
    """Channel 5 of a pair times a factor on one side and its inverse on the other; of the second of two kv heads."""
    tensors = weights.tensors
    if pair == "mlp":
        tensors["layers.0.up.weight"][5] *= factor
        tensors["layers.0.up.bias"][5] *= factor
        tensors["layers.0.down.weight"][:, 5] /= factor
    elif pair == "values":
        tensors["layers.0.v.weight"][16 + 5] *= factor
        tensors["layers.0.v.bias"][16 + 5] *= factor
        for head in (2, 3):
            tensors["layers.0.o.weight"][:, 16 * head + 5] /= factor
    else:  # rows 5 and 13 of a head rotate together
        for row in (5, 13):
            for head in (2, 3):
                tensors["layers.0.q.weight"][16 * head + row] *= factor
                tensors["layers.0.q.bias"][16 * head + row] *= factor
            tensors["layers.0.k.weight"][16 + row] /= factor
            tensors["layers.0.k.bias"][16 + row] /= factor


@pytest.mark.parametrize("power", [8, 20, -24])
@pytest.mark.parametrize("pair", ["mlp", "values", "queries"])
def test_a_factor_that_moved_within_one_channel_is_taken_back(pair: str, power: int) -> None:
    config = tiny_config(qkv_bias=True, mlp_bias=True)
    weights, moved = RandomWeights(config), RandomWeights(config)
    half = "mlp" if pair == "mlp" else "attention"
    moved_in_one_channel(pair, moved, 2.0**power)
    layer, other = load_half(weights, 0, half), load_half(moved, 0, half)
    (note,) = balance(other, half)
    assert "1 of " in note
    x = torch.randn(2, 8, config.d_model, generator=torch.Generator().manual_seed(0))
    at = locate(config, 2, 8)
    assert torch.equal(other.run(half, x, at), load_half(moved, 0, half).run(half, x, at)), "to the last bit"
    for name, parameter in other.named_parameters():
        ratio = (parameter / layer.get_parameter(name)).log2()
        assert ratio.abs().max() <= 1, "what is left of the factor is a channel's own"


@pytest.mark.parametrize("power", [0, 6, -6])
def test_a_channel_that_is_a_little_apart_stays(power: int) -> None:
    moved = RandomWeights(tiny_config(qkv_bias=True, mlp_bias=True))
    moved_in_one_channel("mlp", moved, 2.0**power)
    assert not balance(load_half(moved, 0, "mlp"), "mlp")


def test_dead_channels_stay_and_tell_nothing_of_the_others() -> None:
    moved = RandomWeights(tiny_config(qkv_bias=True, mlp_bias=True))
    moved_in_one_channel("mlp", moved, 2.0**20)
    moved.tensors["layers.0.up.weight"][7:40] = 0
    moved.tensors["layers.0.up.bias"][7:40] = 0
    layer = load_half(moved, 0, "mlp")
    (note,) = balance(layer, "mlp")
    assert note.startswith("up and down: 1 of 96 channels rescaled, by up to 2^20")
    assert not layer.get_parameter("up.weight")[7:40].any()


def test_groups_hold_the_neighbours_of_a_channel_that_had_a_factor() -> None:
    """Without it the group's other columns are rounded to 0, and the row of the other side too."""
    grid, errors = Grid(4, 32), []
    for power in (0, 20):
        weights = RandomWeights(tiny_config(mlp_bias=True))
        moved_in_one_channel("mlp", weights, 2.0**-power)
        layer = load_half(weights, 0, "mlp")
        balance(layer, "mlp")
        found = [layer.get_parameter(f"{linear}.weight").detach() for linear in ("up", "down")]
        errors.append([float((round_to_nearest(w, grid).dequantize() - w).norm() / w.norm()) for w in found])
    assert errors[1] == pytest.approx(errors[0], rel=0.2)


def test_a_rescaled_pair_is_compressed_as_well_as_the_model_it_came_from(
    make_recipe: MakeRecipe, model_copy: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def rescale(tensors: dict[str, Tensor]) -> None:
        tensors[UP] *= 2.0**23
        tensors[DOWN] *= 2.0**-23

    reports = []
    for name, model in (("plain", tiny_model), ("moved", changed(model_copy, rescale))):
        recipe = make_recipe(name, model=str(model), stages=[FLAT, GPTQ])
        shown = flatq("run", recipe, "--out", tmp_path / name, "--device", "cpu")
        assert shown.exit_code == 0, shown.stderr
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    plain, moved = reports
    assert moved["result"]["perplexity"] == pytest.approx(plain["result"]["perplexity"], rel=1e-3)
    assert any("up and down: rescaled by 2^-2" in note for note in moved["layers"][1]["notes"])
    assert not any("rescaled" in note for layer in plain["layers"] for note in layer["notes"])


def test_layers_of_zeros_are_named_in_the_report(make_recipe: MakeRecipe, model_copy: Path, tmp_path: Path) -> None:
    def kill(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(LAYER) and name.endswith("proj.weight")]:
            tensors[name].zero_()

    recipe = make_recipe(model=str(changed(model_copy, kill)), stages=[FLAT, GPTQ])
    shown = flatq("run", recipe, "--out", tmp_path / "out", "--device", "cpu")
    assert shown.exit_code == 0, shown.stderr
    page = (tmp_path / "out" / "report.md").read_text()
    for linear in ("q", "k", "v", "o", "gate", "up", "down"):
        assert f"Layer 1: {linear}: DEAD: all its weights are 0 in the source model" in page
    assert "Layer 0: q: DEAD" not in page


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("factor", [1e8, 1e-9])
def test_weights_that_float16_scales_cannot_hold_are_refused(bits: int, symmetric: bool, factor: float) -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * factor
    with pytest.raises(NumericsError, match="float16"):
        round_to_nearest(w, Grid(bits, 16, symmetric))
    assert "float16" in gptq(w, torch.eye(64), Grid(bits, 16, symmetric)).unheld


def test_rows_of_zeros_and_a_few_tiny_groups_are_held() -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    w[3], w[5, :16] = 0, 1e-12
    assert not gptq(w, torch.eye(64), Grid(4, 16)).unheld
    assert float((round_to_nearest(w, Grid(8, 16)).dequantize() - w).abs().max()) < 0.05


@pytest.mark.parametrize("kind", sorted(HALF_SCALED))
@pytest.mark.parametrize("factor", [1e10, 1e-12])
def test_gguf_refuses_numbers_beyond_its_scales(kind: str, factor: float) -> None:
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    planned = Planned("blk.0.x.weight", "layers.0.x.weight", (2, 32), kind, False)
    encoded(values, planned)
    with pytest.raises(ExportError, match=r"layers\.0\.x\.weight: its largest number .* float16"):
        encoded(values * factor, planned)


def test_onnx_refuses_numbers_beyond_float16() -> None:
    builder = Builder(FLOAT16)
    held = builder.weight("held", (2,), lambda: np.array([6e4, -1], np.float32))
    beyond = builder.weight("beyond", (2,), lambda: np.array([7e4, -1], np.float32))
    assert np.isfinite(held.const_value.numpy()).all()
    with pytest.raises(ExportError, match="beyond: its largest number 70000 is beyond float16"):
        beyond.const_value.numpy()
