"""A run that ends at any call that changes a file, by a kill or a full disk, is resumed to the same bytes.

The calls are counted by ``tests.faults.every_event``; here a few of them, in the slow tests all.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.conftest import FLAT, GPTQ, MakeRecipe, digests, flatq
from tests.faults.every_event import TIMED

ROOT = Path(__file__).parents[2]
needs_gcc = pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="Linux with gcc")


@needs_gcc
@pytest.mark.parametrize(
    ("mode", "sample"),
    [
        ("kill", 5),
        pytest.param("kill", None, marks=pytest.mark.slow),
        pytest.param("full", 50, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_ends_at_a_call_that_changes_a_file_is_resumed_to_the_same_bytes(
    mode: str, sample: int | None, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.faults.every_event", str(tmp_path), "--mode", mode]
    command += ["--sample", str(sample)] if sample else []
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout[-3000:] + shown.stderr[-3000:]
    counted = json.loads(shown.stdout.splitlines()[-1])
    assert counted["events"] > 250, "all phases and all three exporters are counted"
    assert counted["faults"] == 0
    assert counted["trials"] == (sample or counted["events"])


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_one_line_and_it_is_resumed(
    sent: signal.Signals, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe, out = make_recipe(stages=[FLAT, {"gptq": {**GPTQ["gptq"], "block_size": 1}}]), tmp_path / "out"
    with (tmp_path / "log").open("wb") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "flatq", "run", str(recipe), "--out", str(out), "--device", "cpu"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # A shell that starts the tests in the background makes all its children ignore the signal.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
    while started.poll() is None and not (out / "work" / "phases" / "baseline.json").exists():
        time.sleep(0.01)
    psutil.Process(started.pid).send_signal(sent)
    code = started.wait(timeout=60)
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    if sent == signal.SIGINT:
        assert code == 130
        assert "run the same command again to resume" in said
    else:
        assert code in (130, 128 + signal.SIGTERM, -signal.SIGTERM)
    assert flatq("run", recipe, "--out", out, "--device", "cpu").exit_code == 0


def test_output_on_another_file_system_through_a_link_and_inside_the_source_has_the_same_bytes(
    make_recipe: MakeRecipe, model_copy: Path, tmp_path: Path
) -> None:
    places = {"plain": tmp_path / "plain", "linked": tmp_path / "link" / "out", "inside": model_copy / "out"}
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far", target_is_directory=True)
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK):
        places["memory"] = shared / f"flatq-{os.getpid()}"
    before, found = digests(model_copy), {}
    recipe = make_recipe(model=str(model_copy), exports=[{"onnx": {"precision": "int4"}}])
    try:
        for name, place in places.items():
            shown = flatq("run", recipe, "--out", place, "--device", "cpu", "--no-verify")
            assert shown.exit_code == 0, f"{name}: {shown.stderr}"
            found[name] = {file: digest for file, digest in digests(place).items() if file not in TIMED}
            assert all((place / file).is_file() for file in TIMED), name
    finally:
        shutil.rmtree(places.get("memory", tmp_path / "none"), ignore_errors=True)
    assert all(files == found["plain"] for files in found.values())
    assert {name: value for name, value in digests(model_copy).items() if not name.startswith("out/")} == before


def test_a_finished_folder_loses_what_a_killed_end_left_in_it(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, out = make_recipe(stages=[GPTQ]), tmp_path / "out"
    assert flatq("run", recipe, "--out", out, "--device", "cpu").exit_code == 0
    before = digests(out)
    (out / "work" / "phases").mkdir(parents=True)
    (out / "work" / "dense-0").write_text("left")
    shown = flatq("run", recipe, "--out", out, "--device", "cpu")
    assert shown.exit_code == 0
    assert "already finished" in caplog.text
    assert digests(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("runs", [20])
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_runs_in_one_process_leave_no_memory_open_files_or_temporary_files(
    runs: int, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    recipe, here, seen = make_recipe(exports=[{"onnx": {"precision": "int4"}}]), psutil.Process(), []
    libc = ctypes.CDLL(None)
    for number in range(runs):
        shown = flatq("run", recipe, "--out", tmp_path / f"out-{number}", "--device", "cpu")
        assert shown.exit_code == 0, shown.stderr
        gc.collect()
        libc.malloc_trim(0)
        seen.append((here.memory_info().rss, here.num_fds(), here.num_threads()))
    memory, files, threads = zip(*seen, strict=True)
    settled = runs // 2  # libraries fill their caches in the first runs
    each = 10e6  # bytes that a run may add; the model and its states are 20 times as many
    assert files[-1] <= files[settled], files
    assert threads[-1] <= threads[settled], threads
    assert memory[-1] <= memory[settled] + (runs - settled) * each, memory
    assert [path.name for path in temporary.iterdir() if path.name != ".ses"] == []
