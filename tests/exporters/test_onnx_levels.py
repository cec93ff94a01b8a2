"""ONNX exports say the same at every optimization level of onnxruntime, and verification opens them all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from flatq.artifact import Artifact
from flatq.errors import ExportError
from flatq.export.deliver import deliver
from flatq.export.planned import PlannedExport
from flatq.export.protocols import Exported
from flatq.export.verify import verify
from flatq.model.grid import Grid
from flatq_onnx import OnnxExporter, OnnxOptions, tensors
from flatq_onnx.runner import OnnxRunner
from flatq_onnx.session import LEVELS
from flatq_onnx.sizes import estimated_bytes
from tests.exporters.conftest import MakeArtifact, reference_logits, some_tokens
from tests.exporters.test_onnx import GRIDS, HALF_SHARE, LAYOUTS, TARGET_FILES, TOLERANCE, decoded, export
from tests.models import tiny_config

ROUNDED_SHARE = (
    0.25  # of the spread of logits, what activations in 8 bits may move one by; zeros move them by 3 or more
)


def check_all_levels(artifact: Artifact, root: Path, share: float = 0.0) -> None:
    """Prompt and decoding at every level, as deployed and exact; ``share`` of the spread is allowed for float16."""
    tokens = some_tokens(artifact.config, 2, 9)
    wanted = reference_logits(artifact, tokens)
    spread = wanted.std(-1).mean()
    for level in LEVELS:
        for exact, limit in ((True, max(TOLERANCE, share * spread)), (False, ROUNDED_SHARE * spread)):
            runner = OnnxRunner(root, provider="cpu", threads=1, exact=exact, level=level)
            assert np.abs(runner.logits(tokens) - wanted).max() < limit, (level, exact)
            if runner.contract.cache_type == "float" or not exact:
                assert np.abs(decoded(runner, tokens, 4) - wanted[:, 3:]).max() < limit, (level, exact)


@pytest.mark.parametrize("precision", GRIDS)
@pytest.mark.parametrize("target", TARGET_FILES)
def test_every_target_and_precision_says_the_same_at_every_level(
    make_artifact: MakeArtifact, target: str, precision: str
) -> None:
    grid, embed_grid = GRIDS[precision]
    artifact = make_artifact(tiny_config(d_ff=(64, 128)), grid=grid, embed_grid=embed_grid)
    half = target == "cuda"
    plain = {} if grid else {"precision": "fp16" if half else "fp32"}
    exported, _ = export(artifact, target=target, **plain)
    check_all_levels(artifact, exported.root, HALF_SHARE if half else 0.0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same_at_every_level(make_artifact: MakeArtifact, layout: str, tied: bool) -> None:
    config = tiny_config(d_v=(16, 11), d_ff=(96, 77), tied_head=tied, qkv_bias=True)
    grid = Grid(4, 32, symmetric=False)
    artifact = make_artifact(config, grid=grid, embed_grid=grid)
    check_all_levels(artifact, export(artifact, external_data_above=0, **LAYOUTS[layout])[0].root)


def test_matrices_that_onnxruntime_does_not_fold_have_float32_scales(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(d_model=256, d_ff=(960, 960))
    artifact = make_artifact(config, grid=Grid(4, 32), embed_grid=Grid(4, 32))
    folded = export(artifact)[0].bytes
    monkeypatch.setattr(tensors, "FOLDED_BYTES", 20_000)
    exported, options = export(artifact)
    graph = onnx.load(exported.root / "model.onnx").graph
    kinds = {weight.name: weight.data_type for weight in graph.initializer}
    assert kinds["layers.0.gate_up.scales"] == onnx.TensorProto.FLOAT
    assert kinds["layers.0.o.scales"] == onnx.TensorProto.FLOAT16
    assert exported.bytes > 1.05 * folded
    assert estimated_bytes(config, artifact.grids, options) == pytest.approx(exported.bytes, rel=0.02)
    check_all_levels(artifact, exported.root)


def as_written_before(root: Path) -> None:
    """Put the fault into a graph: codes that are constants beside scales that only constant folding makes so."""
    model = onnx.load(root / "model.onnx")
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "Reshape"}
    weights = {weight.name: weight for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            flat, sizes = (weights[name] for name in made[node.input[1]].input)
            del flat.dims[:]
            flat.dims.extend(numpy_helper.to_array(sizes))
            node.input[1] = flat.name
    onnx.save(model, root / "model.onnx")


class FormerExporter(OnnxExporter):
    """Writes graphs with the fault."""

    def write(self, artifact: Artifact, out: Path, options: OnnxOptions) -> Exported:
        exported = super().write(artifact, out, options)
        as_written_before(out)
        return exported


@pytest.mark.parametrize("bits", [4, 8])
def test_a_graph_that_is_wrong_without_constant_folding_is_not_delivered(
    make_artifact: MakeArtifact, tmp_path: Path, bits: int
) -> None:
    artifact = make_artifact(tiny_config(tied_head=False), grid=Grid(bits, 32))
    options = OnnxOptions(target="genai")
    with pytest.raises(ExportError, match="old, optimization level disabled: the runtime"):
        deliver(PlannedExport("old", "onnx", FormerExporter(), options), artifact, tmp_path / "old", None)
    assert not (tmp_path / "old").exists()
    done = deliver(PlannedExport("new", "onnx", OnnxExporter(), options), artifact, tmp_path / "new", None)
    assert done["verify"]["levels"] == ("extended", "basic", "disabled", "all without ConstantFolding")


def test_the_fault_is_one_that_the_default_level_hides(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact(tiny_config(), grid=Grid(4, 32), embed_grid=Grid(4, 32))
    FormerExporter().write(artifact, tmp_path, OnnxOptions())
    opener = partial(OnnxRunner, tmp_path, provider="cpu", threads=1)
    assert verify(artifact, opener, open_exact=partial(opener, exact=True)) is not None
    wrong = opener(level="disabled").logits(some_tokens(artifact.config, 1, 4))
    assert (wrong == 0).all() or not np.isfinite(wrong).all()
