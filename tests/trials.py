"""Runs of tests on a copy of the package in which one file may be another.

torch is imported once. Every run of tests is a fork of this process, so it needs a system that can fork.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import compileall
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_CPU = 120  # seconds of one run of tests, after which a fault counts as noticed: it loops
LONGEST = 1200  # seconds on the clock, also of unchanged code
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # pytest itself is imported before it starts
LATE = "exported_run"  # the fixture that takes longest
NOTE = "__reached__"  # the name of ``Tracer.note`` in the traced files


@dataclass(frozen=True)
class Trial:
    """What is run: arguments of pytest, a file with another text (or none), and files whose lines are noted."""

    tests: Sequence[str]
    file: str | None = None
    text: str = ""
    trace: Sequence[str] = ()


@dataclass(frozen=True)
class Reached:
    """What a test ran.

    Attributes:
        seconds: of CPU.
        late: whether it needs the slowest fixture.
        lines: (file, line) of the traced files.
        shared: those that were run for it and other tests, by a fixture of a module or of the session.
    """

    seconds: float
    late: bool
    lines: set[tuple[str, int]] = field(default_factory=set)
    shared: set[tuple[str, int]] = field(default_factory=set)


class Tracer:
    """A plug-in of pytest: notes which lines of the ``traced`` files each test runs, in its process and in all threads.

    Attributes:
        tests: by name, what ``Reached`` has of it, with (file, first line, last line) in place of single lines.
    """

    def __init__(self) -> None:
        self.spans: set[tuple[str, int, int]] = set()
        self.fixtures: dict[str, set[tuple[str, int, int]]] = {}
        self.tests: dict[str, Any] = {}

    def note(self, *span: Any) -> None:
        self.spans.add(span)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Function) -> Iterator[None]:
        self.spans = set()
        began = time.process_time()
        try:
            return (yield)
        finally:
            seconds = round(time.process_time() - began, 2)
            shared = set[tuple[str, int, int]]().union(*(self.fixtures.get(name, ()) for name in item.fixturenames))
            self.tests[item.nodeid] = [seconds, LATE in item.fixturenames, sorted(self.spans), sorted(shared)]

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        before, self.spans = self.spans, set()
        try:
            return (yield)
        finally:
            if fixturedef.scope == "function":
                self.spans |= before
            else:
                self.fixtures[fixturedef.argname] = self.spans
                self.spans = before


class Traced(ast.NodeTransformer):
    """Puts a call of ``Tracer.note`` before every statement of every function."""

    def __init__(self, file: str) -> None:
        self.file, self.inside = file, False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        outside, self.inside = self.inside, True
        head = self._of(node)  # with the defaults of its parameters
        self.generic_visit(node)
        self.inside = outside
        node.body.insert(0, head)
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name in ("body", "orelse", "finalbody") if self.inside and not isinstance(node, ast.Lambda) else ():
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                noted = [(self._of(each), each) for each in statements]
                setattr(node, name, [each for pair in noted for each in pair])
        return super().generic_visit(node)

    def _of(self, statement: ast.stmt) -> ast.stmt:
        """Of a statement that holds others only its head."""
        body = getattr(statement, "body", None)
        last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
        return self._note(statement.lineno, max(statement.lineno, last))

    def _note(self, first: int, last: int) -> ast.stmt:
        return ast.parse(f"{NOTE}({self.file!r}, {first}, {last})").body[0]


def traced(file: str, text: str) -> str:
    """The text of a file with the calls of ``Tracer.note``."""
    return ast.unparse(ast.fix_missing_locations(Traced(file).visit(ast.parse(text))))


@cache
def template() -> Path:
    """The package, its exporters and its tests, compiled; removed when this process ends."""
    place = Path(tempfile.mkdtemp(prefix="flatq-template-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "golden", "interop")
    for name in ("flatq", "exporters", "tests", "recipes"):
        shutil.copytree(ROOT / name, place / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", place)
    for name in ("flatq", "exporters"):
        compileall.compile_dir(place / name, quiet=1)
    return place


def import_once() -> None:
    """What every fork needs and no fault touches."""
    import datasets  # noqa: F401
    import gguf  # noqa: F401
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama  # noqa: F401
    import typer.testing  # noqa: F401

    torch.set_num_threads(1)


class Running:
    """A trial in a process of its own."""

    def __init__(self, trial: Trial) -> None:
        self.place, self.began = Path(tempfile.mkdtemp(prefix="flatq-mutant-")).resolve(), time.monotonic()
        shutil.copytree(template(), self.place, dirs_exist_ok=True)
        if trial.file is not None:
            (self.place / trial.file).write_text(trial.text)
        for file in trial.trace:
            (self.place / file).write_text(traced(file, (self.place / file).read_text()))
        self.reached: dict[str, Reached] = {}
        self.child = os.fork()
        if self.child == 0:
            run_tests(self.place, trial)

    def verdict(self) -> str | None:
        """What noticed the fault, empty if nothing did, None while the tests run."""
        late = time.monotonic() - self.began > LONGEST
        if late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child, signal.SIGKILL)  # and all that it has started
        done, status = os.waitpid(self.child, 0 if late else os.WNOHANG)
        if not done:
            return None
        shown = (self.place / "shown").read_text() if (self.place / "shown").exists() else ""
        if (self.place / "reached.json").exists():
            noted = json.loads((self.place / "reached.json").read_text())
            for test, (seconds, slow, *spans) in noted.items():
                lines, shared = (
                    {(file, line) for file, first, last in some for line in range(first, last + 1)} for some in spans
                )
                self.reached[test] = Reached(seconds, slow, lines, shared)
        shutil.rmtree(self.place, ignore_errors=True)
        code = os.waitstatus_to_exitcode(status)
        failed = re.search(r"^(?:FAILED|ERROR) (\S+::\S*)", shown, re.MULTILINE)
        if late or code == 0:
            return f"no end after {LONGEST} s" if late else ""
        return failed[1] if failed else f"exit code {code}: {shown.strip()[-300:]}"


def ended(trials: Sequence[Trial], jobs: int) -> list[tuple[str, dict[str, Reached]]]:
    """What noticed each fault and what was reached, so many at a time; a trial without tests is noticed by nothing."""
    found: list[tuple[str, dict[str, Reached]]] = [("", {})] * len(trials)
    running: dict[int, Running] = {}
    waiting = [number for number, trial in enumerate(trials) if trial.tests]
    while waiting or running:
        while waiting and len(running) < jobs:
            number = waiting.pop(0)
            running[number] = Running(trials[number])
        for number, process in list(running.items()):
            said = process.verdict()
            if said is not None:
                found[number] = said, running.pop(number).reached
                print(f"{number + 1} of {len(trials)}: {said or 'nothing noticed'}", file=sys.stderr, flush=True)
        time.sleep(0.05)
    return found


def verdicts(trials: Sequence[Trial], jobs: int) -> list[str]:
    """What noticed each fault; empty if nothing did."""
    return [said for said, _ in ended(trials, jobs)]


def must_pass(trials: Sequence[Trial], jobs: int) -> dict[str, Reached]:
    """An end if tests fail on what they should pass; what each test reached, if the trials say which files to trace."""
    found: dict[str, Reached] = {}
    for said, reached in ended(trials, jobs):
        if said:
            raise SystemExit(f"the tests fail without a fault: {said}")
        found |= reached
    return found


def run_tests(place: Path, trial: Trial) -> None:
    """The child's side; does not return."""
    code = 99
    try:
        shown = os.open(place / "shown", os.O_CREAT | os.O_WRONLY)
        os.dup2(shown, 1)
        os.dup2(shown, 2)
        os.setpgid(0, 0)
        os.chdir(place)
        if trial.file is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (LONGEST_CPU, LONGEST_CPU))
        sys.path[:] = [
            str(place),
            str(place / "exporters"),
            *(each for each in sys.path if Path(each or ".").resolve() not in (ROOT, ROOT / "exporters")),
        ]
        os.fsync = lambda _: None  # type: ignore[assignment]  # a copy that nobody keeps
        os.environ["PYTHONPATH"] = f"{place}{os.pathsep}{place / 'exporters'}"
        for module in [name for name in sys.modules if name.split(".")[0] in ("tests", "flatq")]:
            del sys.modules[module]
        tracer = Tracer()
        setattr(builtins, NOTE, tracer.note)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=short", *QUIET, f"--basetemp={place / 'pytest'}"]
        code = int(pytest.main([*options, *trial.tests], plugins=[tracer] if trial.trace else []))
        (place / "reached.json").write_text(json.dumps(tracer.tests))
        import flatq

        if not str(flatq.__file__).startswith(str(place)):
            code = 98
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
