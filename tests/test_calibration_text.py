"""The benchmark of calibration texts: its questions, its candidates, and that it goes on where it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flatq.model.weights import load_decoder
from flatq.sources.source import open_model
from tests.test_self_text import TEMPLATE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import calibration_text
import questions


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("The capital of France is Paris.", ("Paris",), True),
        ("paris", ("Paris",), True),
        ("Parisian", ("Paris",), False),
        ("It is 4.", ("4", "four"), True),
        ("It is 40.", ("4", "four"), False),
        ("It is 3.4", ("4", "four"), False),
        ("fourteen", ("4", "four"), False),
        ("", ("4",), False),
    ],
)
def test_an_answer_is_right_if_the_word_stands_in_it(answer: str, accepted: tuple[str, ...], right: bool) -> None:
    assert questions.is_right(answer, accepted) is right


def test_every_question_is_asked_once_and_has_an_answer() -> None:
    asked = [question for question, _ in questions.QUESTIONS]
    assert len(asked) == len(set(asked)) == 40
    assert all(accepted for _, accepted in questions.QUESTIONS)


def test_answers_side_by_side_are_those_of_each_question_alone(model_copy: Path) -> None:
    (model_copy / "chat_template.jinja").write_text(TEMPLATE)
    source = open_model(str(model_copy))
    tokenizer, decoder = source.tokenizer(), load_decoder(source)
    together = questions.answers(source, tokenizer, frozenset({1}))
    assert len(together) == len(questions.QUESTIONS)
    for number in (0, 7, 39):
        prompt = f"<s>[user]{questions.QUESTIONS[number][0]}</s>[assistant]"
        ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        start = len(ids)
        with torch.inference_mode():
            for _ in range(questions.NEW_TOKENS):
                ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
        written = ids[start:]
        end = written.index(1) if 1 in written else len(written)
        assert together[number] == tokenizer.decode(written[:end])


def test_candidates_have_names_of_their_own_and_are_recipes() -> None:
    names = [candidate.name for candidate in calibration_text.CANDIDATES]
    assert len(names) == len(set(names))
    for candidate in calibration_text.CANDIDATES:
        recipe = candidate.recipe("model")
        assert (recipe.flat is None) == (candidate.keep_ratio == 1)


def test_a_finished_candidate_is_kept_and_drawn(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.jsonl"
    measured = []

    def measure(self: Any, candidate: Any, model: str, dense: dict[str, float]) -> dict[str, Any]:
        measured.append(candidate.name)
        damage = dict.fromkeys(dense, 0.25)
        line = {"name": candidate.name, "tokens": 7, "keep_ratio": candidate.keep_ratio, "damage": damage}
        return {**line, "mean": 0.25, "worst": 0.25, "right": 11, "seconds": 1.0}

    monkeypatch.setattr(calibration_text.Laboratory, "measure", measure)
    monkeypatch.setattr(calibration_text.Laboratory, "right", lambda self, weights: 12)
    monkeypatch.setattr(calibration_text, "source_code", lambda tokenizer: torch.zeros(1, 8, dtype=torch.int64))
    monkeypatch.setattr(calibration_text, "LENGTH", 16)
    command = ["--model", str(tiny_model), "--text", f"made-up={text_file}", "--out", str(out)]
    command += ["--work", str(tmp_path / "work"), "--only", "self 64 x 256"]
    for _ in range(2):
        result = CliRunner().invoke(calibration_text.app, command)
        assert result.exit_code == 0, result.output
    wanted = [c.name for c in calibration_text.CANDIDATES if "self 64 x 256" in c.name]
    assert measured == wanted
    assert len(wanted) > 1
    lines = calibration_text.lines(out)
    assert [line["name"] for line in lines] == ["dense", *measured]
    assert list(lines[0]["perplexity"]) == ["code", "made-up", "python-docs", "self"]
    table = out.with_suffix(".md").read_text()
    assert "| self 64 x 256 | 7 | 0.9 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 11 | 1 |" in table
