"""Detection of llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer.

The pre-tokenizers are built into llama.cpp and selected by name. A wrong name gives other tokens and slightly worse
text, which is hard to notice, so only certain matches are used. Two methods, tried in this order:

- llama.cpp's: its converter tokenizes a fixed text, which contains every kind of character that pre-tokenizers treat
  differently, and looks up the hash of the token ids. That needs an entry for every vocabulary; the table has those of
  the supported families.
- By definition: ``tokenizer.json`` contains the steps of the pre-tokenizer, which are recognized independent of the
  vocabulary, regular expressions by their hash.

Source: text, hashes and names are data of llama.cpp's ``convert_hf_to_gguf`` (MIT), which every converter must share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f "
    "(multiple emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 "
    "3...3 \u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785\U0001f601 "
    "?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= "
    "\u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)
# First 16 digits of SHA-256 of the printed list of token ids of that text.
VOCABULARIES = {
    "0ef9807a4087ebef": "llama-bpe",
    "c136ed14d01c2745": "smaug-bpe",
    "f6791d196f87ce6b": "midm-2.0",
    "9d032fcbd5501f4a": "falcon3",
    "63b97e4253352e6f": "tekken",
    "0e9433cbbb161f89": "pixtral",
    "d4540891389ea895": "qwen2",
    "e636dc30a262dcc0": "qwen2",
    "b3f499bb4255f8ca": "deepseek-r1-qwen",
    "862f827721df9560": "f2llmv2",
    "b0a6b1c0bd5998eb": "a.x-4.0",
    "d4c8f286ea6b520b": "megrez",
    "855059429035d75a": "smollm",
    "1431a23e583c9743": "minerva-7b",
    "049ecf7629871e30": "deepseek-llm",
    "347715f544604f91": "deepseek-coder",
    "d5f1dd6f980fec56": "seed-coder",
    "7fc505bd3104ca10": "viking",
    "a1e163ecab2e718a": "mellum",
    "3ce83efda5659b07": "gpt-2",
}
# First 16 digits of SHA-256 of a Split step's regular expression, and ``ignore_merges``.
EXPRESSIONS = {
    ("d98f9631be1e9607", True): "llama-bpe",
    ("d98f9631be1e9607", False): "smaug-bpe",
    ("1ff7f41064896984", False): "qwen2",
    ("1d64a9a8eaf9f1bd", True): "tekken",
}


def name_of(described: Mapping[str, Any]) -> str | None:
    """The name of the pre-tokenizer, or None if it is not recognized.

    Args:
        described: a parsed ``tokenizer.json``.
    """
    return by_vocabulary(described) or by_rule(described)


def by_vocabulary(described: Mapping[str, Any]) -> str | None:
    """llama.cpp's method: the hash of the token ids of a fixed text."""
    numbers = Tokenizer.from_str(json.dumps(described)).encode(CHECK_TEXT).ids
    return VOCABULARIES.get(digits(str(numbers)))


def by_rule(described: Mapping[str, Any]) -> str | None:
    """By the steps of the pre-tokenizer."""
    steps = steps_of(described.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    whole = bool(described["model"].get("ignore_merges"))
    if any(step.get("add_prefix_space") for step in steps):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return None if whole else "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return None if whole else "smollm"
    plain = kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True)
    if plain and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
        return EXPRESSIONS.get((digits(steps[0].get("pattern", {}).get("Regex", "")), whole))
    return None


def known_names() -> list[str]:
    """All names that can be recognized, in alphabetical order."""
    return sorted({*VOCABULARIES.values(), *EXPRESSIONS.values()})


def digits(text: str) -> str:
    """First 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def steps_of(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A pre-tokenizer's steps, with nested sequences flattened."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part["pretokenizers"] for step in steps_of(inner)]
    return [part]
