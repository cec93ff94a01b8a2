"""Additional files that onnxruntime-genai and optimum need: configuration and tokenizer.

Widths per layer are not needed in these files: both programs compute the shapes of the cache from heads and head size
and take everything else from the graph. Tokenizer, chat templates and generation settings are files of the model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flatq.export import (
    Artifact,
    DecoderConfig,
    ExportError,
    Rope,
    UnsupportedModel,
    chat_templates,
    config_to_hf,
    read_json,
    write_json,
)
from flatq_onnx.options import WEB_SUFFIXES, OnnxOptions

TOKENIZER = "tokenizer.json"
# Keys of generation_config.json that onnxruntime-genai has under the same name.
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "min_length")

GENAI_TYPES = (  # as of onnxruntime-genai 0.18; all of them are run in the same way
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text",
)  # fmt: skip


def write_companions(
    artifact: Artifact, out: Path, options: OnnxOptions, graph: list[Path]
) -> tuple[list[Path], list[str]]:
    """Write the files that ``options.target`` needs.

    Args:
        artifact: the model.
        out: folder of the export.
        options: of the export.
        graph: the files that were written: the graph, and its external data if it has any.

    Returns:
        Their paths, and notes about changes of copied files.
    """
    if options.target == "genai":
        path, content = out / "genai_config.json", genai_config(artifact, options)
    elif options.target == "optimum":
        path, content = out / "config.json", transformers_config(artifact)
    elif options.target == "web":
        path, content = out / "config.json", web_config(artifact, options, graph)
    else:
        return [], []
    write_json(path, content)
    copied, changes = artifact.copy_companions(out)
    if options.target == "web":
        changes += put_templates_inside(out)
    return [path, *copied], changes


def genai_config(artifact: Artifact, options: OnnxOptions) -> dict[str, Any]:
    """``genai_config.json``; sampling as in the model's ``generation_config.json``, greedy without one."""
    config, dims = artifact.config, artifact.config.layers[0]
    context = options.positions(config)
    names = {
        part: {f"{when}_{kind}_names": f"{stem}.%d.{kind}" for kind in ("key", "value")}
        for part, when, stem in (("inputs", "past", "past_key_values"), ("outputs", "present", "present"))
    }
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **_token_ids(artifact)}
    if ids["pad_token_id"] is None:
        ends = ids["eos_token_id"]
        ids["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return {
        "model": {
            "type": config.family if config.family in GENAI_TYPES else "llama",  # the graph has the rest
            **{name: value for name, value in ids.items() if value is not None},
            "context_length": context,
            "vocab_size": config.vocab,
            "decoder": {
                "filename": options.model_file,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": dims.d_qk,
                "hidden_size": config.d_model,
                "num_attention_heads": dims.heads,
                "num_key_value_heads": dims.kv_heads,
                "num_hidden_layers": len(config.layers),
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **names["inputs"]},
                "outputs": {"logits": "logits", **names["outputs"]},
            },
        },
        "search": {
            "do_sample": False,
            **{key: value for key in SEARCH if (value := artifact.generation().get(key)) is not None},
            "max_length": context,
            "past_present_share_buffer": True,
        },
        **({"speculative": speculation} if (speculation := _speculation(options)) else {}),
    }


def _speculation(options: OnnxOptions) -> dict[str, int]:
    chosen = {"ngram_size": options.ngram_size, "max_draft_tokens": options.max_draft_tokens}
    return {key: value for key, value in chosen.items() if value is not None}


def transformers_config(artifact: Artifact) -> dict[str, Any]:
    """``config.json`` for transformers 4; it can state only the largest width of the MLPs."""
    config = artifact.config
    first, widest = config.layers[0], max(layer.d_ff for layer in config.layers)
    dims = replace(first, d_v=first.d_qk, d_ff=widest)
    plain = DecoderConfig(
        "llama",
        config.d_model,
        config.vocab,
        config.layers,
        Rope(),
        config.norm_eps,
        config.tied_head,
        config.max_positions,
    )
    try:
        settings = config_to_hf(plain if config.experts else config, dims)
    except UnsupportedModel:  # optimum only takes widths from the file, which a llama has, too
        settings = config_to_hf(plain, dims)
    return {**settings, "torch_dtype": "float32", **_token_ids(artifact)}


def web_config(artifact: Artifact, options: OnnxOptions, graph: list[Path]) -> dict[str, Any]:
    """``config.json`` for transformers.js, which finds in it which file to load."""
    dtype = WEB_SUFFIXES[options.precision == "int4", options.activations].removeprefix("_") or "fp32"
    settings: dict[str, Any] = {"dtype": dtype}
    if options.activations == "fp16":
        settings["kv_cache_dtype"] = {dtype: "float16"}
    if len(graph) > 1:
        settings["use_external_data_format"] = {graph[0].name: 1}
    return {**transformers_config(artifact), "transformers.js_config": settings}


def put_templates_inside(out: Path) -> list[str]:
    """Copy chat templates from their files into ``tokenizer_config.json``, where transformers.js looks for them."""
    templates, path = chat_templates(out), out / "tokenizer_config.json"
    settings = read_json(path, dict[str, Any], "export the model again", error=ExportError) if path.exists() else {}
    if not templates or settings.get("chat_template"):
        return []
    named = [{"name": name, "template": template} for name, template in templates.items()]
    settings["chat_template"] = templates["default"] if list(templates) == ["default"] else named
    write_json(path, settings)
    return ["tokenizer_config.json: the chat templates are also in this file, because transformers.js reads no other"]


def _token_ids(artifact: Artifact) -> dict[str, Any]:
    return {name: value for name, value in artifact.settings.items() if name.endswith("_token_id")}
