"""GGUF files of Phi-3, Granite and GLM-4, written here as llama.cpp's converter writes them, are read as the model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from flatq.errors import ArtifactError, UnsupportedModel
from flatq.model.weights import load_decoder
from flatq.sources.gguf_file import pairs_from_halves
from flatq.sources.source import open_model
from tests.exporters.test_gguf_tokenizer import split_by
from tests.parity.test_decoder_parity import LONGROPE, TOLERANCE, tiny, tokens

CASES = (
    "phi3",
    "phi3-window",
    "phi3-longrope",
    "phi3-partial-longrope",
    "granite",
    "granite-tied-biases",
    "glm4",
    "glm4-no-bias",
)
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def named(name: str) -> str:
    """The converter's name of a tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}"
    _, _, index, inside = stem.split(".", 3)
    return f"blk.{index}.{INSIDE[inside]}.{kind}"


def written(model: Any, file: Path, *, kind: str = "F32", more: dict[str, Any] | None = None) -> Path:
    """The file that llama.cpp's converter writes of a model."""
    config = model.config
    rope = config.rope_parameters
    heads, d_qk = config.num_attention_heads, getattr(config, "head_dim", None) or config.hidden_size // 4
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    rotated = rope.get("partial_rotary_factor") or 1.0
    writer.add_rope_dimension_count(int(d_qk * rotated))
    if config.model_type == "phi3":
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_sliding_window(config.sliding_window or 0)
        if "long_factor" in rope:
            longer = config.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(longer) / math.log(original)))
            writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
            writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "glm4":
        writer.add_key_length(d_qk)
        writer.add_value_length(d_qk)
    if "tokenizer_model" not in (more or {}):
        writer.add_tokenizer_model("no_vocab")
    for key, value in (more or {}).items():
        getattr(writer, f"add_{key}")(value)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors_of(model):
        values = tensor.contiguous().numpy()
        if tensor.dim() == 2 and kind != "F32":
            writer.add_tensor(named(name), gguf.quants.quantize(values, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(named(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tensors_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Granite's converter is Llama's, which interleaves the rows of a rotary pair."""
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "granite" and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            yield name, pairs_from_halves(tensor, heads)
        else:
            yield name, tensor


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = tiny(case)
    source = open_model(str(written(theirs, tmp_path / "m.gguf")))
    source.validate()
    ids = tokens(2, 24)
    assert (load_decoder(source)(ids) - theirs(ids).logits).abs().max() < TOLERANCE
    assert source.storage.model_type == theirs.config.model_type


@pytest.mark.parametrize("case", CASES)
def test_file_and_folder_are_the_same_model(tmp_path: Path, case: str) -> None:
    theirs = tiny(case)
    theirs.save_pretrained(tmp_path / "hf")
    file, folder = open_model(str(written(theirs, tmp_path / "m.gguf"))), open_model(str(tmp_path / "hf"))
    assert (file.names(), file.config.layers, file.config.kinds) == (
        folder.names(),
        folder.config.layers,
        folder.config.kinds,
    )
    assert (file.config.family, file.config.max_positions) == (folder.config.family, folder.config.max_positions)
    for name in file.names():
        torch.testing.assert_close(file.tensor(name), folder.tensor(name), rtol=1e-6, atol=1e-7)
        assert file.dtype_of(name) == folder.dtype_of(name)


@torch.no_grad()
@pytest.mark.parametrize("case", ["phi3", "glm4"])
def test_rows_of_quantized_fused_matrices_are_found(tmp_path: Path, case: str) -> None:
    theirs = tiny(case, intermediate_size=64)
    source = open_model(str(written(theirs, tmp_path / "m.gguf", kind="Q8_0")))
    name, rows = {"phi3": ("self_attn.qkv_proj", slice(32, 48)), "glm4": ("mlp.gate_up_proj", slice(64, 128))}[case]
    whole = theirs.state_dict()[f"model.layers.1.{name}.weight"].numpy()
    meant = gguf.quants.dequantize(
        gguf.quants.quantize(whole, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    )
    found = source.tensor("layers.1.k.weight" if case == "phi3" else "layers.1.up.weight")
    torch.testing.assert_close(found, torch.from_numpy(meant[rows]))


@pytest.mark.parametrize(("case", "name", "same"), [("glm4", "glm4", "dbrx"), ("granite", "qwen2", "qwen2")])
def test_the_tokenizer_in_the_file_is_read(tmp_path: Path, case: str, name: str, same: str) -> None:
    described = split_by(same)
    vocabulary = described["model"]["vocab"]
    added = [token["content"] for token in described["added_tokens"]]
    file = written(
        tiny(case),
        tmp_path / "m.gguf",
        more={
            "tokenizer_model": "gpt2",
            "tokenizer_pre": name,
            "token_list": [*vocabulary, *added],
            "token_types": [1] * len(vocabulary) + [3] * len(added),
            "token_merges": [" ".join(pair) for pair in described["model"]["merges"]],
            "eos_token_id": len(vocabulary),
        },
    )
    text = "the other them 12 3456 it's IT'S the"
    wanted = Tokenizer.from_str(json.dumps(described)).encode(text).ids
    assert open_model(str(file)).tokenizer().encode(text) == wanted


def test_granite_without_a_scale_has_the_usual_one(tmp_path: Path) -> None:
    theirs = tiny("granite", attention_multiplier=8**-0.5)
    wanted = open_model(str(written(theirs, tmp_path / "a.gguf"))).tensor("layers.0.q.weight")
    theirs.config.attention_multiplier = 0.0
    found = open_model(str(written(theirs, tmp_path / "b.gguf"))).tensor("layers.0.q.weight")
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("case", "more", "words"),
    [
        ("granite", {"logit_scale": -1.0}, "logits_scaling"),
        ("granite", {"rope_dimension_count": 4}, "rope.dimension_count is 4"),
        ("glm4", {"rope_dimension_sections": [2, 2, 0, 0]}, "pictures"),
        ("phi3", {"rope_dimension_count": 10}, "partial_rotary_factor"),
        ("phi3", {"rope_scaling_attn_factors": 1.2}, "attn_factor"),
        ("phi3-longrope", {"rope_dimension_count": 6}, "short_factor"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, case: str, more: dict[str, Any], words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:  # the later of two values is the file's
        patch.setattr(gguf.GGUFWriter, "add_key_value", overwriting)
        file = written(tiny(case), tmp_path / "m.gguf", more=more)
    with pytest.raises(UnsupportedModel, match=words):
        open_model(str(file))


def overwriting(self: Any, key: str, value: Any, kind: Any, sub_type: Any = None) -> None:
    self.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value=value, type=kind, sub_type=sub_type)


def test_a_fused_matrix_with_rows_too_many_is_refused(tmp_path: Path) -> None:
    theirs = tiny("phi3")
    theirs.config.num_key_value_heads = 1
    with pytest.raises(ArtifactError, match=r"layers.0.q.weight has shape \[64, 32\]"):
        open_model(str(written(theirs, tmp_path / "m.gguf"))).validate()


@torch.no_grad()
@pytest.mark.llamacpp
@pytest.mark.parametrize("case", ["phi3", "phi3-partial-longrope", "granite", "glm4"])
def test_llama_cpp_computes_the_same(tmp_path: Path, case: str) -> None:
    """llama.cpp reads the file that is written here as the converter writes it."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make llamacpp)")
    from flatq_gguf.runner import LlamaCppRunner

    # llama.cpp takes the short divisors for contexts up to the original length, and makes contexts of 256 at least.
    rope = {**LONGROPE, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 512}
    longer = {"rope_parameters": rope, "original_max_position_embeddings": 512, "max_position_embeddings": 2048}
    source = open_model(str(written(tiny(case, **(longer if "longrope" in case else {})), tmp_path / "m.gguf")))
    ids = tokens(1, 20)
    runner = LlamaCppRunner(tmp_path, provider="cpu", threads=1, exact=True)
    found = torch.from_numpy(np.asarray(runner.logits(ids.numpy())))
    runner.close()
    assert (found - load_decoder(source)(ids)).abs().max() < 2e-3
