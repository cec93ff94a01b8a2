"""Text comes piece by piece, whole characters only, and the same each time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flatq.errors import FlatqError, NumericsError, RecipeError
from flatq.export.generate import DecoderRunner, Stream, stream
from flatq.export.protocols import FloatArray, IntArray
from flatq.model.decoder import GrowingCache
from flatq.model.weights import load_decoder
from tests.conftest import flatq
from tests.models import RandomWeights, tiny_config

END = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids are bytes, so that most characters are several tokens; END is a special token."""
    plain = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # bytes that stand for themselves
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"<end>": END}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()


class Scripted:
    """A runner that always finds the next id of a script likeliest."""

    provider = "test"

    def __init__(self, script: list[int]) -> None:
        self.script, self.at, self.prompt, self.capacity = script, 0, list[int](), 0

    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        raise NotImplementedError

    def start(self, tokens: IntArray, capacity: int) -> FloatArray:
        self.at, self.prompt, self.capacity = 0, tokens[0].tolist(), capacity
        return self._next()

    def step(self, tokens: IntArray) -> FloatArray:
        assert tokens.tolist() == [self.script[self.at - 1]]
        return self._next()

    def close(self) -> None:
        pass

    def _next(self) -> FloatArray:
        self.at += 1
        return 9 * np.eye(257, dtype=np.float32)[[self.script[self.at - 1]]]


def say(text: str, prompt: str = "so", **options: Any) -> Stream:
    script = [*text.encode(), 256]
    options = {"new_tokens": len(script), "eos": {256}} | options
    return stream(Scripted(script), BYTES, prompt, **options)


def test_pieces_are_whole_characters() -> None:
    assert list(say("né 猫🙂")) == ["n", "é", " ", "猫", "🙂"]


@given(st.text(max_size=12), st.text(min_size=1, max_size=3))
def test_the_pieces_of_any_text_joined_are_the_text(text: str, prompt: str) -> None:
    text, prompt = (some.encode(errors="ignore").decode() for some in (text, prompt))
    assume(prompt)
    assert "".join(say(text, prompt)) == text


def test_a_prompt_that_ends_in_a_replacement_character_is_not_repeated() -> None:
    assert list(say("ab", "x\N{REPLACEMENT CHARACTER}")) == ["a", "b"]


def test_special_tokens_are_not_text() -> None:
    script = [*b"a", END, *b"b"]
    assert list(stream(Scripted(script), BYTES, "x", new_tokens=3, eos=set())) == ["a", "b"]


def test_a_tokenizer_that_cannot_decode_piece_by_piece_is_refused() -> None:
    class Slow:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1]}

    with pytest.raises(RecipeError, match=r"Slow does not decode piece by piece; .* tokenizer\.json"):
        stream(Scripted([1]), Slow(), "x", new_tokens=1, eos=set())


def test_an_unfinished_character_comes_at_the_end() -> None:
    assert list(say("a🙂", new_tokens=3)) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_the_result_is_there_after_the_last_piece() -> None:
    running = say("hello")
    next(running)
    with pytest.raises(FlatqError, match="exhaust the stream"):
        running.result  # noqa: B018
    list(running)
    assert running.result.text == "hello"
    assert running.result.tokens == (*b"hello", 256)
    assert running.result.prompt_tokens == 2
    assert running.result.stopped_by == "end"
    assert running.result.tokens_per_second is not None
    assert running.result.tokens_per_second > 0
    assert running.result.first_token_seconds > 0


@pytest.mark.parametrize("new_tokens", [0, 1, 4])
def test_it_stops_at_the_length(new_tokens: int) -> None:
    running = say("hello", new_tokens=new_tokens)
    assert "".join(running) == "hello"[:new_tokens]
    assert running.result.stopped_by == "length"
    assert (running.result.tokens_per_second is None) == (new_tokens < 2)


def test_a_chat_goes_through_the_template() -> None:
    tokenizer, runner = byte_tokenizer(), Scripted([256])
    with pytest.raises(RecipeError, match="no chat template"):
        stream(runner, tokenizer, "hi", new_tokens=1, eos={256}, chat=True)
    tokenizer.chat_template = "<{{ messages[0].role }}>{{ messages[0].content }}"
    list(stream(runner, tokenizer, "hi", new_tokens=1, eos={256}, chat=True))
    assert bytes(runner.prompt) == b"<user>hi"
    assert runner.capacity == len(runner.prompt) + 1


@pytest.mark.parametrize("options", [{"new_tokens": -1}, {"temperature": -0.1}])
def test_negative_numbers_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="neither may be negative"):
        say("x", **options)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RecipeError, match="the prompt is empty"):
        stream(Scripted([1]), BYTES, "", new_tokens=1, eos=set())


def test_logits_that_are_no_numbers_are_refused() -> None:
    runner = Scripted([1])
    runner._next = lambda: np.full((1, 257), math.nan, np.float32)  # type: ignore[method-assign]
    with pytest.raises(NumericsError):
        list(stream(runner, BYTES, "x", new_tokens=1, eos=set()))


def test_greedy_is_what_the_decoder_finds_likeliest() -> None:
    weights = RandomWeights(tiny_config(vocab=257, tied_head=False))
    running = stream(DecoderRunner(weights), BYTES, "start", new_tokens=6, eos=set())
    list(running)
    decoder, ids = load_decoder(weights), list(b"start")
    for _ in range(6):
        ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
    assert running.result.tokens == tuple(ids[5:])


def test_the_same_seed_draws_the_same_text_and_another_another() -> None:
    runner = DecoderRunner(RandomWeights(tiny_config(vocab=257, tied_head=False)))

    def drawn(seed: int, temperature: float = 1.5) -> tuple[int, ...]:
        running = stream(runner, BYTES, "x", new_tokens=12, temperature=temperature, seed=seed, eos=set())
        list(running)
        return running.result.tokens

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, 1e-6) == drawn(2, 0.0)  # the cold limit is greedy


def test_draws_follow_the_softmax() -> None:
    runner = Scripted([65] * 2000)
    runner._next = lambda: np.log(np.array([[1, 3, 4]], np.float32))  # type: ignore[method-assign]
    runner.step = lambda tokens: runner._next()  # type: ignore[method-assign]
    running = stream(runner, BYTES, "x", new_tokens=2000, temperature=1.0, eos=set())
    list(running)
    assert np.bincount(running.result.tokens) / 2000 == pytest.approx([1 / 8, 3 / 8, 4 / 8], abs=0.03)


def test_the_decoder_as_a_runner_follows_the_protocol() -> None:
    weights = RandomWeights(tiny_config())
    runner = DecoderRunner(weights)
    tokens = np.arange(2 * 7).reshape(2, 7)
    whole = runner.logits(tokens)
    assert runner.start(tokens[:, :4], 7) == pytest.approx(whole[:, 3], abs=1e-4)
    for position in (4, 5, 6):
        assert runner.step(tokens[:, position]) == pytest.approx(whole[:, position], abs=1e-4)
    assert runner.start(tokens[:, :1], 7) == pytest.approx(whole[:, 0], abs=1e-4)
    valid = np.array([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    alone = load_decoder(weights)(torch.from_numpy(tokens[1:, 2:]), cache=GrowingCache()).numpy()
    assert runner.logits(tokens, valid)[1, 2:] == pytest.approx(alone[0], abs=1e-4)
    runner.close()


def test_a_terminal_without_utf8_gets_text(exported_run: tuple[Path, Path]) -> None:
    plain = {"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [
        "-m",
        "flatq",
        "generate",
        exported_run[1],
        "--new-tokens",
        "30",
        "--prompt",
        "h\u00f6r \u65e5\u672c".encode(),
    ]
    ran = subprocess.run([sys.executable, *words], capture_output=True, env={**os.environ, **plain}, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.decode("ascii").strip(), "the model writes other characters, too"
    assert b"?" in ran.stdout
    assert b"Traceback" not in ran.stderr


def test_a_prompt_of_other_bytes_is_refused(exported_run: tuple[Path, Path]) -> None:
    shown = flatq("generate", exported_run[1], "--prompt", "h\udcf6r")
    assert shown.exit_code == 2
    assert "the prompt is no UTF-8 text" in shown.stderr
