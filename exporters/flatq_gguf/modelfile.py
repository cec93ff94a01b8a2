"""A Modelfile for Ollama beside the GGUF file: ``ollama create NAME -f Modelfile``.

Ollama does not run the chat template of a GGUF file, which is written in Jinja. It compares it with a list of templates
that it knows, and its own templates are written in another language. So the Modelfile has a TEMPLATE if the chat
template can be written in that language: every message is its content between fixed texts that depend on the role, and
a fixed text precedes the answer. The texts are found by writing marked messages, and the result is compared with
the chat template on other chats that end with a question. If any differs, TEMPLATE is left out.

Parameters are those of the publisher's generation settings, and the end tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatq.export import Artifact, TemplateRefuses, end_tokens, open_tokenizer, write_atomically, written_out
from flatq_gguf.tokenizer import Vocabulary

MODELFILE = "Modelfile"
LARGEST_CONTEXT = 8192  # positions; Ollama allocates the whole cache at once
# Keys of generation_config.json and Ollama's names for them.
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
ROLES = ("system", "user", "assistant")
DATES = ("01 Jan 2025", "02 Feb 2026")  # a template that writes the date is not made of fixed texts
Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template of fixed texts.

    Attributes:
        opening: text before the first message, if that is no system message.
        around: the texts before and after the content of each role.
        answer: text before the model's answer.
    """

    opening: str
    around: Mapping[str, tuple[str, str]]
    answer: str

    def written(self, chat: Chat) -> str:
        """The text of a chat up to the model's answer."""
        parts = [] if chat[0]["role"] == "system" else [self.opening]
        parts += [message["content"].join(self.around[message["role"]]) for message in chat]
        return "".join([*parts, self.answer])

    def ollama(self) -> str:
        """The template in Ollama's language, which is that of Go's text/template."""
        start = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_literal(self.opening)}{{{{ end }}}}'
        branches = [
            f'{{{{ if eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}{{{{ end }}}}'
            for role, (before, after) in self.around.items()
        ]
        body = f"{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}"
        return f"{start if self.opening else ''}{body}{_literal(self.answer)}"


def _literal(text: str) -> str:
    """Fixed text in a template of Go, where braces open an action."""
    return text.replace("{{", '{{ "{{" }}')


def _chat(*contents: str, system: str | None = None) -> Chat:
    """A chat in which user and assistant alternate."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


MARKS = {role: f"\N{REPLACEMENT CHARACTER}{role}\N{REPLACEMENT CHARACTER}" for role in ROLES}
PROBES: tuple[Chat, ...] = (
    _chat("Hello"),
    _chat("Hello", system="Be short."),
    _chat("  two spaces, a line\n\n", " and {{ braces }}\n", "Third <b>turn</b>"),
    _chat("one", "two", "three", "four", "five", system=" \nkeep "),
    _chat("", "x", "y"),
)


def template_of(tokenizer: Any, bos: str) -> Template | None:
    """The chat template as fixed texts; None if it is not made of fixed texts, or there is none.

    Args:
        tokenizer: the model's, with its chat template.
        bos: begin-of-text token that llama.cpp adds; the chat template's own is left out then. Empty if it adds none.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        found = _divided(tokenizer)
    except (ValueError, TemplateRefuses):  # a mark is changed, missing or written twice, or a chat is refused
        return None
    try:
        for date in DATES:
            if [found.written(chat) for chat in PROBES] != _texts(tokenizer, PROBES, date):
                return None
    except TemplateRefuses:
        return None
    start = found.around["system"][0]
    if bos and found.opening.startswith(bos) and start.startswith(bos):
        around = {**found.around, "system": (start.removeprefix(bos), found.around["system"][1])}
        return Template(found.opening.removeprefix(bos), around, found.answer)
    return None if bos and (bos in found.opening or bos in start) else found


def _divided(tokenizer: Any) -> Template:
    """The fixed texts around the marks, divided at the borders of messages.

    Raises:
        ValueError: they are not fixed.
        TemplateRefuses: a chat is refused.
    """
    user, assistant, system = MARKS["user"], MARKS["assistant"], MARKS["system"]
    alone, answered = _texts(tokenizer, [_chat(user), _chat(user, assistant)], answer=False)
    asked, third, led = _texts(tokenizer, [_chat(user), _chat(user, assistant, user), _chat(user, system=system)])
    opening, user_after = alone.split(user)
    _, between = answered.split(user)
    before_assistant, assistant_after = between.split(assistant)
    before_user = third.split(assistant)[1].split(user)[0].removeprefix(assistant_after)
    system_before, rest = led.split(system)
    around = {
        "system": (system_before, rest.split(user)[0].removesuffix(before_user)),
        "user": (before_user, user_after),
        "assistant": (before_assistant.removeprefix(user_after), assistant_after),
    }
    return Template(opening.removesuffix(before_user), around, asked.split(user)[1].removeprefix(user_after))


def _texts(tokenizer: Any, chats: Sequence[Chat], date: str = DATES[0], *, answer: bool = True) -> list[str]:
    return list(written_out(tokenizer, chats, add_generation_prompt=answer, date_string=date))


def write_modelfile(
    out: Path, artifact: Artifact, files: Sequence[Path], vocabulary: Vocabulary | None, context: int
) -> tuple[list[Path], list[str]]:
    """Write the Modelfile, if Ollama can read the file; returns its path and notes for the report.

    Args:
        out: folder of the export.
        artifact: the exported artifact.
        files: the parts of the model.
        vocabulary: of the file; None if it has none.
        context: context length in the file.
    """
    if len(files) > 1 or vocabulary is None:
        return [], ["no Modelfile for Ollama: it reads one file that holds the tokenizer"]
    lines = [f"FROM ./{files[0].name}"]
    if context > LARGEST_CONTEXT:
        lines.append(f"# The model has {context} positions; Ollama keeps a cache for num_ctx of them.")
    lines.append(f"PARAMETER num_ctx {min(context, LARGEST_CONTEXT)}")
    lines += _parameters(artifact.generation())
    lines += [f'PARAMETER stop "{text}"' for text in _stops(artifact, vocabulary)]
    notes = []
    if "default" in vocabulary.chat_templates:
        bos = vocabulary.tokens[vocabulary.ids["bos"]] if vocabulary.flags.get("add_bos_token") else ""
        template = template_of(open_tokenizer(artifact.root), bos)
        text = "" if template is None else template.ollama()
        if template is None or '"""' in text:
            notes = ["Modelfile without TEMPLATE: the chat template is no sequence of fixed texts; Ollama has a list"]
        else:
            lines.append(f'TEMPLATE """{text}"""')
    write_atomically(out / MODELFILE, "".join(f"{line}\n" for line in lines).encode())
    return [out / MODELFILE], notes


def _parameters(generation: Mapping[str, Any]) -> list[str]:
    """Sampling settings of ``generation_config.json``; without ``do_sample`` only the penalty applies."""
    found = []
    for key, name in PARAMETERS.items():
        value = generation.get(key)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if plain and (generation.get("do_sample") is True or key == "repetition_penalty"):
            found.append(f"PARAMETER {name} {value}")
    return found


def _stops(artifact: Artifact, vocabulary: Vocabulary) -> list[str]:
    """Texts of the end tokens; a Modelfile cannot quote quotes and line breaks."""
    ids = end_tokens(artifact.settings) | end_tokens(artifact.generation())
    texts = [vocabulary.tokens[index] for index in sorted(ids) if index < len(vocabulary.tokens)]
    return [text for text in texts if not set(text) & {'"', "\n", "\r"}]
