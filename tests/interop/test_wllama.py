"""wllama, llama.cpp as WebAssembly in Chromium, writes what the artifact writes, as text and as a chat."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flatq.artifact import Artifact
from flatq.tokenizer import open_tokenizer
from flatq_gguf import GgufExporter, GgufOptions
from tests.interop.greedy import greedy
from tests.interop.node import CHROMIUM, in_node

HERE = Path(__file__).parent / "web"
WORDS = ["the", "bright", "river", "bird", "under", "stone"]
NEW = 6
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}the {% endif %}"
pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium; set CHROMIUM to its path"),
    pytest.mark.skipif(
        not (HERE / "node_modules" / "@wllama").is_dir(),
        reason="make interop-web installs wllama into tests/interop/web",
    ),
]


def readable(artifact: Artifact, prompt: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Pairs of words, and the text that follows their prompt; wllama 3.13 ends with an error at half a character."""
    tokenizer = open_tokenizer(artifact.root)
    for first, second in itertools.product(WORDS, WORDS):
        ids = greedy(artifact, prompt(f"{first} {second}"), NEW)
        text = tokenizer.decode(ids)
        ends = not set(ids).isdisjoint(tokenizer.all_special_ids)
        if text.isprintable() and text.strip() == text and "\ufffd" not in text and not ends:
            yield f"{first} {second}", text


def test_it_writes_what_the_artifact_writes(exported_run: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(exported_run[1] / "artifact", tmp_path / "artifact")
    (tmp_path / "artifact" / "chat_template.jinja").write_text(TEMPLATE)
    artifact = Artifact.open(tmp_path / "artifact")
    texts = dict(itertools.islice(readable(artifact, str), 3))
    chats = dict(itertools.islice(readable(artifact, lambda text: f"{text}\nthe "), 2))
    assert texts, "no prompt has a readable continuation"
    assert chats, "no chat has a readable continuation"
    (tmp_path / "file").mkdir()
    exported = GgufExporter().write(artifact, tmp_path / "file", GgufOptions(precision="f32"))
    task = {"prompts": list(texts), "chats": list(chats), "newTokens": NEW}
    found = in_node(HERE / "wllama.mjs", exported.files[0], task)
    assert found["texts"] == list(texts.values())
    assert found["chats"] == list(chats.values())
