"""Text files as people have them: odd separators, marks, empty records, halves of characters, chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flatq.calibration.corpora import Corpus, read_text
from flatq.errors import RecipeError

TEXTS = ["first text", "second, a bit longer", "third"]


def read(file: Path, field: str = "text", **more: Any) -> str:
    return read_text(Corpus("text", str(file), field, **more), None, test=False, tokens=1, place="calibration")


def lines(texts: list[Any], key: str = "text", *, ascii_only: bool = False) -> list[str]:
    return [json.dumps({key: text}, ensure_ascii=ascii_only) for text in texts]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\n"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_record_ends_at_its_line_feed_only(tmp_path: Path, character: str, ascii_only: bool) -> None:
    texts = [f"before{character}after {text}" for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines(texts, ascii_only=ascii_only)).encode())
    assert read(tmp_path / "a.jsonl") == "\n\n".join(texts)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n   \n", "\r\n\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_empty_lines_and_a_byte_order_mark_are_no_text(tmp_path: Path, end: str, mark: str) -> None:
    (tmp_path / "a.jsonl").write_bytes((mark + end.join(lines(TEXTS)) + end).encode())
    assert read(tmp_path / "a.jsonl") == "\n\n".join(TEXTS)
    (tmp_path / "a.txt").write_bytes((mark + "plain text").encode())
    assert read(tmp_path / "a.txt") == "plain text"


@pytest.mark.parametrize("empty", [None, "", "  \n"])
def test_records_without_a_text_are_skipped_and_counted(
    tmp_path: Path, empty: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines([empty, *TEXTS, empty])))
    assert read(tmp_path / "a.jsonl") == "\n\n".join(TEXTS)
    assert "2 of 5 records have no text under 'text' and are skipped" in caplog.text


def test_a_file_of_nothing_but_empty_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines([None, ""])))
    with pytest.raises(RecipeError, match=r"holds no text under 'text' \(2 records without\)"):
        read(tmp_path / "a.jsonl")


def test_halves_of_characters_are_replaced_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d and \\udc00, whole \\ud83d\\ude00"}')
    assert read(tmp_path / "a.jsonl") == "cut \N{REPLACEMENT CHARACTER} and \N{REPLACEMENT CHARACTER}, whole 😀"
    assert "2 halves of characters" in caplog.text


def test_no_warning_where_there_is_nothing_to_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines(TEXTS)))
    read(tmp_path / "a.jsonl")
    assert not caplog.text


@pytest.mark.parametrize(
    ("record", "field", "words"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "text", "set chat_template: true and field: messages"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "set chat_template: true and field: messages"),
        ({"content": "words", "id": 7}, "text", "Name the key with field, such as field: content"),
        ({"text": ["a"]}, "text", "Each line must hold a text under a key"),
        (["a"], "text", "Each line must hold a text under a key"),
        ({"text": 3}, "text", "Each line must hold a text under a key"),
    ],
)
def test_a_record_of_another_shape_is_one_line_with_the_way_out(
    tmp_path: Path, record: Any, field: str, words: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(RecipeError) as raised:
        read(tmp_path / "a.jsonl", field)
    assert words in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
