"""Additional files that onnxruntime-genai and optimum need: configuration and tokenizer.

Widths per layer are not needed in these files: both programs compute the shapes of the cache from heads and head size
and take everything else from the graph. optimum needs transformers 4, which has an older format of tokenizer settings
than the artifact, which is written by transformers 5.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from flatq.export import Artifact, config_to_hf, write_json
from flatq_onnx.contract import MODEL
from flatq_onnx.options import OnnxOptions

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
NEW_KEYS = ("backend", "is_local", "local_files_only")  # of transformers 5


def write_companions(artifact: Artifact, out: Path, options: OnnxOptions) -> list[Path]:
    """Write the files that ``options.target`` needs; returns their paths."""
    if options.target == "genai":
        write_json(out / "genai_config.json", genai_config(artifact, options))
        return [out / "genai_config.json", *_tokenizer(artifact, out)]
    if options.target == "optimum":
        write_json(out / "config.json", transformers_config(artifact))
        return [out / "config.json", *_tokenizer(artifact, out)]
    return []


def genai_config(artifact: Artifact, options: OnnxOptions) -> dict[str, Any]:
    """``genai_config.json``; greedy by default."""
    config, dims = artifact.config, artifact.config.layers[0]
    context = options.context_length or config.max_positions
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
            "type": config.family,
            **{name: value for name, value in ids.items() if value is not None},
            "context_length": context,
            "vocab_size": config.vocab,
            "decoder": {
                "filename": MODEL,
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
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": True},
    }


def transformers_config(artifact: Artifact) -> dict[str, Any]:
    """``config.json`` for transformers 4; it can state only the largest width of the MLPs.

    Raises:
        UnsupportedModel: the family's configuration cannot describe the model.
    """
    config = artifact.config
    first, widest = config.layers[0], max(layer.d_ff for layer in config.layers)
    settings = config_to_hf(config, replace(first, d_v=first.d_qk, d_ff=widest))
    return {**settings, "torch_dtype": "float32", **_token_ids(artifact)}


def _token_ids(artifact: Artifact) -> dict[str, Any]:
    return {name: value for name, value in artifact.settings.items() if name.endswith("_token_id")}


def _tokenizer(artifact: Artifact, out: Path) -> list[Path]:
    """Copy the artifact's tokenizer, if any, with settings in the format of transformers 4."""
    root, written = artifact.root, list[Path]()
    for name in (TOKENIZER, TEMPLATE):
        if (root / name).exists():
            written.append(Path(shutil.copyfile(root / name, out / name)))
    if (root / "tokenizer_config.json").exists():
        settings = json.loads((root / "tokenizer_config.json").read_text())
        settings = {name: value for name, value in settings.items() if name not in NEW_KEYS}
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path = out / "tokenizer_config.json"
        write_json(path, {**settings, "padding_side": "left"})
        written.append(path)
    return written
