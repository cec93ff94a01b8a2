"""What needs an NVIDIA GPU: it solves as the CPU does, and whole runs end alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from flatq.artifact import Artifact
from flatq.calibration.grams import Gram
from flatq.compress.heads import output_basis
from flatq.compress.mlp import eliminate, nystroem, ridge_leverage
from flatq.doctor import _cuda
from flatq.export.protocols import exporter_named
from flatq.linalg import drift_correction
from flatq.machine.memory import device_memory_bytes
from flatq.model.grid import Grid
from flatq.quantize.gptq import gptq
from tests.conftest import FLAT, GPTQ, MakeRecipe, flatq
from tests.laws.test_gptq_laws import correlated_gram, random
from tests.test_distributed import perplexity_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, -1), Grid(4, 16, False)], ids=str)
def test_gptq_gives_the_codes_of_the_cpu(grid: Grid) -> None:
    w, gram = random(48, 128), correlated_gram(128)
    here = gptq(w, gram, grid)
    there = gptq(w.cuda(), gram.cuda(), grid)
    assert there.weight.codes.is_cuda
    assert (here.weight.codes == there.weight.codes.cpu()).double().mean() > 0.995, "but for rounding on the edge"
    assert there.error_of() == pytest.approx(here.error_of(), rel=1e-2)


def test_flat_solves_as_on_the_cpu() -> None:
    w, gram = random(32, 96), correlated_gram(96)
    there = w.cuda(), gram.cuda()
    keep = eliminate(w, gram, 64, 0.01).kept(96)
    assert torch.equal(eliminate(*there, 64, 0.01).kept(96).cpu(), keep)
    assert torch.allclose(
        nystroem(*there, keep.cuda(), 1e-4).cpu(), nystroem(w, gram, keep, 1e-4), rtol=1e-2, atol=5e-3
    )
    assert torch.allclose(ridge_leverage(there[1], 0.01).cpu(), ridge_leverage(gram, 0.01), atol=1e-4)
    drift = random(96, 32, seed=3)
    assert torch.allclose(
        drift_correction(there[1], drift.cuda(), 0.1).cpu(), drift_correction(gram, drift, 0.1), rtol=1e-3, atol=1e-3
    )
    for carried, on_gpu in zip(output_basis(gram, w, 3, 2), output_basis(there[1], there[0], 3, 2), strict=True):
        # A direction of a basis has no sign of its own.
        assert torch.allclose(on_gpu.cpu().abs(), carried.abs(), rtol=1e-2, atol=1e-3)


def test_grams_are_summed_as_on_the_cpu() -> None:
    x = random(3, 40, 1500, seed=2)
    here, there = Gram(1500), Gram(1500, device="cuda")
    for part in x:
        here.update(part)
        there.update(part.cuda())
    assert torch.allclose(there.mean().cpu(), here.mean(), rtol=1e-4, atol=1e-4)


def test_a_run_on_the_gpu_ends_as_one_on_the_cpu(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(stages=[FLAT])
    for device in ("cpu", "cuda"):
        shown = flatq("run", recipe, "--out", tmp_path / device, "--device", device)
        assert shown.exit_code == 0, shown.stderr
    here, there = (Artifact.open(tmp_path / device) for device in ("cpu", "cuda"))
    assert here.config == there.config, "the same plan"
    assert perplexity_of(tmp_path / "cuda") == pytest.approx(perplexity_of(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 0.03), ("auto", 0.06)])
def test_a_whole_run_on_the_gpu_is_as_good(
    precision: str, tolerance: float, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    calibration = yaml.safe_load(make_recipe().read_text())["calibration"]
    recipe = make_recipe(stages=[FLAT, GPTQ], calibration=calibration | {"precision": precision})
    for device in ("cpu", "cuda:0"):
        shown = flatq("run", recipe, "--out", tmp_path / device[:3], "--device", device)
        assert shown.exit_code == 0, shown.stderr
    assert perplexity_of(tmp_path / "cud") == pytest.approx(perplexity_of(tmp_path / "cpu"), rel=tolerance)


@pytest.mark.skipif("cuda" not in exporter_named("onnx").providers(), reason="needs onnxruntime with CUDA")
def test_an_export_is_checked_and_measured_where_it_will_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    bench = {"provider": "cuda", "prompt": 8, "new_tokens": 4, "repeats": 1, "baseline": True}
    recipe = make_recipe(stages=[FLAT], exports=[{"onnx": {"target": "cuda", "precision": "fp16"}}], bench=bench)
    shown = flatq("run", recipe, "--out", tmp_path / "run", "--device", "cuda")
    assert shown.exit_code == 0, shown.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    checked = report["exports"][0]["verify"]
    assert (checked["exact"]["provider"], checked["deployed"]["provider"]) == (
        "CPUExecutionProvider",
        "CUDAExecutionProvider",
    )
    assert {entry["name"]: entry["provider"] for entry in report["bench"]} == {
        "baseline": "CUDAExecutionProvider",
        "onnx": "CUDAExecutionProvider",
    }


def test_the_doctor_names_the_gpu() -> None:
    assert torch.cuda.get_device_name(0) in _cuda()


def test_what_the_gpu_holds_is_known() -> None:
    held = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    found = device_memory_bytes(os.getpid())
    assert found is not None
    assert found >= len(held)


def test_a_gpu_that_is_not_there_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    shown = flatq("run", make_recipe(), "--out", tmp_path / "out", "--device", f"cuda:{torch.cuda.device_count()}")
    assert shown.exit_code == 2
    assert "not on this machine; it has cpu, cuda:0" in shown.stderr


def test_processes_without_a_gpu_each_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    count = torch.cuda.device_count() + 1
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "flatq", "run"]
    ended = subprocess.run(
        [*command, make_recipe(), "--out", tmp_path / "out", "--device", "cuda"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ended.returncode != 0
    assert f"{count} processes on {count - 1} GPU" in ended.stderr
