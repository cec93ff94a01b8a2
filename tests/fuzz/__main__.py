"""Fuzz the readers: ``python -m tests.fuzz`` prints a table of inputs, tracebacks, hangs and memory for each target.

Each input is a file of a small model, run or export, changed at random, and the whole folder is then read. Only errors
of flatq may come out, each within 10 s and with less than 1 GB of memory; no file outside of the folder may be opened
for writing, and no program started. The change is drawn from a seed and the number of the input, so that every input
can be made again: ``--target T --first N --inputs 1``. Linux and macOS (``fork``).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from flatq.errors import FlatqError
from tests.fuzz.targets import TARGETS, Target, material

SECONDS, MEMORY = 10.0, 1_000_000_000  # most of computing for an input, bytes for a process
PATIENCE = 120.0  # seconds, for an input that waits
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link", "shutil.rmtree")


@dataclass
class Result:
    """What became of the inputs of a target."""

    target: str
    inputs: int = 0
    refused: int = 0
    tracebacks: int = 0
    hangs: int = 0
    outside: int = 0
    most_memory_mb: int = 0
    seconds: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether anything happened that must not."""
        return bool(self.tracebacks or self.hangs or self.outside) or self.most_memory_mb * 1e6 > MEMORY


def fuzzed(target: Target, place: Path, *, first: int, inputs: int, until: float) -> Result:
    """Read changed inputs in forked processes, until there are enough or the time is over."""
    result, began = Result(target.name), time.monotonic()
    number = first
    while number < first + inputs and time.monotonic() < until:
        note = place / "note.json"
        note.write_text(json.dumps({"number": number}))
        child = os.fork()
        if child == 0:
            _read_all(target, place, number, first + inputs, until)
        number = _watched(child, note, result, number)
    result.inputs, result.seconds = number - first, round(time.monotonic() - began, 1)
    return result


def _watched(child: int, note: Path, result: Result, number: int) -> int:
    """Wait for a child; it is killed if an input takes too long. Returns the number of the next input."""
    seen, since, spent = number, time.monotonic(), 0.0
    while True:
        done, _ = os.waitpid(child, os.WNOHANG)
        stated = _stated(note)
        if stated.get("number", seen) != seen:
            seen, since, spent = stated["number"], time.monotonic(), _computed(child)
        if done:
            break
        computed = _computed(child)
        if computed - spent > SECONDS or time.monotonic() - since > PATIENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            result.hangs += 1
            result.faults[str(seen)] = f"no answer within {SECONDS:g} s"
            _add(result, stated)
            return int(seen) + 1
        time.sleep(0.02)
    stated = _stated(note)
    _add(result, stated)
    if not stated.get("ended"):
        result.tracebacks += 1
        result.faults[str(seen)] = "the process died"
        return int(seen) + 1
    return int(stated["number"])


def _computed(child: int) -> float:
    """Seconds that a process computed; other programs on the machine do not count."""
    try:
        times = psutil.Process(child).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _stated(note: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(note.read_text())
        return found
    except ValueError:  # being written
        return {}


def _add(result: Result, stated: dict[str, Any]) -> None:
    result.refused += stated.get("refused", 0)
    result.most_memory_mb = max(result.most_memory_mb, stated.get("memory", 0) // 1_000_000)
    for number, words in stated.get("faults", {}).items():
        result.faults[number] = words
        if words.startswith("outside"):
            result.outside += 1
        else:
            result.tracebacks += 1


def _read_all(target: Target, place: Path, first: int, end: int, until: float) -> None:
    """The child's side: read inputs and note what happens; does not return."""
    note, faults, refused = place / "note.json", dict[str, str](), 0
    folder, broken = place / "folder", list[str]()
    try:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place.parent / target.folder, folder) if target.folder != "." else folder.mkdir()
        whole = (place.parent / target.folder / target.file).read_bytes()
        os.environ["FLATQ_CACHE"], tempfile.tempdir = str(place / "cache"), str(place)
        os.chdir(place)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        logging.disable(logging.CRITICAL)
        sys.addaudithook(lambda event, given: _audit(event, given, place, broken))
        number = first
        while number < end and time.monotonic() < until:
            data = target.mutate(whole, random.Random(f"{target.name} {number}"))
            (folder / target.file).write_bytes(data)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            note.write_text(json.dumps({"number": number, "refused": refused, "memory": memory, "faults": faults}))
            try:
                target.read(folder)
            except FlatqError as error:
                refused += 1
                if not str(error).strip():
                    faults[str(number)] = f"an error without words: {error!r}"
            except BaseException as problem:
                where = traceback.extract_tb(problem.__traceback__)
                ours = [frame for frame in where if "/flatq" in frame.filename]
                last = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
                faults[str(number)] = f"{type(problem).__name__} at {last}: {str(problem)[:200]}"
            if broken:
                faults[str(number)] = f"outside: {broken.pop()}"
                broken.clear()
            number += 1
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        stated = {"number": number, "refused": refused, "memory": memory, "faults": faults, "ended": True}
        note.write_text(json.dumps(stated))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _import_for(target: Target, root: Path) -> None:
    """Read the unchanged folder, so that every child has what it imports."""
    with tempfile.TemporaryDirectory(dir=root) as place:
        folder = Path(place) / "folder"
        if target.folder == ".":
            folder.mkdir()
            shutil.copy(root / target.file, folder)
        else:
            shutil.copytree(root / target.folder, folder)
        os.environ["FLATQ_CACHE"] = str(Path(place) / "cache")
        target.read(folder)


def _audit(event: str, given: tuple[Any, ...], place: Path, broken: list[str]) -> None:
    """Note what a reader must not do: start a program, connect, change a file outside of its folder."""
    if event in STARTS:
        broken.append(f"{event} {given!r:.200}")
    elif event == "open":
        path, _, flags = given
        if isinstance(path, str | bytes) and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _inside(event, path, place, broken)
    elif event in CHANGES and given and isinstance(given[0], str | bytes):
        _inside(event, given[0], place, broken)


def _inside(event: str, path: str | bytes, place: Path, broken: list[str]) -> None:
    full = os.path.abspath(os.fsdecode(path))
    if not full.startswith(str(place)) and full != os.devnull:
        broken.append(f"{event} {full}")


def keep(target: Target, root: Path, folder: Path, numbers: Iterable[int]) -> None:
    """Write inputs of a target again, for the corpus."""
    whole = (root / target.folder / target.file).read_bytes()
    for number in numbers:
        path = folder / target.slug / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(target.mutate(whole, random.Random(f"{target.name} {number}")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz the targets; returns the number of those with a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="repeatable; all if not given")
    parser.add_argument("--inputs", type=int, default=1000, help="for each target")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seconds", type=float, default=3600.0, help="at most, for each target")
    parser.add_argument("--work", type=Path, help="folder for the material, kept; a temporary one if not given")
    parser.add_argument("--keep", type=Path, help="write the inputs with a fault here, one folder for each target")
    parser.add_argument("--table", type=Path, help="write the results here, as JSON")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="flatq-fuzz-") as temporary:
        root = (asked.work or Path(temporary)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        material(root)
        results = []
        columns = ("inputs", "refused", "tracebacks", "hangs", "outside", "MB", "s")
        print(f"{'target':24}" + "".join(f"{column:>11}" for column in columns))
        for name in asked.target or TARGETS:
            _import_for(TARGETS[name], root)
            place = Path(tempfile.mkdtemp(prefix="fuzz-", dir=root))
            until = time.monotonic() + asked.seconds
            found = fuzzed(TARGETS[name], place, first=asked.first, inputs=asked.inputs, until=until)
            shutil.rmtree(place, ignore_errors=True)
            results.append(found)
            row = (found.inputs, found.refused, found.tracebacks, found.hangs, found.outside, found.most_memory_mb)
            print(f"{name:24}" + "".join(f"{value:>11}" for value in (*row, found.seconds)), flush=True)
            if asked.keep:
                keep(TARGETS[name], root, asked.keep, map(int, found.faults))
            for number, words in list(found.faults.items())[:10]:
                print(f"    --target {name!r} --first {number} --inputs 1: {words}", flush=True)
        if asked.table:
            asked.table.write_text(json.dumps([asdict(found) for found in results], indent=1) + "\n")
    return sum(found.failed for found in results)


if __name__ == "__main__":
    sys.exit(main())
