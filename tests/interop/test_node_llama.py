"""node-llama-cpp, llama.cpp in Node, writes what the artifact writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flatq.artifact import Artifact
from flatq_gguf import GgufExporter, GgufOptions
from tests.interop.greedy import greedy
from tests.interop.node import in_node

HERE = Path(__file__).parent / "gguf"
NEW, PROMPTS = 8, ["the bright river", "a slow bird sings under the stone of"]
pytestmark = [
    pytest.mark.node_llama,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (HERE / "node_modules").is_dir(), reason="make interop-gguf installs node-llama-cpp into tests/interop/gguf"
    ),
]


def written(file: Path) -> list[dict[str, list[int]]]:
    """Ids of the prompts and of what follows them."""
    found: list[dict[str, list[int]]] = in_node(HERE / "run.mjs", file, {"prompts": PROMPTS, "newTokens": NEW})
    return found


@pytest.mark.parametrize(
    "options", [{"precision": "f32"}, {"precision": "f32", "layout": "deci"}, {"precision": "f16"}], ids=str
)
def test_it_writes_what_the_artifact_writes(
    exported_run: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    artifact = Artifact.open(exported_run[1] / "artifact")
    exported = GgufExporter().write(artifact, tmp_path, GgufOptions(**options))
    found = written(next(file for file in exported.files if file.suffix == ".gguf"))
    assert [len(row["written"]) for row in found] == [NEW] * len(PROMPTS)
    if options["precision"] == "f32":  # rounding changes a random model's text
        assert [row["written"] for row in found] == [greedy(artifact, text, NEW) for text in PROMPTS]
