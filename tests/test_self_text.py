"""Text that the model writes itself: seeded, resumable, and every row begins where texts begin."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flatq.calibration.self_text as self_text
from flatq.calibration.self_text import (
    FixedCache,
    Row,
    SelfText,
    Turn,
    begin_token,
    chat_script,
    document_script,
    drawn_ids,
    require_memory,
    stop_ids,
    write_rows,
)
from flatq.calibration.tokens import self_tokens, token_batches
from flatq.errors import NumericsError, RecipeError
from flatq.model.decoder import Decoder
from flatq.model.weights import load_decoder
from flatq.recipe.blocks import CalibrationSpec, EvaluationSpec
from flatq.sources.source import Source, open_model
from tests.conftest import MakeRecipe, flatq

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def source(tiny_model: Path) -> Source:
    return open_model(str(tiny_model))


@pytest.fixture
def chatty(model_copy: Path) -> Source:
    """The tiny model with a chat template."""
    (model_copy / "chat_template.jinja").write_text(TEMPLATE)
    return open_model(str(model_copy))


def ids(source: Source, text: str) -> list[int]:
    found: list[int] = source.tokenizer()(text, add_special_tokens=False)["input_ids"]
    return found


def test_the_same_seed_writes_the_same_rows_and_another_seed_others(source: Source, tmp_path: Path) -> None:
    rows = SelfText(source, tmp_path / "a").rows(3, 24, 7)
    assert rows.shape == (3, 24)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, SelfText(source, tmp_path / "b").rows(3, 24, 7))
    assert not torch.equal(rows, SelfText(source, tmp_path / "c").rows(3, 24, 8))
    assert len({tuple(row.tolist()) for row in rows}) == 3


def test_every_row_begins_where_texts_begin(source: Source, tmp_path: Path) -> None:
    rows = SelfText(source, tmp_path).rows(4, 16, 1)
    assert rows[:, 0].tolist() == [source.tokenizer().bos_token_id] * 4


def test_every_second_row_is_a_chat_where_there_is_a_template(chatty: Source, tmp_path: Path) -> None:
    rows = SelfText(chatty, tmp_path).rows(4, 40, 1)
    opening = ids(chatty, "<s>[user]")
    begin = chatty.tokenizer().bos_token_id
    assert rows[:, 0].tolist() == [begin] * 4
    for row in rows[1::2].tolist():
        assert row[: len(opening)] == opening
    for row in rows[0::2].tolist():
        assert row[: len(opening)] != opening


def test_the_model_writes_both_turns_of_a_chat(chatty: Source) -> None:
    script = chat_script(chatty.tokenizer(), frozenset({1}))
    assert script is not None
    asked, answered = script
    assert list(asked.opening) == ids(chatty, "<s>[user]")
    assert list(answered.opening) == ids(chatty, "</s>[assistant]")
    row = Row(script)
    row.take(len(asked.opening))
    for token in (50, 51, 1):  # two ids of the user's, then the end of the turn, which the template writes itself
        row.draw(token)
    row.take(len(row.queue))
    for token in (60, 1):  # the answer and its end; after it the next chat begins
        row.draw(token)
    row.take(len(row.queue))
    assert row.ids == [*asked.opening, 50, 51, *answered.opening, 60, 1, *asked.opening]


def test_a_text_that_ends_early_is_followed_by_the_next_one() -> None:
    row = Row((Turn((0,), frozenset({0, 1})),))
    row.take(1)
    row.draw(9)
    row.draw(1)
    assert row.take(len(row.queue)) == [0]
    row.draw(8)
    row.draw(0)  # the begin token itself: not written twice
    assert row.ids == [0, 9, 1, 0, 8, 0]


def test_side_by_side_a_row_is_what_it_is_alone(source: Source) -> None:
    decoder = load_decoder(source)
    scripts = [(Turn((0,), frozenset({1})),), (Turn((0, 5, 6), frozenset({1})),)]
    chances = torch.rand(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    together = write_rows(decoder, scripts, chances)
    for row, script in enumerate(scripts):
        assert torch.equal(together[row : row + 1], write_rows(decoder, [script], chances[row : row + 1]))


def test_what_is_drawn_follows_the_model_without_a_cache(source: Source) -> None:
    decoder = load_decoder(source)
    chances = torch.rand(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    script = (Turn((0, 4), frozenset({-1})),)
    row = write_rows(decoder, [script], chances)
    with torch.inference_mode():
        logits = decoder(row)[0]
    expected = [int(drawn_ids(logits[i : i + 1], chances[:, i + 1])) for i in range(1, 11)]
    assert row[0, 2:].tolist() == expected


def test_draws_have_the_probabilities_of_the_logits() -> None:
    logits = torch.log(torch.tensor([0.1, 0.0, 0.6, 0.3]))
    chances = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = drawn_ids(logits.expand(1000, 4), chances).bincount(minlength=4)
    assert (counts - torch.tensor([100, 0, 600, 300])).abs().max() <= 1
    assert drawn_ids(logits[None], torch.tensor([1 - 1e-16], dtype=torch.float64)).item() == 3


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(NumericsError, match="not finite"):
        drawn_ids(torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5], dtype=torch.float64))


def test_a_finished_batch_is_not_written_again(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text, "SIDE_BY_SIDE", 2)
    whole = SelfText(source, tmp_path / "whole").rows(5, 12, 1)
    written = []

    def counted(decoder: Decoder, scripts: Any, *rest: Any) -> torch.Tensor:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(scripts))
        return write_rows(decoder, scripts, *rest)

    monkeypatch.setattr(self_text, "write_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        SelfText(source, tmp_path / "killed").rows(5, 12, 1)
    monkeypatch.setattr(self_text, "write_rows", lambda *given: written.append(len(given[1])) or write_rows(*given))
    assert torch.equal(SelfText(source, tmp_path / "killed").rows(5, 12, 1), whole)
    assert written == [2, 2, 1]


def test_a_damaged_batch_is_written_again(source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = SelfText(source, tmp_path).rows(2, 12, 1)
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-16] ^= 1
    file.write_bytes(content)
    assert torch.equal(SelfText(source, tmp_path).rows(2, 12, 1), rows)
    assert f"{file}: is damaged; it is made again" in caplog.text


def test_a_model_that_does_not_fit_is_refused_with_a_way_out(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(RecipeError, match=r"dataset self: .* 0.0 GB are free on cpu; use dataset wikitext2, .*text"):
        SelfText(source, tmp_path).rows(1, 8, 1)
    monkeypatch.undo()
    require_memory(source.config, 1, 8, "cpu")


def test_without_a_begin_token_the_end_token_begins_and_without_both_nothing_does() -> None:
    assert begin_token(SimpleNamespace(bos_token_id=None, eos_token_id=5)) == 5
    assert document_script(SimpleNamespace(bos_token_id=3, eos_token_id=5), frozenset({5}))[0].opening == (3,)
    with pytest.raises(RecipeError, match="neither a begin-of-text nor an end-of-text token"):
        begin_token(SimpleNamespace(bos_token_id=None, eos_token_id=None))


def test_all_stated_ends_count() -> None:
    assert stop_ids({"eos_token_id": [7, 8]}, SimpleNamespace(eos_token_id=9)) == {7, 8, 9}
    assert stop_ids({}, SimpleNamespace(eos_token_id=None)) == set()


def test_no_template_or_one_that_hides_the_user_gives_no_chats(source: Source, chatty: Source) -> None:
    assert chat_script(source.tokenizer(), frozenset({1})) is None
    tokenizer = chatty.tokenizer()
    tokenizer.chat_template = "{{ bos_token }}[user]"
    assert chat_script(tokenizer, frozenset({1})) is None


def test_the_cache_returns_all_that_was_written(source: Source) -> None:
    dims = source.config.layers[0]
    cache = FixedCache(source.config, 2, 5)
    first, second = torch.rand(2, dims.kv_heads, 3, dims.d_qk), torch.rand(2, dims.kv_heads, 2, dims.d_qk)
    cache.update(first, first, 0)
    cache.past = 3
    keys, values = cache.update(second, second, 0)
    assert torch.equal(keys, torch.cat([first, second], 2))
    assert torch.equal(values, keys)


# In a recipe


def texts(source: Source, tmp_path: Path, calibration: dict[str, Any], evaluation: list[dict[str, Any]]) -> Any:
    seen = CalibrationSpec.model_validate({"samples": 8, "seq_len": 16} | calibration)
    judged = [EvaluationSpec.model_validate({"tokens": 64, "seq_len": 32} | block) for block in evaluation]
    return token_batches(seen, judged, source.tokenizer(), SelfText(source, tmp_path / "rows"))


def test_a_mix_holds_rows_of_all_its_texts_shuffled(source: Source, tmp_path: Path, text_file: Path) -> None:
    mix = [{"dataset": "self", "share": 3}, {"dataset": "text", "path": str(text_file), "share": 1}]
    tokens = texts(source, tmp_path, {"mix": mix}, [{}])
    alone = {tuple(row) for row in SelfText(source, tmp_path / "rows").rows(6, 16, 42).tolist()}
    rows = [tuple(row) for row in tokens.calibration.tolist()]
    assert sum(row in alone for row in rows) == 6
    assert len(set(rows)) == 8
    assert [row in alone for row in rows] != [True] * 6 + [False] * 2
    parts = tokens.description["calibration"]["parts"]
    assert [part["sequences"] for part in parts] == [6, 2]
    # What is judged on: the held-out part of each, and a text of another kind.
    assert [(text.name, text.calibrated) for text in tokens.evaluation] == [
        ("self", True),
        (text_file.stem, True),
        ("python-docs", False),
    ]
    json.dumps(tokens.description)


def test_what_the_model_wrote_for_the_judgement_is_not_what_it_wrote_to_calibrate(
    source: Source, tmp_path: Path
) -> None:
    tokens = texts(source, tmp_path, {"dataset": "self", "seq_len": 32, "samples": 2}, [{"dataset": "held-out"}])
    assert tokens.heldout.shape == tokens.calibration.shape == (2, 32)
    assert not torch.equal(tokens.heldout, tokens.calibration)


def test_the_text_of_another_kind_is_one_that_was_not_calibrated_on(source: Source, tmp_path: Path) -> None:
    found = texts(source, tmp_path, {"dataset": "python-docs"}, [{}])
    assert [(text.name, text.calibrated) for text in found.evaluation] == [("python-docs", True), ("self", False)]
    found = texts(source, tmp_path, {"dataset": "self"}, [{}])
    assert [(text.name, text.calibrated) for text in found.evaluation] == [("self", True), ("python-docs", False)]
    both = {"mix": [{"dataset": "self", "share": 1}, {"dataset": "python-docs", "share": 1}]}
    with pytest.raises(RecipeError, match="other needs one of python-docs, self that is not a calibration text"):
        texts(source, tmp_path, both, [{"dataset": "other"}])


def test_texts_have_names_of_their_own(source: Source, tmp_path: Path, text_file: Path) -> None:
    twice = [{"dataset": "text", "path": str(text_file), "tokens": tokens} for tokens in (64, 128)]
    found = texts(source, tmp_path, {"dataset": "python-docs"}, [*twice, {"dataset": "held-out", "name": "docs"}])
    assert [text.name for text in found.evaluation] == [text_file.stem, f"{text_file.stem} 2", "docs"]
    assert [text.tokens.numel() for text in found.evaluation] == [64, 128, 64]


def test_chats_of_a_file_go_through_the_template(chatty: Source, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "stone river"}, {"role": "assistant", "content": "bird sings"}]}
    file.write_text((json.dumps(chat) + "\n") * 40)
    text = {"dataset": "text", "path": str(file), "chat_template": True, "samples": 2}
    found = texts(chatty, tmp_path, text, [{"dataset": "held-out"}])
    once = ids(chatty, "<s>[user]stone river</s>[assistant]bird sings</s>")
    endless = (once * 10)[: len(once) + 15]
    assert all(
        any(endless[start : start + 16] == row for start in range(len(once))) for row in found.calibration.tolist()
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, "line 1: no list of messages with role and content under 'messages'; found: text"),
        ({"messages": [{"role": "user"}]}, "no list of messages"),
        ([1], "found: list"),
    ],
)
def test_a_line_without_messages_is_named(chatty: Source, tmp_path: Path, line: Any, message: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(line))
    with pytest.raises(RecipeError, match=message):
        texts(chatty, tmp_path, {"dataset": "text", "path": str(file), "chat_template": True}, [{}])


def test_messages_need_a_template(source: Source, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("{}")
    with pytest.raises(RecipeError, match=r"calibration.chat_template: this model's tokenizer has no chat template"):
        texts(source, tmp_path, {"dataset": "text", "path": str(file), "chat_template": True}, [{}])


def test_a_run_calibrated_on_its_own_text_is_repeatable(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(calibration={"dataset": "self", "samples": 8, "seq_len": 64, "precision": "float32"})
    for name in ("a", "b"):
        shown = flatq("run", recipe, "--out", tmp_path / name)
        assert shown.exit_code == 0, shown.stderr
    a, b = (json.loads((tmp_path / name / "artifact" / "manifest.json").read_text()) for name in ("a", "b"))
    assert a["tokens"] == b["tokens"]
    assert a["tokens"]["calibration"]["dataset"] == "self"
    assert [text["calibrated"] for text in a["tokens"]["judged"]] == [True, False]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert "self-text" in report["timing"]


def test_the_plan_tells_what_writing_takes(make_recipe: MakeRecipe) -> None:
    own = make_recipe("own", calibration={"dataset": "self", "samples": 8, "seq_len": 64})
    shown = flatq("plan", own)
    assert shown.exit_code == 0, shown.stderr
    assert "self-text" in shown.stdout
    other = flatq("plan", make_recipe("other", evaluation={"dataset": "held-out", "tokens": 256, "seq_len": 64}))
    assert "self-text" not in other.stdout


def test_tokens_that_the_model_writes_are_counted() -> None:
    mix = {"mix": [{"dataset": "self", "share": 1}, {"dataset": "python-docs", "share": 1}]}
    seen = CalibrationSpec.model_validate(mix | {"samples": 5, "seq_len": 10})
    assert self_tokens(seen, [EvaluationSpec(tokens=50, seq_len=20)]) == 30 + 40
    assert self_tokens(CalibrationSpec(dataset="c4"), [EvaluationSpec()]) == 0
