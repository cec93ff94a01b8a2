"""GPTQModel, and transformers with it, read our GPTQ folders (`make interop-gptq`)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flatq.artifact import Artifact
from flatq.model.decoder import LINEARS, DecoderConfig
from flatq.model.grid import Grid
from flatq.model.weights import load_decoder
from flatq_safetensors import SafetensorsExporter, SafetensorsOptions
from tests.models import tiny_artifact, tiny_config

pytestmark = [
    pytest.mark.gptqmodel,
    pytest.mark.timeout(900),  # importing GPTQModel alone takes half a minute of an idle machine
    pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="no GPTQModel (make interop-gptq)"),
]

OWN_WIDTHS = tiny_config(d_qk=32, d_v=(16, 32), d_ff=(96, 64))
PLAIN = tiny_config(d_qk=32, d_v=(16, 16), d_ff=(96, 96))
EIGHT = {f"layers.{index}.down": Grid(8, 32) for index in range(2)}

TRANSFORMERS = """
from transformers import AutoModelForCausalLM, GPTQConfig
described = json.load(open(sys.argv[1] + "/config.json"))["quantization_config"]
rule = GPTQConfig(
    bits=described["bits"], group_size=described["group_size"], sym=described["sym"], desc_act=False,
    format=described["format"], backend="gptq_torch")
model, found = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=rule, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
assert not found["missing_keys"] and not found["mismatched_keys"], found
"""
GPTQMODEL = """
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(sys.argv[1], backend=BACKEND.GPTQ_TORCH, dtype=torch.float16, device="cpu").model
"""
SCRIPT = """
import json, sys
sys.modules["flatq"] = None  # as on a machine without flatq: any import of it fails
import numpy, torch
{load}
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
linear = model.model.layers[0].mlp.down_proj
numpy.savez(sys.argv[3], logits=logits.float().numpy(), weight=linear.dequantize_weight().T.float().numpy())
print(type(linear).__name__)
"""


def read_by(loader: str, folder: Path, tokens: torch.Tensor) -> Any:
    """Logits, and what the first ``down`` decodes to, in a process that knows nothing of flatq."""
    out = folder.parent / "read.npz"
    environment = {
        "HF_HOME": str(folder.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
        "GPTQMODEL_CPU_WORKERS": "2",  # with fewer, GPTQModel 7.7.0 dies on two cores
        "TORCHDYNAMO_DISABLE": "1",  # else it compiles every shape, for minutes
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(load=loader), str(folder), json.dumps(tokens.tolist()), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "TorchLinear"
    return np.load(out)


def in_half(artifact: Artifact, tokens: torch.Tensor) -> np.ndarray:
    """The artifact's logits with its decoded weights rounded to float16, as GPTQModel's CPU kernel holds them."""
    decoder = load_decoder(artifact)
    for layer in decoder.layers:
        for name in LINEARS:
            weight = getattr(layer, name).weight
            weight.data = weight.data.half().float()
    with torch.no_grad():
        return decoder(tokens).numpy()


@pytest.mark.parametrize(
    ("loader", "config", "grid", "overrides", "options"),
    [
        (TRANSFORMERS, OWN_WIDTHS, Grid(4, 32), {}, {"format": "gptq"}),
        (TRANSFORMERS, OWN_WIDTHS, Grid(3, 16), {}, {"format": "gptq"}),
        (TRANSFORMERS, OWN_WIDTHS, Grid(4, 32, symmetric=False), {}, {"format": "gptq_v2"}),
        (TRANSFORMERS, PLAIN, Grid(4, 32), {}, {"format": "gptq", "pad_values": True}),
        (GPTQMODEL, PLAIN, Grid(4, 32), EIGHT, {"format": "gptq", "pad_values": True}),
    ],
    ids=["own widths", "3 bit", "v2", "plain", "GPTQModel, mixed bits"],
)
def test_a_gptq_folder_gives_the_artifacts_logits(
    tmp_path: Path,
    tiny_model: Path,
    loader: str,
    config: DecoderConfig,
    grid: Grid,
    overrides: dict[str, Grid],
    options: dict[str, Any],
) -> None:
    artifact = tiny_artifact(tmp_path / "a", config, grid=grid, overrides=overrides)
    for file in tiny_model.glob("tokenizer*"):  # GPTQModel loads no folder without one
        shutil.copy(file, artifact.root)
    folder = SafetensorsExporter().write(artifact, tmp_path / "out", SafetensorsOptions(**options)).root
    tokens = torch.randint(3, config.vocab, (2, 9), generator=torch.Generator().manual_seed(1))
    read = read_by(loader, folder, tokens)
    stored = artifact.tensor("layers.0.down.weight").dequantize()  # type: ignore[union-attr]
    np.testing.assert_array_equal(read["weight"], stored.half().float().numpy())
    expected = in_half(artifact, tokens)
    np.testing.assert_allclose(read["logits"], expected, atol=0.03 * expected.std())
