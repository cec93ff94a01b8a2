"""Streaming text generation with a ``Runner``, and a runner for artifacts.

Tokens cannot be decoded one by one: a byte-level tokenizer may need three tokens for one character, and many drop a
leading space at the start of a sequence. ``tokenizers.decoders.DecodeStream`` handles both; an incomplete character at
the end becomes the replacement character.

Sampling supports only temperature. Left out: top-k, top-p and penalties.

Axes: b batch, s prompt positions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from flatq.chats import TemplateRefuses, written_out
from flatq.errors import FlatqError, NumericsError, RecipeError
from flatq.export.protocols import FloatArray, IntArray, Runner, require_positions
from flatq.model.decoder import Decoder, GrowingCache
from flatq.model.weights import Weights, load_decoder

log = logging.getLogger(__name__)
Choose = Callable[[FloatArray], int]
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8  # last ids of the prompt, as context for decoding the first piece


@dataclass(frozen=True, slots=True)
class Generation:
    """Result of a finished stream.

    Attributes:
        text: all pieces.
        tokens: generated ids, including the end token, if any.
        prompt_tokens: length of the prompt.
        first_token_seconds: from the start of the prompt to the first id.
        tokens_per_second: speed of the ids after the first; None when there is at most one.
        stopped_by: ``end`` (an end token) or ``length``.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    first_token_seconds: float
    tokens_per_second: float | None
    stopped_by: str


class Detokenizer:
    """Incremental decoding of tokens to text; an incomplete character is held back until it is complete."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer, context = _backend(tokenizer), prompt[-CONTEXT:]
        if self._tokenizer.decode(context).endswith(UNFINISHED):  # else the first piece would repeat the prompt's end
            context = []
        self._decoder, self._held = DecodeStream(ids=context, skip_special_tokens=True), list[int]()

    def push(self, token: int) -> str:
        """The text that is complete with this token, possibly empty."""
        self._held.append(token)
        piece = self._decoder.step(self._tokenizer, token)
        if piece:
            self._held.clear()
        return piece or ""

    def flush(self) -> str:
        """The text that was held back, at the end."""
        return str(self._tokenizer.decode(self._held, skip_special_tokens=True))


class Stream(Iterator[str]):
    """Iterator over pieces of text; ``result`` is available after the last piece."""

    def __init__(
        self, runner: Runner, tokenizer: Any, prompt: list[int], new_tokens: int, choose: Choose, eos: set[int]
    ) -> None:
        self._runner, self._prompt, self._new_tokens = runner, prompt, new_tokens
        self._choose, self._eos = choose, eos
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._pieces = self._run()
        self._result: Generation | None = None

    def __next__(self) -> str:
        """The next piece."""
        return next(self._pieces)

    @property
    def result(self) -> Generation:
        """The whole generation.

        Raises:
            FlatqError: the stream is not finished.
        """
        if self._result is None:
            raise FlatqError("the stream's result is available only after its last piece; exhaust the stream first")
        return self._result

    def _run(self) -> Iterator[str]:
        text, generated, stopped_by = "", list[int](), "length"
        first = last = began = time.perf_counter()
        while len(generated) < self._new_tokens:
            token = self._choose(self._logits(generated)[0])
            generated.append(token)
            last = time.perf_counter()
            first = last if len(generated) == 1 else first
            if token in self._eos:
                stopped_by = "end"
                break
            if piece := self._detokenizer.push(token):
                text += piece
                yield piece
        if piece := self._detokenizer.flush():
            text += piece
            yield piece
        speed = (len(generated) - 1) / (last - first) if len(generated) > 1 else None
        self._result = Generation(text, tuple(generated), len(self._prompt), first - began, speed, stopped_by)
        log.info("generated %d tokens%s", len(generated), f", {speed:.1f} tokens/s" if speed else "")

    def _logits(self, generated: list[int]) -> FloatArray:
        if generated:
            return self._runner.step(np.array(generated[-1:], dtype=np.int64))
        return self._runner.start(np.array([self._prompt], dtype=np.int64), len(self._prompt) + self._new_tokens)


def stream(
    runner: Runner,
    tokenizer: Any,
    prompt: str,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos: set[int],
    chat: bool = False,
    vocab: int | None = None,
) -> Stream:
    """Continue a prompt; pieces are computed lazily.

    Args:
        runner: the open model.
        tokenizer: a transformers tokenizer with a ``tokenizers`` backend.
        prompt: text to continue, or to answer with ``chat``.
        new_tokens: maximum number of ids to generate, 0 or more.
        temperature: 0 is greedy; otherwise ids are sampled from ``softmax(logits / temperature)``.
        seed: of the sampling; the same seed gives the same text.
        eos: ids that end the text; they are not part of it.
        chat: format the prompt as a user message with the tokenizer's chat template.
        vocab: rows of the embedding; a prompt with a token beyond them is an error.

    Raises:
        RecipeError: the prompt has no tokens or one without an embedding, there is no chat template, or a
            number is out of range.
    """
    if new_tokens < 0 or temperature < 0:
        raise RecipeError(
            f"generate: new_tokens is {new_tokens} and temperature {temperature}; neither may be negative"
        )
    ids = prompt_ids(tokenizer, _unicode(prompt), chat=chat)
    if vocab is not None and max(ids) >= vocab:
        raise RecipeError(
            f"the prompt holds the token {tokenizer.convert_ids_to_tokens(max(ids))!r} (id {max(ids)}), and "
            f"the model's embedding has {vocab} rows; leave it out"
        )
    choose = _chooser(temperature, np.random.default_rng(seed))

    return Stream(runner, tokenizer, ids, new_tokens, choose, eos)


def _unicode(prompt: str) -> str:
    """A prompt from the command line of a system whose locale is not UTF-8, where Python keeps bytes as surrogates.

    Raises:
        RecipeError: the bytes are no UTF-8.
    """
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as wrong:
        raise RecipeError(f"the prompt is no UTF-8 text ({wrong}); use a terminal with a UTF-8 locale") from wrong


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """Ids of a prompt, with the special tokens that the tokenizer adds.

    Raises:
        RecipeError: there are no ids, or no chat template.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise RecipeError("--chat: this model's tokenizer has no chat template; leave --chat out to continue text")
        try:
            (prompt,) = written_out(tokenizer, [[{"role": "user", "content": prompt}]], add_generation_prompt=True)
        except TemplateRefuses as refused:
            raise RecipeError(f"--chat: the model's chat template refuses the prompt ({refused})") from refused
    ids: list[int] = list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])
    if not ids:
        raise RecipeError("the prompt is empty and this tokenizer puts no token before a text; give at least one word")
    return ids


def _backend(tokenizer: Any) -> Tokenizer:
    """The ``tokenizers`` backend of a transformers tokenizer, which supports incremental decoding.

    Raises:
        RecipeError: it has none (a tokenizer written in Python).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise RecipeError(
            f"generate: {type(tokenizer).__name__} does not decode piece by piece; use a model whose folder has a "
            "tokenizer.json"
        )
    return backend


def _chooser(temperature: float, random: np.random.Generator) -> Choose:
    def choose(logits: FloatArray) -> int:
        if not np.isfinite(logits).all():
            raise NumericsError("generate: the runtime returned logits that are not finite; verify the export first")
        if temperature == 0:
            return int(logits.argmax())
        # Gumbel-max trick: the argmax of logits plus Gumbel noise is a sample from their softmax.
        return int((logits.astype(np.float64) / temperature + random.gumbel(size=logits.shape)).argmax())

    return choose


class DecoderRunner:
    """flatq's decoder as a ``Runner``, for artifacts without an export."""

    def __init__(self, weights: Weights, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._decoder: Decoder = load_decoder(weights, dtype=dtype, device=device)
        self._device = device
        self._cache = GrowingCache()

    @property
    def provider(self) -> str:
        """The device, as ``torch:cpu``."""
        return f"torch:{self._device}"

    @torch.inference_mode()
    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        """See ``Runner.logits``."""
        self._allow(tokens.shape[1])
        seen = None if valid is None else torch.from_numpy(valid).to(self._device)
        return self._host(self._decoder(torch.from_numpy(tokens).to(self._device), valid=seen))

    @torch.inference_mode()
    def start(self, tokens: IntArray, capacity: int) -> FloatArray:
        """See ``Runner.start``; the cache grows, ``capacity`` is only compared with the model's limit."""
        self._allow(capacity)
        self._cache = GrowingCache()
        return self._extend(torch.from_numpy(tokens))

    @torch.inference_mode()
    def step(self, tokens: IntArray) -> FloatArray:
        """See ``Runner.step``."""
        return self._extend(torch.from_numpy(tokens)[:, None])

    def close(self) -> None:
        """Release the cache."""
        self._cache = GrowingCache()

    def _allow(self, positions: int) -> None:
        require_positions("the model", positions, self._decoder.config.max_positions)

    def _extend(self, tokens: torch.Tensor) -> FloatArray:
        hidden = self._decoder.hidden(tokens.to(self._device), cache=self._cache, past=self._cache.length())
        return self._host(self._decoder.logits(hidden[:, -1]))

    @staticmethod
    def _host(logits: torch.Tensor) -> FloatArray:
        array: FloatArray = logits.float().cpu().numpy()
        return array
