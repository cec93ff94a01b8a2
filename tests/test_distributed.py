"""Several processes on one run: the same plan, the same weights, and a way on when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from flatq.artifact import Artifact
from flatq.machine import distributed
from flatq.model.weights import dense
from tests.conftest import FLAT, GPTQ, LAYERS, MakeRecipe, flatq
from tests.processes import statistics

BLOCKS = 2 * LAYERS
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo, SIGKILL")


def launch(processes: int, recipe: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    """``torchrun --nproc-per-node N -m flatq run RECIPE --out OUT``."""
    return torchrun(processes, ["-m", "flatq", "run", str(recipe), "--out", str(out), "--device", "cpu"], log)


def torchrun(processes: int, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """``torchrun --nproc-per-node N ARGUMENTS``; what it prints goes to ``log``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
            cwd=Path(__file__).parents[1],
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def assert_same_model(one: Path, other: Path, tolerance: float) -> None:
    a, b = Artifact.open(one), Artifact.open(other)
    assert a.config == b.config, "the same plan"
    assert a.names() == b.names()
    for name in a.names():
        x, y = dense(a.tensor(name)).double(), dense(b.tensor(name)).double()
        assert (x - y).norm() <= tolerance * x.norm(), name


def perplexity_of(run: Path) -> float:
    return float(json.loads((run / "report.json").read_text())["result"]["perplexity"])


def test_a_finished_process_of_several_ends_well_whatever_is_left_in_it() -> None:
    code = """
import atexit, os
from flatq.machine import distributed
atexit.register(os.abort)
print("done", end="")
distributed.leave()
"""
    ended = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **several}, stdout=subprocess.PIPE, check=False)
        for several in ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1"})
    ]
    assert [process.returncode for process in ended] == [0, -signal.SIGABRT]
    assert ended[0].stdout == b"done"


@pytest.mark.parametrize("rows", [1, 2])
def test_a_process_without_rows_takes_part_in_every_statistic(rows: int, tmp_path: Path) -> None:
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    shared.mkdir()
    started = torchrun(3, ["-m", "tests.processes", str(shared), str(rows)], tmp_path / "log")
    expected = statistics(rows, alone)
    assert started.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    found = load_file(shared / "statistics.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


# Trained by the first process alone; steps so small that rounding in the walk stays the largest difference.
RECOVER = {"recover": {"steps": 2, "samples": 4, "tokens": 64, "learning_rate": 1e-6}}
MIXED_BITS = {"gptq": {"average_bits": 3.6, "group_size": 16, "correction": 0.5}}


@pytest.mark.parametrize(
    ("processes", "samples", "stages", "tolerance"),
    [
        pytest.param(2, 8, [FLAT, RECOVER], 1e-5, id="2 processes"),
        pytest.param(3, 8, [FLAT], 1e-5, id="3 processes", marks=pytest.mark.slow),
        pytest.param(2, 1, [FLAT], 1e-5, id="1 sample on 2 processes", marks=pytest.mark.slow),
        pytest.param(4, 1, [MIXED_BITS], 1e-5, id="1 sample on 4 processes, measured bits", marks=pytest.mark.slow),
    ],
)
def test_processes_that_share_the_samples_give_the_result_of_one(
    processes: int,
    samples: int,
    stages: list[dict[str, Any]],
    tolerance: float,
    make_recipe: MakeRecipe,
    text_file: Path,
    tmp_path: Path,
) -> None:
    calibration = {"dataset": "text", "path": str(text_file), "samples": samples, "seq_len": 64}
    recipe = make_recipe(stages=stages, calibration={**calibration, "precision": "float32"})
    started = launch(processes, recipe, tmp_path / "shared", tmp_path / "log")
    assert flatq("run", recipe, "--out", tmp_path / "alone", "--device", "cpu").exit_code == 0
    assert started.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert_same_model(tmp_path / "shared", tmp_path / "alone", tolerance)
    assert perplexity_of(tmp_path / "shared") == pytest.approx(perplexity_of(tmp_path / "alone"), rel=tolerance)
    assert (tmp_path / "log").read_text().count(str(tmp_path / "shared")) == 1, "only the first one reports"


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages",
    [[FLAT, GPTQ], [MIXED_BITS]],
    ids=["both stages", "measured bits, dense model walked along"],
)
def test_quantized_models_of_one_and_of_three_processes_are_equally_good(
    stages: list[dict[str, Any]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    # A code that lies on the edge between two values may fall to either side of it; what follows then differs, down to
    # the channels that are kept.
    recipe = make_recipe(stages=stages)
    started = launch(3, recipe, tmp_path / "shared", tmp_path / "log")
    assert flatq("run", recipe, "--out", tmp_path / "alone", "--device", "cpu").exit_code == 0
    assert started.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert perplexity_of(tmp_path / "shared") == pytest.approx(perplexity_of(tmp_path / "alone"), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["the one that writes", "another"])
def test_a_lost_process_ends_the_run_and_one_alone_finishes_it(
    victim: int, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(stages=[FLAT, {"gptq": {**GPTQ["gptq"], "block_size": 1}}])
    started = launch(2, recipe, tmp_path / "shared", tmp_path / "log")
    state = tmp_path / "shared" / "work" / "state.json"
    while started.poll() is None and not (state.exists() and json.loads(state.read_text())["blocks_done"] >= 2):
        time.sleep(0.005)
    workers = {child.environ()["RANK"]: child for child in psutil.Process(started.pid).children()}
    workers[str(victim)].send_signal(signal.SIGKILL)
    assert started.wait(timeout=120) != 0
    done = json.loads(state.read_text())["blocks_done"]
    assert 2 <= done < BLOCKS, "the kill came in the middle"
    said = (tmp_path / "log").read_text()
    assert "Finished blocks are kept: run the same command again" in " ".join(said.split())

    assert flatq("run", recipe, "--out", tmp_path / "shared", "--device", "cpu").exit_code == 0
    assert flatq("run", recipe, "--out", tmp_path / "alone", "--device", "cpu").exit_code == 0
    assert perplexity_of(tmp_path / "shared") == pytest.approx(perplexity_of(tmp_path / "alone"), rel=0.02)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [0, 1, 2, 7, 16])
def test_every_sample_belongs_to_exactly_one_process(count: int, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr(distributed.dist, "get_rank", lambda rank=rank: rank)
        shares.append(distributed.share(samples))
    assert [sample for share in shares for sample in share] == list(range(samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_reduce", "broadcast", "broadcast_object_list"):
        monkeypatch.delattr(distributed.dist, name)
    x = torch.ones(2)
    assert distributed.all_reduce(x) is x
    assert distributed.broadcast(3) == distributed.on_first(lambda: 3) == 3
    distributed.barrier()
    distributed.broadcast_layer(torch.nn.Linear(2, 2), "cpu")
    assert distributed.first()
    assert distributed.part()
