"""transformers.js writes what the artifact writes: in Node, and in Chromium with WebAssembly and WebGPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flatq.artifact import Artifact
from flatq_onnx import OnnxExporter, OnnxOptions
from tests.interop.greedy import greedy
from tests.interop.node import CHROMIUM, in_node

HERE = Path(__file__).parent / "web"
NEW, PROMPTS = 8, ["the bright river", "a slow bird sings under the stone of"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}the {% endif %}"
pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (HERE / "node_modules").is_dir(), reason="make interop-web installs transformers.js into tests/interop/web"
    ),
]
in_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium; set CHROMIUM to its path")
CASES = [
    ("node", {}),
    ("node", {"precision": "fp32"}),
    ("node", {"external_data_above": 0}),
    pytest.param("wasm", {}, marks=in_chromium),
    pytest.param("wasm", {"precision": "fp32"}, marks=in_chromium),
    pytest.param("wasm", {"decode_on_load": True}, marks=in_chromium),
    pytest.param("wasm", {"external_data_above": 0}, marks=in_chromium),
    pytest.param("webgpu", {}, marks=in_chromium),  # without a GPU it takes a minute or more
]


def written(engine: str, folder: Path) -> dict[str, Any]:
    """What transformers.js writes for the prompts: alone, as chats, in one batch."""
    found: dict[str, Any] = in_node(HERE / "run.mjs", engine, folder, {"prompts": PROMPTS, "newTokens": NEW})
    if "absent" in found:
        pytest.skip(found["absent"])
    return found


@pytest.fixture
def artifact(exported_run: tuple[Path, Path], tmp_path: Path) -> Artifact:
    """A tiny compressed model with codes and a chat template."""
    shutil.copytree(exported_run[1] / "artifact", tmp_path / "artifact")
    (tmp_path / "artifact" / "chat_template.jinja").write_text(TEMPLATE)
    return Artifact.open(tmp_path / "artifact")


@pytest.mark.parametrize(("engine", "options"), CASES, ids=str)
def test_it_writes_what_the_artifact_writes(
    artifact: Artifact, tmp_path: Path, engine: str, options: dict[str, Any]
) -> None:
    wanted = [greedy(artifact, text, NEW) for text in PROMPTS]
    chats = [greedy(artifact, f"<s>{text}\nthe ", NEW) for text in PROMPTS]
    unused = set(range(3, artifact.config.vocab)).difference(*wanted, *chats)
    artifact.settings["eos_token_id"] = unused.pop()  # no row ends early
    chosen = OnnxOptions.model_validate({"target": "web", "accuracy_level": 0, **options})
    folder = tmp_path / "mine"
    folder.mkdir()
    OnnxExporter().write(artifact, folder, chosen)
    found = written(engine, folder)
    assert found["single"] == wanted
    assert found["batch"] == wanted
    assert found["chat"] == chats
