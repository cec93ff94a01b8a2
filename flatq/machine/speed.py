"""How fast this machine multiplies matrices and moves numbers, measured in less than 0.1 seconds.

The rates are kept in the user's cache for a day. A machine that others share is as fast as it is at that moment: what
follows from these rates is a rough estimate.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from flatq.cache import recall, remember
from flatq.machine.environment import cpu_name
from flatq.machine.precision import blocks_in, forward_precision, resolved

SECONDS = 0.02  # per rate
WIDTH = {"cpu": 768, "cuda": 4096}  # of the square matrices: large enough for the full rate
KEPT = 24 * 3600  # seconds that rates in the cache are used
NUMBERS = 1 << 22  # of a vector: 16 MiB, more than a cache holds


@dataclass(frozen=True, slots=True)
class Speed:
    """Rates of one device.

    Attributes:
        forward: multiply-adds count as two, per second, in the precision of forward passes.
        solve: the same in float32.
        moved: bytes read and written per second by an operation on vectors.
    """

    forward: float
    solve: float
    moved: float


@dataclass(frozen=True, slots=True)
class Kept:
    """Rates in the cache, and the time of their measurement in seconds since 1970."""

    speed: Speed
    at: float


@functools.cache
def measured_speed(device: str = "cpu", precision: str = "auto") -> Speed:
    """The rates of a device: those of the last day with as many threads, else measured.

    Args:
        device: as torch names it.
        precision: of forward passes, see ``precision.forward_precision``.
    """
    about = repr((cpu_name(), torch.get_num_threads(), torch.__version__, device, resolved(precision, device)))
    kept, now = recall("speed", about, Kept), time.time()
    if kept is not None and 0 <= now - kept.at < KEPT:
        return kept.speed
    speed = _measured(device, precision)
    remember("speed", about, asdict(Kept(speed, now)))
    return speed


def _measured(device: str, precision: str) -> Speed:
    width = WIDTH.get(torch.device(device).type, WIDTH["cpu"])
    with torch.inference_mode():
        a, b = (torch.randn(width, width, device=device) for _ in range(2))
        x, y = (torch.ones(NUMBERS, device=device) for _ in range(2))
        solve = 2 * width**3 / _fastest(lambda: a @ b, device)
        moved = 3 * x.nbytes / _fastest(lambda: torch.mul(x, y, out=y), device)
    if resolved(precision, device) == "float32":
        return Speed(solve, solve, moved)
    with forward_precision(precision, device), blocks_in(precision, device):
        half = a.bfloat16(), b.bfloat16()
        return Speed(2 * width**3 / _fastest(lambda: half[0] @ half[1], device), solve, moved)


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several calls; the first one, which starts threads, is not among them."""
    work()
    found, until = list[float](), time.perf_counter() + SECONDS
    while not found or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found)
