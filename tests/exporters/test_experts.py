"""Exports of a mixture of experts, each against the artifact."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from flatq.errors import ExportError
from flatq.export.protocols import exporter_named
from flatq.export.speed import SpeedLoad
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.sources.source import open_model
from tests.exporters.conftest import MakeArtifact, reference_logits, some_tokens
from tests.models import tiny_config

ROUTED: dict[str, Any] = {"experts": 4, "experts_per_token": 2}
NORMED = tiny_config(
    family="qwen3_moe", qk_norm=True, d_qk=32, d_v=(32, 16), d_ff=(256, 128), normed_routing=True, **ROUTED
)
PLAIN = tiny_config(family="mixtral", d_qk=32, d_v=(32, 32), d_ff=(128, 128), **ROUTED)


@pytest.mark.parametrize("config", [NORMED, PLAIN], ids=["normed", "plain"])
@pytest.mark.parametrize(
    ("name", "options", "grid", "tolerance"),
    [
        ("onnx", {"precision": "fp32"}, None, 1e-4),
        ("onnx", {"precision": "fp16"}, None, 0.05),
        ("onnx", {"precision": "int4"}, Grid(4, 32, True), 1e-4),
        ("onnx", {"precision": "int4", "attention": "gqa"}, Grid(4, 16, False), 1e-4),
        ("onnx", {"precision": "int4"}, Grid(3, 32, True), 1e-4),
        ("onnx", {"precision": "int4"}, Grid(8, 32, True), 1e-4),
        ("onnx", {"precision": "int4", "target": "web"}, Grid(4, 32, True), 1e-4),
        ("safetensors", {"format": "compressed-tensors", "dtype": "fp32"}, Grid(4, 32, True), 1e-4),
    ],
)
def test_an_export_with_experts_is_the_artifact(
    make_artifact: MakeArtifact,
    tmp_path: Path,
    config: Any,
    name: str,
    options: dict[str, Any],
    grid: Grid | None,
    tolerance: float,
) -> None:
    exporter, artifact = exporter_named(name), make_artifact(config, grid=grid)
    wanted = exporter.Options(**options)
    (tmp_path / "out").mkdir()
    assert exporter.check(config, artifact.grids, wanted) == []
    exported = exporter.write(artifact, tmp_path / "out", wanted)
    if name == "onnx":
        assert exporter.bytes(config, artifact.grids, wanted) == pytest.approx(exported.bytes, rel=0.1)
    runner = exporter.open(exported.root, wanted, provider="cpu", threads=1, exact=True)
    assert runner is not None
    tokens = some_tokens(config, 2, 12)
    with closing(runner):
        assert np.abs(runner.logits(tokens) - reference_logits(artifact, tokens)).max() < tolerance


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("grid", [None, Grid(4, 32, True)])
def test_experts_of_one_width_are_a_standard_checkpoint(
    make_artifact: MakeArtifact, tmp_path: Path, family: str, grid: Grid | None
) -> None:
    qwen = family == "qwen3_moe"
    config = tiny_config(family=family, qk_norm=qwen, normed_routing=True, d_ff=(128, 128), tied_head=False, **ROUTED)
    exporter, artifact = exporter_named("safetensors"), make_artifact(config, grid=grid)
    options = exporter.Options(format="fp32", max_shard_size=100_000)
    exported = exporter.write(artifact, tmp_path / "out", options)
    assert exporter.bytes(config, artifact.grids, options, itemsize=4) == 4 * config.parameters()
    model = transformers.AutoModelForCausalLM.from_pretrained(exported.root)
    assert model.config.model_type == family
    tokens = some_tokens(config, 2, 12)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(found - reference_logits(artifact, tokens)).max() < 1e-4
    again = open_model(str(exported.root))
    again.validate()
    assert again.config == config


@pytest.mark.parametrize(
    ("changed", "options", "grid", "all_computed", "version"),
    [
        ({}, {}, Grid(4, 32, True), "", "1.24"),
        ({}, {}, Grid(4, 16, False), "", "1.24"),
        ({"normed_routing": False}, {}, Grid(4, 32, True), "", "1.25"),
        ({}, {}, Grid(3, 32, True), "", "1.24"),
        ({}, {}, Grid(8, 32, True), "only for 4 bits", "1.23"),
        ({}, {}, Grid(2, 32, True), "only for 4 bits", "1.24"),
        ({"layers": PLAIN.layers}, {}, Grid(4, 32, False), "two or more for zero points", "1.23"),
        ({"activation": "gelu"}, {}, Grid(4, 32, True), "only the gated silu", "1.23"),
        ({}, {"precision": "fp32"}, Grid(4, 32, True), "quantized alike", "1.23"),
        ({}, {"target": "web"}, Grid(4, 32, True), "only tried with float32 on CPUs", "1.23"),
        ({}, {"activations": "fp16"}, Grid(4, 32, True), "only tried with float32 on CPUs", "1.23"),
    ],
)
def test_where_onnxruntimes_node_is_not_exact_all_experts_are_computed_and_said_to_be(
    make_artifact: MakeArtifact,
    tmp_path: Path,
    changed: dict[str, Any],
    options: dict[str, Any],
    grid: Grid,
    all_computed: str,
    version: str,
) -> None:
    exporter, artifact = exporter_named("onnx"), make_artifact(replace(NORMED, **changed), grid=grid)
    (tmp_path / "out").mkdir()
    exported = exporter.write(artifact, tmp_path / "out", exporter.Options(**{"precision": "int4", **options}))
    said = [note for note in exported.notes if "every expert is computed for every token" in note]
    assert [all_computed in note for note in said] == [True] * bool(all_computed)
    contract = next(path for path in exported.files if path.name == "flatq_onnx.json")
    assert json.loads(contract.read_text())["onnxruntime"] == version
    graph = next(path for path in exported.files if path.suffix == ".onnx")
    assert (b"QMoE" in graph.read_bytes()) == (not all_computed)


def test_speed_is_not_predicted() -> None:
    exporter = exporter_named("onnx")
    with pytest.raises(ExportError, match="speed of a mixture of experts cannot be predicted"):
        exporter.speed_model(NORMED, exporter.Options(), SpeedLoad(64, 64))


def test_down_may_have_other_codes_than_gate_and_up(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    exporter, four = exporter_named("onnx"), Grid(4, 32, True)
    others = {"layers.0.down": Grid(8, 32, True), "layers.1.down": Grid(3, 32, True)}
    artifact = make_artifact(NORMED, grid=four, overrides=others)
    options = exporter.Options(precision="int4")
    exported = exporter.write(artifact, tmp_path / "out", options)
    assert any(note.startswith("in 1 of 2 layers every expert") for note in exported.notes)
    runner = exporter.open(exported.root, options, provider="cpu", threads=1, exact=True)
    assert runner is not None
    tokens = some_tokens(NORMED, 2, 12)
    with closing(runner):
        assert np.abs(runner.logits(tokens) - reference_logits(artifact, tokens)).max() < 1e-4


@pytest.mark.parametrize("config", [NORMED, replace(PLAIN, normed_routing=True)], ids=["qwen3moe", "mixtral"])
@pytest.mark.parametrize(("precision", "grid"), [("f32", None), ("codes", Grid(4, 32, True)), ("q8_0", None)])
def test_llamacpp_computes_the_experts_of_the_file(
    make_artifact: MakeArtifact, tmp_path: Path, config: DecoderConfig, precision: str, grid: Grid | None
) -> None:
    exporter, artifact = exporter_named("gguf"), make_artifact(config, grid=grid)
    options = exporter.Options(precision=precision, otherwise="f32")
    assert exporter.check(config, artifact.grids, options) == []
    if absent := exporter.missing(options):
        pytest.skip(absent[0])
    exported = exporter.write(artifact, tmp_path / "out", options)
    runner = exporter.open(exported.root, options, provider="cpu", threads=1, exact=True)
    assert runner is not None
    tokens = some_tokens(config, 2, 12)
    with closing(runner):
        difference = np.abs(runner.logits(tokens) - reference_logits(artifact, tokens)).max()
    assert difference < (1.0 if precision == "q8_0" else 1e-4)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (PLAIN, {}, "experts whose weights add up to 1"),
        (NORMED, {"layout": "deci"}, "layout: deci has no experts; leave layout out"),
        (NORMED, {"precision": "q4_k_m"}, "precision: q4_k_m is not made of experts"),
        (NORMED, {"imatrix": True}, "imatrix is not made of experts"),
        (tiny_config(**ROUTED, normed_routing=True, family="gemma", activation="gelu_tanh"), {}, "silu"),
    ],
)
def test_what_gguf_cannot_do_with_experts_is_refused_by_name(
    config: DecoderConfig, options: dict[str, Any], words: str
) -> None:
    exporter = exporter_named("gguf")
    said = exporter.check(config, {}, exporter.Options(**{"precision": "f32", **options}))
    assert any(words in one for one in said)
