"""Chat templates that loop, allocate, recurse or raise end with one line; usual ones give what transformers gives."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from flatq import chats
from flatq.calibration.self_text import chat_script
from flatq.chats import TemplateRefuses, written_out
from flatq.errors import RecipeError
from flatq.export.generate import prompt_ids

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork templates run without limits")
CHATS = [[{"role": "user", "content": "The stone?"}], [{"role": "user", "content": "é\n{{ 1 }}"}] * 3]
USUAL = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ date_string }}"
)
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "computes": "{{ 9 ** (9 ** 9) }}",
    "allocates": "{{ 'a' * 10 ** 11 }}",
    "pads": "{{ '%099999999999d' % 3 }}",
    "doubles": "{% set n = namespace(t='aa') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "writes": "{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "raises": "{{ raise_exception('no system\nmessage here') }}",
    "divides": "{{ 1 / 0 }}",
    "is no template": "{% for",
    "runs code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reads a file": "{% include '/etc/passwd' %}",
    "imports": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch pwned') }}",
}


def test_usual_templates_give_what_transformers_gives(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = USUAL
    settings = {"add_generation_prompt": True, "date_string": "1 Jan"}
    direct = [tokenizer.apply_chat_template(chat, tokenize=False, **settings) for chat in CHATS]
    assert list(written_out(tokenizer, CHATS, **settings)) == direct
    assert list(written_out(tokenizer, [])) == []


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_in_one_line(
    template: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "SECONDS", 3.0)
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(TemplateRefuses) as refused:
        list(written_out(tokenizer, CHATS))
    assert time.monotonic() - began < 10
    assert str(refused.value).strip()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) <= 300
    assert list(tmp_path.iterdir()) == []
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 << 20, "KiB"


def test_a_prompt_whose_template_does_not_end_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "SECONDS", 1.0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = HOSTILE["loops"]
    with pytest.raises(RecipeError, match=r"template refuses the prompt \(it did not end within 1 seconds\)"):
        prompt_ids(tokenizer, "The", chat=True)
    assert chat_script(tokenizer, frozenset([1])) is None
