"""Forty plain questions with one answer each: does a compressed model still know what the dense one knows?

Asked through the chat template, answered greedily with at most ``NEW_TOKENS`` ids, and judged by whether one of the
accepted words or numbers stands in the answer as a word of its own (before the answer says something else of that kind
is not judged). Perplexity averages over all tokens; these questions ask for the one token that carries the fact.

Left out: anything that needs judgement, more than one step, or knowledge of a date.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from flatq.calibration.self_text import FixedCache
from flatq.model.weights import Weights, load_decoder

NEW_TOKENS = 24
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What is the capital of France?", ("Paris",)),
    ("What is the capital of Italy?", ("Rome",)),
    ("What is the capital of Japan?", ("Tokyo",)),
    ("What is the capital of Germany?", ("Berlin",)),
    ("What is the capital of Spain?", ("Madrid",)),
    ("What is the capital of England?", ("London",)),
    ("What is the capital of Russia?", ("Moscow",)),
    ("What is the capital of Egypt?", ("Cairo",)),
    ("What is the capital of China?", ("Beijing",)),
    ("What is the capital of Canada?", ("Ottawa",)),
    ("What is 2+2?", ("4", "four")),
    ("What is 3+5?", ("8", "eight")),
    ("What is 10-3?", ("7", "seven")),
    ("What is 6 times 2?", ("12", "twelve")),
    ("What is 5+5?", ("10", "ten")),
    ("What is 20 divided by 4?", ("5", "five")),
    ("What is 9-4?", ("5", "five")),
    ("What is 7+1?", ("8", "eight")),
    ("What is the opposite of hot?", ("cold", "cool")),
    ("What is the opposite of up?", ("down",)),
    ("What is the opposite of big?", ("small", "little", "tiny")),
    ("What is the opposite of day?", ("night",)),
    ("What is the opposite of left?", ("right",)),
    ("What is the opposite of happy?", ("sad", "unhappy", "sadness", "unhappiness")),
    ("What is the opposite of open?", ("closed", "close", "shut")),
    ("What is the opposite of fast?", ("slow",)),
    ("How many days are there in a week?", ("7", "seven")),
    ("How many months are there in a year?", ("12", "twelve")),
    ("How many legs does a dog have?", ("4", "four")),
    ("How many hours are there in a day?", ("24",)),
    ("How many minutes are there in an hour?", ("60", "sixty")),
    ("How many sides does a triangle have?", ("3", "three")),
    ("What color is the sky on a clear day?", ("blue",)),
    ("What color is grass?", ("green",)),
    ("What color is a banana?", ("yellow",)),
    ("What is the largest planet in the solar system?", ("Jupiter",)),
    ("Who wrote Romeo and Juliet?", ("Shakespeare",)),
    ("What is the chemical formula of water?", ("H2O",)),
    ("Which animal makes honey?", ("bee", "bees", "honeybee", "honeybees")),
    ("What language is spoken in Brazil?", ("Portuguese",)),
)


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """Whether one of the accepted words stands in the answer, in whatever case."""
    return any(re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in accepted)


@torch.inference_mode()
def answers(weights: Weights, tokenizer: Any, ends: frozenset[int]) -> list[str]:
    """The model's greedy answer to each question, computed side by side.

    Args:
        weights: a source or an artifact; all of it is read into memory.
        tokenizer: with a chat template.
        ends: ids that end an answer.
    """
    asked = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        )["input_ids"]
        for question, _ in QUESTIONS
    ]
    decoder = load_decoder(weights)
    rows, lengths = [list(ids) for ids in asked], [len(ids) for ids in asked]
    cache = FixedCache(decoder.config, len(rows), max(lengths) + NEW_TOKENS)
    while cache.past < max(lengths) + NEW_TOKENS - 1:
        # What all rows have is read at once; from then on a position at a time, prescribed or chosen.
        until = min(map(len, rows))
        hidden = decoder.hidden(torch.tensor([row[cache.past : until] for row in rows]), cache=cache, past=cache.past)
        cache.past = until
        chosen = decoder.logits(hidden[:, -1]).argmax(-1).tolist()
        for row, token in zip(rows, chosen, strict=True):
            if len(row) == until:
                row.append(token)
    written = [row[length : length + NEW_TOKENS] for row, length in zip(rows, lengths, strict=True)]
    return [tokenizer.decode(_until(ids, ends)) for ids in written]


def _until(ids: Sequence[int], ends: frozenset[int]) -> list[int]:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:stop])


def right(weights: Weights, tokenizer: Any, ends: frozenset[int]) -> int:
    """How many of ``QUESTIONS`` the model answers rightly."""
    found = answers(weights, tokenizer, ends)
    return sum(is_right(answer, accepted) for answer, (_, accepted) in zip(found, QUESTIONS, strict=True))
