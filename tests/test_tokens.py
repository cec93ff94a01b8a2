"""Token batches: seeded, disjoint, and nothing of the held-out part is ever seen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flatq.calibration.corpora as corpora
from flatq.calibration.corpora import python_docs
from flatq.calibration.tokens import Tokens, draw_windows, token_batches
from flatq.errors import RecipeError
from flatq.recipe.blocks import CalibrationSpec, EvaluationSpec, MixedSpec


def words(text: str, **_: Any) -> dict[str, list[int]]:
    """A tokenizer of numbers: the text is the token ids."""
    return {"input_ids": [int(word) for word in text.split()]}


def numbered(file: Path, start: int, count: int) -> str:
    file.write_text(" ".join(str(n) for n in range(start, start + count)))
    return str(file)


def calibration(**changed: Any) -> CalibrationSpec:
    return CalibrationSpec.model_validate(
        {"dataset": "text", "path": None, "samples": 4, "seq_len": 8, "seed": 1} | changed
    )


def evaluation(**changed: Any) -> list[EvaluationSpec]:
    return [EvaluationSpec.model_validate({"dataset": "held-out", "tokens": 32, "seq_len": 16} | changed)]


def batches(path: str, **changed: Any) -> Tokens:
    return token_batches(calibration(path=path, **changed), evaluation(), words)


@given(length=st.integers(8, 300), seq_len=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_windows_are_disjoint_pieces_of_the_stream(length: int, seq_len: int, seed: int, data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, max(1, length // seq_len)))
    if samples * seq_len > length:
        return
    windows = draw_windows(torch.arange(length), samples, seq_len, seed, "text")
    assert windows.shape == (samples, seq_len)
    assert windows.unique().numel() == samples * seq_len
    assert bool((windows == windows[:, :1] + torch.arange(seq_len)).all())


def test_the_seed_chooses_and_repeats(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t.txt", 0, 1000)
    assert torch.equal(batches(path).calibration, batches(path).calibration)
    assert not torch.equal(batches(path).calibration, batches(path, seed=2).calibration)
    assert torch.equal(batches(path).heldout, batches(path, seed=2).heldout)


@pytest.mark.parametrize("length", [64, 65, 319, 320, 1000])
def test_nothing_held_out_is_calibrated_on(tmp_path: Path, length: int) -> None:
    tokens = batches(numbered(tmp_path / "t.txt", 0, length))
    boundary = int(tokens.heldout.min())
    assert tokens.heldout.shape == (2, 16)
    assert boundary == length - max(32, -(-length // 10))
    assert int(tokens.calibration.max()) < boundary


def test_evaluation_may_read_another_file(tmp_path: Path) -> None:
    seen, judged = numbered(tmp_path / "a.txt", 0, 32), numbered(tmp_path / "b.txt", 5000, 32)
    tokens = token_batches(calibration(path=seen), evaluation(dataset="text", path=judged), words)
    assert sorted(tokens.calibration.flatten().tolist()) == list(range(32))
    assert tokens.heldout.flatten().tolist() == list(range(5000, 5032))


def test_naming_the_same_file_twice_still_keeps_its_end_apart(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t.txt", 0, 200)
    tokens = token_batches(calibration(path=path), evaluation(dataset="text", path=path), words)
    assert int(tokens.calibration.max()) < int(tokens.heldout.min())


def test_a_test_split_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(name: str, config: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
        assert (name, config, streaming) == ("Salesforce/wikitext", "wikitext-2-raw-v1", False)
        start = {"train": 0, "test": 9000}[split]
        return [{"text": str(start + n)} for n in range(100)]

    monkeypatch.setattr("datasets.load_dataset", hub)
    tokens = token_batches(calibration(dataset="wikitext2", samples=12), evaluation(), words)
    assert tokens.calibration.shape == (12, 8)
    assert tokens.heldout.flatten().tolist() == list(range(9000, 9032))


def test_an_endless_corpus_is_read_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def hub(*_: Any, **__: Any) -> Any:
        for number in range(10**9):
            read.append(number)
            yield {"text": "1234 " * 20}

    monkeypatch.setattr("datasets.load_dataset", hub)
    token_batches(calibration(dataset="c4"), evaluation(), words)
    assert 0 < len(read) < 50


@pytest.mark.parametrize("dataset", ["wikitext2", "c4", "alpaca"])
def test_offline_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    def hub(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", hub)
    with pytest.raises(RecipeError, match=r"calibration.dataset: .*no route.*python-docs.*text"):
        token_batches(calibration(dataset=dataset), evaluation(), words)


def test_lines_of_json_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(json.dumps({"body": str(n)}) for n in range(64)) + "\n\n")
    tokens = batches(str(file), field="body")
    assert tokens.heldout.flatten().tolist() == list(range(32, 64))


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ('{"text": "1"}\nnonsense', ".jsonl", "line 2: not valid JSON"),
        ('{"body": "1"}', ".jsonl", "no text under 'text'; found: body"),
        ("[1]", ".jsonl", "found: list"),
        ("1 2 3", ".csv", "allowed: .txt"),
        (None, ".txt", "cannot be read"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str | None, suffix: str, message: str) -> None:
    file = tmp_path / f"t{suffix}"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RecipeError, match=message) as refused:
        batches(str(file))
    assert file.name in str(refused.value)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, r"evaluation.tokens: .* has 0 tokens, evaluation needs 32"),
        (31, "has 31 tokens"),
        (32, "leaves 0 tokens for calibration"),
        (63, "leaves 31 tokens for calibration, 4 samples of 8 need 32; set samples to at most 3"),
    ],
)
def test_too_little_text_is_refused_with_numbers(tmp_path: Path, length: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        batches(numbered(tmp_path / "t.txt", 0, length))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (calibration(), "calibration.path"),
        (
            calibration().model_copy(
                update={"dataset": None, "mix": (MixedSpec.model_construct(dataset="wikitext3", share=1),)}
            ),
            "allowed: wikitext2, c4, alpaca, python-docs, self, text",
        ),
        (calibration(dataset="self"), "no model is available here; use another dataset"),
    ],
)
def test_an_incomplete_or_unknown_corpus_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        token_batches(spec, evaluation(), words)


def test_less_than_one_evaluation_sequence_is_refused(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t.txt", 0, 100)
    with pytest.raises(RecipeError, match=r"evaluation.tokens: 15"):
        token_batches(calibration(path=path), evaluation(tokens=15), words)


def test_python_docs_is_long_and_says_nothing_twice() -> None:
    passages = python_docs().split("\n\n")
    assert len(passages) == len(set(passages))
    assert sum(map(len, passages)) > 300_000
    assert not any(passage.endswith("****") for passage in passages)
    assert "Assert statements are a convenient way to insert debugging assertions into a program:" in passages


def test_the_description_is_json_with_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "python_docs", lambda: " ".join(map(str, range(500))))
    tokens = token_batches(calibration(dataset="python-docs"), evaluation(), words)
    described = json.loads(json.dumps(tokens.description))
    shape, numbers = str(tuple(tokens.calibration.shape)).encode(), tokens.calibration.numpy().tobytes()
    assert described["calibration"]["sha256"] == hashlib.sha256(shape + numbers).hexdigest()
    assert described["calibration"]["tokens_available"] == 450
    assert described["heldout"]["sequences"] == 2


def opened(text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
    """A tokenizer that begins every text with two tokens and ends it with one."""
    ids = words(text)["input_ids"]
    return {"input_ids": [900, 901, *ids, 902] if add_special_tokens else ids}


def test_every_row_begins_as_the_tokenizer_begins_every_text(tmp_path: Path) -> None:
    path = numbered(tmp_path / "text.txt", 0, 200)
    found = token_batches(calibration(path=path), evaluation(), opened)
    plain = token_batches(calibration(path=path), evaluation(), words)
    for rows, width in ((found.calibration, 8), (found.heldout, 16)):
        assert rows.shape[1] == width
        assert rows[:, :2].tolist() == [[900, 901]] * len(rows)
        assert (rows[:, 3:] - rows[:, 2:-1] == 1).all(), "the rest is consecutive text"
    text = [row[2:].tolist() for row in (*found.calibration, *found.heldout)]
    assert len({number for row in text for number in row}) == sum(map(len, text)), "no token is in two rows"
    assert 900 not in plain.calibration


def test_a_row_that_the_opening_fills_is_refused(tmp_path: Path) -> None:
    path = numbered(tmp_path / "text.txt", 0, 200)
    with pytest.raises(RecipeError, match=r"calibration.seq_len: 3 leaves no space for text.*at least 4"):
        token_batches(calibration(path=path, seq_len=3), evaluation(), opened)
    with pytest.raises(RecipeError, match=r"evaluation.seq_len: 3 leaves no space for text.*at least 4"):
        token_batches(calibration(path=path), evaluation(seq_len=3), opened)
