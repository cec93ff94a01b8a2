"""Predicted speed: what is measured, and how a plan's time follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flatq.errors import ExportError
from flatq.export.protocols import exporter_named
from flatq.export.speed import Seconds, SpeedLoad
from flatq.model.decoder import LINEARS, DecoderConfig
from flatq.model.grid import Grid
from flatq_onnx import OnnxExporter, OnnxOptions, kernels
from flatq_onnx.kernels import KernelTable, stored_grid
from flatq_onnx.speed import OnnxSpeed
from tests.conftest import GPTQ, ONNX, MakeRecipe, flatq
from tests.models import tiny_config

LOAD = SpeedLoad(context=24, prompt=16, threads=1)
PER_WEIGHT = {2: 1e-9, 4: 2e-9, 8: 4e-9}  # seconds of the invented kernels for each weight
FIXED = 1e-6  # and for each node


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int, int]]:
    """Products that take an exact time, and sample graphs of nothing; returns the shapes measured: [n, k, tokens]."""
    monkeypatch.setenv("FLATQ_CACHE", str(tmp_path / "cache"))
    shapes: list[tuple[int, int, int]] = []

    def product(grid: Grid | None, rows: int, columns: int, tokens: int, accuracy_level: int, threads: int) -> float:
        shapes.append((rows, columns, tokens))
        return FIXED + tokens * rows * columns * (1e-8 if grid is None else PER_WEIGHT[grid.bits])

    monkeypatch.setattr(kernels, "measured_product", product)
    return shapes


def silent(model: OnnxSpeed) -> OnnxSpeed:
    """Without a rest: only products count."""
    nothing = Seconds()
    model.__dict__["_rest"] = replace_rest(nothing)
    return model


def replace_rest(seconds: Seconds) -> object:
    from flatq_onnx.speed import Rest

    return Rest(seconds, seconds, seconds, seconds)


def all_at(config: DecoderConfig, grid: Grid) -> dict[str, Grid]:
    stems = [f"layers.{index}.{name}" for index in range(len(config.layers)) for name in LINEARS]
    return dict.fromkeys([*stems, "embed"], grid)


def products(config: DecoderConfig, grids: Mapping[str, Grid], tokens: int) -> float:
    """The invented kernels' seconds of every node of a graph: q, k, v are one, gate and up are one."""
    total = 0.0
    for index, dims in enumerate(config.layers):
        for unit in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            weights = sum(int(np.prod(dims.shape(name, config.d_model))) for name in unit)
            total += FIXED + tokens * weights * PER_WEIGHT[grids[f"layers.{index}.{unit[0]}"].bits]
    return total + FIXED + config.vocab * config.d_model * PER_WEIGHT[grids["embed"].bits]


CONFIG = tiny_config(d_model=64, d_ff=(256, 256), d_v=(16, 16), d_qk=16, heads=8, kv_heads=4)
NARROW = CONFIG.with_layers([replace(CONFIG.layers[0], d_v=8, d_ff=160), replace(CONFIG.layers[1], d_ff=192)])


@pytest.mark.parametrize("config", [CONFIG, NARROW], ids=["dense", "narrowed"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_plan_s_time_is_the_sum_of_its_nodes(
    invented: list[tuple[int, int, int]], config: DecoderConfig, bits: int
) -> None:
    model = silent(OnnxSpeed(CONFIG, OnnxOptions(), LOAD))
    model._choice = lambda: 0.0  # type: ignore[method-assign]
    grids = all_at(config, Grid(bits, 32))
    stored = {**grids, "embed": Grid(max(4, bits), 32)}  # the lookup has no 2 bits
    found = model.predict(config, grids)
    assert found.decode == pytest.approx(products(config, stored, 1))
    head = config.vocab * config.d_model * PER_WEIGHT[max(4, bits)]
    assert found.prefill == pytest.approx(products(config, stored, LOAD.prompt))
    assert head > 0


def test_linears_of_one_grid_are_one_node_and_others_one_each(invented: list[tuple[int, int, int]]) -> None:
    model = OnnxSpeed(CONFIG, OnnxOptions(), LOAD)
    dims, same = CONFIG.layers[0], Grid(4, 32)
    one = model.linears(dims, dict.fromkeys("qkv", same)).decode
    three = model.linears(dims, {"q": same, "k": same, "v": Grid(4, 64)}).decode
    assert three - one == pytest.approx(2 * FIXED, rel=0.01)


def test_below_the_floor_a_product_is_priced_like_the_smallest_measured_one(
    invented: list[tuple[int, int, int]],
) -> None:
    model, dims = OnnxSpeed(CONFIG, OnnxOptions(), LOAD), CONFIG.layers[0]
    least = min(model._widths(into=True))
    grids = {"down": Grid(4, 32)}
    floor = model.linears(replace(dims, d_ff=least), grids)
    assert model.linears(replace(dims, d_ff=8), grids) == floor
    assert model.linears(replace(dims, d_ff=least + 8), grids).decode > floor.decode


def test_the_values_of_grouped_attention_are_as_wide_as_the_keys(invented: list[tuple[int, int, int]]) -> None:
    narrow, grids = replace(CONFIG.layers[0], d_v=8), dict.fromkeys("qkv", Grid(4, 32))
    reduced, grouped = (OnnxSpeed(CONFIG, OnnxOptions(attention=kind), LOAD) for kind in ("reduced", "gqa"))
    assert reduced.linears(narrow, grids).decode < grouped.linears(narrow, grids).decode
    assert grouped.linears(narrow, grids) == grouped.linears(CONFIG.layers[0], grids)


def test_a_measured_kernel_is_not_measured_again_not_even_by_another_process(
    invented: list[tuple[int, int, int]],
) -> None:
    grid = Grid(4, 32)
    first = KernelTable(1).product(grid, 96, 64, 1, 4)
    assert KernelTable(1).product(grid, 96, 64, 1, 4) == first
    assert invented == [(96, 64, 1)]
    KernelTable(2).product(grid, 96, 64, 1, 4)
    assert len(invented) == 2, "the number of threads is part of the key"


def test_a_huge_table_is_measured_in_part(
    invented: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LARGEST", 64 * 100)
    assert KernelTable(1).product(Grid(4, 32), 200, 64, 1, 4) == pytest.approx(2 * (FIXED + 6400 * PER_WEIGHT[4]))
    assert invented == [(100, 64, 1)]


@pytest.mark.parametrize(
    ("grid", "lookup", "stored"),
    [
        (Grid(3, 64, False), False, Grid(4, 64)),
        (Grid(2, 64, False), False, Grid(2, 64, False)),
        (Grid(2, 64), True, Grid(4, 64)),
        (Grid(4, 48), False, Grid(4, 16)),
        (None, True, None),
    ],
)
def test_a_grid_is_priced_as_the_file_has_it(grid: Grid | None, lookup: bool, stored: Grid | None) -> None:
    assert stored_grid(grid, 96, lookup=lookup) == stored


@pytest.mark.parametrize(
    "options", [OnnxOptions(), OnnxOptions(attention="gqa", cache_type="int8")], ids=["ort", "int8"]
)
def test_a_tiny_model_is_measured_and_priced(
    options: OnnxOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLATQ_CACHE", str(tmp_path / "cache"))
    for name, value in {"SESSIONS": 1, "SESSION_BYTES": 1 << 16, "SECONDS": 0.0}.items():
        monkeypatch.setattr(kernels, name, value)
    grids = all_at(CONFIG, Grid(4, 32))
    found = OnnxExporter().speed_model(CONFIG, options, LOAD).predict(CONFIG, grids)
    assert 0 < found.decode < 1
    assert found.decode < found.prefill < 1
    again = OnnxExporter().speed_model(CONFIG, options, LOAD).predict(CONFIG, grids)
    assert again == found, "all of it comes from the table"


def test_options_and_loads_that_cannot_be_predicted_are_refused() -> None:
    with pytest.raises(ExportError, match="target: cuda with activations: fp16"):
        OnnxSpeed(CONFIG, OnnxOptions(target="cuda"), LOAD)
    with pytest.raises(ExportError, match=r"1000 positions.*a model of 256; use at most 232"):
        OnnxSpeed(CONFIG, OnnxOptions(), SpeedLoad(context=1000))


@pytest.mark.parametrize("name", ["gguf", "safetensors"])
def test_other_exporters_cannot_predict_speed(name: str) -> None:
    exporter = exporter_named(name)
    with pytest.raises(ExportError, match="cannot predict speed"):
        exporter.speed_model(CONFIG, exporter.Options(), LOAD)


def test_a_plan_shows_the_predicted_speed_only_if_asked(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(self: OnnxSpeed, config: DecoderConfig, grids: Mapping[str, Grid]) -> Seconds:
        assert grids
        assert self.load == SpeedLoad(9 + 2, 9, 1)
        return Seconds(0.004, 0.25)

    monkeypatch.setattr(OnnxSpeed, "predict", predict)
    bench = {"prompt": 9, "new_tokens": 4, "threads": 1}
    recipe = make_recipe(stages=[GPTQ], exports=[*ONNX[:1], {"safetensors": {}}], bench=bench)
    shown = flatq("plan", recipe, "--speed")
    assert shown.exit_code == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    assert "about 250 tokens/s decoding at a context of 11, a prompt of 9 tokens in 250 ms" in text
    assert "no predicted speed: this exporter cannot predict speed" in text
    assert "tokens/s decoding" not in flatq("plan", recipe).stdout
