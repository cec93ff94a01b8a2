"""Metadata of a GGUF file: architecture, widths, tokenizer, provenance; and its file name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from flatq.export import Artifact, DecoderConfig, Rope
from flatq_gguf.layouts import FULL_WINDOW, native_rope
from flatq_gguf.tensors import Contents, Planned
from flatq_gguf.tokenizer import Vocabulary

# ``general.file_type`` by the type of most weights: llama.cpp's LlamaFileType.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "BF16": 32}

# Keys of generation_config.json and llama.cpp's names for them.
SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
QUANTIZED_NAME = re.compile(r"[.-](I?Q\d\w*|BF16|F16|F32)$", re.IGNORECASE)  # of a GGUF source


def most_common(planned: list[Planned]) -> str:
    """The type of most weights of the layers."""
    weights: dict[str, int] = {}
    for tensor in planned:
        if len(tensor.shape) == 2 and tensor.source.startswith("layers."):
            weights[tensor.kind] = weights.get(tensor.kind, 0) + tensor.shape[0] * tensor.shape[1]
    return max(weights, key=lambda kind: weights[kind])


def model_name(artifact: Artifact, contents: Contents) -> str:
    """The option ``name``, else the last part of the model's origin."""
    if contents.options.name is not None:
        return contents.options.name
    source = artifact.manifest.get("source", {})
    origin = str(source.get("hub_id") or source.get("origin", ""))
    last = PurePath(origin.removeprefix("package:")).name.removesuffix(".gguf")
    return QUANTIZED_NAME.sub("", last) or contents.config.family


def file_name(artifact: Artifact, contents: Contents, kind: str) -> str:
    """File name in llama.cpp's convention: ``Name-Finetune-TYPE.gguf``."""
    import gguf

    return f"{gguf.naming_convention(model_name(artifact, contents), None, 'flatq', None, None, kind)}.gguf"


def describe(writer: Any, artifact: Artifact, contents: Contents, kind: str) -> None:
    """Write ``general.*``: name, size, license, provenance."""
    import gguf

    source = artifact.manifest.get("source", {})
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_name(artifact, contents))
    writer.add_finetune("flatq")
    writer.add_size_label(gguf.size_label(contents.config.parameters(), 0, 0, 0))
    if source.get("license"):
        writer.add_license(source["license"])
    writer.add_quantized_by(f"flatq {artifact.manifest.get('versions', {}).get('flatq', '')}".strip())
    writer.add_description(
        f"{contents.config.family} model compressed by flatq; written as architecture {contents.architecture.name}"
    )
    if hub_id := source.get("hub_id"):
        organization, _, name = hub_id.partition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{hub_id}")
    if kind not in ("F32", "F16", "BF16"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[kind])
    sample(writer, artifact.generation())


def context_length(contents: Contents) -> int:
    """Context length in the file; limited to the shortest sliding window, unless llama.cpp applies windows."""
    limit = contents.options.context_length or contents.config.max_positions
    if contents.architecture.graph.windows:
        return limit
    return min([limit, *(window for window in contents.config.windows() if window is not None)])


def dimension(writer: Any, contents: Contents) -> None:
    """Write the widths and switches of the architecture."""
    config, chosen = contents.config, contents.architecture
    layers, first = chosen.written.layers, chosen.written.layers[0]
    by_layer = chosen.graph.by_layer
    writer.add_vocab_size(config.vocab)
    writer.add_context_length(context_length(contents))
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(len(layers))
    each = first.d_ff // config.mlp_parts
    writer.add_feed_forward_length([dims.d_ff for dims in layers] if by_layer else each)
    writer.add_head_count([dims.heads for dims in layers] if by_layer else first.heads)
    writer.add_head_count_kv([dims.kv_heads for dims in layers] if by_layer else first.kv_heads)
    writer.add_key_length(first.d_qk)
    writer.add_value_length(first.d_v)
    writer.add_rope_dimension_count(first.d_qk)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.rope.scaling is not None and native_rope(config.rope):
        _add_scaling(writer, config.rope)
    if chosen.name == "mimo2":
        _add_mimo2_keys(writer, config)
    if chosen.graph.windows:
        _add_windows(writer, config, always=chosen.graph.always_windows)
    if config.experts:
        writer.add_expert_count(config.experts)
        writer.add_expert_used_count(config.experts_per_token)
        writer.add_expert_feed_forward_length(each)
    if config.attention_cap is not None:
        writer.add_attn_logit_softcapping(config.attention_cap)
    if config.logit_cap is not None:
        writer.add_final_logit_softcapping(config.logit_cap)


def _add_windows(writer: Any, config: DecoderConfig, *, always: bool) -> None:
    """Write the window, the layers that have it, and their rotary base."""
    windowed = next((kind for kind in config.kinds if kind.window is not None), None)
    if windowed is None and not always:
        return
    rope = config.rope if windowed is None or windowed.rope is None else windowed.rope
    pattern = [window is not None for window in config.windows()]
    if windowed is None:
        pattern[0] = True  # one layer must have a window
    writer.add_sliding_window(FULL_WINDOW if windowed is None else windowed.window)
    writer.add_sliding_window_pattern(pattern)
    writer.add_float32(f"{writer.arch}.rope.freq_base_swa", rope.theta)


def _add_scaling(writer: Any, rope: Rope) -> None:
    """Write the rule of the frequencies; llama.cpp's own factor of YaRN is cancelled, because the weights have it."""
    import gguf

    writer.add_rope_scaling_factor(rope.factor)
    if rope.scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_orig_ctx_len(rope.original_max_positions)
    writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    writer.add_rope_scaling_attn_factors(1 / (1 + 0.1 * math.log(max(rope.factor, 1.0))))


def _add_mimo2_keys(writer: Any, config: DecoderConfig) -> None:
    """Write keys that architecture mimo2 requires; they do not affect the result."""
    writer.add_expert_feed_forward_length(0)
    writer.add_sliding_window(FULL_WINDOW)
    writer.add_sliding_window_pattern([True] + [False] * (len(config.layers) - 1))
    writer.add_float32(f"{writer.arch}.rope.freq_base_swa", config.rope.theta)


def tokenize(writer: Any, vocabulary: Vocabulary | None) -> None:
    """Write ``tokenizer.*``; without a tokenizer ``no_vocab``, because llama.cpp requires the key."""
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for name, value in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    further = sorted(set(vocabulary.chat_templates) - {"default"})
    for name in further:
        writer.add_string(f"tokenizer.chat_template.{_plain(name)}", vocabulary.chat_templates[name])
    if further:  # gguf's own add_chat_template lists them in an order that differs from run to run
        writer.add_array("tokenizer.chat_templates", [_plain(name) for name in further])
    if "default" in vocabulary.chat_templates:
        writer.add_chat_template(vocabulary.chat_templates["default"])


def sample(writer: Any, generation: Mapping[str, Any]) -> None:
    """Write ``general.sampling.*``, llama.cpp's defaults for sampling, from ``generation_config.json``."""
    for key, name in SAMPLING.items():
        value = generation.get(key)
        if isinstance(value, int | float) and (generation.get("do_sample") is True or key == "repetition_penalty"):
            if key == "top_k":
                writer.add_int32(f"general.sampling.{name}", int(value))
            else:
                writer.add_float32(f"general.sampling.{name}", float(value))


def _plain(name: str) -> str:
    """A template's name as gguf's own writer spells it in a key."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)
