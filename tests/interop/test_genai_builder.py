"""onnxruntime-genai's model builder reads our GPTQ folders, and its graph computes what the artifact computes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flatq.artifact import Artifact
from flatq.model.weights import load_decoder
from tests.conftest import MakeRecipe, flatq

pytestmark = [
    pytest.mark.gptqmodel,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("onnxruntime_genai") is None, reason="no onnxruntime-genai (make interop-gptq)"
    ),
]

RUN = """
import json, sys
import numpy, onnxruntime_genai
model = onnxruntime_genai.Model(sys.argv[1])
settings = onnxruntime_genai.GeneratorParams(model)
settings.set_search_options(max_length=64, do_sample=False)
generator = onnxruntime_genai.Generator(model, settings)
generator.append_tokens(numpy.array(json.loads(sys.argv[2]), dtype=numpy.int32))
logits = numpy.array(generator.get_output("logits"))
for _ in range(4):
    generator.generate_next_token()
numpy.savez(sys.argv[3], logits=logits, tokens=numpy.array(generator.get_sequence(0)))
"""


def python(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_the_builder_opens_a_gptq_folder_and_its_graph_gives_the_artifacts_logits(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    stages = [{"gptq": {"bits": 4, "group_size": 32}}]
    recipe = make_recipe(stages=stages, exports=[{"safetensors": {"format": "gptq"}}])
    shown = flatq("run", recipe, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.stderr
    found = importlib.util.find_spec("onnxruntime_genai")
    assert found is not None
    assert found.origin is not None
    builder = Path(found.origin).parent / "models" / "builder.py"
    folder, graph = tmp_path / "out" / "exports" / "safetensors", tmp_path / "graph"
    # The builder would quantize the head, too, and compute with int8 activations.
    exact = ["--extra_options", "accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
    python(builder, "-i", folder, "-o", graph, "-p", "int4", "-e", "cpu", "-c", tmp_path / "cache", *exact)
    tokens = torch.randint(3, 320, (1, 12), generator=torch.Generator().manual_seed(1))
    python("-c", RUN, graph, json.dumps(tokens[0].tolist()), tmp_path / "read.npz")
    read = np.load(tmp_path / "read.npz")
    decoder = load_decoder(Artifact.open(tmp_path / "out"))
    with torch.no_grad():
        expected = decoder(tokens).numpy()
    logits = read["logits"].reshape(1, -1, expected.shape[-1])
    np.testing.assert_allclose(logits[:, -1], expected[:, -1], atol=5e-3 * expected.std())
    assert len(read["tokens"]) == 16
