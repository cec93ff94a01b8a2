"""Progress reports for everything that takes more than a few seconds.

On a terminal it is a bar with the remaining time, on stderr, and it disappears at the end, so that stdout contains only
results. Elsewhere (a log file, CI, a notebook) it is one log line per 10 %, because a bar would be thousands of control
characters.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
Advance = Callable[..., None]


@contextmanager
def progress(what: str, total: int, *, every_percent: int = 10) -> Iterator[Advance]:
    """Show the progress of the enclosed work.

    Args:
        what: name of the work, one or two words.
        total: total number of steps; 0 is allowed and shows nothing.
        every_percent: without a terminal, log after each such percentage.

    Yields:
        ``advance(steps=1)``, to be called after each step.
    """
    if sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(what, total=total)
            yield lambda steps=1: bar.advance(task, steps)
    else:
        yield _logger(what, total, every_percent)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _logger(what: str, total: int, every_percent: int) -> Advance:
    done, reported = 0, 0
    began = time.monotonic()

    def advance(steps: int = 1) -> None:
        nonlocal done, reported
        done += steps
        percent = min(100, 100 * done // max(total, 1))
        if percent // every_percent > reported // every_percent:
            reported = percent
            elapsed = time.monotonic() - began
            left = elapsed * max(total - done, 0) / done
            log.info("%s: %d of %d (%d %%), %.0f s, about %.0f s left", what, done, total, percent, elapsed, left)

    return advance
