"""llama.cpp itself opens the files and computes what the artifact computes."""

from __future__ import annotations

import ctypes
import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers

from flatq.artifact import ENERGIES, Artifact, save_shard
from flatq.errors import ExportError
from flatq.export.protocols import FloatArray
from flatq.export.verify import APPROXIMATE, verify
from flatq.model.config import Kind
from flatq.model.decoder import DecoderConfig, Rope
from flatq.model.grid import Grid
from flatq.model.weights import dense
from flatq_gguf import GgufExporter
from tests.conftest import flatq
from tests.exporters.conftest import MakeArtifact, printed_by_the_readme, reference_logits, some_tokens
from tests.exporters.test_gguf import export, with_energies
from tests.exporters.test_gguf_tokenizer import byte_level, save_tokenizer
from tests.models import tiny_config

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make llamacpp)")
import llama_cpp

from flatq_gguf.runner import LlamaCppRunner

pytestmark = pytest.mark.llamacpp

YARN = Rope(theta=500.0, scaling="yarn", factor=4.0, original_max_positions=64, beta_fast=8.0, beta_slow=2.0)
LONGROPE = Rope(theta=500.0, scaling="longrope", divisors=tuple(1 + 0.3 * index for index in range(8)))
LINEAR = Rope(scaling="linear", factor=4.0)
TABLE = 0.015  # on a CPU llama.cpp looks GELU up in a table of float16 numbers; the logits' spread is 8
GEMMA: dict[str, Any] = {"activation": "gelu_tanh", "post_norms": True}
WINDOWED: dict[str, Any] = {"other_kinds": (Kind(Rope(theta=50.0), 6),), "kind_of": (1, 0)}
ONE_THETA: dict[str, Any] = {"other_kinds": (Kind(Rope(), 6),), "kind_of": (1, 0)}
CAPS: dict[str, Any] = {"attention_cap": 5.0, "logit_cap": 20.0}
OLMO: dict[str, Any] = {"qk_norm": True, "wide_qk_norm": True, "pre_norms": False, "post_norms": True}
STILL: dict[str, Any] = {"other_kinds": (Kind(None),), "kind_of": (0, 0, 0, 1, 0)}
OWN: dict[str, DecoderConfig] = {
    "gemma": replace(tiny_config(activation="gelu_tanh", d_v=(8, 12), d_ff=(96, 64)), family="gemma"),
    "gemma2": replace(tiny_config(**GEMMA, **WINDOWED, **CAPS, d_v=(8, 12), d_ff=(96, 64)), family="gemma2"),
    "gemma2, no window": replace(tiny_config(**GEMMA, **CAPS), family="gemma2"),
    "gemma3": replace(tiny_config(**GEMMA, **WINDOWED, qk_norm=True, d_v=(8, 12), d_ff=(96, 64)), family="gemma3_text"),
    "gemma3, linear rope, no window": replace(
        tiny_config(**GEMMA, qk_norm=True, rope=Rope(scaling="linear", factor=4.0)), family="gemma3_text"
    ),
    "gemma3, untied, capped": replace(
        tiny_config(**GEMMA, **WINDOWED, qk_norm=True, tied_head=False, logit_cap=20.0), family="gemma3_text"
    ),
    "olmo2": replace(tiny_config(**OLMO, tied_head=False, d_v=(8, 12), d_ff=(96, 64)), family="olmo2"),
    "olmo3": replace(tiny_config(**OLMO, **ONE_THETA, tied_head=False), family="olmo3"),
    "smollm3": replace(
        tiny_config(**STILL, qkv_bias=True, d_v=(8, 12, 16, 8, 8), d_ff=(96, 64, 32, 64, 96)),
        family="smollm3",
    ),
    "hunyuan": replace(
        tiny_config(qk_norm=True, norm_after_rope=True, d_v=(8, 12), d_ff=(96, 64)), family="hunyuan_v1_dense"
    ),
    "hunyuan, yarn rope": replace(
        tiny_config(qk_norm=True, norm_after_rope=True, tied_head=False, rope=YARN), family="hunyuan_v1_dense"
    ),
    "qwen3, narrowed": replace(tiny_config(qk_norm=True, d_v=(8, 12), d_ff=(96, 64)), family="qwen3"),
}
MODELS: dict[str, tuple[DecoderConfig, dict[str, Any]]] = {
    "not narrowed": (tiny_config(), {}),
    "untied": (tiny_config(tied_head=False), {}),
    "narrowed": (tiny_config(d_v=(8, 12), d_ff=(96, 64)), {}),
    "narrowed, untied, no groups": (tiny_config(kv_heads=4, d_v=(12, 8), d_ff=(90, 64), tied_head=False), {}),
    "one head for all": (tiny_config(kv_heads=1, d_v=(8, 16)), {}),
    "odd rank": (tiny_config(d_v=(7, 1)), {}),
    "llama3 rope": (
        tiny_config(d_v=(8, 16), rope=Rope(theta=500.0, scaling="llama3", factor=8.0, original_max_positions=16)),
        {},
    ),
    "linear rope": (tiny_config(d_v=(8, 8), rope=LINEAR), {}),
    "yarn rope": (tiny_config(d_v=(8, 16), rope=YARN), {}),
    "yarn rope, not truncated": (tiny_config(rope=replace(YARN, truncate=False)), {}),
    "longrope": (tiny_config(rope=LONGROPE, qkv_bias=True), {}),
    "half of the head rotates": (tiny_config(d_v=(8, 16), rope=Rope(theta=500.0, rotated=0.5)), {}),
    "half of the head rotates, linear": (tiny_config(rope=replace(LINEAR, rotated=0.5)), {}),
    "qwen3, narrowed, as openelm": (
        replace(tiny_config(qk_norm=True, d_v=(8, 16), d_ff=(90, 64)), family="qwen3"),
        {},
    ),
    "qwen3, narrowed, yarn rope": (
        replace(tiny_config(qk_norm=True, d_v=(8, 16), d_ff=(90, 64), rope=YARN), family="qwen3"),
        {},
    ),
    "qwen3, yarn rope": (replace(tiny_config(qk_norm=True, rope=YARN), family="qwen3"), {}),
    "qwen2, yarn rope": (replace(tiny_config(qkv_bias=True, rope=YARN), family="qwen2"), {}),
    "biases": (tiny_config(d_v=(8, 16), d_ff=(90, 64), qkv_bias=True, o_bias=True, mlp_bias=True), {}),
    "biases, not narrowed": (tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True), {}),
    "qwen2": (replace(tiny_config(qkv_bias=True), family="qwen2"), {}),
    "qwen2, narrowed": (replace(tiny_config(qkv_bias=True, d_v=(8, 16)), family="qwen2"), {}),
    "qwen3": (replace(tiny_config(qk_norm=True), family="qwen3"), {}),
    "mistral within its window": (replace(tiny_config(d_v=(8, 8), sliding_window=40), family="mistral"), {}),
    "compact": (
        tiny_config(heads=2, kv_heads=1, d_qk=64, d_v=(32, 32), d_ff=(64, 96), tied_head=False),
        {"layout": "compact"},
    ),
    "compact, not narrowed": (tiny_config(d_qk=32, d_v=(32, 32), tied_head=False), {"layout": "compact"}),
    **{name: (config, {}) for name, config in OWN.items()},
}


def opened(artifact: Artifact, *, exact: bool = True, **options: Any) -> LlamaCppRunner:
    exported, chosen = export(artifact, **options)
    runner = GgufExporter().open(exported.root, chosen, provider="cpu", threads=1, exact=exact)
    assert isinstance(runner, LlamaCppRunner)
    return runner


def divergence(reference: FloatArray, found: FloatArray) -> float:
    """Mean of KL(reference || found), nats."""
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("config", "options"), MODELS.values(), ids=MODELS)
def test_float32_files_give_the_artifacts_logits(
    make_artifact: MakeArtifact, config: DecoderConfig, options: dict[str, Any]
) -> None:
    limit = 1e-3 if config.activation == "silu" else TABLE
    artifact = make_artifact(config)
    tokens = some_tokens(config, 2, 24)
    reference = reference_logits(artifact, tokens)
    exported, _ = export(artifact, **options)
    assert exported.rounding_kl == (0 if config.activation == "silu" else 1e-4)
    assert any("table of float16" in note for note in exported.notes) == (config.activation != "silu")
    runner = LlamaCppRunner(exported.root, provider="cpu", threads=1, exact=True)
    assert divergence(reference, runner.logits(tokens)) < 5e-5
    np.testing.assert_allclose(runner.logits(tokens), reference, atol=limit)
    steps = [runner.start(tokens[:, :20], 24), *(runner.step(tokens[:, position]) for position in range(20, 24))]
    np.testing.assert_allclose(np.stack(steps, 1), reference[:, 19:], atol=limit)
    runner.close()


GRIDS = {
    "4-bit": Grid(4, 32),
    "4-bit asymmetric": Grid(4, 32, symmetric=False),
    "3-bit": Grid(3, 64),
    "8-bit": Grid(8, 32),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_codes_mean_the_artifacts_weights_to_llama_cpp(make_artifact: MakeArtifact, grid: Grid) -> None:
    config = tiny_config(heads=2, kv_heads=1, d_qk=64, d_v=(32, 64), d_ff=(96, 64))
    artifact = make_artifact(config, grid=grid, embed_grid=Grid(8, 32))
    tokens = some_tokens(config, 2, 24)
    reference = reference_logits(artifact, tokens)
    exact = opened(artifact)
    np.testing.assert_allclose(exact.logits(tokens), reference, atol=1e-3)
    copies = list(exact.root.glob(".float32-*"))
    assert len(copies) == 1
    exact.close()
    assert not copies[0].exists()
    deployed = opened(artifact, exact=False)
    assert divergence(reference, deployed.logits(tokens)) < APPROXIMATE.kl
    deployed.close()


def test_a_rank_that_breaks_blocks_costs_next_to_nothing(make_artifact: MakeArtifact) -> None:
    config = tiny_config(heads=2, kv_heads=1, d_qk=64, d_v=(48, 40))
    artifact = make_artifact(config, grid=Grid(4, 32), embed_grid=Grid(8, 32))
    tokens = some_tokens(config, 2, 24)
    runner = opened(artifact)
    assert divergence(reference_logits(artifact, tokens), runner.logits(tokens)) < 1e-3
    runner.close()


@pytest.mark.parametrize("options", [{}, {"split_above": 60_000}], ids=["one file", "split"])
def test_verify_passes_and_counts_every_position(make_artifact: MakeArtifact, options: dict[str, Any]) -> None:
    artifact = make_artifact(tiny_config(d_v=(16, 16)), grid=Grid(4, 32), embed_grid=Grid(8, 32))
    found = verify(
        artifact, lambda: opened(artifact, exact=False, **options), open_exact=lambda: opened(artifact, **options)
    )
    assert found is not None
    assert found.exact.max_abs < 1e-3
    assert found.exact.top1 == 1
    assert found.deployed is not None
    assert "llama.cpp cpu" in found.deployed.provider


def test_verify_sees_rows_in_the_wrong_order(make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_artifact(tiny_config())
    monkeypatch.setattr("flatq_gguf.placement.pairs_from_halves", lambda rows, heads: rows)
    with pytest.raises(ExportError, match="the logit of token"):
        verify(artifact, lambda: opened(artifact))


def test_greedy_text_is_the_artifacts(make_artifact: MakeArtifact) -> None:
    config = tiny_config(d_v=(8, 12), d_ff=(96, 64))
    artifact = make_artifact(config)
    runner = opened(artifact)
    text = some_tokens(config, 1, 8)
    token = runner.start(text, 40).argmax(-1)
    for _ in range(32):
        assert token[0] == reference_logits(artifact, text)[0, -1].argmax()
        text = np.concatenate([text, token[:, None]], 1)
        token = runner.step(token).argmax(-1) if text.shape[1] < 40 else token
    runner.close()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_valid_position(make_artifact: MakeArtifact, side: str) -> None:
    config = tiny_config(d_v=(8, 16))
    artifact = make_artifact(config)
    tokens, valid = some_tokens(config, 2, 12), np.ones((2, 12), np.int64)
    valid[1, :5] = 0
    if side == "right":
        valid = valid[:, ::-1].copy()
    runner = opened(artifact)
    found, reference = runner.logits(tokens, valid), reference_logits(artifact, tokens, valid)
    np.testing.assert_allclose(found[valid == 1], reference[valid == 1], atol=1e-3)
    runner.close()


def test_prompts_longer_than_one_batch_are_read_in_parts(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(tiny_config(d_v=(8, 16)))
    tokens = some_tokens(artifact.config, 2, 23)
    monkeypatch.setattr("flatq_gguf.runner.TOKENS_AT_ONCE", 5)
    runner, reference = opened(artifact), reference_logits(artifact, tokens)
    np.testing.assert_allclose(runner.logits(tokens), reference, atol=1e-3)
    np.testing.assert_allclose(runner.start(tokens, 23), reference[:, -1], atol=1e-3)
    runner.close()


def test_the_compact_layout_has_the_smaller_value_cache(make_artifact: MakeArtifact) -> None:
    sizes = {}
    for layout in ("deci", "compact"):
        artifact = make_artifact(tiny_config(heads=2, kv_heads=1, d_qk=64, d_v=(32, 32), tied_head=False))
        runner = opened(artifact, exact=False, layout=layout)
        before = len(runner.log)
        runner.start(some_tokens(artifact.config, 1, 8), 256)
        log = runner.log[before:]
        sizes[layout] = [
            sum(float(found) for found in re.findall(rf"{letter} \(f16\): +([\d.]+) MiB", log)) for letter in "KV"
        ]
        runner.close()
    (keys, values), (compact_keys, compact_values) = sizes["deci"], sizes["compact"]
    assert keys == pytest.approx(compact_keys, abs=0.02)
    assert values == pytest.approx(keys, abs=0.02)
    assert compact_values == pytest.approx(values / 2, abs=0.02)


@pytest.mark.parametrize("digits", [False, True], ids=["gpt-2", "smollm"])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(make_artifact: MakeArtifact, digits: bool) -> None:
    artifact = make_artifact(tiny_config(vocab=300))
    tokenizer = byte_level(300, digits=digits)
    save_tokenizer(artifact.root, tokenizer, eos_token="<|end|>")
    runner = opened(artifact)
    text = "the other  them\n\n 12 3.45 it's <|end|>thé <think>"
    assert runner.tokenize(text) == tokenizer.encode(text).ids
    runner.close()


def test_llama_cpp_knows_end_tokens_templates_and_sampling(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config(vocab=300))
    named = [{"name": name, "template": f"{{{{ {name} }}}}"} for name in ("default", "tool_use")]
    save_tokenizer(artifact.root, byte_level(300), chat_template=named)
    artifact.settings["eos_token_id"] = [2, 5, 7]
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 20}
    (artifact.root / "generation_config.json").write_text(json.dumps(sampling))
    runner = LlamaCppRunner(export(artifact)[0].root, provider="cpu", threads=1)
    vocabulary = llama_cpp.llama_model_get_vocab(runner._model)
    ends = {2, 5, 7, byte_level(300).token_to_id("<|end|>")}  # llama.cpp knows some tokens by their text
    assert {2, 5, 7} <= {i for i in range(300) if llama_cpp.llama_vocab_is_eog(vocabulary, i)} <= ends
    assert llama_cpp.llama_model_chat_template(runner._model, None) == b"{{ default }}"
    assert llama_cpp.llama_model_chat_template(runner._model, b"tool_use") == b"{{ tool_use }}"
    found = ctypes.create_string_buffer(64)
    for key, value in ((b"temp", b"0.500000"), (b"top_k", b"20")):
        llama_cpp.llama_model_meta_val_str(runner._model, b"general.sampling." + key, found, 64)
        assert found.value == value
    runner.close()


def test_llama_cpp_merges_by_score_as_the_tokenizer_by_rank(make_artifact: MakeArtifact) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh,."]
    merged = ["ab", "bc", "abc", "▁a", "▁ab", "▁abc", "cd", "de", "cde", "▁▁"]  # best first; every way to make one
    merges = [(word[:cut], word[cut:]) for word in merged for cut in range(1, len(word))]
    vocab = {piece: index for index, piece in enumerate([*pieces, *merged])}
    known = [(left, right) for left, right in merges if left in vocab and right in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=known, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    artifact = make_artifact(tiny_config(vocab=300))
    save_tokenizer(artifact.root, tokenizer, bos_token="<s>", eos_token="</s>")
    runner = opened(artifact)
    for text in ("abc", "abcde abab,bcd  aabbcc.", "hé\ncde abcdabcde", "Z abc"):
        assert runner.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids
    runner.close()


def test_half_precision_is_what_half_precision_costs(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(tiny_config(d_v=(8, 16)))
    tokens = some_tokens(artifact.config, 2, 24)
    runner = opened(artifact, exact=False, precision="f16")
    assert divergence(reference_logits(artifact, tokens), runner.logits(tokens)) < 1e-4
    runner.close()


WIDE = tiny_config(d_model=256, d_v=(16, 8), d_ff=(256, 200), tied_head=False)


@pytest.mark.parametrize(("precision", "kl"), [("q3_k_m", 0.2), ("q4_k_m", 0.05), ("q5_k_m", 0.02), ("q6_k", 0.01)])
@pytest.mark.parametrize("imatrix", [False, True], ids=["by itself", "by importance"])
def test_llama_cpps_own_quantizer_makes_k_quants(
    make_artifact: MakeArtifact, precision: str, kl: float, imatrix: bool
) -> None:
    artifact = with_energies(make_artifact(WIDE))
    exported, options = export(
        artifact, precision=precision, ffn_multiple=256, imatrix=imatrix, quantize_with="llama-cpp-python"
    )
    names = [f"llama-flatq-{kind}.gguf" for kind in ((["IMATRIX"] if imatrix else []) + [precision.upper()])]
    assert sorted(file.name for file in exported.root.iterdir()) == names
    tokens = some_tokens(artifact.config, 2, 24)
    runner = GgufExporter().open(exported.root, options, provider="cpu", exact=True)
    assert runner is not None
    assert 0 < divergence(reference_logits(artifact, tokens), runner.logits(tokens)) < kl < exported.rounding_kl
    runner.close()


def test_importance_moves_the_error_to_columns_that_carry_little(make_artifact: MakeArtifact) -> None:
    artifact = with_energies(make_artifact(WIDE))
    loud = torch.full((256,), 1e-4)
    loud[::8] = 1.0
    energies = {stem: loud.clone() if stem.endswith("up") else energy for stem, energy in artifact.energies().items()}
    save_shard(artifact.root / ENERGIES, energies)
    expected = dense(artifact.tensor("layers.0.up.weight")).numpy()
    errors = []
    for imatrix in (False, True):
        exported, _ = export(artifact, precision="q4_k_m", ffn_multiple=256, imatrix=imatrix)
        tensor = {t.name: t for t in gguf.GGUFReader(exported.files[-1]).tensors}["blk.0.ffn_up.weight"]
        assert tensor.tensor_type.name == "Q4_K"
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        errors.append(float(np.square(found - expected)[:, ::8].sum()))
    assert errors[1] < 0.8 * errors[0]


def test_k_quants_of_a_split_model_are_split(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(WIDE)
    exported, options = export(artifact, precision="q6_k", ffn_multiple=256, split_above=400_000)
    count = len(exported.files)
    assert count > 1
    assert exported.files[-1].name == f"llama-flatq-Q6_K-{count:05d}-of-{count:05d}.gguf"
    runner = GgufExporter().open(exported.root, options, provider="cpu", exact=True)
    assert runner is not None
    tokens = some_tokens(artifact.config, 2, 24)
    assert 0 < divergence(reference_logits(artifact, tokens), runner.logits(tokens)) < 0.01
    runner.close()


def test_a_damaged_file_is_an_error_that_llama_cpp_explains(make_artifact: MakeArtifact) -> None:
    exported, chosen = export(make_artifact(tiny_config()))
    file = exported.files[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ExportError, match=r"cannot load it: .*"):
        GgufExporter().open(exported.root, chosen, provider="cpu")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no \.gguf file"):
        LlamaCppRunner(tmp_path)


def test_a_crash_in_llama_cpp_becomes_an_error(make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    exported, chosen = export(make_artifact(tiny_config()))
    monkeypatch.setattr("llama_cpp.llama_print_system_info", lambda: b"AMX_INT8 = 1 | ")
    runner = GgufExporter().open(exported.root, chosen, provider="cpu")  # the probe lives, so the file is opened
    assert runner is not None
    runner.close()
    dead = subprocess.CompletedProcess([], -11, "", "Segmentation fault")
    monkeypatch.setattr("subprocess.run", lambda *args, **settings: dead)
    with pytest.raises(ExportError, match=r"exit code -11: Segmentation fault.*make llamacpp"):
        GgufExporter().open(exported.root, chosen, provider="cpu")


def test_cuda_without_cuda_is_refused(make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    exported, chosen = export(make_artifact(tiny_config()))
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: False)
    with pytest.raises(ExportError, match="DGGML_CUDA"):
        GgufExporter().open(exported.root, chosen, provider="cuda")


def test_misuse_is_named(make_artifact: MakeArtifact) -> None:
    runner = opened(make_artifact(tiny_config()))
    with pytest.raises(ExportError, match="step was called before start"):
        runner.step(np.zeros(1, np.int64))
    with pytest.raises(ExportError, match="capacity 3 is less"):
        runner.start(np.zeros((1, 4), np.int64), 3)
    assert math.isfinite(runner.start(np.zeros((1, 4), np.int64), 4).sum())
    runner.close()


def test_the_readme_s_python_writes_what_flatq_writes(exported_run: tuple[Path, Path], tmp_path: Path) -> None:
    """The block of code is run as it is in a moved folder, in a process that imports nothing of flatq."""
    shown = flatq("export", exported_run[1], "--format", "gguf", "--out", tmp_path / "mine", "-o", "precision=f16")
    assert shown.exit_code == 0, shown.stderr
    printed = printed_by_the_readme(tmp_path / "mine")
    mine = flatq("generate", tmp_path / "mine", "--prompt", "The sea is", "--new-tokens", "5")
    assert mine.exit_code == 0, mine.stderr
    text = mine.stdout.strip("\n").rstrip("\N{REPLACEMENT CHARACTER}")
    assert text
    assert printed.startswith("The sea is" + text)
