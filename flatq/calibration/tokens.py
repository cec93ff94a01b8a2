"""Token batches: the text that decides what is kept, and other text on which the result is judged.

A corpus is read in its own order and tokenised once, as one stream without special tokens. Calibration takes
disjoint windows of it, chosen by a seed. The held-out part is either the corpus's own test split or the end of the
stream (a tenth, or as much as the evaluation asks for if that is more), cut off *before* any window is drawn: no
token is ever in both.

``python-docs`` is the Python language reference that ships with every CPython (``pydoc_data.topics``): English
technical prose with code, about 90,000 tokens, there without a download. Passages that stand under several
topics are kept once, or the held-out part would repeat what calibration saw.

Left out: packing with begin-of-text tokens (windows start mid-text, as in the GPTQ and FLAT-LLM experiments).
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flatq.errors import RecipeError

if TYPE_CHECKING:
    from flatq.recipe.blocks import CalibrationSpec, EvaluationSpec

CHARACTERS_PER_TOKEN = 5  # more than any tokenizer in use needs for English
PARTS = ("calibration", "heldout")
POOL = 4  # of an endless corpus, read this many times what is drawn, so that the seed has a choice


@dataclass(frozen=True, slots=True)
class HubText:
    """A dataset of the hub; ``test`` is None where it has no test split."""

    path: str
    name: str | None
    train: str
    test: str | None
    endless: bool = False


HUB_TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test"),
    "c4": HubText("allenai/c4", "en", "train", "validation", endless=True),
    "alpaca": HubText("tatsu-lab/alpaca", None, "train", None),  # its `text` is the filled-in prompt with the answer
}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Which text: a name, and for ``text`` a file with its field."""

    dataset: str
    path: str | None = None
    field: str = "text"

    @property
    def label(self) -> str:
        """How to call it in messages."""
        return self.path or self.dataset if self.dataset == "text" else self.dataset

    @property
    def has_test(self) -> bool:
        """Whether its publisher set a test split apart."""
        return self.dataset in HUB_TEXTS and HUB_TEXTS[self.dataset].test is not None


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
        heldout: int64 [windows, evaluation seq_len].
        description: where both come from, with digests; JSON-ready.
    """

    calibration: Tensor
    heldout: Tensor
    description: dict[str, Any]

    @property
    def judged(self) -> tuple[JudgedText, ...]:
        """The texts that the model is judged on, by name."""
        seen, judged = ({k: self.description[part].get(k) for k in ("dataset", "path", "field")} for part in PARTS)
        name = Path(judged["path"]).stem if judged["path"] else str(judged["dataset"])
        return (JudgedText(name, self.heldout, seen == judged),)

    @property
    def samples_digest(self) -> str:
        """SHA-256 of the calibration tokens and their shape: the data half of a cache key."""
        return _digest(self.calibration)


def token_batches(calibration: CalibrationSpec, evaluation: EvaluationSpec, tokenizer: Any) -> Tokens:
    """Read, tokenise, set the held-out part aside, draw the calibration windows.

    Args:
        calibration: corpus, number and length of the windows, seed.
        evaluation: corpus (None: the calibration's) and amount of the held-out text.
        tokenizer: the model's, a ``PreTrainedTokenizerFast``.

    Raises:
        RecipeError: the corpus cannot be read, or is too short; the message holds the numbers.
    """
    seen = Corpus(calibration.dataset, calibration.path, calibration.field)
    judged = seen
    if evaluation.dataset is not None:
        judged = Corpus(evaluation.dataset, evaluation.path, evaluation.field)
    windows = evaluation.tokens // evaluation.seq_len
    if windows == 0:
        raise RecipeError(
            f"evaluation.tokens: {evaluation.tokens} is less than one sequence of evaluation.seq_len "
            f"{evaluation.seq_len}; raise tokens or lower seq_len"
        )
    wanted = calibration.samples * calibration.seq_len
    kept = windows * evaluation.seq_len

    stream = tokenise(read_text(seen, test=False, tokens=POOL * wanted, place="calibration"), tokenizer)
    if judged == seen and not seen.has_test:
        stream, rest = _set_apart(stream, kept, judged.label)
    else:
        rest = tokenise(read_text(judged, test=True, tokens=kept, place="evaluation"), tokenizer)
        if not judged.has_test:
            _, rest = _set_apart(rest, kept, judged.label)
    if len(rest) < kept:
        raise _too_short(judged.label, len(rest), kept, "evaluation.tokens")
    drawn = draw_windows(stream, calibration.samples, calibration.seq_len, calibration.seed, seen.label)
    heldout = rest[:kept].view(windows, evaluation.seq_len)
    description = {
        "calibration": _describe(seen, drawn, len(stream)) | {"seed": calibration.seed},
        "heldout": _describe(judged, heldout, len(rest)),
    }
    return Tokens(drawn, heldout, description)


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


def read_text(corpus: Corpus, *, test: bool, tokens: int, place: str) -> str:
    """The corpus as one string.

    Args:
        corpus: which one.
        test: the test split, where the corpus has one.
        tokens: how many are wanted; only an endless corpus looks at it.
        place: ``calibration`` or ``evaluation``, for messages.

    Raises:
        RecipeError: it cannot be read.
    """
    if corpus.dataset == "python-docs":
        return python_docs()
    if corpus.dataset == "text":
        return _local_text(corpus, place)
    if corpus.dataset in HUB_TEXTS:
        return _hub_text(corpus, test=test, tokens=tokens, place=place)
    allowed = ", ".join([*HUB_TEXTS, "python-docs", "text"])
    raise RecipeError(f"{place}.dataset: {corpus.dataset!r} is not known; allowed: {allowed}")


def python_docs() -> str:
    """The Python language reference of this interpreter: prose unwrapped, every passage once."""
    try:
        from pydoc_data.topics import topics
    except ImportError as stripped:
        raise RecipeError(
            "dataset python-docs: this Python comes without pydoc_data (a stripped build); use dataset text with a path"
        ) from stripped
    seen: set[str] = set()
    passages = []
    for topic in topics.values():
        for block in re.split(r"\n\s*\n", topic):
            lines = [line for line in block.splitlines() if not re.fullmatch(r"\s*([*=~^\"'-])\1{2,}\s*", line)]
            passage = _unwrap("\n".join(lines))
            if passage and passage not in seen:
                seen.add(passage)
                passages.append(passage)
    return "\n\n".join(passages)


def _unwrap(block: str) -> str:
    # A sentence begins with a capital, a quote or a star and ends with a stop; code and grammar keep their lines.
    flat = " ".join(re.sub(r"(?<=[a-z]-)\n\s*(?=[a-z])", "", block).split())
    prose = re.match(r"[A-Z\"(*]", flat) and re.search(r"[.:!?)]$", flat) and "::=" not in flat and ">>>" not in flat
    return flat if prose else textwrap.dedent(block).strip("\n")


def _local_text(corpus: Corpus, place: str) -> str:
    if corpus.path is None:
        raise RecipeError(f"{place}.path: dataset text needs the path of a .txt or .jsonl file")
    file = Path(corpus.path).expanduser()
    if file.suffix not in (".txt", ".jsonl"):
        raise RecipeError(f"{place}.path: {file} is not supported; allowed: .txt (plain), .jsonl (one object a line)")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failed:
        raise RecipeError(
            f"{place}.path: {file} cannot be read as UTF-8 text ({failed}); give another file"
        ) from failed
    return text if file.suffix == ".txt" else "\n\n".join(_records(text, corpus.field, file, place))


def _records(text: str, field: str, file: Path, place: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as broken:
            raise RecipeError(f"{place}.path: {file}, line {number}: not valid JSON ({broken})") from broken
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise RecipeError(f"{place}.field: {file}, line {number}: no text under {field!r}; found: {found}")
        yield record[field]


def _hub_text(corpus: Corpus, *, test: bool, tokens: int, place: str) -> str:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever httpx it uses

    row = HUB_TEXTS[corpus.dataset]
    split = row.test if test and row.test else row.train
    documents: list[str] = []
    length = 0
    try:
        for record in datasets.load_dataset(row.path, row.name, split=split, streaming=row.endless):
            documents.append(record["text"])
            length += len(record["text"])
            if row.endless and length >= tokens * CHARACTERS_PER_TOKEN:
                break
    except (OSError, HTTPError, DatasetsError, ValueError) as failed:
        raise RecipeError(
            f"{place}.dataset: {corpus.dataset} ({row.path}) could not be had from the Hugging Face hub ({failed}). "
            "Without a network: dataset python-docs (ships with Python), or dataset text with a path of yours"
        ) from failed
    return "\n\n".join(documents)


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
    if corpus.dataset == "python-docs":
        about["python"] = platform.python_version()
    return about | {
        "sequences": windows.shape[0],
        "seq_len": windows.shape[1],
        "tokens_available": available,
        "sha256": _digest(windows),
    }
