"""Token batches: the text that decides what is kept, and other text on which the result is judged.

A corpus is read in its own order and tokenised once, as one stream without special tokens. Calibration takes
disjoint windows of it, chosen by a seed. The held-out part is either the corpus's own test split or the end of the
stream (a tenth, or as much as the evaluation asks for if that is more), cut off *before* any window is drawn: no
token is ever in both. Text that the model writes itself needs no windows: its rows begin where texts begin, and what
is held out is drawn with another seed.

A mixture is rows of several texts in proportion to their shares, shuffled, so that a measurement on the first few rows
sees all of them. The model is judged on text of a kind that it was not calibrated on as well: its own kind tells what
it keeps where it was looked at, the other what it keeps elsewhere.

Left out: packing with begin-of-text tokens (windows of read texts start mid-text, as in the GPTQ and FLAT-LLM
experiments).
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flatq.calibration.corpora import Corpus, read_text
from flatq.errors import RecipeError

if TYPE_CHECKING:
    from flatq.recipe.blocks import CalibrationSpec, EvaluationSpec, TextSpec

POOL = 4  # of an endless corpus, read this many times what is drawn, so that the seed has a choice
OTHERS = ("python-docs", "self")  # the first that was not calibrated on is the text of another kind
ANOTHER_SEED = 2**32  # added for what is judged on; a recipe's seeds are all below


class Writer(Protocol):
    """Something that writes rows of text, such as ``self_text.SelfText``."""

    def rows(self, samples: int, seq_len: int, seed: int) -> Tensor:
        """int64 [samples, seq_len], the same for the same arguments."""
        ...


@dataclass(frozen=True, slots=True)
class JudgedText:
    """A text that the model is judged on.

    Attributes:
        name: what it is called in reports; no two of a run are the same.
        tokens: int64 [windows, seq_len].
        calibrated: whether the model was calibrated on text of this kind (never on these very tokens).
    """

    name: str
    tokens: Tensor
    calibrated: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a run observes and what it is judged on.

    Attributes:
        calibration: int64 [samples, seq_len].
        judged: at least one text, in the order of the recipe.
        description: where all of it comes from, with digests; JSON-ready.
    """

    calibration: Tensor
    judged: tuple[JudgedText, ...]
    description: dict[str, Any]

    @property
    def heldout(self) -> Tensor:
        """Tokens of the first text that is judged on, int64 [windows, seq_len]."""
        return self.judged[0].tokens


def token_batches(
    calibration: CalibrationSpec, evaluation: Sequence[EvaluationSpec], tokenizer: Any, writer: Writer | None = None
) -> Tokens:
    """Read or write, tokenise, set the held-out parts aside, draw the calibration windows.

    Args:
        calibration: texts, number and length of the windows, seed.
        evaluation: texts and amounts of what the model is judged on.
        tokenizer: the model's, a ``PreTrainedTokenizerFast``.
        writer: writes the rows of dataset self; None where nothing asks for them.

    Raises:
        RecipeError: a text cannot be read or written, or is too short; the message holds the numbers.
    """
    desk = _Desk(calibration, _unfolded(calibration, evaluation), tokenizer, writer)
    drawn, seen = [], []
    for part, count in zip(calibration.parts, calibration.counts(), strict=True):
        windows, available = desk.observed(corpus_of(part), count)
        drawn.append(windows)
        seen.append(_describe(corpus_of(part), windows, available))
    rows = torch.cat(drawn)
    if len(drawn) > 1:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(calibration.seed))]
    about = seen[0] if len(seen) == 1 else {"dataset": "mix", "parts": seen, **_shape(rows)}
    judged, told = [], []
    for name, spec, corpus in desk.wanted:
        kept, available = desk.judged(spec, corpus)
        judged.append(JudgedText(name, kept, corpus in desk.sources))
        told.append({"name": name, "calibrated": corpus in desk.sources} | _describe(corpus, kept, available))
    description = {"calibration": about | {"seed": calibration.seed}, "heldout": told[0], "judged": told}
    return Tokens(rows, tuple(judged), description)


def self_tokens(calibration: CalibrationSpec, evaluation: Sequence[EvaluationSpec]) -> int:
    """How many tokens the model writes itself."""
    seen = zip(calibration.parts, calibration.counts(), strict=True)
    written = calibration.seq_len * sum(count for part, count in seen if part.dataset == "self")
    judged = [spec for spec, corpus in _unfolded(calibration, evaluation) if corpus.dataset == "self"]
    return written + sum(spec.tokens // spec.seq_len * spec.seq_len for spec in judged)


def corpus_of(spec: TextSpec) -> Corpus:
    """The text that a block of the recipe names."""
    # One spelling for one text, or its held-out part would not be known for what it is.
    path = str(Path(spec.path)) if spec.path else None
    field = spec.field or ("messages" if spec.chat_template else "text")
    return Corpus(str(getattr(spec, "dataset", None)), path, field, spec.chat_template)


def _unfolded(
    calibration: CalibrationSpec, evaluation: Sequence[EvaluationSpec]
) -> list[tuple[EvaluationSpec, Corpus]]:
    """Each text to be judged on with its corpus: ``held-out`` is every part of the calibration, null also ``other``."""
    sources = [corpus_of(part) for part in calibration.parts]
    names = {corpus.dataset for corpus in sources}
    other = next((name for name in OTHERS if name not in names), None)
    found: list[tuple[EvaluationSpec, Corpus]] = []
    for spec in evaluation:
        if spec.dataset in (None, "held-out"):
            found += [(spec, corpus) for corpus in sources]
        if spec.dataset == "other" and other is None:
            raise RecipeError(
                f"evaluation.dataset: other needs one of {', '.join(OTHERS)} that is not calibrated on; name a text"
            )
        if spec.dataset in (None, "other") and other is not None:
            found.append((spec, Corpus(other)))
        if spec.dataset not in (None, "held-out", "other"):
            found.append((spec, corpus_of(spec)))
    return found


def _named(wanted: Sequence[tuple[EvaluationSpec, Corpus]]) -> Iterator[tuple[str, EvaluationSpec, Corpus]]:
    taken: set[str] = set()
    for spec, corpus in wanted:
        stem = spec.name or (Path(corpus.path).stem if corpus.path else corpus.dataset)
        name = next(name for n in range(1, len(wanted) + 2) if (name := stem if n == 1 else f"{stem} {n}") not in taken)
        taken.add(name)
        yield name, spec, corpus


class _Desk:
    """Where texts are cut: each is read once, and what is judged on is set apart before anything is drawn."""

    def __init__(
        self,
        calibration: CalibrationSpec,
        wanted: Sequence[tuple[EvaluationSpec, Corpus]],
        tokenizer: Any,
        writer: Writer | None,
    ) -> None:
        self._calibration, self._tokenizer, self._writer = calibration, tokenizer, writer
        self.sources = [corpus_of(part) for part in calibration.parts]
        self.wanted = list(_named(wanted))
        self._rest: dict[Corpus, Tensor] = {}
        for _, spec, _ in self.wanted:
            _rows_of(spec)

    def observed(self, corpus: Corpus, samples: int) -> tuple[Tensor, int]:
        """Calibration rows of a text, int64 [samples, seq_len], and how many tokens they were chosen from."""
        seq_len, seed = self._calibration.seq_len, self._calibration.seed
        if corpus.dataset == "self":
            return self._written(samples, seq_len, seed), samples * seq_len
        tokens = POOL * samples * seq_len
        stream = self._tokenised(corpus, test=False, tokens=tokens, place="calibration")
        apart = self._kept(corpus)
        if apart and not corpus.has_test:
            stream, self._rest[corpus] = _set_apart(stream, apart, corpus.label)
        return draw_windows(stream, samples, seq_len, seed, corpus.label), len(stream)

    def judged(self, spec: EvaluationSpec, corpus: Corpus) -> tuple[Tensor, int]:
        """Rows that the model is judged on, int64 [windows, seq_len], and how many tokens there are."""
        windows = _rows_of(spec)
        kept = windows * spec.seq_len
        if corpus.dataset == "self":
            return self._written(windows, spec.seq_len, self._calibration.seed + ANOTHER_SEED), kept
        if corpus not in self._rest:
            tokens = self._kept(corpus)
            stream = self._tokenised(corpus, test=True, tokens=tokens, place="evaluation")
            self._rest[corpus] = stream if corpus.has_test else _set_apart(stream, tokens, corpus.label)[1]
        rest = self._rest[corpus]
        if len(rest) < kept:
            raise _too_short(corpus.label, len(rest), kept, "evaluation.tokens")
        return rest[:kept].view(windows, spec.seq_len), len(rest)

    def _kept(self, corpus: Corpus) -> int:
        """Tokens of a text that are judged on, 0 if none are."""
        asked = [_rows_of(spec) * spec.seq_len for _, spec, wanted in self.wanted if wanted == corpus]
        return max(asked, default=0)

    def _written(self, samples: int, seq_len: int, seed: int) -> Tensor:
        if self._writer is None:
            raise RecipeError(
                "dataset self: the model writes this text, and there is no model at hand here; name another dataset"
            )
        return self._writer.rows(samples, seq_len, seed)

    def _tokenised(self, corpus: Corpus, *, test: bool, tokens: int, place: str) -> Tensor:
        return tokenise(read_text(corpus, self._tokenizer, test=test, tokens=tokens, place=place), self._tokenizer)


def _rows_of(spec: EvaluationSpec) -> int:
    if spec.tokens < spec.seq_len:
        raise RecipeError(
            f"evaluation.tokens: {spec.tokens} is less than one sequence of evaluation.seq_len {spec.seq_len}; raise "
            "tokens or lower seq_len"
        )
    return spec.tokens // spec.seq_len


def draw_windows(stream: Tensor, samples: int, seq_len: int, seed: int, label: str) -> Tensor:
    """Disjoint windows in random order, [tokens] -> [samples, seq_len].

    The grid of windows starts at a random offset, so that different seeds cut the text differently.

    Raises:
        RecipeError: the stream is shorter than the windows together.
    """
    available = len(stream) // seq_len
    if available < samples:
        raise RecipeError(
            f"calibration: {label} leaves {len(stream):,} tokens for calibration, {samples} samples of {seq_len} need "
            f"{samples * seq_len:,}; set samples to at most {available}, lower seq_len, or take a longer text"
            if available
            else f"calibration: {label} leaves {len(stream):,} tokens for calibration, fewer than one sequence of "
            f"seq_len {seq_len}; lower seq_len, or take a longer text"
        )
    generator = torch.Generator().manual_seed(seed)
    spare = len(stream) - available * seq_len
    offset = int(torch.randint(spare + 1, (1,), generator=generator))
    chosen = torch.randperm(available, generator=generator)[:samples]
    return stream[offset : offset + available * seq_len].view(available, seq_len)[chosen]


def tokenise(text: str, tokenizer: Any) -> Tensor:
    """One stream without special tokens, int64 [tokens]."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def _set_apart(stream: Tensor, kept: int, label: str) -> tuple[Tensor, Tensor]:
    if len(stream) < kept:
        raise _too_short(label, len(stream), kept, "evaluation.tokens")
    start = len(stream) - max(math.ceil(len(stream) / 10), kept)
    return stream[:start], stream[start:]


def _too_short(label: str, found: int, needed: int, key: str) -> RecipeError:
    return RecipeError(
        f"{key}: {label} holds {found:,} tokens, evaluation needs {needed:,}; lower {key}, or take a longer text"
    )


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.contiguous().numpy().tobytes()).hexdigest()


def _describe(corpus: Corpus, windows: Tensor, available: int) -> dict[str, Any]:
    about: dict[str, Any] = {"dataset": corpus.dataset}
    if corpus.dataset == "text":
        about |= {"path": corpus.path, "field": corpus.field}
    if corpus.chat_template:
        about["chat_template"] = True
    if corpus.dataset == "python-docs":
        about["python"] = platform.python_version()
    return about | {**_shape(windows), "tokens_available": available}


def _shape(windows: Tensor) -> dict[str, Any]:
    return {"sequences": windows.shape[0], "seq_len": windows.shape[1], "sha256": _digest(windows)}
