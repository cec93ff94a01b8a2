"""The tokenizer inside a GGUF file, with the pre-tokenizer of llama.cpp.

A GGUF file holds the vocabulary and the merges, but only the name of the pre-tokenizer, which is built into llama.cpp.
transformers knows some of these names and silently uses the pre-tokenizer of GPT-2 for all others, which gives other
tokens. So a name that is not known here raises an error.

Left out: names whose regular expressions transformers does not have.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf

from flatq.errors import ArtifactError, UnsupportedModel

# Split digits, then use the pre-tokenizer of GPT-2.
DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
AS_GPT2 = {"gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion", "granite-docling"}
# Names with the same expression as another.
SAME = {"glm4": "dbrx", "chatglm-bpe": "dbrx"}
# ignore_merges: a word in the vocabulary is one token; bos is added unless the file disables it.
# Architectures that transformers does not read; their tokenizers are read from a file of architecture llama.
UNKNOWN_TO_TRANSFORMERS = {"deci", "hunyuan-dense", "granite", "glm4"}
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}


def read_tokenizer(path: Path, model: str | None, pre: str | None) -> Any:
    """The file's ``PreTrainedTokenizerFast``.

    Args:
        path: the file.
        model: its ``tokenizer.ggml.model``; only ``gpt2`` (byte-level BPE) has named pre-tokenizers.
        pre: its ``tokenizer.ggml.pre``.

    Raises:
        UnsupportedModel: the name of the pre-tokenizer is missing or not known.
        ArtifactError: the tokenizer is damaged.
    """
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if model == "gpt2" and pre not in (
        supported := DIGITS_FIRST | AS_GPT2 | set(SAME) | set(GGUF_PRE_TOKENIZER_SPLITS)
    ):
        known = ", ".join(sorted(supported))
        raise UnsupportedModel(
            f"{path}: tokenizer.ggml.pre {pre!r} is not a supported pre-tokenizer; supported: {known}. "
            "Use the Hugging Face folder of this model"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="flatq-tokenizer-") as folder:
            file = _readable(path, Path(folder))
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as damaged:  # the libraries raise various exceptions
        raise ArtifactError(
            f"{path}: its tokenizer cannot be read ({type(damaged).__name__}: {str(damaged)[:200]}); download it again"
        ) from damaged
    bare = tokenizer.backend_tokenizer
    if pre in DIGITS_FIRST:
        bare.pre_tokenizer = Sequence([Digits(individual_digits=True), bare.pre_tokenizer])
    if pre in WHOLE_WORDS:
        bare.model.ignore_merges = True
    return tokenizer


def _readable(path: Path, folder: Path) -> Path:
    """The file, or one in ``folder`` with its tokenizer only, of an architecture that transformers reads."""
    fields = gguf.GGUFReader(path).fields
    if fields["general.architecture"].contents() not in UNKNOWN_TO_TRANSFORMERS:
        return path
    copy = folder / path.name
    with closing(gguf.GGUFWriter(copy, "llama")) as writer:
        for key, field in fields.items():
            if key.startswith("tokenizer."):
                value = field.contents()
                value = SAME.get(value, value) if key == "tokenizer.ggml.pre" else value
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, value, field.types[0], sub_type=inner)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    return copy
