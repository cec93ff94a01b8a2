"""What a process is said to hold is what it holds. Each in a process of its own, where nothing else comes and goes."""

from __future__ import annotations

import subprocess
import sys

import pytest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc and malloc_trim are Linux's")

FREED_PIECES = """
from flatq.machine.memory import give_back, rss_bytes
pieces = [bytearray(b"x") * (64 << 10) for _ in range(2048)]  # 128 MiB, too small for mappings of their own
kept = pieces[::64]
held = rss_bytes()
del pieces
give_back()
print(held - rss_bytes())
"""

FORGOTTEN_PEAK = """
from flatq.machine.memory import forget_peak, peak_rss_bytes
large = bytearray(b"x") * (128 << 20)
peak = peak_rss_bytes()
del large
before = peak_rss_bytes()
assert forget_peak()
print(peak - before, peak - peak_rss_bytes())
"""


def numbers(program: str) -> list[int]:
    """What a Python program prints."""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return [int(number) for number in done.stdout.split()]


@linux_only
def test_freed_pieces_between_used_ones_go_back_to_the_system() -> None:
    assert numbers(FREED_PIECES)[0] > 100 << 20


@linux_only
def test_a_forgotten_peak_starts_from_what_is_held_now() -> None:
    before, after = numbers(FORGOTTEN_PEAK)
    assert before <= 1 << 20, "a peak stays until it is forgotten"
    assert after > 100 << 20
