"""The Modelfile for Ollama: a template only where it writes what the chat template writes, the publisher's settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from flatq.artifact import Artifact
from flatq_gguf.modelfile import PROBES, Template, template_of, write_modelfile
from flatq_gguf.tokenizer import read_vocabulary

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = CHATML.replace("You help.", "{{ '{{' }}").replace("<|im_end|>", "</s>")
BEGINS = "{{ bos_token }}" + CHATML.replace(
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}", ""
)
INST = (
    "{% for m in messages %}{% if m.role == 'system' %}<<SYS>>{{ m.content }}<</SYS>>{% elif m.role == 'user' %}"
    "[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
EXACT = {"chatml": CHATML, "braces": PLAIN, "begins": BEGINS, "inst": INST}
NOT_FIXED = {
    "trims": CHATML.replace("m.content", "m.content | trim"),
    "date": CHATML.replace("You help.", "Today is {{ date_string }}."),
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML,
    "system in the question": CHATML.replace("{{ m.role }}\n", "{{ m.role }}\n{{ messages[0].content }} "),
    "number": CHATML.replace("<|im_end|>", "<|im_end|>{{ loop.index }}"),
    "nothing": "hello",
    "loops": "{% for a in range(99999999) %}{% for b in range(99999999) %}{% endfor %}{% endfor %}",
}
ACTION = re.compile(r"\{\{ (.*?) \}\}")


def evaluated(template: str, chat: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that are used."""
    body = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*?)\{\{ end \}\}((?:(?!\{\{ end \}\}).)*)", template, re.S)
    assert body, template
    start, each, answer = body.groups()
    opening = re.fullmatch(r'\{\{ if ne \(index \.Messages 0\)\.Role "system" \}\}(.*)\{\{ end \}\}', start, re.S)
    assert opening or not start
    parts = [opening.group(1)] if opening and chat[0]["role"] != "system" else []
    branches = re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', each, re.S)
    again = [f'{{{{ if eq .Role "{role}" }}}}{text}{{{{ end }}}}' for role, text in branches]
    assert "".join(again) == each
    for message in chat:
        text = dict(branches)[message["role"]]
        before, after = (part.replace('{{ "{{" }}', "\0") for part in text.split("{{ .Content }}"))
        parts.append(before + message["content"] + after)
    written = "".join([*parts, answer])
    return written.replace('{{ "{{" }}', "{{").replace("\0", "{{")


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    found: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    return found


@pytest.mark.parametrize("name", EXACT)
def test_a_template_of_fixed_texts_writes_the_same_in_ollama(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = EXACT[name]
    found = template_of(tokenizer, "")
    assert isinstance(found, Template)
    for chat in PROBES:
        theirs = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert evaluated(found.ollama(), chat) == theirs


@pytest.mark.parametrize("name", NOT_FIXED)
def test_any_other_template_is_left_to_ollama(
    name: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatq.chats.SECONDS", 0.3 if name == "loops" else 10.0)
    tokenizer.chat_template = NOT_FIXED[name]
    assert template_of(tokenizer, "") is None
    tokenizer.chat_template = None
    assert template_of(tokenizer, "") is None


def test_the_token_that_llama_cpp_adds_is_not_in_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = BEGINS
    bos = str(tokenizer.bos_token)
    whole, bare = template_of(tokenizer, ""), template_of(tokenizer, bos)
    assert whole is not None
    assert bare is not None
    assert whole.opening == bos
    assert [whole.written(chat) for chat in PROBES] == [bos + bare.written(chat) for chat in PROBES]
    tokenizer.chat_template = CHATML.replace("You help.", "{{ bos_token }}")
    assert template_of(tokenizer, bos) is None


Written = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def written(exported_run: tuple[Path, Path], tmp_path: Path) -> Written:
    """The Modelfile and the notes for an artifact with a chat template and generation settings."""

    def write(chat: str | None, generation: dict[str, Any], parts: int = 1, context: int = 64) -> tuple[str, list[str]]:
        import shutil

        root = Path(shutil.copytree(exported_run[1] / "artifact", tmp_path / "artifact"))
        (root / "generation_config.json").write_text(json.dumps(generation))
        (root / "chat_template.jinja").unlink(missing_ok=True)
        if chat is not None:
            (root / "chat_template.jinja").write_text(chat)
        artifact = Artifact.open(root, check=False)
        vocabulary = read_vocabulary(artifact, artifact.config.vocab, None)
        files = [Path(f"model-{part}.gguf") for part in range(parts)]
        found, notes = write_modelfile(tmp_path, artifact, files, vocabulary, context)
        return (found[0].read_text() if found else "", notes)

    return write


def test_a_modelfile_has_the_publishers_settings(written: Written) -> None:
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [1, 5]}
    text, notes = written(CHATML, sampling, context=9000)
    lines, _, template = text.partition("TEMPLATE ")
    assert lines.splitlines()[:-2] == [
        "FROM ./model-0.gguf",
        "# The model has 9000 positions; Ollama keeps a cache for num_ctx of them.",
        "PARAMETER num_ctx 8192",
        "PARAMETER temperature 0.6",
        "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1.1",
    ]
    assert all(line.startswith('PARAMETER stop "') for line in lines.splitlines()[-2:])
    assert template.startswith('"""{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nYou help.')
    assert template.endswith('{{ end }}{{ end }}<|im_start|>assistant\n"""\n')
    assert notes == []


def test_what_is_not_stated_is_left_to_ollama(written: Written) -> None:
    text, notes = written(NOT_FIXED["trims"], {"temperature": 0.6, "repetition_penalty": 1.2})
    assert text.splitlines()[:3] == ["FROM ./model-0.gguf", "PARAMETER num_ctx 64", "PARAMETER repeat_penalty 1.2"]
    assert "TEMPLATE" not in text
    assert [note.partition(":")[0] for note in notes] == ["Modelfile without TEMPLATE"]


def test_a_model_without_a_chat_template_has_no_template(written: Written) -> None:
    text, notes = written(None, {})
    assert "TEMPLATE" not in text
    assert notes == []


def test_ollama_reads_no_parts(written: Written) -> None:
    assert written(CHATML, {}, parts=2) == ("", ["no Modelfile for Ollama: it reads one file that holds the tokenizer"])
