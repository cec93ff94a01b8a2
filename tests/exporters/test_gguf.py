"""GGUF files hold the artifact's weights, read back with gguf's own decoder, and say what llama.cpp needs to know."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from flatq.artifact import ENERGIES, Artifact, save_shard
from flatq.errors import ArtifactError, ExportError, UnsupportedModel
from flatq.export.protocols import Exported, exporter_named
from flatq.model.config import Kind
from flatq.model.decoder import LINEARS, DecoderConfig, Rope
from flatq.model.grid import Grid
from flatq.model.weights import dense, load_decoder
from flatq.sources.gguf_file import GgufFile
from flatq.sources.source import Source
from flatq.tokenizer import open_tokenizer
from flatq_gguf import GgufExporter, GgufOptions
from flatq_gguf.sizes import PIECE_BYTES
from tests.conftest import MakeRecipe, flatq
from tests.exporters.conftest import MakeArtifact, reference_logits, some_tokens
from tests.family_table import save_tokenizer
from tests.models import SWITCHES, tiny_config

CARRIED = {  # every grid that a block type can hold, and that type
    "4-bit": (4, True, "Q4_0"),
    "3-bit": (3, True, "Q4_0"),
    "2-bit": (2, True, "Q4_0"),
    "8-bit": (8, True, "Q8_0"),
    "4-bit asymmetric": (4, False, "Q5_0"),
    "3-bit asymmetric": (3, False, "Q4_0"),
    "2-bit asymmetric": (2, False, "Q4_0"),
}


def export(artifact: Artifact, **options: Any) -> tuple[Exported, GgufOptions]:
    """Write into a folder beside the artifact; float32 if the artifact has no codes."""
    chosen = GgufOptions(**{"precision": "codes" if artifact.grids else "f32", **options})
    out = artifact.root.with_name(f"{artifact.root.name}-gguf-{len(list(artifact.root.parent.iterdir()))}")
    out.mkdir()
    return GgufExporter().write(artifact, out, chosen), chosen


def read(exported: Exported) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of all parts, by name."""
    readers = [gguf.GGUFReader(file) for file in exported.files if file.suffix == ".gguf"]
    fields = {key: field.contents() for key, field in readers[0].fields.items()}
    return fields, {tensor.name: tensor for reader in readers for tensor in reader.tensors}


def decoded(tensor: Any) -> NDArray[np.float32]:
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def stacked_pairs(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp's row order of q and k: row 2j of a head is its row j, row 2j + 1 its row d / 2 + j."""
    width = len(weight) // heads
    rows = [head * width + j + half * width // 2 for head in range(heads) for j in range(width // 2) for half in (0, 1)]
    return weight[rows]


def expected_linear(artifact: Artifact, index: int, linear: str, written: dict[str, int]) -> NDArray[np.float32]:
    """The artifact's decoded weight in the file's order, written here a second time, head by head."""
    dims = artifact.config.layers[index]
    weight = dense(artifact.tensor(f"layers.{index}.{linear}.weight")).numpy()
    if linear in ("q", "k"):
        return stacked_pairs(weight, dims.heads if linear == "q" else dims.kv_heads)
    if linear == "v":
        heads = weight.reshape(dims.kv_heads, dims.d_v, -1)
        return np.pad(heads, ((0, 0), (0, dims.d_qk - dims.d_v), (0, 0))).reshape(-1, weight.shape[1])
    if linear == "o":
        heads = weight.reshape(len(weight), dims.heads, dims.d_v)
        return np.pad(heads, ((0, 0), (0, 0), (0, dims.d_qk - dims.d_v))).reshape(len(weight), -1)
    missing = written["d_ff"] - dims.d_ff
    return np.pad(weight, ((0, 0), (0, missing)) if linear == "down" else ((0, missing), (0, 0)))


GGUF_NAMES = dict(
    zip(LINEARS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True)
)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("bits", "symmetric", "kind"), CARRIED.values(), ids=CARRIED)
def test_codes_are_read_back_as_the_artifacts_weights_bit_for_bit(
    make_artifact: MakeArtifact, bits: int, symmetric: bool, kind: str, group_size: int
) -> None:
    wide = group_size == 128  # so that two groups fit into every row
    config = tiny_config(heads=2, kv_heads=1, d_qk=128, d_v=(128, 64), d_ff=(256, 160), d_model=256 if wide else 64)
    if group_size != 32:  # padded heads need whole groups
        config = config.with_layers([replace(dims, d_v=128) for dims in config.layers])
    artifact = make_artifact(config, grid=Grid(bits, group_size, symmetric), embed_grid=Grid(8, 32))
    exported, _ = export(artifact)
    _, tensors = read(exported)
    for index in range(2):
        for linear in LINEARS:
            found = tensors[f"blk.{index}.{GGUF_NAMES[linear]}.weight"]
            assert found.tensor_type.name == kind
            expected = expected_linear(artifact, index, linear, {"d_ff": config.layers[index].d_ff})
            np.testing.assert_array_equal(decoded(found), expected)
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    np.testing.assert_array_equal(decoded(tensors["token_embd.weight"]), dense(artifact.tensor("embed.weight")).numpy())
    assert exported.rounding_kl == 0


def test_every_tensor_has_the_type_of_its_own_grid(make_artifact: MakeArtifact) -> None:
    config = tiny_config(d_v=(16, 16), d_ff=(96, 64))
    mixed = {
        "layers.0.q": (Grid(8, 32), "Q8_0"),
        "layers.0.down": (Grid(3, 32), "Q4_0"),
        "layers.1.v": (Grid(4, 32, symmetric=False), "Q5_0"),
        "layers.1.down": (Grid(8, 64), "Q8_0"),
    }
    overrides = {stem: grid for stem, (grid, _) in mixed.items()}
    artifact = make_artifact(config, grid=Grid(4, 32), embed_grid=Grid(4, 32), overrides=overrides)
    exported, _ = export(artifact)
    fields, tensors = read(exported)
    for index in range(2):
        for linear in LINEARS:
            found = tensors[f"blk.{index}.{GGUF_NAMES[linear]}.weight"]
            assert found.tensor_type.name == mixed.get(f"layers.{index}.{linear}", (None, "Q4_0"))[1]
            expected = expected_linear(artifact, index, linear, {"d_ff": config.layers[index].d_ff})
            np.testing.assert_array_equal(decoded(found), expected)
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert exported.rounding_kl == 0


def test_a_matrix_whose_codes_do_not_fit_is_stored_otherwise_and_said(make_artifact: MakeArtifact) -> None:
    config = tiny_config(heads=2, kv_heads=1, d_qk=64, d_v=(48, 64), d_ff=(96, 96))
    artifact = make_artifact(config, grid=Grid(4, 32))
    for otherwise, bound in (("q8_0", 0.02), ("f16", 1e-3), ("f32", 0)):
        exported, _ = export(artifact, otherwise=otherwise)
        _, tensors = read(exported)
        assert tensors["blk.0.attn_output.weight"].tensor_type.name == otherwise.upper()
        assert tensors["blk.1.attn_output.weight"].tensor_type.name == "Q4_0"
        expected = expected_linear(artifact, 0, "o", {})
        assert np.abs(decoded(tensors["blk.0.attn_output.weight"]) - expected).max() <= bound * np.abs(expected).max()
        assert any("layers.0.o" in note and "rank_multiple: 32" in note for note in exported.notes)
        assert any("they are not quantized: embed" in note for note in exported.notes)


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16", "q8_0", "q5_0", "q4_1", "q4_0"])
def test_plain_types_hold_the_rounded_weights(make_artifact: MakeArtifact, precision: str) -> None:
    artifact = make_artifact(tiny_config(d_v=(8, 16), d_ff=(96, 64), tied_head=False))
    exported, _ = export(artifact, precision=precision)
    fields, tensors = read(exported)
    kind = gguf.GGMLQuantizationType[precision.upper()]
    expected = expected_linear(artifact, 0, "up", {"d_ff": 96})
    rounded = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
    np.testing.assert_array_equal(decoded(tensors["blk.0.ffn_up.weight"]), rounded)
    assert tensors["blk.0.ffn_up.weight"].tensor_type == kind
    table = kind.name if precision in ("f32", "f16", "bf16") else "Q8_0"
    assert tensors["token_embd.weight"].tensor_type.name == tensors["output.weight"].tensor_type.name == table
    assert (
        fields["general.file_type"]
        == gguf.LlamaFileType["ALL_F32" if precision == "f32" else f"MOSTLY_{precision.upper()}"]
    )
    assert (exported.rounding_kl == 0) == (precision == "f32")


def test_rows_that_are_no_whole_blocks_are_stored_in_half_precision(make_artifact: MakeArtifact) -> None:
    exported, _ = export(make_artifact(tiny_config(d_model=48)), precision="q8_0")
    _, tensors = read(exported)
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"


@pytest.mark.parametrize("multiple", [32, 256])
def test_mlp_widths_are_filled_up_with_zero_channels(make_artifact: MakeArtifact, multiple: int) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 8), d_ff=(90, 600)), grid=Grid(4, 32))
    exported, _ = export(artifact, ffn_multiple=multiple)
    fields, tensors = read(exported)
    widths = [math.ceil(width / multiple) * multiple for width in (90, 600)]
    assert fields["deci.feed_forward_length"] == widths
    for linear in ("gate", "up", "down"):
        expected = expected_linear(artifact, 0, linear, {"d_ff": widths[0]})
        np.testing.assert_array_equal(decoded(tensors[f"blk.0.{GGUF_NAMES[linear]}.weight"]), expected)


def test_widths_that_padding_makes_equal_need_no_other_architecture(make_artifact: MakeArtifact) -> None:
    exported, _ = export(make_artifact(tiny_config(d_v=(16, 8), d_ff=(90, 96)), grid=Grid(4, 32)))
    fields, _ = read(exported)
    assert (fields["general.architecture"], fields["llama.feed_forward_length"]) == ("llama", 96)


@pytest.mark.parametrize("bits", [(4, 4), (8, 4)])
def test_a_narrowed_qwen3_is_an_openelm(make_artifact: MakeArtifact, bits: tuple[int, int]) -> None:
    config = replace(tiny_config(qk_norm=True, d_qk=32, d_v=(32, 32), d_ff=(96, 64)), family="qwen3")
    special = {"layers.0.v": Grid(bits[0], 32)}
    artifact = make_artifact(config, grid=Grid(bits[1], 32), overrides=special)
    exported, _ = export(artifact)
    fields, tensors = read(exported)
    assert (fields["general.architecture"], fields["openelm.feed_forward_length"]) == ("openelm", [96, 64])
    fused = tensors["blk.0.attn_qkv.weight"]
    assert fused.tensor_type.name == ("Q4_0" if bits == (4, 4) else "Q8_0")
    rows = [dense(artifact.tensor(f"layers.0.{linear}.weight")) for linear in "qkv"]
    tolerance = 0 if bits == (4, 4) else 0.02  # codes of two types are not one matrix, so they are rounded
    np.testing.assert_allclose(decoded(fused), torch.cat(rows).numpy(), atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_that_was_not_narrowed_keeps_its_own_architecture(make_artifact: MakeArtifact, family: str) -> None:
    switches = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(family, {})
    artifact = make_artifact(replace(tiny_config(**switches), family=family))
    exported, _ = export(artifact)
    file = GgufFile(exported.files[0])
    assert file.config.layers == artifact.config.layers
    for name in artifact.names():
        if not name.endswith("bias"):  # flatq's own reader of GGUF puts the rows of weights back
            np.testing.assert_array_equal(file.read(name).numpy(), dense(artifact.tensor(name)).numpy())


@pytest.mark.parametrize("family", [name for name in SWITCHES if name != "qwen2"])
def test_flatqs_own_reader_opens_the_file_of_every_family(make_artifact: MakeArtifact, family: str) -> None:
    widths: dict[str, Any] = {"d_v": (16,) * 4, "d_ff": (96,) * 4}
    artifact = make_artifact(tiny_config(family=family, **widths, **SWITCHES[family]))
    exported, _ = export(artifact)
    source = Source(GgufFile(exported.files[0]), "file")
    source.validate()
    config = artifact.config
    assert (source.config.kinds, source.config.kind_of) == (config.kinds, config.kind_of)
    assert source.config.switches() == config.switches()
    tokens = some_tokens(config, 2, 20)
    with torch.no_grad():
        found = load_decoder(source)(torch.from_numpy(tokens)).numpy()
    # Where llama.cpp scales the embedding, the residual stream is larger, and the norms' epsilon weighs less.
    np.testing.assert_allclose(found, reference_logits(artifact, tokens), atol=5e-4)


def test_deci_describes_every_layer(make_artifact: MakeArtifact) -> None:
    exported, _ = export(make_artifact(tiny_config(d_v=(8, 16), d_ff=(64, 96))))
    fields, tensors = read(exported)
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [4, 4]
    assert fields["deci.attention.head_count_kv"] == [2, 2]
    assert fields["deci.feed_forward_length"] == [64, 96]
    assert fields["deci.attention.key_length"] == fields["deci.attention.value_length"] == 16
    assert fields["deci.rope.dimension_count"] == 16
    assert fields["deci.context_length"] == 256
    assert "output.weight" not in tensors
    assert any("padded with zeros" in note for note in exported.notes)


def test_compact_keeps_the_narrow_values_and_the_order_of_rows(make_artifact: MakeArtifact) -> None:
    config = tiny_config(heads=2, kv_heads=1, d_qk=64, d_v=(32, 32), d_ff=(64, 96), tied_head=False)
    artifact = make_artifact(config, grid=Grid(4, 32))
    exported, _ = export(artifact, layout="compact")
    fields, tensors = read(exported)
    assert fields["general.architecture"] == "mimo2"
    assert (fields["mimo2.attention.key_length"], fields["mimo2.attention.value_length"]) == (64, 32)
    assert fields["mimo2.feed_forward_length"] == 96
    assert any(fields["mimo2.attention.sliding_window_pattern"])
    assert fields["mimo2.attention.sliding_window"] > fields["mimo2.context_length"]
    for linear in ("q", "k", "v", "o"):
        expected = dense(artifact.tensor(f"layers.0.{linear}.weight")).numpy()
        np.testing.assert_array_equal(decoded(tensors[f"blk.0.{GGUF_NAMES[linear]}.weight"]), expected)


COMPACT = {"precision": "f16", "layout": "compact"}


@pytest.mark.parametrize(
    ("config", "grids", "options", "words"),
    [
        (tiny_config(), {}, {}, ["nothing is quantized", "precision: f16"]),
        (tiny_config(), {"embed": Grid(8, 32, symmetric=False)}, {}, ["8-bit asymmetric", "symmetric: true"]),
        (tiny_config(), {"embed": Grid(4, 48)}, {}, ["group_size 48", "multiple of 32"]),
        (tiny_config(), {"embed": Grid(4, 32)}, {"precision": "q4_0"}, ["a second time", "precision: codes"]),
        (tiny_config(d_v=(16, 24)), {}, {"precision": "f16"}, ["larger than d_qk in layers [1]"]),
        (tiny_config(d_v=(8, 8), qk_norm=True), {}, {"precision": "f16"}, ["q and k: none, not heads", "to onnx"]),
        (tiny_config(activation="gelu"), {}, {"precision": "f16"}, ["the activation silu, not gelu"]),
        (tiny_config(post_norms=True), {}, {"precision": "f16"}, ["no norms after attention", "export to onnx"]),
        (tiny_config(logit_cap=3.0), {}, {"precision": "f16"}, ["no cap of logits"]),
        (
            replace(tiny_config(other_kinds=(Kind(None),), kind_of=(0, 1)), family="smollm3"),
            {},
            {"precision": "f16"},
            ["smollm3", "no rotary embedding in every 4th layer"],
        ),
        (
            replace(tiny_config(post_norms=True, activation="gelu_tanh", tied_head=False), family="gemma2"),
            {},
            {"precision": "f16"},
            ["a head that is tied", "a cap of scores; a cap of logits"],
        ),
        (tiny_config(), {}, COMPACT, ["twice", "layout: deci"]),
        (tiny_config(tied_head=False, d_v=(8, 16)), {}, COMPACT, ["[8, 16]", "uniform"]),
        (tiny_config(tied_head=False), {}, COMPACT, ["[16]", "rank_multiple: 32"]),
        (
            tiny_config(tied_head=False, d_qk=32, d_v=(32, 32), rope=Rope(scaling="llama3"), mlp_bias=True),
            {},
            COMPACT,
            ["rope factors", "mlp_bias"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_written_is_refused_with_the_way_out(
    config: DecoderConfig, grids: dict[str, Grid], options: dict[str, Any], words: list[str]
) -> None:
    found = "\n".join(GgufExporter().check(config, grids, GgufOptions(**options)))
    for word in words:
        assert word in found


@pytest.mark.parametrize(
    ("wanted", "missing"),
    [
        ("auto", "llama-cpp-python is not installed and llama-quantize is not on the PATH"),
        ("llama-cpp-python", "llama-cpp-python is not installed"),
        ("llama-quantize", "llama-quantize is not on the PATH"),
    ],
)
def test_k_quants_without_llama_cpp_are_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, wanted: str, missing: str
) -> None:
    monkeypatch.setattr("flatq_gguf.k_quants.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    (found,) = GgufExporter().check(tiny_config(), {}, GgufOptions(precision="q4_k_m", quantize_with=wanted))
    assert f"{missing};" in found
    assert "llama-quantize FILE-F16.gguf FILE.gguf Q4_K_M" in found


@pytest.mark.parametrize(
    ("verb", "flat", "refused"),
    [
        ("run", {}, True),
        ("plan", {}, True),
        ("plan", {"uniform": True}, False),
        ("plan", {"values": "whole"}, False),
    ],
)
def test_ranks_that_will_differ_are_refused_before_they_are_measured(
    make_recipe: MakeRecipe, tmp_path: Path, verb: str, flat: dict[str, Any], refused: bool
) -> None:
    stages = [{"flat": {"keep_ratio": 0.8, **flat}}]
    recipe = make_recipe(stages=stages, exports=[{"gguf": {"layout": "compact", "precision": "f16", "verify": False}}])
    out = tmp_path / "out"
    shown = flatq(verb, recipe, *(("--out", out) if verb == "run" else ()))
    words = " ".join(shown.stderr.split())
    assert shown.exit_code == 2  # this model's head is tied, which compact refuses in any case
    assert ("one d_v for all layers, this model has [8, 16]; set uniform: true" in words) == refused
    assert not (out / "work").exists()


def test_the_program_quantizes_where_there_is_no_library(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncp "$3" "$4"; echo "$@" > "$(dirname "$0")/called"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    artifact = with_energies(make_artifact(tiny_config()))
    exported, _ = export(artifact, precision="q4_k_m", quantize_with="llama-quantize", imatrix=True)
    assert [file.name for file in exported.files] == ["llama-flatq-IMATRIX.gguf", "llama-flatq-Q4_K_M.gguf"]
    called = (program.parent / "called").read_text().split()
    assert (called[0], called[-1]) == ("--imatrix", "Q4_K_M")
    program.write_text('#!/bin/sh\necho "this file is odd" >&2; exit 3\n')
    with pytest.raises(ExportError, match=r"llama-quantize.*exit code 3: this file is odd.*precision: f16"):
        export(artifact, precision="q4_k_m", quantize_with="llama-quantize")


def with_energies(artifact: Artifact) -> Artifact:
    """The artifact as `flatq run` leaves it: with the mean squares of its calibration."""
    generator = torch.Generator().manual_seed(1)
    energies = {}
    for index, dims in enumerate(artifact.config.layers):
        for linear in LINEARS:
            columns = dims.shape(linear, artifact.config.d_model)[1]
            energies[f"layers.{index}.{linear}"] = torch.rand(columns, generator=generator)
    save_shard(artifact.root / ENERGIES, energies)
    artifact.manifest["tokens"] = {"calibration": {"dataset": "python-docs", "sequences": 6, "seq_len": 50}}
    return artifact


def test_the_importance_matrix_has_the_order_and_widths_of_the_written_tensors(make_artifact: MakeArtifact) -> None:
    artifact = with_energies(make_artifact(tiny_config(heads=2, kv_heads=1, d_v=(8, 16), d_ff=(90, 96))))
    exported, _ = export(artifact, precision="f16", imatrix=True)
    (path,) = [file for file in exported.files if file.name.endswith("-IMATRIX.gguf")]
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (6, 50)
    assert fields["imatrix.datasets"] == ["python-docs"]
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(found) == 2 * len(LINEARS) * 2
    energies = artifact.energies()
    o, down = energies["layers.0.o"].numpy(), energies["layers.0.down"].numpy()
    padded = np.pad(o.reshape(2, 8), ((0, 0), (0, 8))).ravel()
    np.testing.assert_allclose(found["blk.0.attn_output.weight.in_sum2"][0], 300 * padded, rtol=1e-6)
    np.testing.assert_allclose(found["blk.0.ffn_down.weight.in_sum2"][0], 300 * np.pad(down, (0, 6)), rtol=1e-6)
    np.testing.assert_allclose(found["blk.1.attn_q.weight.in_sum2"][0], 300 * energies["layers.1.q"].numpy(), rtol=1e-6)
    assert all(data.item() == 300 for name, data in found.items() if name.endswith(".counts"))
    assert any("--imatrix llama-flatq-IMATRIX.gguf" in note for note in exported.notes)


def test_an_artifact_without_energies_says_how_to_get_them(make_artifact: MakeArtifact) -> None:
    with pytest.raises(ArtifactError, match=r"energies.*run the recipe again"):
        export(make_artifact(tiny_config()), precision="f16", imatrix=True)


def test_opening_without_llama_cpp_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatq.export.protocols.find_spec", lambda name: None)
    with pytest.raises(ExportError, match="llama-cpp-python is not installed; install it with `pip install"):
        GgufExporter().open(tmp_path, GgufOptions())
    assert GgufExporter().providers() == ()


def test_an_objection_of_check_also_stops_write(make_artifact: MakeArtifact) -> None:
    with pytest.raises(ExportError, match="nothing is quantized"):
        export(make_artifact(tiny_config()), precision="codes")


def test_a_number_beyond_half_precision_is_refused(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(tiny_config())
    monkeypatch.setattr(Artifact, "tensor", lambda self, name: torch.full_like(self._read(name), 1e5))
    with pytest.raises(ExportError, match="beyond float16; use precision bf16"):
        export(artifact, precision="f16")


def test_a_sliding_window_ends_the_context(make_artifact: MakeArtifact) -> None:
    exported, _ = export(make_artifact(tiny_config(sliding_window=40)))
    fields, _ = read(exported)
    assert fields["llama.context_length"] == 40
    assert any("sliding window" in note for note in exported.notes)


def test_rope_factors_divide_the_frequencies(make_artifact: MakeArtifact) -> None:
    rope = Rope(theta=500.0, scaling="llama3", factor=8.0, original_max_positions=16)
    exported, _ = export(make_artifact(tiny_config(rope=rope, d_v=(8, 8))))
    _, tensors = read(exported)
    plain = replace(rope, scaling=None).inverse_frequencies(16).numpy()
    divided = plain / decoded(tensors["rope_freqs.weight"])
    np.testing.assert_allclose(divided, rope.inverse_frequencies(16).numpy(), rtol=1e-6)


def test_linear_rope_is_a_key(make_artifact: MakeArtifact) -> None:
    fields, _ = read(export(make_artifact(tiny_config(rope=Rope(scaling="linear", factor=4.0))))[0])
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 4.0)


@pytest.mark.parametrize(
    "switches", [{}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}], ids=["plain", "biases"]
)
def test_the_estimate_is_the_size_of_the_file(make_artifact: MakeArtifact, switches: dict[str, Any]) -> None:
    config = tiny_config(d_v=(8, 16), d_ff=(96, 64), d_model=256, vocab=512, **switches)
    artifact = make_artifact(config, grid=Grid(4, 32))
    exported, options = export(artifact)
    tokenizer = config.vocab * PIECE_BYTES  # counted, though this artifact has none
    assert GgufExporter().bytes(config, artifact.grids, options) - tokenizer == pytest.approx(exported.bytes, rel=0.01)


def test_a_large_file_is_split_into_numbered_parts(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    exported, _ = export(artifact, split_above=100_000)
    whole, _ = export(artifact)
    assert len(exported.files) > 1
    count = len(exported.files)
    assert [file.name[-20:] for file in exported.files] == [f"-{n + 1:05d}-of-{count:05d}.gguf" for n in range(count)]
    fields, tensors = read(exported)
    assert fields["split.count"] == count
    for name, tensor in read(whole)[1].items():
        np.testing.assert_array_equal(tensor.data, tensors[name].data)


def test_a_failed_export_leaves_no_file_behind(make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_artifact(tiny_config())

    def broken(self: Artifact, name: str) -> torch.Tensor:
        raise ExportError("the disk is gone")

    monkeypatch.setattr(Artifact, "tensor", broken)
    with pytest.raises(ExportError, match="the disk is gone"):
        export(artifact)
    assert not list(artifact.root.parent.glob("*-gguf-*/*.gguf"))


def test_the_file_says_where_it_came_from(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    artifact.manifest["source"] = {"origin": "a@1", "hub_id": "some-org/Some-Model-1B", "license": "apache-2.0"}
    exported, _ = export(artifact, precision="f16")
    fields, _ = read(exported)
    assert exported.files[0].name == "Some-Model-1B-flatq-F16.gguf"
    assert fields["general.name"] == "Some-Model-1B"
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/some-org/Some-Model-1B"
    assert fields["tokenizer.ggml.model"] == "no_vocab"


@pytest.mark.parametrize("origin", ["/models/My Model", "package:holder/Model.gguf"])
def test_a_local_source_is_no_model_of_a_hub(make_artifact: MakeArtifact, origin: str) -> None:
    artifact = make_artifact(tiny_config())
    artifact.manifest["source"] = {"origin": origin, "hub_id": None}
    fields, _ = read(export(artifact)[0])
    assert not [key for key in fields if "base_model" in key or "url" in key]


def test_a_quantized_source_does_not_lend_its_type_to_the_name(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config())
    artifact.manifest["source"] = {"origin": "package:holder/Model-135M.Q4_1.gguf"}
    assert export(artifact)[0].files[0].name == "Model-135M-flatq-F32.gguf"
    assert export(artifact, name="mine")[0].files[0].name == "mine-flatq-F32.gguf"


def test_the_dense_export_has_the_familys_own_architecture() -> None:
    twin = GgufExporter().dense(GgufOptions(layout="compact", baseline="q4_0"))
    assert (twin.precision, twin.layout) == ("q4_0", "auto")


def test_options_are_closed_and_the_exporter_is_found_by_name() -> None:
    assert isinstance(exporter_named("gguf"), GgufExporter)
    for wrong in ({"precison": "f16"}, {"precision": "q2_k"}, {"name": "a/b"}, {"split_above": -1}):
        with pytest.raises(ValidationError):
            GgufOptions(**wrong)


def test_the_same_artifact_gives_the_same_bytes(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config(), grid=Grid(4, 32))
    first, second = export(artifact)[0], export(artifact)[0]
    assert first.files[0].read_bytes() == second.files[0].read_bytes()


BY_LAYER: dict[str, Any] = {"d_v": (8, 16), "d_ff": (90, 64)}
HALF = Rope(theta=500.0, rotated=0.5)
DECI: dict[str, DecoderConfig] = {
    "narrowed": tiny_config(**BY_LAYER),
    "untied": tiny_config(**BY_LAYER, tied_head=False),
    "biases": tiny_config(**BY_LAYER, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qwen2": replace(tiny_config(**BY_LAYER, qkv_bias=True), family="qwen2"),
    "llama3 rope": tiny_config(**BY_LAYER, rope=Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)),
    "half of the head rotates": tiny_config(**BY_LAYER, rope=HALF),
    "not narrowed, half rotates": tiny_config(rope=HALF),
}


@pytest.mark.parametrize("config", DECI.values(), ids=DECI)
def test_flatqs_own_reader_opens_narrowed_models(make_artifact: MakeArtifact, config: DecoderConfig) -> None:
    artifact = make_artifact(config)
    exported, _ = export(artifact)
    file = GgufFile(exported.files[0])
    source = Source(file, "file")
    source.validate()
    widths = [math.ceil(dims.d_ff / 32) * 32 for dims in config.layers]  # whole blocks
    assert [(dims.d_v, dims.d_ff) for dims in source.config.layers] == [(16, width) for width in widths]
    tokens = some_tokens(config, 2, 20)
    with torch.no_grad():
        found = load_decoder(source)(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(found, reference_logits(artifact, tokens), atol=5e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", [4, 2]),
        ("attention.head_count_kv", [2, 0]),
        ("feed_forward_length", [96, 0]),
        ("feed_forward_length", [96]),
    ],
)
def test_layers_without_attention_or_mlp_are_refused(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch, key: str, value: list[int]
) -> None:
    exported, _ = export(make_artifact(tiny_config(**BY_LAYER)))
    read = GgufFile._value
    monkeypatch.setattr(GgufFile, "_value", lambda self, name: value if name == f"deci.{key}" else read(self, name))
    with pytest.raises(UnsupportedModel, match="differs by layer, or a layer has none"):
        GgufFile(exported.files[0])


@pytest.mark.parametrize("family", ["llama", "qwen2", "hunyuan_v1_dense"])
def test_flatqs_own_reader_reads_the_tokenizer_of_a_narrowed_model(make_artifact: MakeArtifact, family: str) -> None:
    switches = {"qwen2": {"qkv_bias": True}, "hunyuan_v1_dense": SWITCHES["hunyuan_v1_dense"]}.get(family, {})
    artifact = make_artifact(replace(tiny_config(**BY_LAYER, **switches, vocab=320), family=family))
    save_tokenizer(artifact.root)
    exported, _ = export(artifact)
    text = "the bright bird sings over <s> the slow river."
    found = GgufFile(next(file for file in exported.files if file.suffix == ".gguf")).tokenizer()
    assert found(text)["input_ids"] == open_tokenizer(artifact.root)(text)["input_ids"]
