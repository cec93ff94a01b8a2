"""Measures what works for each family: the numbers of ``docs/families.md``.

Every model is tiny and random, with random biases and gains of norms. It is read by flatq, run at keep_ratio 1.0 and
exported in every format without rounding; every number is the largest difference of a logit from transformers' own.
Then it is narrowed and quantized to 4 bits and exported with its codes, and compared with the artifact, for nobody else
has that model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flatq.artifact import Artifact
from flatq.errors import FlatqError
from flatq.export.protocols import FloatArray, exporter_named
from flatq.model.dims import LINEARS
from flatq.model.weights import load_decoder
from flatq.pipeline.run import run
from flatq.recipe.grammar import Recipe
from flatq.sources.source import open_model
from tests.exporters.conftest import reference_logits, some_tokens
from tests.parity.test_decoder_parity import CASES, LONGROPE, tiny

# Row of the table -> case of the parity tests.
MODELS: Mapping[str, str] = {
    "llama": "llama-gqa",
    "llama, llama3 rope": "llama-rope-llama3",
    "llama, yarn": "llama-yarn",
    "mistral": "mistral-window",
    "ministral": "ministral",
    "ministral3": "ministral3",
    "qwen2": "qwen2",
    "qwen2, yarn": "qwen2-yarn",
    "qwen3": "qwen3",
    "qwen3, yarn": "qwen3-yarn",
    "phi3": "phi3-window",
    "phi3, longrope, partial": "phi3-partial-longrope",
    "granite": "granite-tied-biases",
    "glm": "glm",
    "glm4": "glm4",
    "ernie4_5": "ernie4_5",
    "helium": "helium",
    "internlm3": "internlm3",
    "seed_oss": "seed_oss",
    "hunyuan_v1_dense": "hunyuan-alpha",
    "smollm3": "smollm3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "qwen3_moe": "qwen3_moe",
    "mixtral": "mixtral",
}
WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 320,
}
# llama.cpp does not apply the windows of these, so a file's context ends there.
WINDOW = {"sliding_window": 32}
MORE: Mapping[str, dict[str, Any]] = {
    "mistral-window": WINDOW,
    "ministral": WINDOW,
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "phi3-window": WINDOW,
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64},
    "phi3-partial-longrope": {
        "rope_parameters": {
            **LONGROPE,
            "partial_rotary_factor": 0.5,
            "short_factor": [1 + 0.1 * pair for pair in range(8)],
            "long_factor": [2.0 + pair for pair in range(8)],
        }
    },
}
# Column -> options. The first set is exact, of a dense model; the second carries the codes of a quantized one.
EXACT: Mapping[str, dict[str, Any]] = {
    "onnx reduced": {"onnx": {"precision": "fp32"}},
    "onnx gqa": {"onnx": {"precision": "fp32", "attention": "gqa"}},
    "onnx genai": {"onnx": {"precision": "fp32", "target": "genai"}},
    "onnx optimum": {"onnx": {"precision": "fp32", "target": "optimum"}},
    "onnx web": {"onnx": {"precision": "fp32", "target": "web"}},
    "gguf auto": {"gguf": {"precision": "f32"}},
    "gguf deci": {"gguf": {"precision": "f32", "layout": "deci"}},
    "gguf compact": {"gguf": {"precision": "f32", "layout": "compact"}},
    "safetensors fp32": {"safetensors": {"format": "fp32"}},
}
CODES: Mapping[str, dict[str, Any]] = {
    "onnx reduced int4": {"onnx": {"precision": "int4"}},
    "onnx gqa int4": {"onnx": {"precision": "int4", "attention": "gqa"}},
    "gguf codes": {"gguf": {"otherwise": "f32"}},
    "safetensors compressed-tensors": {"safetensors": {"format": "compressed-tensors", "dtype": "fp32"}},
    "safetensors gptq": {"safetensors": {"format": "gptq", "dtype": "fp32"}},
    "safetensors gptq_v2": {"safetensors": {"format": "gptq_v2", "dtype": "fp32"}},
}
NARROWED = {"flat": {"keep_ratio": 0.8, "uniform": True, "values": "whole", "width_multiple": 32}}
QUANTIZED = {"gptq": {"bits": 4, "group_size": 32}}
COLUMNS = ("parity", "full rank", *EXACT, "flat", "gptq", *CODES)
LENGTH = 24
TEXT = "the bright bird sings over the slow river; a stone walks under the light of words. "
Cell = float | str  # largest difference, or why not


def measured(name: str, folder: Path, tokenizer: Path) -> dict[str, Cell]:
    """One row of the table.

    Args:
        name: of ``MODELS``.
        folder: for models and exports; its parts are removed as soon as they are not needed.
        tokenizer: folder with the files of a tokenizer for 320 tokens.
    """
    case = MODELS[name]
    theirs = tiny(case, **WIDTHS, **MORE.get(case, {}))
    theirs.save_pretrained(folder / "model")  # which makes the folder
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special")):
            shutil.copy(file, folder / "model")
    source = open_model(str(folder / "model"))
    source.validate()
    tokens = some_tokens(source.config, 2, LENGTH)
    with torch.no_grad():
        expected: FloatArray = theirs(torch.from_numpy(tokens)).logits.numpy()
        found: dict[str, Cell] = {"parity": _largest(load_decoder(source)(torch.from_numpy(tokens)).numpy(), expected)}
    whole = _artifact(folder, "whole", [{"flat": {"keep_ratio": 1.0}}])
    found["full rank"] = _largest(reference_logits(whole, tokens), expected)
    found |= {column: _exported(whole, options, folder, tokens, expected) for column, options in EXACT.items()}
    small = _artifact(folder, "small", [NARROWED, QUANTIZED])
    answer = reference_logits(small, tokens)
    narrowed = small.config.decoder_parameters() < whole.config.decoder_parameters()
    found["flat"] = "yes" if narrowed else "nothing was narrowed"
    found["gptq"] = "yes" if len(small.grids) == len(LINEARS) * len(small.config.layers) else "not all is quantized"
    found |= {column: _exported(small, options, folder, tokens, answer) for column, options in CODES.items()}
    shutil.rmtree(folder)
    return found


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer with at most 320 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def _artifact(folder: Path, name: str, stages: list[dict[str, Any]]) -> Artifact:
    text = folder / "text.txt"
    text.write_text(TEXT * 400)
    recipe = {
        "version": 1,
        "model": str(folder / "model"),
        "calibration": {"dataset": "text", "path": str(text), "samples": 8, "seq_len": 24, "precision": "float32"},
        "evaluation": {"tokens": 96, "seq_len": 24},
        "stages": stages,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run(Recipe.load(path), folder / name)
    return Artifact.open(folder / name / "artifact")


def _exported(
    artifact: Artifact, entry: dict[str, Any], folder: Path, tokens: NDArray[np.int64], expected: FloatArray
) -> Cell:
    ((kind, wanted),) = entry.items()
    exporter = exporter_named(kind)
    options = exporter.Options(**wanted)
    if problems := exporter.check(artifact.config, artifact.grids, options):
        return problems[0]
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    try:
        exported = exporter.write(artifact, out, options)
        runner = exporter.open(exported.root, options, provider="cpu", threads=1, exact=True)
    except FlatqError as refused:
        return str(refused).replace(str(out), "FOLDER")
    assert runner is not None
    with closing(runner):
        return _largest(runner.logits(tokens), expected)


def _largest(found: FloatArray, expected: FloatArray) -> float:
    return float(np.abs(found - expected).max())


assert set(MODELS.values()) <= set(CASES)
