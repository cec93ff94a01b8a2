"""Adapter from any ``Runner`` (torch, ONNX Runtime, llama.cpp, transformers) to the model interface of lm-eval.

Tokenization follows lm-eval's class for Hugging Face models, so that numbers can be compared with published ones: no
begin token before a text that has a context, and the begin or end token as the context of a text that has none.

Requests are sorted by length and padded on the right, which does not affect a causal model. Requests with the same
input (the letters of a multiple-choice question) are computed once. The same requests always give the same batches.

Only this module imports lm-eval.

Axes: b rows, s positions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flatq.calibration.tokens import opening_ids
from flatq.errors import RecipeError
from flatq.export.generate import Detokenizer
from flatq.export.protocols import FloatArray, IntArray, Runner

ROWS = 16
LOGITS_AT_ONCE = 1 << 26  # 256 MiB of float32
NEW_TOKENS = 256  # lm-eval's default
Scored = tuple[float, bool]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Satisfies ``lm_eval.api.model.LM``.

    Args:
        runner: the open model.
        tokenizer: a transformers tokenizer.
        vocab: size of the vocabulary.
        context: maximum number of positions; longer texts are truncated on the left.
        prefix: token that is inserted before a text without a context.
        ends: tokens that end a generated text.
    """

    def __init__(
        self, runner: Runner, tokenizer: Any, *, vocab: int, context: int, prefix: int, ends: frozenset[int]
    ) -> None:
        super().__init__()
        self.tokenizer, self._opening = tokenizer, opening_ids(tokenizer)
        self._runner, self._vocab, self._context, self._prefix, self._ends = runner, vocab, context, prefix, ends

    @property
    def eot_token_id(self) -> int:
        """Token that lm-eval inserts before a text without a context."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, by default with the tokens before it that the tokenizer begins every text with."""
        ids = list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
        begun = add_special_tokens is False or ids[: len(self._opening)] == self._opening
        return ids if begun else [*self._opening, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[Scored]:
        """For each (pair, context, continuation): log-probability, and whether greedy decoding gives the continuation.

        Raises:
            RecipeError: a continuation has no tokens, or more than fit into the context.
        """
        asked: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}  # input -> places in ``requests``, targets
        for place, (pair, before, after) in enumerate(requests):
            if not 0 < len(after) <= self._context:
                raise RecipeError(
                    f"tasks: a text to score has {len(after)} tokens; 1 to {self._context} can be scored: {pair!r:.200}"
                )
            shown = [*before, *after][-self._context - 1 : -1]
            asked.setdefault(tuple(shown), []).append((place, after))
        found: list[Scored] = [(0.0, False)] * len(requests)
        for batch in self._batches(asked):
            for ids, logits in zip(batch, self._logits(batch), strict=True):
                for place, after in asked[ids]:
                    found[place] = scored(logits[len(ids) - len(after) : len(ids)], after)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows that do not overlap; every token is scored once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)  # the windows bring the prefix
            for window in get_rolling_token_windows(ids, self._prefix, self._context, 1):
                before, after = make_disjoint_window(window)
                windows.append((request.args[0][:80], before, after))
                owners.append(place)
        sums = [0.0] * len(requests)
        for place, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[place] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each cut before the first of its stop texts.

        Raises:
            RecipeError: a task requires sampling, or more tokens than fit into the context.
        """
        asked = []
        for place, request in enumerate(requests):
            text, wishes = request.args
            stops, most = self._wishes(wishes)
            ids = self.tok_encode(text)[-(self._context - most) :] or [self._prefix]
            asked.append(((len(ids), most, stops), place, ids))
        found = [""] * len(requests)
        for (_, most, stops), group in groupby(sorted(asked), key=lambda item: item[0]):
            rows = list(group)
            for start in range(0, len(rows), ROWS):
                part = rows[start : start + ROWS]
                texts = self._continued([ids for _, _, ids in part], stops, most)
                found = _placed(found, [place for _, place, _ in part], texts)
        return found

    def _wishes(self, wishes: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        if wishes.get("do_sample") and wishes.get("temperature", 1.0) > 0:
            raise RecipeError(f"tasks: a task requires sampling ({wishes}); only greedy decoding is supported")
        stops, most = wishes.get("until") or [], int(wishes.get("max_gen_toks", NEW_TOKENS))
        if not 0 < most < self._context:
            raise RecipeError(f"tasks: max_gen_toks is {most}; 1 to {self._context - 1} fit this model's context")
        return (stops,) if isinstance(stops, str) else tuple(stops), most

    def _continued(self, prompts: list[list[int]], stops: Sequence[str], most: int) -> list[str]:
        """Greedy continuations of prompts with the same length."""
        decoders = [Detokenizer(self.tokenizer, prompt) for prompt in prompts]
        texts, growing = [""] * len(prompts), set(range(len(prompts)))
        logits = self._runner.start(np.array(prompts, np.int64), len(prompts[0]) + most)
        for count in range(1, most + 1):
            chosen = logits.argmax(-1).astype(np.int64)
            for row in sorted(growing):
                ended = int(chosen[row]) in self._ends
                texts[row] += "" if ended else decoders[row].push(int(chosen[row]))
                if ended or any(stop in texts[row] for stop in stops):
                    growing.discard(row)
            if not growing or count == most:
                break
            logits = self._runner.step(chosen)
        whole = [text + decoder.flush() for text, decoder in zip(texts, decoders, strict=True)]
        return [text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))] for text in whole]

    def _batches(self, inputs: dict[tuple[int, ...], Any]) -> Iterator[list[tuple[int, ...]]]:
        """All inputs in batches, the longest first; the logits of a batch have at most ``LOGITS_AT_ONCE`` numbers."""
        waiting = sorted(inputs, key=lambda ids: (-len(ids), ids))
        while waiting:
            rows = max(1, min(ROWS, LOGITS_AT_ONCE // (len(waiting[0]) * self._vocab)))
            yield waiting[:rows]
            waiting = waiting[rows:]

    def _logits(self, batch: Sequence[tuple[int, ...]]) -> FloatArray:
        """Logits [b, s, v] of rows of unequal length; undefined at padding."""
        lengths = np.array([len(ids) for ids in batch])
        tokens: IntArray = np.zeros((len(batch), lengths.max()), np.int64)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = ids
        valid = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int64)
        return self._runner.logits(tokens, None if valid.all() else valid)


def scored(logits: FloatArray, targets: Sequence[int]) -> Scored:
    """Log-probability of targets under logits [s, v], and whether each is the most likely token; in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    chosen = wide[np.arange(len(targets)), targets]
    logprob = (chosen - top - np.log(np.exp(wide - top[:, None]).sum(-1))).sum()
    return float(logprob), bool((wide.argmax(-1) == np.array(targets)).all())


def _placed(found: list[str], places: Sequence[int], texts: Sequence[str]) -> list[str]:
    given = dict(zip(places, texts, strict=True))
    return [given.get(place, text) for place, text in enumerate(found)]
