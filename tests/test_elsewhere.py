"""Runs on another device than the CPU: nothing that lies there meets what lies here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from flatq.artifact import Artifact
from flatq.model.weights import dense
from flatq_onnx.check import too_old_for_int8
from tests.conftest import FLAT, GPTQ, MakeRecipe, flatq

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch has no Python devices"
)
STAGES: dict[str, list[dict[str, Any]]] = {
    "default": [FLAT, GPTQ],
    "paper": [
        {"flat": FLAT["flat"] | {"method": "paper"}},
        {"gptq": GPTQ["gptq"] | {"symmetric": False}},
    ],
    "budget": [{"gptq": {"average_bits": 3.5, "group_size": 16}}],
}


@pytest.mark.slow  # half a minute; .ci/run runs it
def test_runs_elsewhere_end_as_on_the_cpu(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    exports = [] if too_old_for_int8() else [{"onnx": {"cache_type": "int8"}}]
    recipes = {name: make_recipe(name=name, stages=stages, exports=exports) for name, stages in STAGES.items()}
    pairs = [part for name, recipe in recipes.items() for part in (str(recipe), str(tmp_path / f"{name} away"))]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.elsewhere", *pairs],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name, recipe in recipes.items():
        assert flatq("run", recipe, "--out", tmp_path / name, "--device", "cpu").exit_code == 0
        here, there = Artifact.open(tmp_path / name), Artifact.open(tmp_path / f"{name} away")
        assert here.config == there.config, name
        for tensor in here.names():
            assert torch.equal(dense(here.tensor(tensor)), dense(there.tensor(tensor))), (name, tensor)
        if exports:
            ranges = there.cache_ranges()
            assert all(torch.equal(largest, ranges[part]) for part, largest in here.cache_ranges().items())


def test_tensors_of_two_devices_do_not_meet() -> None:
    code = """
import torch, tests.elsewhere as there
there.backend_registration._setup_privateuseone_for_python_backend(there.NAME, there.Backend())
with there.Away():
    x = torch.ones(2, device=there.NAME)
    assert (x + x).tolist() == [2, 2] and (x * torch.tensor(3.0)).device.type == there.NAME
    try:
        x + torch.ones(2)
    except RuntimeError as error:
        print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert "aten.add: some tensors are elsewhere, and [(2,)] on the CPU" in shown.stdout, shown.stderr


@pytest.mark.slow  # half a minute; .ci/run runs it
def test_the_script_for_a_lent_gpu_does_its_steps_at_toy_size_and_continues(tmp_path: Path) -> None:
    script = [sys.executable, "benchmarks/gpu.py", "--work", str(tmp_path), "--shape", "toy", "--device", "cpu"]
    little = ["--tokens", "1024", "--prompt", "8", "--new-tokens", "4"]
    root = Path(__file__).parents[1]
    steps = ["checkpoint", "compress", "dense", "less", "speed"]
    for _ in range(2):
        done = subprocess.run([*script, *little], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        reported = [line.split(":")[0] for line in done.stdout.splitlines() if ': {"seconds"' in line]
        assert reported == steps
        steps = []  # the second call finds all results
    found = json.loads((tmp_path / "gpu.json").read_text())
    runs = [found[name]["result"]["exports"]["int4"] for name in ("compress", "less", "dense")]
    assert all(one["verify"] and not one["error"] for one in runs)
    assert runs[0]["bytes"] < runs[1]["bytes"] < runs[2]["bytes"]
    assert {one["name"] for one in found["speed"]["result"]} == {"compress", "dense", "less"}
