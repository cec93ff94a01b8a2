"""The family table: every key that matters is read, everything else is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import transformers

from flatq.errors import UnsupportedModel
from flatq.model.config import DecoderConfig, Kind
from flatq.model.decoder import Rope
from flatq.model.families import FAMILIES
from flatq.model.folds import rows_in_halves
from flatq.model.hf_config import config_from_hf, config_to_hf, read_hf
from flatq.model.lacking import NEEDS, WRAPPERS
from flatq.model.weights import tensor_shapes
from tests.models import tiny_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 16}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 32}
GEMMA = {**LLAMA, "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh"}
MORE: dict[str, dict[str, Any]] = {
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "query_pre_attn_scalar": 48},
    "gemma3_text": {**GEMMA, "sliding_window": 16},
    "granite": {"residual_multiplier": 0.22},
    "ministral3": {"rope_parameters": {}},
    "qwen3_moe": {
        **QWEN3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
}
KEYS = {"head_dim": 32, "sliding_window": 16}
ROWS = {
    name: {**LLAMA, **{key: KEYS[key] for key in KEYS if key in row.required}, **MORE.get(name, {}), "model_type": name}
    for name, row in FAMILIES.items()
}
SHORT, LONGER = (1.0,) * 8, (2.0,) * 8
YARN = Rope(scaling="yarn", factor=4.0, original_max_positions=32, beta_fast=16.0, truncate=False)
LONGROPE = Rope(scaling="longrope", divisors=(1.0, 1.5, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0), original_max_positions=256)
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("name", "more", "written"),
    [
        ("phi3", {}, "llama"),
        ("phi3", {"sliding_window": 8}, "mistral"),
        ("granite", {"attention_bias": True}, "llama"),
        ("glm", {}, "qwen2"),
        ("glm", {"attention_bias": False}, "llama"),
        ("ernie4_5", {"use_bias": True}, "llama"),
        ("seed_oss", {}, "qwen2"),
        ("seed_oss", {"attention_out_bias": True}, "llama"),
        ("ministral3", {}, "llama"),
    ],
)
def test_a_folded_model_is_one_of_another_family(name: str, more: dict[str, Any], written: str) -> None:
    assert config_from_hf({**ROWS[name], **more}).family == written


@pytest.mark.parametrize("name", ROWS)
def test_widths_are_read(name: str) -> None:
    config = config_from_hf(ROWS[name])
    dims = config.layers[2]
    assert config.family == name or FAMILIES[name].plain
    assert (config.d_model, config.vocab, len(config.layers)) == (64, 100, 3)
    assert (dims.heads, dims.kv_heads, dims.d_ff) == (4, 2, 96)
    assert dims.d_qk == dims.d_v == {**FAMILIES[name].defaults, **ROWS[name]}.get("head_dim", 16)


@pytest.mark.parametrize("name", ROWS)
def test_names_translate_there_and_back(name: str) -> None:
    config = replace(config_from_hf(ROWS[name]), tied_head=False)
    names = FAMILIES[name].names
    for ours in tensor_shapes(config):
        assert ours in names.all_from_hf(names.to_hf(ours))
        assert names.from_gguf(names.to_gguf(ours)) == ours


@pytest.mark.parametrize(
    "stranger",
    ["model.layers.x.mlp.up_proj.weight", "model.layers.0.mlp.experts.0.weight", "lm_head", "lm_head.scale", ""],
)
def test_a_strange_tensor_has_no_name(stranger: str) -> None:
    assert FAMILIES["llama"].names.from_hf(stranger) is None


def test_a_name_that_is_not_ours_cannot_be_translated() -> None:
    with pytest.raises(KeyError):
        FAMILIES["llama"].names.to_hf("layers.0.query.weight")


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("llama", {}, (False, False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False, False)),
        ("llama", {"mlp_bias": True}, (False, False, True, False)),
        ("mistral", {}, (False, False, False, False)),
        ("qwen2", {}, (True, False, False, False)),
        ("qwen3", {}, (False, False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_switches_follow_the_family(name: str, more: dict[str, Any], expected: tuple[bool, ...]) -> None:
    config = config_from_hf({**ROWS[name], **more})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == expected


@pytest.mark.parametrize(
    ("more", "rope"),
    [
        ({}, Rope(10000.0)),
        ({"rope_theta": 500000, "rope_scaling": None}, Rope(500000.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope(1e6)),
        ({"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2}}, Rope(5.0, "linear", 2.0)),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, Rope(1e4, "llama3", 8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, Rope(5e5, "llama3", 8.0)),
    ],
)
def test_rope_is_read_in_the_old_and_the_new_style(more: dict[str, Any], rope: Rope) -> None:
    assert config_from_hf({**LLAMA, **more}).rope == rope


@pytest.mark.parametrize(
    ("name", "more", "window"),
    [
        ("llama", {"sliding_window": 8}, None),  # transformers' Llama does not look at it either
        ("mistral", {}, 16),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 8}, None),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, None),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 8),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, None),
    ],
)
def test_the_window_follows_the_family(name: str, more: dict[str, Any], window: int | None) -> None:
    assert set(config_from_hf({**ROWS[name], **more}).windows()) == {window}


@pytest.mark.parametrize(
    ("name", "more", "windows"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8, 8)),
        ("gemma2", {}, (16, None, 16)),
        ("gemma3_text", {}, (16, 16, 16)),
        ("gemma3_text", {"sliding_window_pattern": 2}, (16, None, 16)),
        ("olmo3", {"num_hidden_layers": 4}, (16, 16, 16, None)),
        ("olmo3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, (None, 16, None)),
        ("ministral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, (None, 16, None)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
    ],
)
def test_windows_may_differ_from_layer_to_layer(
    name: str, more: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    config = config_from_hf({**ROWS[name], **more})
    assert config.windows() == windows
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_kind_of_layer_has_its_own_rope() -> None:
    gemma = {**ROWS["gemma3_text"], "sliding_window_pattern": 2}
    old = config_from_hf({**gemma, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    linear, plain = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, {"rope_type": "default"}
    ropes = {"full_attention": linear, "sliding_attention": {**plain, "rope_theta": 1e4}}
    assert config_from_hf({**gemma, "rope_parameters": ropes}) == old
    assert [old.kind(index).rope for index in range(2)] == [Rope(1e4), Rope(1e6, "linear", 8.0)]
    assert [config_from_hf(ROWS["smollm3"]).kind(index).rope for index in range(3)] == [Rope(2e6), None, Rope(2e6)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "lama"}, ["'lama' is not supported; supported: llama", "qwen3"]),
        ({"model_type": "olmoe"}, ["'olmoe'", "it needs a mixture of experts of another kind", "which flatq does not"]),
        ({"model_type": "mistral3", "text_config": {"model_type": "gpt_oss"}}, ["'gpt_oss'", "mixture of experts"]),
        ({"model_type": "gpt_neox"}, ["'gpt_neox'", "side by side", "supported: llama, mistral"]),
        ({"model_type": None}, ["None"]),
        ({"hidden_act": "relu2"}, ["hidden_act", "'relu2'", "silu, gelu"]),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, ["'ntk'", "linear, llama3, yarn, longrope, dynamic"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["rope_scaling.low_freq_factor is missing"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor is missing"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["one rope per kind of layer"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, ["rope_theta", "'big'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"num_hidden_layers": "3"}, ["num_hidden_layers", "'3'"]),
        ({"hidden_size": 66}, ["hidden_size 66"]),
        ({"head_dim": 7}, ["head_dim 7 is odd"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["already quantized"]),
        ({"vocab_size": -1, "mlp_bias": 1}, ["mlp_bias", "vocab_size"]),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(changed: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        config_from_hf({**LLAMA, **changed}, where="folder/config.json")
    for word in ["folder/config.json", *words]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("name", "key"),
    [("llama", key) for key in LLAMA if key not in ("model_type", "num_key_value_heads")]
    + [("mistral", "sliding_window"), ("mistral", "num_key_value_heads"), ("qwen3", "head_dim")],
)
def test_a_missing_key_is_named(name: str, key: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{key} is missing"):
        config_from_hf({k: v for k, v in ROWS[name].items() if k != key})


def test_llama_without_kv_heads_is_multi_head() -> None:
    config = config_from_hf({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    assert config.layers[0].group == 1


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, ["max_window_layers is missing"]),
        ("gemma2", {"layer_types": ["full_attention"]}, ["layer_types", "3 layers"]),
        ("olmo3", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, ["linear_attention"]),
        ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers", "3 layers"]),
        ("smollm3", {"no_rope_layers": [0, 0, 0]}, ["no_rope_layers", "not 0 for all"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("granite", {"residual_multiplier": 0}, ["residual_multiplier"]),
        ("granite", {"embedding_multiplier": "x"}, ["embedding_multiplier"]),
        ("granite", {"attention_multiplier": math.inf}, ["attention_multiplier"]),
        ("granite", {"logits_scaling": None}, ["logits_scaling"]),
    ],
)
def test_kinds_of_layers_that_are_not_clear_are_refused(name: str, more: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        config_from_hf({**ROWS[name], **more})
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("family", sorted(name for name, row in FAMILIES.items() if not row.plain))
def test_what_is_written_for_a_family_is_read_back_as_the_same_model(family: str) -> None:
    row = FAMILIES[family]
    switches = {name: decides for name, decides in row.switches.items() if isinstance(decides, bool)}
    config = replace(tiny_config(d_v=(16, 16)), family=family, **switches)
    if row.expert_width:
        read = config_from_hf(ROWS[family])
        config = read.with_layers([replace(read.layers[0], d_qk=16, d_v=16)] * 2)
    if row.folds or row.interleaved:
        with pytest.raises(UnsupportedModel, match=f"{family}: its config.json cannot describe"):
            config_to_hf(config)
        return
    for rope in (Rope(), Rope(scaling="linear", factor=2.0), Rope(scaling="llama3", factor=8.0), YARN, LONGROPE):
        model = replace(config, rope=rope, sliding_window=None if row.window in ("never", "alternating") else 32)
        if row.window == "by_layer":
            model = replace(model, sliding_window=None, other_kinds=(Kind(rope, 32),), kind_of=(0, 1))
        settings = config_to_hf(model)
        assert config_from_hf(settings) == model
        assert settings["architectures"] == [row.architecture]
        assert hasattr(transformers, row.architecture)


def test_widths_that_a_family_cannot_state_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="this model's layers differ"):
        config_to_hf(tiny_config(d_v=(8, 16)))
    with pytest.raises(UnsupportedModel, match="this model d_qk 16 and d_v 8"):
        config_to_hf(tiny_config(d_v=(8, 8)))
    with pytest.raises(UnsupportedModel, match="'gpt9' is not supported"):
        config_to_hf(replace(tiny_config(), family="gpt9"))


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("llama", {"is_causal": False}, ["is_causal: False", "supported: True"]),
        ("llama", {"embedding_multiplier": 12.0}, ["embedding_multiplier: 12.0", "for llama", "supported: 1"]),
        ("llama", {"attention_multiplier": 0.1}, ["attention_multiplier"]),
        ("qwen2", {"residual_multiplier": 0.2, "logits_scaling": 8}, ["residual_multiplier", "logits_scaling"]),
        ("llama", {"no_rope_layers": [1, 1, 0]}, ["no_rope_layers"]),
        ("mistral", {"attn_logit_softcapping": 30.0}, ["attn_logit_softcapping"]),
        ("qwen3", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
        ("qwen3", {"query_pre_attn_scalar": 256}, ["query_pre_attn_scalar"]),
        ("llama", {"rope_interleaved": True}, ["rope_interleaved"]),
        ("llama", {"attention_sinks": True}, ["attention_sinks"]),
        ("qwen2", {"auto_map": {"AutoModel": "modeling.Model"}}, ["auto_map"]),
        ("phi3", {"is_causal": False}, ["is_causal"]),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, ["layer_types", "full_attention"]),
    ],
)
def test_a_key_that_changes_the_computation_is_refused_where_it_is_not_known(
    name: str, more: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        config_from_hf({**ROWS[name], **more})
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {"is_causal": True, "embedding_multiplier": 1.0, "auto_map": None, "rope_interleaved": False}),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}),
        ("phi3", {"auto_map": {"AutoModel": "modeling_phi3.Phi3Model"}}),
        ("llama", {"layer_types": ["full_attention"] * 3}),
    ],
)
def test_a_key_that_changes_nothing_or_is_known_is_accepted(name: str, more: dict[str, Any]) -> None:
    config_from_hf({**ROWS[name], **more})


@pytest.mark.parametrize(("context", "longest", "divisors"), [(None, 32, SHORT), (16, 16, SHORT), (64, 64, LONGER)])
def test_the_context_chooses_the_factors_of_longrope(
    context: int | None, longest: int, divisors: tuple[float, ...]
) -> None:
    rope = {"rope_type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONGER)}
    model = {**ROWS["phi3"], "rope_scaling": rope, "original_max_position_embeddings": 32}
    config = read_hf(model, context=context).config
    assert (config.max_positions, config.rope.divisors) == (longest, divisors)
    with pytest.raises(UnsupportedModel, match="context_length: 257 is beyond the 256 positions"):
        read_hf(model, context=257)


def test_a_rope_that_changes_with_the_length_is_read_up_to_the_original_context() -> None:
    dynamic = {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    assert read_hf(dynamic).config == config_from_hf(LLAMA)
    with pytest.raises(UnsupportedModel, match="beyond the 256 positions"):
        read_hf(dynamic, context=1024)
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1}
    growing = {**ROWS["ministral3"], "rope_parameters": yarn}
    assert read_hf(growing).config.max_positions == 32
    with pytest.raises(UnsupportedModel, match="beyond the 32 positions"):
        read_hf(growing, context=33)


def test_what_is_supported_lacks_nothing() -> None:
    assert not set(NEEDS) & set(FAMILIES)
    assert not set(WRAPPERS) & set(FAMILIES)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 8])
def test_pairs_are_put_in_halves(width: int, interleaved: bool) -> None:
    order = rows_in_halves(8, width, interleaved=interleaved).tolist()
    pairs = set(zip(order[:4], order[4:], strict=True))
    rotating = (
        {(i, i + 1) for i in range(0, width, 2)} if interleaved else {(i, i + width // 2) for i in range(width // 2)}
    )
    assert pairs - {(first, second) for first, second in pairs if first >= width} == rotating
    frequencies = Rope(rotated=width / 8).inverse_frequencies(8)
    assert [index for index, one in enumerate(frequencies) if one > 0] == list(range(width // 2))
    assert sorted(order) == list(range(8))


@pytest.mark.parametrize("experts", [None, 0, 1])
def test_one_expert_is_none(experts: int | None) -> None:
    assert config_from_hf({**LLAMA, "num_experts": experts}) == config_from_hf(LLAMA)


def test_alpha_belongs_to_hunyuan() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0}
    theirs = config_from_hf({**ROWS["hunyuan_v1_dense"], "rope_parameters": rope})
    assert theirs.rope == Rope(theta=pytest.approx(1e4 * 1000 ** (32 / 30)))
    assert config_from_hf({**LLAMA, "rope_parameters": rope}).rope == Rope()
    with pytest.raises(UnsupportedModel, match="alpha"):
        config_from_hf({**ROWS["hunyuan_v1_dense"], "rope_parameters": rope | {"alpha": -1}})
