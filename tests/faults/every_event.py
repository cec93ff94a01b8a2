"""End a run at each call that creates, writes, renames or removes a file, resume it, and compare every file.

``python -m tests.faults.every_event WORK`` makes a tiny model and a recipe with three exports in WORK, counts the calls
of an undisturbed run, then takes them one by one: a SIGKILL (of a write when half of it is done), or a disk that is
full from there on. ``--sample N`` takes N of them, evenly spaced. The last line is JSON: events, trials, and what went
wrong. Linux with gcc only (``injector.c`` is loaded with LD_PRELOAD).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

HERE = Path(__file__).parent
LIBRARY = "FLATQ_INJECTOR"  # environment variable: where the compiled library lies
COUNT, KILL, FULL = 0, 1, 2
TIMED = ("report.json", "report.md", "report.html", "run.json")  # hold times, or digests of files that do
ONNXRUNTIMES = ".ses"  # one file that onnxruntime keeps among the temporary ones
SMALL = {
    "evaluation": {"tokens": 64, "seq_len": 32},
    "stages": [
        {"flat": {"keep_ratio": 0.8, "rank_multiple": 16, "width_multiple": 32}},
        {"gptq": {"group_size": 32, "embedding": {"bits": 8, "group_size": 32}}},
    ],
    "exports": [
        {"onnx": {"attention": "reduced", "external_data_above": 1024}},
        {"gguf": {}},
        {"safetensors": {"format": "compressed-tensors"}},
    ],
}


def compiled(folder: Path) -> Path | None:
    """The library, compiled into a folder; None without a C compiler."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        return None
    library = folder / "injector.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "injector.c"), "-ldl"], check=True)
    return library


class Trials:
    """Runs of one recipe, each in a forked child."""

    def __init__(self, work: Path, recipe: Path) -> None:
        self.work, self.recipe, self.out = work, recipe, work / "out"
        self.temporary = work / "tmp"
        self.temporary.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(self.temporary)
        self.library = ctypes.CDLL(os.environ[LIBRARY])
        self.expected: dict[str, str] = {}

    def ended(self, number: int, mode: int) -> tuple[int, int, str]:
        """A run that is disturbed at event ``number``: exit code (negative for a signal), events seen, what it said."""
        said, seen = self.work / "said", self.work / "seen"
        seen.write_text("-1")
        child = os.fork()
        if child == 0:
            self._run(number, mode, said, seen)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), int(seen.read_text()), said.read_text(errors="replace")

    def _run(self, number: int, mode: int, said: Path, seen: Path) -> None:
        """The child's side; does not return."""
        code = 99
        try:
            shown = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(shown, 1)
            os.dup2(shown, 2)
            from flatq.cli import app

            self.library.injector_arm(str(self.out).encode(), number, mode)
            app(["run", str(self.recipe), "--out", str(self.out), "--device", "cpu", "--no-verify"])
        except SystemExit as ending:
            code = int(ending.code or 0)
        except BaseException as problem:
            print("Traceback", repr(problem))
        finally:
            seen.write_text(str(self.library.injector_seen()))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def digests(self) -> dict[str, str]:
        from tests.conftest import digests

        return {name: "" if name in TIMED else digest for name, digest in digests(self.out).items()}

    def count(self) -> int:
        """Events of an undisturbed run, whose files are what is expected of all others."""
        shutil.rmtree(self.out, ignore_errors=True)
        code, events, said = self.ended(-1, COUNT)
        assert code == 0, said
        self.expected = self.digests()
        return events

    def fault(self, number: int, mode: int) -> str:
        """What went wrong when a run was disturbed at an event and then resumed; empty if nothing did."""
        shutil.rmtree(self.out, ignore_errors=True)
        code, _, said = self.ended(number, mode)
        if mode == KILL and code != -signal.SIGKILL:
            return f"was not killed but ended with {code}: {said[-300:]}"
        if mode == FULL and (code not in (0, 3) or "Traceback" in said):
            return f"a full disk ended with {code}: {said[-900:]}"
        code, _, said = self.ended(-1, COUNT)
        if code or "Traceback" in said:
            return f"the resumed run ended with {code}: {said[-900:]}"
        found = self.digests()
        other = sorted(name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name))
        left = sorted(path.name for path in self.temporary.iterdir() if path.name != ONNXRUNTIMES)
        if mode == FULL and left:
            return f"temporary files are left: {left}"
        for path in self.temporary.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return f"other files: {other}" if other else ""


def prepared(work: Path) -> Path:
    """A tiny model, a text and the recipe."""
    from tests.conftest import write_model, write_text

    text, recipe = write_text(work / "corpus.txt"), work / "tiny.yaml"
    model = write_model(work / "model", text, layers=2)
    calibration = {"dataset": "text", "path": str(text), "samples": 6, "seq_len": 32, "precision": "float32"}
    recipe.write_text(yaml.safe_dump({"version": 1, "model": str(model), "calibration": calibration, **SMALL}))
    return recipe


def import_once() -> None:
    """What every child needs."""
    import gguf  # noqa: F401
    import torch
    import transformers.models.auto.tokenization_auto  # noqa: F401

    import flatq.pipeline.run  # noqa: F401

    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; returns the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sample", type=int, help="so many events, evenly spaced; all if not given")
    parser.add_argument("--mode", choices=("kill", "full"), default="kill")
    asked = parser.parse_args(arguments)
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if LIBRARY not in os.environ:
        library = compiled(work)
        if library is None:
            raise SystemExit("needs Linux and gcc")
        given = {**os.environ, LIBRARY: str(library), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        options = [str(work), "--mode", asked.mode, *(["--sample", str(asked.sample)] if asked.sample else [])]
        return subprocess.run([sys.executable, "-m", "tests.faults.every_event", *options], env=given).returncode
    os.environ["FLATQ_CACHE"] = str(work / "cache")
    import_once()
    trials = Trials(work, prepared(work))
    events = trials.count()
    count = min(asked.sample or events, events)
    numbers = [(2 * place + 1) * events // (2 * count) for place in range(count)]
    faults = {}
    for number in numbers:
        if words := trials.fault(number, KILL if asked.mode == "kill" else FULL):
            faults[number] = words
            print(f"event {number}: {words}", flush=True)
    print(json.dumps({"mode": asked.mode, "events": events, "trials": len(numbers), "faults": len(faults)}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
