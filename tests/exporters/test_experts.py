"""Exports of a mixture of experts, each against the artifact."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatq.export.protocols import exporter_named
from flatq.model.grid import Grid
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
        ("onnx", {"precision": "int4", "attention": "gqa"}, Grid(4, 32, False), 1e-4),
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
    assert exporter.check(config, artifact.grids, wanted) == []
    exported = exporter.write(artifact, tmp_path / "out", wanted)
    if name == "onnx":
        assert exporter.bytes(config, artifact.grids, wanted) == pytest.approx(exported.bytes, rel=0.1)
    runner = exporter.open(exported.root, wanted, provider="cpu", threads=1, exact=True)
    assert runner is not None
    tokens = some_tokens(config, 2, 12)
    with closing(runner):
        assert np.abs(runner.logits(tokens) - reference_logits(artifact, tokens)).max() < tolerance


def test_gguf_says_that_it_has_no_experts() -> None:
    exporter = exporter_named("gguf")
    assert exporter.check(NORMED, {}, exporter.Options()) == [
        "gguf: mixtures of experts are not written; export to onnx or safetensors"
    ]
