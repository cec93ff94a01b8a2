"""Read texts by name, before tokenisation.

``python-docs`` is the Python language reference that ships with CPython (``pydoc_data.topics``): English technical
prose with code, about 90,000 tokens, available without a download. Passages that occur under several topics are kept
once, so that the held-out part does not repeat calibration text.

Text that the model generates itself is in ``self_text``.
"""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatq.chats import TemplateRefuses, written_out
from flatq.errors import RecipeError
from flatq.files import from_json

log = logging.getLogger(__name__)
SURROGATES, REPLACEMENT = re.compile("[\ud800-\udfff]"), "\N{REPLACEMENT CHARACTER}"
CHARACTERS_PER_TOKEN = 5  # more than any tokenizer in use needs for English


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
    """The name of a text; for ``text`` also its file, the field of each record and whether records are chats."""

    dataset: str
    path: str | None = None
    field: str = "text"
    chat_template: bool = False

    @property
    def label(self) -> str:
        """Name of the text in messages."""
        return self.path or self.dataset if self.dataset == "text" else self.dataset

    @property
    def has_test(self) -> bool:
        """Whether the dataset has a test split."""
        return self.dataset in HUB_TEXTS and HUB_TEXTS[self.dataset].test is not None


def read_text(corpus: Corpus, tokenizer: Any, *, test: bool, tokens: int, place: str) -> str:
    """The corpus as one string.

    Args:
        corpus: the text to read.
        tokenizer: the model's, for its chat template.
        test: read the test split, if the corpus has one.
        tokens: number of tokens needed; used only for an endless corpus.
        place: ``calibration`` or ``evaluation``, for messages.

    Raises:
        RecipeError: it cannot be read.
    """
    if corpus.dataset == "python-docs":
        return python_docs()
    if corpus.dataset == "text":
        return _local_text(corpus, tokenizer, place)
    if corpus.dataset in HUB_TEXTS:
        return _hub_text(corpus, test=test, tokens=tokens, place=place)
    allowed = ", ".join([*HUB_TEXTS, "python-docs", "self", "text"])
    raise RecipeError(f"{place}.dataset: {corpus.dataset!r} is not known; allowed: {allowed}")


def python_docs() -> str:
    """The Python language reference of this interpreter; prose is unwrapped and duplicate passages are removed."""
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


def _local_text(corpus: Corpus, tokenizer: Any, place: str) -> str:
    if corpus.path is None:
        raise RecipeError(f"{place}.path: dataset text needs the path of a .txt or .jsonl file")
    file = Path(corpus.path).expanduser()
    if file.suffix not in (".txt", ".jsonl"):
        raise RecipeError(f"{place}.path: {file} is not supported; allowed: .txt (plain), .jsonl (one object a line)")
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors put a byte-order mark first
    except (OSError, UnicodeDecodeError) as failed:
        raise RecipeError(
            f"{place}.path: {file} cannot be read as UTF-8 text ({failed}); give another file"
        ) from failed
    if corpus.chat_template:
        text = "".join(_chats(text, corpus.field, file, place, tokenizer))
    elif file.suffix == ".jsonl":
        text = "\n\n".join(_records(text, corpus.field, file, place))
    return _without_surrogates(text, file)


def _without_surrogates(text: str, file: Path) -> str:
    r"""Halves of a character such as ``\ud83d``, which JSON can spell and no tokenizer takes, are replaced."""
    whole, count = SURROGATES.subn(REPLACEMENT, text)
    if count:
        log.warning("%s: %d halves of characters (lone surrogates) are read as %s", file, count, REPLACEMENT)
    return whole


def _objects(text: str, file: Path, place: str) -> Iterator[tuple[int, Any]]:
    """Line number and content of each line that is not empty."""
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at separators inside of a text
        if line.strip():
            try:
                yield number, from_json(line)
            except ValueError as broken:
                raise RecipeError(f"{place}.path: {file}, line {number}: not valid JSON ({broken})") from broken


def _records(text: str, field: str, file: Path, place: str) -> Iterator[str]:
    """The texts of a .jsonl file; records with an empty text are counted in a warning."""
    read = empty = 0
    for number, record in _objects(text, file, place):
        if not isinstance(record, dict) or not isinstance(record.get(field, 0), str | None):
            raise RecipeError(
                f"{place}.field: {file}, line {number}: no text under {field!r}; found: {_keys_of(record)}."
                f"{_way_out(record)}"
            )
        if record[field] is None or not record[field].strip():
            empty += 1
            continue
        read += 1
        yield record[field]
    if not read:
        raise RecipeError(f"{place}.path: {file} holds no text under {field!r} ({empty} records without); give another")
    if empty:
        log.warning("%s: %d of %d records have no text under %r and are skipped", file, empty, read + empty, field)


def _way_out(record: Any) -> str:
    """The key that the user may have meant: of a chat, else of a text."""
    given = record.items() if isinstance(record, dict) else ()
    for key, value in given:
        if isinstance(value, list) and value and all(_is_message(message) for message in value):
            return f" {key!r} holds a chat: set chat_template: true and field: {key}"
    texts = [str(key) for key, value in given if isinstance(value, str)]
    return (
        f" Name the key with field, such as field: {texts[0]}" if texts else " Each line must hold a text under a key"
    )


def _chats(text: str, field: str, file: Path, place: str, tokenizer: Any) -> Iterator[str]:
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            f"{place}.chat_template: this model's tokenizer has no chat template; give a file with plain text instead"
        )
    numbers, chats = list[int](), list[list[dict[str, Any]]]()
    for number, record in _objects(text, file, place):
        messages = record.get(field) if isinstance(record, dict) else None
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages) or not messages:
            raise RecipeError(
                f"{place}.chat_template: {file}, line {number}: no list of messages with role and content under "
                f"{field!r}; found: {_keys_of(record)}. Name the key with field"
            )
        numbers.append(number)
        chats.append(messages)
    written = 0
    try:
        for words in written_out(tokenizer, chats):
            written += 1
            yield words
    except TemplateRefuses as refused:
        raise RecipeError(
            f"{place}.chat_template: {file}, line {numbers[written]}: the model's chat template refuses this chat "
            f"({refused})"
        ) from refused


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _keys_of(record: Any) -> str:
    return ", ".join(record) if isinstance(record, dict) else type(record).__name__


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
            f"{place}.dataset: {corpus.dataset} ({row.path}) could not be loaded from the Hugging Face hub ({failed}). "
            "Without a network: dataset self (generated by the model), python-docs (ships with Python), or text with "
            "the path of a local file"
        ) from failed
    return "\n\n".join(documents)
