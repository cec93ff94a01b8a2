"""ONNX exports say what the artifact says, in every layout, precision and family."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from flatq.artifact import RANGES, Artifact, save_shard
from flatq.calibration.cache_ranges import cache_ranges
from flatq.errors import ArtifactError, ExportError
from flatq.export.protocols import Exported, exporter_named
from flatq.model.config import Kind
from flatq.model.decoder import DecoderConfig, GrowingCache, Rope
from flatq.model.grid import Grid, QuantizedWeight, round_to_nearest
from flatq.model.weights import load_decoder
from flatq_onnx import OnnxExporter, OnnxOptions
from flatq_onnx.cache import Cache, empty_cache
from flatq_onnx.check import too_old_for_int8
from flatq_onnx.int8_cache import HEADROOM, LARGEST
from flatq_onnx.runner import OnnxRunner
from flatq_onnx.session import CUDA, Session, _elsewhere
from flatq_onnx.tensors import Blocks, pack_codes, pack_scales, pack_zeros, stack_rows, widen_heads
from tests.conftest import flatq
from tests.exporters.conftest import MakeArtifact, printed_by_the_readme, reference_logits, some_tokens
from tests.models import tiny_config

TOLERANCE = 1e-3  # the issue allows 5e-3; these models differ by float32 rounding only
LAYOUTS: dict[str, dict[str, Any]] = {
    "reduced": {"attention": "reduced"},
    "gqa": {"attention": "gqa"},
    "gqa-left": {"attention": "gqa", "left_padding": True},
    "gqa-int8": {"attention": "gqa", "cache_type": "int8"},
}
EVERY = {"num_logits_to_keep": np.array(0)}  # logits of all positions
INT8 = ("gqa-int8",)
RIGHT_ONLY = ("gqa", *INT8)  # where padding may stand
if too_old_for_int8():
    for layout in INT8:
        del LAYOUTS[layout]
needs_int8 = pytest.mark.skipif(bool(too_old_for_int8()), reason=too_old_for_int8())
BETWEEN_CODES = (
    0.05  # a number half way between two codes may become either; not rounding at all moves logits by 0.1 to 0.2
)
GRIDS: dict[str, tuple[Grid | None, Grid | None]] = {  # of the layers' linears, of embedding and head
    "fp32": (None, None),
    "4-bit": (Grid(4, 32), Grid(8, 32)),
    "4-bit-asymmetric": (Grid(4, 32, symmetric=False), Grid(4, 32, symmetric=False)),
    "8-bit": (Grid(8, 64), None),
    "3-bit": (Grid(3, 32, symmetric=False), Grid(3, 48)),
    "2-bit": (Grid(2, -1), Grid(2, 16, symmetric=False)),
}
HALF_SHARE = 0.02  # of the logits' spread, what float16 may move a logit by
DRAWN: dict[str, dict[str, Any]] = {
    "qkv_bias": {"qkv_bias": True},
    "all biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qk_norm": {"qk_norm": True},
    "sliding window": {"sliding_window": 4},
    "linear rope": {"rope": Rope(scaling="linear", factor=4.0)},
    "llama3 rope": {"rope": Rope(theta=500.0, scaling="llama3", factor=8.0, original_max_positions=16)},
    "gelu": {"activation": "gelu"},
    "gelu tanh": {"activation": "gelu_tanh"},
    "norms before and after": {"post_norms": True},
    "norms after": {"pre_norms": False, "post_norms": True},
    "wide qk_norm": {"qk_norm": True, "wide_qk_norm": True},
    "qk_norm after the rope": {"qk_norm": True, "norm_after_rope": True},
    "caps": {"attention_cap": 1.5, "logit_cap": 20.0},
    "qk_norm after the rope, a window and no rope in one layer": {
        "qk_norm": True,
        "norm_after_rope": True,
        "qkv_bias": True,
        "other_kinds": (Kind(Rope(theta=50.0), 4), Kind(None)),
        "kind_of": (1, 2),
    },
    "a window in one layer": {"other_kinds": (Kind(Rope(), 4),), "kind_of": (1, 0)},
    "no rope in one layer": {"other_kinds": (Kind(None),), "kind_of": (0, 1)},
    "two kinds": {"sliding_window": 6, "other_kinds": (Kind(Rope(theta=50.0), 3),), "kind_of": (1, 0)},
    "everything": {
        "activation": "gelu_tanh",
        "post_norms": True,
        "qk_norm": True,
        "qkv_bias": True,
        "attention_cap": 1.5,
        "logit_cap": 20.0,
        "other_kinds": (Kind(Rope(theta=50.0, scaling="linear", factor=2.0), 3), Kind(None)),
        "kind_of": (1, 2),
    },
}


def export(artifact: Artifact, **options: Any) -> tuple[Exported, OnnxOptions]:
    """Write into a folder beside the artifact; fp32 if the artifact has no codes."""
    chosen = OnnxOptions(**{"precision": "int4" if artifact.grids else "fp32", **options})
    if OnnxExporter().needs_cache_ranges(chosen):
        calibration = torch.from_numpy(some_tokens(artifact.config, 8, 32, seed=1))
        save_shard(artifact.root / RANGES, cache_ranges(artifact, calibration))
    out = artifact.root.with_name(artifact.root.name + "-onnx")
    out.mkdir(exist_ok=True)
    return OnnxExporter().write(artifact, out, chosen), chosen


def opened(artifact: Artifact, *, exact: bool = True, **options: Any) -> OnnxRunner:
    exported, _ = export(artifact, **options)
    return OnnxRunner(exported.root, provider="cpu", threads=1, exact=exact)


def empty_past(runner: OnnxRunner, batch: int, positions: int) -> dict[str, NDArray[Any]]:
    """What a program of one's own feeds first: a cache of zeros, with room for all where the graph wants room."""
    contract = runner.contract
    room = positions if "cache_position" in contract.inputs else 0
    feeds = empty_cache(contract, batch, room)
    return feeds | ({"cache_position": np.zeros(batch, np.int64)} if room else {})


def decoded(runner: OnnxRunner, tokens: NDArray[np.int64], prompt: int) -> NDArray[np.float32]:
    """Logits of the prompt's last position and of each step after it, [b, s - prompt + 1, vocab]."""
    rows = [runner.start(tokens[:, :prompt], tokens.shape[1])]
    rows += [runner.step(tokens[:, place]) for place in range(prompt, tokens.shape[1])]
    return np.stack(rows, 1)


def assert_says_what_the_artifact_says(artifact: Artifact, runner: OnnxRunner) -> None:
    tokens = some_tokens(artifact.config, 2, 9)
    wanted = reference_logits(artifact, tokens)
    found = runner.logits(tokens)
    assert np.abs(found - wanted).max() < TOLERANCE
    assert (found.argmax(-1) == wanted.argmax(-1)).all()
    for prompt in (1, 4):
        steps = wanted_steps(artifact, runner, tokens, prompt)
        assert np.abs(decoded(runner, tokens, prompt) - steps).max() < step_tolerance(runner)


def step_tolerance(runner: OnnxRunner) -> float:
    return BETWEEN_CODES if runner.contract.cache_type == "int8" else TOLERANCE


class RoundedCache(GrowingCache):
    """What a cache of int8 holds; a prompt without a past looks at itself unrounded."""

    def __init__(self, ranges: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.ranges = ranges

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        prompt, found = layer_idx not in self.layers and keys.shape[2] > 1, []
        for part, new in (("key", keys), ("value", values)):
            scale = self.ranges[f"layers.{layer_idx}.{part}"][:, None] * HEADROOM / LARGEST
            found.append((new / scale).round().clamp(-128, 127) * scale)
        rounded = super().update(found[0], found[1], layer_idx)
        return (keys, values) if prompt else rounded


def wanted_steps(artifact: Artifact, runner: OnnxRunner, tokens: NDArray[np.int64], prompt: int) -> NDArray[np.float32]:
    """What ``decoded`` should give: the artifact's logits, with its cache in the runner's type."""
    if runner.contract.cache_type == "float":
        return reference_logits(artifact, tokens)[:, prompt - 1 :]
    decoder, cache, found = load_decoder(artifact), RoundedCache(artifact.cache_ranges()), []
    for first, end in ((0, prompt), *((place, place + 1) for place in range(prompt, tokens.shape[1]))):
        found.append(decoder(torch.from_numpy(tokens[:, first:end]), cache=cache, past=first)[:, -1].numpy())
    return np.stack(found, 1)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("precision", GRIDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_decoding_equal_the_artifact(
    make_artifact: MakeArtifact, layout: str, precision: str, kv_heads: int, tied: bool
) -> None:
    config = tiny_config(kv_heads=kv_heads, d_v=(16, 11), d_ff=(96, 77), tied_head=tied)
    grid, embed_grid = GRIDS[precision]
    artifact = make_artifact(config, grid=grid, embed_grid=embed_grid)
    runner = opened(artifact, **LAYOUTS[layout])
    onnx.checker.check_model(str(runner.root / "model.onnx"), full_check=True)
    assert_says_what_the_artifact_says(artifact, runner)


@pytest.mark.parametrize("switch", DRAWN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_switch_of_a_family_is_drawn(make_artifact: MakeArtifact, layout: str, switch: str) -> None:
    config = tiny_config(d_v=(5, 16), d_ff=(33, 64), **DRAWN[switch])
    artifact = make_artifact(config, grid=Grid(4, 32, symmetric=False), embed_grid=Grid(8, 32))
    runner = opened(artifact, **LAYOUTS[layout])
    onnx.checker.check_model(str(runner.root / "model.onnx"), full_check=True)
    assert_says_what_the_artifact_says(artifact, runner)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linears_on_different_grids_are_not_stacked(make_artifact: MakeArtifact, layout: str) -> None:
    mixed = {"layers.0.v": Grid(8, 16), "layers.0.up": Grid(4, 16), "layers.1.k": Grid(2, 32)}
    artifact = make_artifact(tiny_config(d_v=(16, 7)), grid=Grid(4, 32), overrides=mixed)
    assert_says_what_the_artifact_says(artifact, opened(artifact, **LAYOUTS[layout]))


def test_linears_without_codes_stay_float32_and_are_named_in_a_note(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config(), overrides={"layers.0.q": Grid(4, 32), "layers.1.down": Grid(4, 32)})
    exported, _ = export(artifact)
    assert "float32" in exported.notes[0]
    assert "embed" in exported.notes[0]
    assert_says_what_the_artifact_says(artifact, OnnxRunner(exported.root, exact=True))


def test_a_quantized_artifact_can_be_written_as_float32(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config(d_v=(9, 16)), grid=Grid(4, 32), embed_grid=Grid(8, 32))
    assert_says_what_the_artifact_says(artifact, opened(artifact, precision="fp32"))


@pytest.mark.parametrize("d_model", [64, 72], ids=["whole blocks", "ragged block"])
@pytest.mark.parametrize("grid", [Grid(4, 48), Grid(4, 512), Grid(4, -1), Grid(8, 64, symmetric=False)], ids=str)
def test_groups_that_are_no_blocks_are_cut_without_loss(make_artifact: MakeArtifact, grid: Grid, d_model: int) -> None:
    config = tiny_config(d_model=d_model, d_ff=(640, 50))
    artifact = make_artifact(config, grid=grid, embed_grid=grid)
    assert_says_what_the_artifact_says(artifact, opened(artifact))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 16, 32, 48, 128, 512]),
    symmetric=st.booleans(),
    rows=st.integers(1, 9),
    columns=st.integers(1, 600),
    lookup=st.booleans(),
)
def test_packed_bytes_stand_for_the_same_numbers(
    bits: int, group_size: int, symmetric: bool, rows: int, columns: int, lookup: bool
) -> None:
    weight = round_to_nearest(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)), Grid(bits, group_size, symmetric)
    )
    blocks = Blocks.of(weight.grid, rows, columns, lookup=lookup)
    codes, scales, zeros = pack_codes(weight, blocks), pack_scales(weight, blocks), pack_zeros(weight, blocks)
    assert (codes.shape, scales.shape, zeros.shape) == (blocks.codes_shape, blocks.scales_shape, blocks.zeros_shape)
    assert blocks.nbytes() == codes.nbytes + scales.nbytes + blocks.has_zeros * zeros.nbytes

    def unpacked(data: NDArray[np.uint8]) -> NDArray[np.int64]:
        flat = np.unpackbits(data.reshape(rows, -1), axis=1, bitorder="little").reshape(rows, -1, blocks.bits)
        return (flat.astype(np.int64) << np.arange(blocks.bits)).sum(-1)

    zero = unpacked(zeros)[:, : blocks.count] if blocks.has_zeros else np.full(scales.shape, 1 << (blocks.bits - 1))
    block = np.arange(columns) // blocks.block
    numbers = (unpacked(codes)[:, :columns] - zero[:, block]) * scales[:, block]
    assert (numbers == weight.dequantize().numpy()).all()


def test_stacking_and_widening_keep_the_numbers() -> None:
    weight = round_to_nearest(torch.randn(6, 40), Grid(4, 16, symmetric=False))
    wide = widen_heads(stack_rows([weight, weight]), 4, 5)
    assert isinstance(wide, QuantizedWeight)
    heads = wide.dequantize().reshape(4, 5, 40)
    assert torch.equal(heads[:, :3].reshape(12, 40), weight.dequantize().repeat(2, 1))
    assert not heads[:, 3:].any()


PADDINGS = {"left": [[0, 0, 0, 1, 1, 1, 1], [1] * 7], "right": [[1, 1, 1, 1, 0, 0, 0], [1] * 7]}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("layout", "side"),
    [(layout, side) for layout in LAYOUTS for side in PADDINGS if side == "right" or layout not in RIGHT_ONLY],
)
def test_a_padded_row_equals_the_same_row_alone(
    make_artifact: MakeArtifact, layout: str, side: str, window: int | None
) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 11), sliding_window=window), grid=Grid(4, 32))
    runner = opened(artifact, **LAYOUTS[layout])
    tokens, valid = some_tokens(artifact.config, 2, 7), np.array(PADDINGS[side])
    found, real = runner.logits(tokens, valid), valid.astype(bool)
    assert np.abs(found - reference_logits(artifact, tokens, valid))[real].max() < TOLERANCE
    assert np.isfinite(found).all()
    alone = runner.logits(tokens[:1][:, real[0]])
    assert np.abs(found[0, real[0]] - alone[0]).max() < TOLERANCE


def test_left_padding_is_refused_where_it_would_be_wrong(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    runner = opened(artifact, attention="gqa")
    with pytest.raises(ExportError, match=r"supports only right padding.*left_padding: true"):
        runner.logits(some_tokens(artifact.config, 2, 7), np.array(PADDINGS["left"]))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in RIGHT_ONLY])
def test_a_left_padded_batch_decodes_like_its_rows_where_the_graph_allows_it(
    make_artifact: MakeArtifact, layout: str
) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 11)))
    runner = opened(artifact, **LAYOUTS[layout])
    tokens, valid = some_tokens(artifact.config, 2, 7), np.array(PADDINGS["left"])
    session, room = runner.session.ort, layout.startswith("reduced")
    names = [output.name for output in session.get_outputs()]
    past, first, rows = empty_past(runner, 2, 7), 0, []
    for end in range(5, 8):
        mask = valid * (np.arange(7) < end) if room else valid[:, :end]
        feeds = {"input_ids": tokens[:, first:end], "attention_mask": mask, **past, **EVERY}
        logits, *cache = session.run(names, feeds)
        rows.append(logits[:, -1])
        past = {name.replace("present", "past_key_values"): v for name, v in zip(names[1:], cache, strict=True)}
        past |= {"cache_position": np.full(2, end)} if room else {}
        first = end
    wanted = reference_logits(artifact, tokens, valid)[:, 4:]
    assert np.abs(np.stack(rows, 1) - wanted).max() < TOLERANCE


def test_rows_of_different_lengths_go_on_where_each_ends(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 11)))
    runner = opened(artifact)
    tokens, lengths = some_tokens(artifact.config, 2, 6), np.array([3, 5])
    mask = (np.arange(6) < lengths[:, None]).astype(np.int64)
    names = [output.name for output in runner.session.ort.get_outputs()]
    feeds = {"input_ids": tokens[:, :5], "attention_mask": mask, **empty_past(runner, 2, 6), **EVERY}
    _, *cache = runner.session.ort.run(names, feeds)
    mask[np.arange(2), lengths] = 1
    feeds = {"input_ids": tokens[:, 5:], "attention_mask": mask, "cache_position": lengths, **EVERY}
    feeds |= {name.replace("present", "past_key_values"): v for name, v in zip(names[1:], cache, strict=True)}
    logits = runner.session.ort.run(["logits"], feeds)[0][:, 0]
    for row, length in enumerate(lengths):
        alone = np.concatenate([tokens[row, :length], tokens[row, 5:]])[None]
        assert np.abs(logits[row] - reference_logits(artifact, alone)[0, -1]).max() < TOLERANCE


@pytest.mark.parametrize("precision", [name for name in GRIDS if name != "fp32"])
def test_int8_activations_cost_little(make_artifact: MakeArtifact, precision: str) -> None:
    grid, embed_grid = GRIDS[precision]
    artifact = make_artifact(tiny_config(vocab=512), grid=grid, embed_grid=embed_grid)
    tokens = some_tokens(artifact.config, 4, 16)
    wanted = log_softmax(reference_logits(artifact, tokens) / 8)  # random logits are eight times too sure of themselves
    found = log_softmax(opened(artifact, exact=False).logits(tokens) / 8)
    divergence = (np.exp(wanted) * (wanted - found)).sum(-1)
    assert 0 <= divergence.mean() < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_switches_int8_activations_off_and_leaves_the_files_alone(
    make_artifact: MakeArtifact, layout: str
) -> None:
    artifact = make_artifact(tiny_config(), grid=Grid(4, 32), embed_grid=Grid(8, 32))
    exported, _ = export(artifact, external_data_above=0, **LAYOUTS[layout])
    before = {path.name: path.read_bytes() for path in exported.root.iterdir()}
    tokens = some_tokens(artifact.config, 1, 6)
    wanted = reference_logits(artifact, tokens)
    errors = [np.abs(OnnxRunner(exported.root, exact=exact).logits(tokens) - wanted).max() for exact in (True, False)]
    assert errors[0] < TOLERANCE < errors[1]
    assert {path.name: path.read_bytes() for path in exported.root.iterdir()} == before


@needs_int8
@pytest.mark.parametrize("layout", INT8)
def test_a_cache_of_int8_is_the_same_however_it_came_to_be(make_artifact: MakeArtifact, layout: str) -> None:
    """Prompt, single tokens, a longer piece behind a past; one buffer or a new tensor every time."""
    artifact = make_artifact(tiny_config(d_v=(16, 11), d_qk=16), grid=Grid(4, 32))
    runner = opened(artifact, **LAYOUTS[layout])
    tokens, names = some_tokens(artifact.config, 1, 8), [output.name for output in runner.session.ort.get_outputs()]

    def cache(*ends: int) -> dict[str, NDArray[Any]]:
        past, first = empty_past(runner, 1, 0), 0
        for end in ends:
            feeds = {"input_ids": tokens[:, first:end], "attention_mask": np.ones((1, end), np.int64), **past, **EVERY}
            _, *found = runner.session.ort.run(names, feeds)
            past = {name.replace("present", "past_key_values"): v for name, v in zip(names[1:], found, strict=True)}
            first = end
        return past

    whole = cache(8)
    assert {array.dtype for array in whole.values()} == {np.dtype(np.int8)}
    assert {array.shape for array in whole.values()} == {(1, 2, 8, 16)}
    assert not whole["past_key_values.1.value"][..., 11:].any()
    assert max(np.abs(array).max() for array in whole.values()) > 64, "the codes use their range"
    for ends in ((1, 2, 3, 4, 5, 6, 7, 8), (3, 8), (1, 8)):
        other = cache(*ends)  # the second layer sees what the first one's rounded cache gave, so it may differ
        for part in ("key", "value"):
            pair = (cache[f"past_key_values.0.{part}"].astype(int) for cache in (other, whole))
            distance = np.abs(np.subtract(*pair))
            assert distance.max() <= 1
            assert distance.mean() < 0.01
    contract = runner.contract.model_copy(update={"growth": "returned"})
    returned = OnnxRunner(runner.root, provider="cpu", threads=1, exact=True, contract=contract)
    for prompt in (1, 4):
        assert np.abs(decoded(returned, tokens, prompt) - decoded(runner, tokens, prompt)).max() < BETWEEN_CODES


@needs_int8
def test_a_cache_of_int8_needs_measured_ranges(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    with pytest.raises(ArtifactError, match=r"cache_ranges.safetensors: is missing; `flatq run`"):
        OnnxExporter().write(artifact, artifact.root, OnnxOptions(precision="fp32", cache_type="int8"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_bench_puts_beside_an_export_can_be_written(make_artifact: MakeArtifact, layout: str) -> None:
    exporter, config = OnnxExporter(), tiny_config()
    beside = exporter.dense(OnnxOptions(**LAYOUTS[layout]))
    assert not exporter.check(config, {}, beside)
    assert not exporter.needs_cache_ranges(beside)


@needs_int8
def test_a_cache_of_int8_is_refused_where_it_would_be_wrong(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, options = make_artifact(tiny_config()), OnnxOptions(precision="fp32", cache_type="int8")
    root = export(artifact, cache_type="int8")[0].root
    with pytest.raises(ExportError, match="CUDA has no float32 attention with an int8 cache; use provider cpu"):
        OnnxRunner(root, provider="cuda")
    assert OnnxRunner(root).device == "cpu"
    monkeypatch.setattr("flatq_onnx.check.version", lambda _: "1.27.0")
    (found,) = OnnxExporter().check(artifact.config, {}, options)
    assert "needs onnxruntime 1.28 (older versions give wrong results), 1.27.0 is installed; update" in found
    with pytest.raises(ExportError, match=r"1\.27\.0 is installed; update it"):
        OnnxRunner(root)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("capacity", [4, 7])
def test_a_longer_cache_changes_nothing_and_a_full_one_is_an_error(
    make_artifact: MakeArtifact, layout: str, capacity: int
) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 11)))
    runner = opened(artifact, **LAYOUTS[layout])
    tokens = some_tokens(artifact.config, 1, 4)
    rows = [runner.start(tokens[:, :2], capacity), runner.step(tokens[:, 2]), runner.step(tokens[:, 3])]
    assert np.abs(np.stack(rows, 1) - wanted_steps(artifact, runner, tokens, 2)).max() < step_tolerance(runner)
    for _ in range(capacity - 4):
        runner.step(tokens[:, 0])
    with pytest.raises(ExportError, match=f"{capacity} positions"):
        runner.step(tokens[:, 0])


def test_starting_again_forgets_the_past(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    runner = opened(artifact)
    tokens = some_tokens(artifact.config, 2, 5)
    first = decoded(runner, tokens, 3)
    assert np.array_equal(first, decoded(runner, tokens, 3))
    with pytest.raises(ExportError, match="capacity 2"):
        runner.start(tokens, 2)
    runner.close()


def test_stepping_before_the_start_is_an_error(make_artifact: MakeArtifact) -> None:
    with pytest.raises(ExportError, match="before start"):
        opened(make_artifact(tiny_config())).step(np.array([1]))


@pytest.mark.parametrize(("kept", "rows"), [(0, 5), (1, 1), (2, 2), (9, 5)])
def test_logits_of_the_last_positions_only(make_artifact: MakeArtifact, kept: int, rows: int) -> None:
    artifact = make_artifact(tiny_config())
    runner = opened(artifact)
    tokens = some_tokens(artifact.config, 2, 5)
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **empty_past(runner, 2, 5)}
    found = runner.session.ort.run(["logits"], feeds | {"num_logits_to_keep": np.array(kept)})[0]
    assert np.array_equal(found, runner.logits(tokens)[:, 5 - rows :])


@pytest.mark.parametrize("attention", ["reduced", "gqa"])
def test_a_shorter_context_is_in_the_contract(make_artifact: MakeArtifact, attention: str) -> None:
    artifact = make_artifact(tiny_config())
    tokens = some_tokens(artifact.config, 1, 9)
    runner = opened(artifact, attention=attention, context_length=8)
    assert runner.contract.context_length == 8
    assert runner.logits(tokens[:, :8]).shape[1] == 8
    with pytest.raises(ExportError, match=r"9 positions are more than its context length of 8"):
        runner.logits(tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_has_a_type_and_a_shape(make_artifact: MakeArtifact, layout: str) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 11), qk_norm=True), grid=Grid(4, 32))
    graphs = [onnx.load(export(artifact, **LAYOUTS[layout])[0].root / "model.onnx").graph]
    for graph in graphs:
        known = {value.name for value in [*graph.value_info, *graph.output] if value.type.tensor_type.elem_type}
        # An output without a name is one that the node does not give.
        assert {name for node in graph.node for name in node.output if name} <= known
        graphs += [branch.g for node in graph.node for branch in node.attribute if branch.HasField("g")]


def test_the_graph_and_its_contract_say_where_they_come_from(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 11)))
    artifact.manifest["recipe_digest"] = "a" * 64
    root = export(artifact)[0].root
    properties = {entry.key: entry.value for entry in onnx.load(root / "model.onnx").metadata_props}
    assert properties["flatq.recipe_digest"] == "a" * 64
    assert DecoderConfig.from_dict(json.loads(properties["flatq.decoder"])) == artifact.config
    contract = json.loads((root / "flatq_onnx.json").read_text())
    assert contract["cache"][1] == {"heads": 2, "key_width": 16, "value_width": 11}
    assert contract["token_ids"] == {"bos_token_id": 1, "eos_token_id": 2}
    assert contract["growth"] == "fixed"
    session = ort.InferenceSession(root / "model.onnx", providers=["CPUExecutionProvider"])
    assert contract["inputs"] == [spec.name for spec in session.get_inputs()]
    assert contract["outputs"] == [spec.name for spec in session.get_outputs()]
    assert not session.get_overridable_initializers()  # onnxruntime warns of them


@pytest.mark.parametrize("threshold", [0, 10**9])
def test_large_weights_go_into_a_file_of_their_own(make_artifact: MakeArtifact, threshold: int) -> None:
    artifact = make_artifact(tiny_config(), grid=Grid(4, 32))
    exported, _ = export(artifact, external_data_above=threshold)
    names = ["flatq_onnx.json", "model.onnx"] + (["model.onnx.data"] if threshold == 0 else [])
    assert sorted(path.name for path in exported.root.iterdir()) == names
    assert sorted(path.name for path in exported.files) == names
    onnx.checker.check_model(str(exported.root / "model.onnx"), full_check=True)
    assert_says_what_the_artifact_says(artifact, OnnxRunner(exported.root, exact=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", GRIDS)
def test_the_size_is_known_beforehand(make_artifact: MakeArtifact, layout: str, precision: str) -> None:
    grid, embed_grid = GRIDS[precision]
    config = tiny_config(d_v=(16, 11), d_ff=(960, 777), d_model=256, tied_head=layout != "gqa", qkv_bias=True)
    artifact = make_artifact(config, grid=grid, embed_grid=embed_grid)
    exported, options = export(artifact, **LAYOUTS[layout])
    estimate = OnnxExporter().bytes(config, artifact.grids, options)
    assert estimate == pytest.approx(exported.bytes, rel=0.02)


def test_the_same_artifact_gives_the_same_bytes(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 11)), grid=Grid(4, 32), embed_grid=Grid(8, 32))
    first, second = ([path.read_bytes() for path in export(artifact)[0].files] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("layout", "d_qk"),
    [
        ("reduced", 2),
        ("reduced", 24),
        ("gqa-left", 8),
        ("gqa-left", 24),
        ("gqa", 48),
        *(pytest.param(layout, 48, marks=needs_int8) for layout in INT8),
    ],
)
def test_small_and_uneven_heads_are_drawn(make_artifact: MakeArtifact, layout: str, d_qk: int) -> None:
    artifact = make_artifact(tiny_config(d_qk=d_qk, d_v=(1, d_qk)), grid=Grid(4, 32))
    assert_says_what_the_artifact_says(artifact, opened(artifact, **LAYOUTS[layout]))


def test_an_interrupted_export_leaves_no_graph(make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_artifact(tiny_config())
    read = artifact.tensor

    def torn(name: str) -> torch.Tensor | QuantizedWeight:
        if name == "norm.weight":
            raise OSError("disk is gone")
        return read(name)

    monkeypatch.setattr(artifact, "tensor", torn)
    with pytest.raises(ExportError, match="disk is gone; fix that"):
        export(artifact)
    folder = artifact.root.with_name(artifact.root.name + "-onnx")
    assert not list(folder.glob("model.onnx*"))


@pytest.mark.parametrize(
    ("config", "grids", "options", "objection"),
    [
        (tiny_config(), {}, {}, "nothing is quantized; add a gptq stage"),
        (tiny_config(), {"layers.0.q": Grid(4, 24)}, {}, "layers.0.q has group_size 24"),
        (tiny_config(), {"layers.0.q": Grid(5, 32)}, {}, "5 bits"),
        (tiny_config(d_qk=24, d_v=(8, 8)), {}, {"attention": "gqa", "precision": "fp32"}, "multiple of 16"),
        (
            tiny_config(d_qk=12, d_v=(8, 8)),
            {},
            {"attention": "gqa", "precision": "fp32", "left_padding": True},
            "multiple of 8",
        ),
        (tiny_config(d_qk=16, d_v=(16, 24)), {}, {"attention": "gqa", "precision": "fp32"}, r"layers \[1\]"),
        (tiny_config(d_qk=15, d_v=(8, 8)), {}, {"precision": "fp32"}, "odd"),
        (tiny_config(), {}, {"precision": "fp32", "left_padding": True}, "reduced always supports it"),
        (tiny_config(), {}, {"precision": "fp32", "context_length": 300}, "beyond the model's 256"),
    ],
)
def test_what_cannot_be_written_is_refused_before_hours_of_work(
    config: DecoderConfig, grids: dict[str, Grid], options: dict[str, Any], objection: str
) -> None:
    (found,) = OnnxExporter().check(config, grids, OnnxOptions(**options))
    assert re.search(objection, found)


def test_writing_refuses_what_check_refuses(make_artifact: MakeArtifact) -> None:
    with pytest.raises(ExportError, match="nothing is quantized"):
        export(make_artifact(tiny_config()), precision="int4")


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="atention"):
        OnnxOptions(atention="gqa")  # type: ignore[call-arg]


def test_the_exporter_is_found_by_its_name() -> None:
    assert isinstance(exporter_named("onnx"), OnnxExporter)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("flatq_onnx.json", None, "is missing; export the model again"),
        ("flatq_onnx.json", b"{}", "damaged"),
        ("model.onnx", None, "export the model again"),
        ("model.onnx", b"no graph", "cannot load it"),
    ],
)
def test_a_broken_folder_is_named(make_artifact: MakeArtifact, file: str, content: bytes | None, message: str) -> None:
    root = export(make_artifact(tiny_config()))[0].root
    (root / file).unlink() if content is None else (root / file).write_bytes(content)
    with pytest.raises(ExportError, match=message):
        OnnxRunner(root)


def test_what_ran_the_nodes_is_reported(make_artifact: MakeArtifact) -> None:
    runner = opened(make_artifact(tiny_config()))
    assert runner.provider == "CPUExecutionProvider"
    assert runner.session.fallbacks == {}


def test_nodes_that_another_provider_got_are_counted_and_named(make_artifact: MakeArtifact) -> None:
    """What a session on the CPU would be called if CUDA had been to run all of it."""
    runner = opened(make_artifact(tiny_config(), grid=Grid(4, 32)), exact=False)
    session = Session(runner.session.ort, CUDA, _elsewhere(runner.session.ort, CUDA))
    assert list(session.fallbacks) == ["CPUExecutionProvider"]
    assert session.fallbacks["CPUExecutionProvider"]["MatMulNBits"] == 2 * 4
    assert "Reshape" not in session.fallbacks["CPUExecutionProvider"]
    assert re.match(r"CUDAExecutionProvider \(but CPUExecutionProvider runs .*8 MatMulNBits", session.provider)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine has CUDA")
def test_asking_for_cuda_where_there_is_none_is_one_clear_line(make_artifact: MakeArtifact) -> None:
    root = export(make_artifact(tiny_config()))[0].root
    with pytest.raises(ExportError, match="provider cuda is not available") as caught:
        OnnxRunner(root, provider="cuda")
    assert "\n" not in str(caught.value)
    assert OnnxRunner(root, provider="auto").provider == "CPUExecutionProvider"
    with pytest.raises(ExportError, match="'tpu' is unknown"):
        OnnxRunner(root, provider="tpu")


def test_a_recorded_step_finds_all_it_reads_and_writes_where_it_was(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph needs, seen on the CPU: also when the cache grows, and from one text to the next."""
    artifact = make_artifact(tiny_config())
    runner = opened(artifact)
    runner.session = replace(runner.session, replays=True)
    places: dict[int, list[tuple[str, int]]] = {}
    plain = Cache._run

    def watched(cache: Cache, *, single: bool) -> NDArray[np.float32]:
        rows = plain(cache, single=single)
        if single:
            values = {**cache._bound, **cache._buffers, "logits": cache._logits}
            found = [(name, value.data_ptr()) for name, value in values.items()]
            assert places.setdefault(cache._graph, found) == found
        return rows

    monkeypatch.setattr(Cache, "_run", watched)
    for seed, length in ((0, 90), (1, 70), (2, 100)):
        tokens = some_tokens(artifact.config, 2, length, seed=seed)
        wanted = reference_logits(artifact, tokens)
        assert np.abs(decoded(runner, tokens, 4) - wanted[:, 3:]).max() < TOLERANCE
    assert len(places) == 3, "room for 64, 90 and 100 positions, the second also for the text of 70"
    decoded(runner, tokens[:1], 4)
    assert len(places) == 5, "another batch has buffers of its own, and numbers that were never used"


on_cuda = pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="needs CUDA")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("activations", ["fp32", "fp16"])
@pytest.mark.parametrize("grid", [None, Grid(4, 32), Grid(8, 32), Grid(4, 32, symmetric=False)], ids=str)
@pytest.mark.parametrize("layout", ["reduced", "gqa", "gqa-left"])  # the others are for CPUs
def test_cuda_says_what_the_artifact_says(
    make_artifact: MakeArtifact, layout: str, grid: Grid | None, activations: str
) -> None:
    if activations == "fp32" and layout != "reduced":
        pytest.skip("refused, see below")
    artifact = make_artifact(tiny_config(d_v=(16, 11), d_ff=(96, 77)), grid=grid, embed_grid=grid)
    precision = "int4" if grid else activations
    exported, _ = export(artifact, precision=precision, activations=activations, **LAYOUTS[layout])
    runner = OnnxRunner(exported.root, provider="cuda", exact=True)
    assert runner.provider == "CUDAExecutionProvider"
    assert runner.session.replays == (layout != "gqa-left")
    for seed, length in ((0, 9), (1, 90), (2, 80)):  # the cache grows, and what was recorded serves another text
        tokens = some_tokens(artifact.config, 2, length, seed=seed)
        wanted = reference_logits(artifact, tokens)
        limit = TOLERANCE if activations == "fp32" else HALF_SHARE * wanted.std(-1).mean()
        assert np.abs(runner.logits(tokens) - wanted).max() < limit
        assert np.abs(decoded(runner, tokens, 4) - wanted[:, 3:]).max() < limit


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("layout", ["gqa", "gqa-left"])
def test_attention_that_cuda_cannot_compute_is_left_to_the_cpu(make_artifact: MakeArtifact, layout: str) -> None:
    artifact = make_artifact(tiny_config(), grid=Grid(4, 32))
    root = export(artifact, **LAYOUTS[layout])[0].root
    with pytest.raises(ExportError, match=r"supports GroupQueryAttention only in float16; export with target: cuda"):
        OnnxRunner(root, provider="cuda")
    runner = OnnxRunner(root, exact=True)
    assert runner.provider == "CPUExecutionProvider"
    assert_says_what_the_artifact_says(artifact, runner)


def test_the_package_loads_without_its_runtime(tmp_path: Path) -> None:
    code = "import sys, flatq_onnx; sys.exit(bool({'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("grid", [None, Grid(4, 32), Grid(8, 32, symmetric=False)], ids=str)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in INT8])
def test_float16_graphs_stay_close(make_artifact: MakeArtifact, layout: str, grid: Grid | None, tied: bool) -> None:
    config = tiny_config(d_v=(16, 11), d_ff=(96, 77), tied_head=tied)
    artifact = make_artifact(config, grid=grid, embed_grid=grid)
    runner = opened(artifact, precision="int4" if grid else "fp16", activations="fp16", **LAYOUTS[layout])
    path = str(runner.root / "model.onnx")
    onnx.checker.check_model(path, full_check=True)
    floats = {v.type.tensor_type.elem_type for v in onnx.load(path).graph.input} - {onnx.TensorProto.INT64}
    assert floats == {onnx.TensorProto.FLOAT16}
    tokens = some_tokens(artifact.config, 2, 9)
    wanted = reference_logits(artifact, tokens)
    limit = HALF_SHARE * wanted.std(-1).mean()
    assert np.abs(runner.logits(tokens) - wanted).max() < limit
    assert np.abs(decoded(runner, tokens, 4) - wanted[:, 3:]).max() < limit


@pytest.mark.parametrize(
    ("options", "bits", "version"),
    [
        ({"attention": "gqa"}, 4, "1.23"),
        ({"attention": "gqa"}, 2, "1.24"),
        ({"attention": "gqa", "activations": "fp16"}, 2, "1.28"),
        ({"attention": "gqa", "precision": "fp32"}, 2, "1.23"),
        ({}, 4, "1.23"),
        ({}, 2, "1.24"),
        ({"target": "web"}, 4, "1.23"),
        pytest.param({"cache_type": "int8"}, 4, "1.28", marks=needs_int8),
    ],
)
def test_the_contract_states_the_oldest_onnxruntime(
    make_artifact: MakeArtifact, options: dict[str, Any], bits: int, version: str
) -> None:
    artifact = make_artifact(tiny_config(), grid=Grid(bits, 32), embed_grid=Grid(2, 32))
    exported, _ = export(artifact, **options)
    assert json.loads((exported.root / "flatq_onnx.json").read_text())["onnxruntime"] == version


@pytest.mark.parametrize(("options", "version"), [({}, "1.27"), ({"attention": "gqa"}, "1.23")])
def test_capped_scores_need_a_newer_onnxruntime(
    make_artifact: MakeArtifact, options: dict[str, Any], version: str
) -> None:
    exported, _ = export(make_artifact(tiny_config(attention_cap=5.0)), **options)
    assert json.loads((exported.root / "flatq_onnx.json").read_text())["onnxruntime"] == version


TARGET_FILES = {
    "ort": {"model.onnx"},
    "genai": {"model.onnx", "genai_config.json"},
    "optimum": {"model.onnx", "config.json"},
    "cuda": {"model.onnx"},
    "web": {"onnx/model_q4.onnx", "config.json"},
}


@pytest.mark.parametrize(
    ("target", "layout"),
    [
        *((target, "") for target in TARGET_FILES),
        *(pytest.param(target, one, marks=needs_int8) for target in ("ort", "genai") for one in INT8),
    ],
)
def test_a_target_sets_layout_numbers_and_files(make_artifact: MakeArtifact, target: str, layout: str) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 16), d_ff=(64, 128)), grid=Grid(4, 32), embed_grid=Grid(4, 32))
    exported, options = export(artifact, target=target, **LAYOUTS.get(layout, {}))
    found = {path for path in exported.root.rglob("*") if path.is_file()}
    assert {path.relative_to(exported.root).as_posix() for path in found} == TARGET_FILES[target] | {"flatq_onnx.json"}
    assert set(exported.files) == found
    assert OnnxOptions(**options.model_dump()) == options
    runner = OnnxRunner(exported.root, provider="cpu", threads=1, exact=True)
    if target != "cuda":
        assert_says_what_the_artifact_says(artifact, runner)
    else:
        assert runner.contract.float_type == "float16"
    assert OnnxExporter().bytes(artifact.config, artifact.grids, options) == pytest.approx(exported.bytes, rel=0.2)


@pytest.mark.parametrize(
    ("options", "objection"),
    [
        ({"target": "genai", "attention": "reduced"}, "genai supports only attention: gqa"),
        ({"target": "optimum", "left_padding": False}, "pads on the left"),
        ({"target": "cuda", "left_padding": True}, "slow kernel"),
        ({"target": "cuda", "activations": "fp32"}, "computes in fp16"),
        ({"target": "cuda", "accuracy_level": 4}, "gives zeros on a CPU"),
        ({"precision": "fp16", "activations": "fp32"}, "leave activations out"),
        ({"ngram_size": 3}, "use target: genai"),
        ({"target": "genai", "max_draft_tokens": 8}, "which is not set"),
        pytest.param({"cache_type": "int8", "attention": "reduced"}, "not attention: reduced", marks=needs_int8),
        pytest.param({"cache_type": "int8", "target": "optimum"}, "not left_padding", marks=needs_int8),
        pytest.param({"cache_type": "int8", "activations": "fp16"}, "not fp16", marks=needs_int8),
    ],
)
def test_what_a_target_cannot_take_is_refused(options: dict[str, Any], objection: str) -> None:
    config, grids = tiny_config(d_ff=(64, 64)), {"layers.0.q": Grid(4, 32)}
    (found,) = OnnxExporter().check(config, grids, OnnxOptions(**options))
    assert objection in found


@pytest.mark.parametrize(("d_ff", "objects"), [((64, 128), False), ((96, 128), True)])
def test_cuda_wants_whole_blocks_and_outputs_in_64s(d_ff: tuple[int, int], objects: bool) -> None:
    config = tiny_config(d_ff=d_ff)
    grids = {f"layers.{index}.{linear}": Grid(4, 32) for index in range(2) for linear in ("o", "gate", "up", "down")}
    found = OnnxExporter().check(config, grids, OnnxOptions(target="cuda"))
    assert bool(found) == objects
    assert all("multiples of 64, but layers.0.gate 96" in words for words in found)


def test_genai_and_optimum_get_a_tokenizer_in_the_older_spelling(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    (artifact.root / "tokenizer.json").write_text("{}")
    (artifact.root / "chat_template.jinja").write_text("{{ messages }}")
    (artifact.root / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "eos_token": "</s>"})
    )
    for target, name in (("genai", "genai_config.json"), ("optimum", "config.json")):
        exported, _ = export(artifact, target=target, precision="fp32")
        assert {"tokenizer.json", "chat_template.jinja", name} <= {path.name for path in exported.files}
        settings = json.loads((exported.root / "tokenizer_config.json").read_text())
        assert settings == {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "backend": "tokenizers",
            "eos_token": "</s>",
        }
        assert "tokenizer_class TokenizersBackend" in exported.notes[-1]
    stated = json.loads((exported.root / "config.json").read_text())
    assert (stated["model_type"], stated["head_dim"], stated["eos_token_id"]) == ("llama", 16, 2)
    decoder = json.loads((exported.root / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"


@pytest.mark.parametrize(
    ("options", "there"),
    [({}, True), ({"attention": "gqa"}, True), ({"precision": "fp16"}, False), ({"target": "genai"}, False)],
)
def test_the_readme_has_a_program_in_cpp_for_plain_onnxruntime(options: dict[str, Any], there: bool) -> None:
    """Float16 logits have no type in C++."""
    assert ("```cpp" in OnnxExporter().usage(OnnxOptions(**options))) == there


@pytest.mark.parametrize(
    ("options", "stated"),
    [
        ({}, None),
        ({"ngram_size": 3}, {"ngram_size": 3}),
        ({"ngram_size": 2, "max_draft_tokens": 8}, {"ngram_size": 2, "max_draft_tokens": 8}),
    ],
)
def test_speculation_is_stated_for_genai(
    make_artifact: MakeArtifact, options: dict[str, Any], stated: dict[str, int] | None
) -> None:
    exported, _ = export(make_artifact(tiny_config()), target="genai", precision="fp32", **options)
    settings = json.loads((exported.root / "genai_config.json").read_text())
    assert settings.get("speculative") == stated
    assert any("refuses batches" in note for note in exported.notes) == ("ngram_size" in options)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"ngram_size": 3}, True), ({"ngram_size": 3, "accuracy_level": 0}, False), ({}, False)],
)
def test_rounding_that_changes_speculated_text_is_said(
    make_artifact: MakeArtifact, options: dict[str, Any], said: bool
) -> None:
    artifact = make_artifact(tiny_config(), grid=Grid(4, 32))
    exported, _ = export(artifact, **{"target": "genai", "accuracy_level": 4, **options})
    assert any("a text may differ" in note for note in exported.notes) == said


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_tied_table_is_in_the_file_once(make_artifact: MakeArtifact, precision: str) -> None:
    sizes = []
    for tied in (True, False):
        artifact = make_artifact(tiny_config(vocab=4096, tied_head=tied), grid=Grid(4, 32), embed_grid=Grid(4, 32))
        exported, _ = export(artifact, target="genai", precision=precision)
        sizes.append((exported.root / "model.onnx").stat().st_size)
    table = 4096 * tiny_config().d_model * (4 if precision == "fp32" else 1 / 2)
    assert sizes[1] - sizes[0] > 0.9 * table


@pytest.mark.parametrize("layout", ["gqa", "gqa-left", *(pytest.param(layout, marks=needs_int8) for layout in INT8)])
def test_a_graph_without_our_contract_is_run_by_what_it_says_itself(make_artifact: MakeArtifact, layout: str) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 11)), grid=Grid(4, 32), embed_grid=Grid(8, 32))
    exported, options = export(artifact, **LAYOUTS[layout])
    (exported.root / "flatq_onnx.json").unlink()
    runner = OnnxExporter().open(exported.root, options, provider="cpu", threads=1, exact=True)
    assert isinstance(runner, OnnxRunner)
    assert (runner.contract.growth, runner.contract.cache_type) == ("shared", options.cache_type)
    assert_says_what_the_artifact_says(artifact, runner)


def test_a_foreign_graph_that_is_no_decoder_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    root = export(make_artifact(tiny_config()))[0].root
    (root / "flatq_onnx.json").unlink()
    with pytest.raises(ExportError, match=r"unknown inputs \['cache_position'\]"):
        OnnxExporter().open(root, OnnxOptions())
    with pytest.raises(ExportError, match=r"holds 0 \.onnx files"):
        OnnxExporter().open(tmp_path / "nothing", OnnxOptions())


@pytest.mark.parametrize(
    "options", [{}, {"attention": "gqa"}, {"attention": "gqa", "left_padding": True}, {"cache_type": "int8"}], ids=str
)
def test_the_readme_s_python_writes_what_flatq_writes(
    exported_run: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    """The block of code is run as it stands in a moved folder, in a process that imports nothing of flatq."""
    if options.get("cache_type") == "int8" and too_old_for_int8():
        pytest.skip(too_old_for_int8())
    run = shutil.copytree(exported_run[1] / "artifact", tmp_path / "artifact")  # gets ranges of the cache
    pairs = [part for key, value in options.items() for part in ("--option", f"{key}={value}")]
    shown = flatq("export", run, "--format", "onnx", "--out", tmp_path / "mine", *pairs)
    assert shown.exit_code == 0, shown.stderr
    printed = printed_by_the_readme(tmp_path / "mine")
    mine = flatq("generate", tmp_path / "mine", "--prompt", "The sea is", "--new-tokens", "20")
    assert mine.exit_code == 0, mine.stderr
    assert printed == "The sea is" + mine.stdout.strip("\n")


@pytest.mark.parametrize("decode", [False, True], ids=["kernel", "decoded"])
@pytest.mark.parametrize("precision", [name for name in GRIDS if name != "fp32"])
@pytest.mark.parametrize("tied", [True, False])
def test_web_graphs_have_no_operator_that_browsers_lack(
    make_artifact: MakeArtifact, precision: str, tied: bool, decode: bool
) -> None:
    linears, ends = GRIDS[precision]
    artifact = make_artifact(tiny_config(d_v=(16, 11), tied_head=tied), grid=linears, embed_grid=ends)
    exported, _ = export(artifact, target="web", decode_on_load=decode)
    kinds = {node.op_type for node in onnx.load(exported.root / "onnx/model_q4.onnx").graph.node}
    assert "GatherBlockQuantized" not in kinds
    assert ("MatMulNBits" in kinds) != decode
    assert_says_what_the_artifact_says(artifact, OnnxRunner(exported.root, provider="cpu", threads=1, exact=True))
