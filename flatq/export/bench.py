"""Speed and memory of exports, each in a separate process.

Memory is measured in a new process because peak memory includes everything that a process did before. The peak also
includes Python and imported libraries, so the resident memory before the model was opened is reported as well.

The speed of a machine varies over time (throttling, other load). So that this affects all models equally, the processes
stay alive and are measured alternately, A B, then B A, and so on; median and range are reported. All models are in
memory at the same time; measure them separately if they do not fit.

The prompt is random tokens (speed does not depend on the text); new tokens are chosen greedily.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
from rich.console import Console
from rich.table import Table

from flatq.errors import ExportError, FlatqError, RecipeError
from flatq.machine.memory import device_memory_bytes, peak_rss_bytes, rss_bytes
from flatq.units import size

if TYPE_CHECKING:  # a measured process must not import torch for type annotations
    from flatq.export.protocols import Runner

OpenRunner: TypeAlias = "Callable[[], Runner | None]"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Measurements of one runner.

    Attributes:
        name: name of the export.
        provider: the provider that was used.
        threads: requested number; 0 is the runtime's default.
        batch, prompt, new_tokens, repeats: the load, and the number of measurements.
        load_seconds: time to import the runtime and load the model.
        first_token_seconds: from a prompt to the first new token.
        prefill_tokens_per_second: prompt tokens of all rows per second.
        decode_tokens_per_second: new tokens of all rows per second, the first one not counted.
        rss_before_bytes: resident memory of the process before the model was opened.
        peak_rss_bytes: peak resident memory of the process.
        device_memory_bytes: memory of the process on the GPU; None if no GPU is used or it cannot be measured.
    """

    name: str
    provider: str
    threads: int
    batch: int
    prompt: int
    new_tokens: int
    repeats: int
    load_seconds: float
    first_token_seconds: Spread
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    rss_before_bytes: int
    peak_rss_bytes: int
    device_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Load:
    """The load of one measurement; ``vocab`` is the range of the random prompt."""

    prompt: int
    new_tokens: int
    batch: int
    vocab: int

    def problems(self) -> list[str]:
        """Messages about values that are too small."""
        least = {"prompt": 1, "new_tokens": 2, "batch": 1, "vocab": 1}
        return [
            f"bench.{name}: {getattr(self, name)} is too small; at least {low} is needed"
            for name, low in least.items()
            if getattr(self, name) < low
        ]


def bench_side_by_side(
    open_runners: Mapping[str, OpenRunner],
    load: Load,
    *,
    repeats: int = 5,
    threads: int = 0,
    on_repeat: Callable[[], object] | None = None,
) -> list[BenchResult]:
    """Measure several runners in turn, each in a new process, after one warm-up each.

    Args:
        open_runners: by name; each is pickled, so it must be a module-level function or a ``functools.partial`` of one
            (an exporter's bound ``open`` also works).
        load: the load of one measurement.
        repeats: at least 1.
        threads: recorded in the result; ``open_runners`` set it.
        on_repeat: called ``(repeats + 1) * len(open_runners)`` times, for a progress bar.

    Raises:
        RecipeError: a number of ``load`` or ``repeats`` is too small.
        ExportError: a runner failed or its process died; the message says which and how.
    """
    problems = load.problems() + ([] if repeats >= 1 else [f"bench.repeats: {repeats} is too small; at least 1"])
    if problems:
        raise RecipeError(problems)
    with ExitStack() as stack:
        children = [stack.enter_context(_Child(name, opener, load)) for name, opener in open_runners.items()]
        for child in children:  # one after another, so that loads do not share the disk
            child.ask("open")
        for turn in range(repeats + 1):
            for child in children if turn % 2 == 0 else reversed(children):
                times = child.ask("repeat")
                if turn > 0:
                    child.times.append(times)
                if on_repeat is not None:
                    on_repeat()
        return [child.result(threads) for child in children]


class _Child:
    """A process with one runner, controlled over a pipe."""

    def __init__(self, name: str, open_runner: OpenRunner, load: Load) -> None:
        self.name, self.load = name, load
        self.times: list[tuple[float, float]] = []  # (first token, the other tokens), seconds
        context = multiprocessing.get_context("spawn")  # a fork would inherit the parent's memory and locks
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, open_runner, load), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the child is an end of file here

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()  # the child ends on end of file
        self._process.join(timeout=5 if error is None else 0.2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def ask(self, order: str) -> Any:
        """Send an order and return its answer.

        Raises:
            ExportError: the order failed, or the process has ended.
        """
        try:
            self._pipe.send(order)
            failed, answer = self._pipe.recv()
        except (EOFError, ConnectionError) as gone:
            self._process.join(timeout=5)
            code = self._process.exitcode
            why = "it was killed, probably out of memory" if code is not None and code < 0 else "see its output above"
            raise ExportError(
                f"bench of {self.name}: the process ended with exit code {code} during {order!r} ({why}); "
                "bench one model at a time, or on a machine with more memory"
            ) from gone
        if failed:
            raise ExportError(f"bench of {self.name}: {order!r} failed in its process: {answer}")
        return answer

    def result(self, threads: int) -> BenchResult:
        """All measurements so far."""
        load, facts = self.load, self.ask("facts")
        decoded = load.batch * (load.new_tokens - 1)
        return BenchResult(
            name=self.name,
            threads=threads,
            batch=load.batch,
            prompt=load.prompt,
            new_tokens=load.new_tokens,
            repeats=len(self.times),
            first_token_seconds=Spread.of([first for first, _ in self.times]),
            prefill_tokens_per_second=Spread.of([load.batch * load.prompt / first for first, _ in self.times]),
            decode_tokens_per_second=Spread.of([decoded / rest for _, rest in self.times]),
            **facts,
        )


def serve(pipe: Connection, open_runner: OpenRunner, load: Load) -> None:
    """Main loop of the child process: orders ``open``, ``repeat``, ``facts``, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interrupted parent closes the pipe
    runner: Runner | None = None
    facts: dict[str, Any] = {"rss_before_bytes": rss_bytes()}
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            break
        try:
            answer: Any = None
            if order == "open":
                began = time.perf_counter()
                runner = open_runner()
                facts["load_seconds"] = time.perf_counter() - began
                if runner is None:
                    raise ExportError("there is no runtime for this format, so it cannot be measured")
                facts["provider"] = runner.provider
            elif order == "repeat":
                assert runner is not None
                answer = _repeat(runner, load)
            elif order == "facts":
                memory = device_memory_bytes(os.getpid()) if "cpu" not in facts["provider"].lower() else None
                answer = {**facts, "peak_rss_bytes": peak_rss_bytes(), "device_memory_bytes": memory}
            pipe.send((False, answer))
        except FlatqError as error:
            pipe.send((True, str(error)))
        except Exception:  # any other failure of a runtime is sent to the parent, which raises it
            pipe.send((True, traceback.format_exc(limit=-3)))
    if runner is not None:
        runner.close()


def _repeat(runner: Runner, load: Load) -> tuple[float, float]:
    """One measurement: seconds to the first token, seconds for all others."""
    tokens = np.random.default_rng(0).integers(load.vocab, size=(load.batch, load.prompt), dtype=np.int64)
    began = time.perf_counter()
    token = runner.start(tokens, load.prompt + load.new_tokens).argmax(-1)
    first = time.perf_counter()
    for _ in range(load.new_tokens - 1):
        token = runner.step(token).argmax(-1)
    return first - began, time.perf_counter() - first


def rendered(table: Table, *, width: int = 110) -> str:
    """A rich table as text, at most ``width`` characters wide."""
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def bench_table(results: Sequence[BenchResult]) -> str:
    """A table of the results."""
    table = Table(show_header=True)
    for column in ("", "prefill tok/s", "decode tok/s", "first token", "load", "peak RSS", "provider"):
        table.add_column(column, justify="left" if column in ("", "provider") else "right")
    for result in results:
        prefill, decode = result.prefill_tokens_per_second, result.decode_tokens_per_second
        held = result.device_memory_bytes
        device = [] if held is None else [f"{size(held)} on the device"]
        table.add_row(
            result.name,
            f"{prefill.median:.1f} ({prefill.low:.1f}-{prefill.high:.1f})",
            f"{decode.median:.1f} ({decode.low:.1f}-{decode.high:.1f})",
            f"{result.first_token_seconds.median:.3f} s",
            f"{result.load_seconds:.2f} s",
            " + ".join([size(result.peak_rss_bytes), *device]),
            result.provider,
        )
    return rendered(table)
