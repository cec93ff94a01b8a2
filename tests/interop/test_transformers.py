"""Other releases of transformers open what flatq writes: the tokenizer, and models whose code travels with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatq.artifact import Artifact, tokenizer_in
from flatq.export.generate import DecoderRunner
from flatq.export.protocols import exporter_named
from flatq_safetensors.configs import TRANSFORMERS
from tests.conftest import MakeRecipe, flatq

SITES = Path(os.environ.get("FLATQ_TRANSFORMERS_SITES", "."))
NEW = 6
pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(Path() == SITES, reason="make interop-transformers sets FLATQ_TRANSFORMERS_SITES"),
]
TEXT = "the bright river of 2024"
PROBE = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, new = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(text, return_tensors="pt")["input_ids"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
settings = dict(max_new_tokens=int(new), do_sample=False, eos_token_id=None, pad_token_id=0)
rows = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
print("FOUND", json.dumps([transformers.__version__, type(model).__name__, rows[0].tolist()]))
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers copies the code of a folder to."""
    return tmp_path_factory.mktemp("modules")


@pytest.mark.parametrize("options", [{"format": "fp32"}, {}], ids=["dense", "compressed"])
@pytest.mark.parametrize("version", TRANSFORMERS)
def test_a_folder_with_its_own_code_writes_what_the_artifact_writes(
    make_recipe: MakeRecipe, tmp_path: Path, modules: Path, version: str, options: dict[str, Any]
) -> None:
    shown = flatq("run", make_recipe(stop_above=None), "--out", tmp_path / "run")
    assert shown.exit_code == 0, shown.stderr
    artifact, out = Artifact.open(tmp_path / "run"), tmp_path / f"own-{version}-{len(options)}"
    exporter = exporter_named("safetensors")
    out.mkdir()
    exporter.write(artifact, out, exporter.Options(**options))
    # Without flatq on the path, or its classes would be found instead of the folder's.
    site = [str(SITES.resolve() / version)] if (SITES / version).is_dir() else []
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(site), "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, out, TEXT, str(NEW)], env=given, capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    line = next(line for line in ran.stdout.splitlines() if line.startswith("FOUND"))
    assert json.loads(line.removeprefix("FOUND")) == [version, "FlatqHubForCausalLM", greedy(artifact)]


def greedy(artifact: Artifact) -> list[int]:
    written: list[int] = tokenizer_in(artifact.root)(TEXT)["input_ids"]
    runner, ids = DecoderRunner(artifact), np.array([written])
    logits = runner.start(ids, ids.shape[1] + NEW)
    for _ in range(NEW):
        written.append(int(logits[0].argmax()))
        logits = runner.step(np.array(written[-1:]))
    return written
