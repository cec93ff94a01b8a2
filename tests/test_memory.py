"""What this process is said to hold is what it holds."""

from __future__ import annotations

import sys

import pytest
import torch

from flatq.memory import forget_peak, give_back, peak_rss_bytes, rss_bytes

PIECE, PIECES = 64 << 10, 2048  # 128 MiB of pieces too small for mappings of their own

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc and malloc_trim are Linux's")


@linux_only
def test_freed_pieces_between_used_ones_go_back_to_the_system() -> None:
    pieces = [torch.ones(PIECE, dtype=torch.uint8) for _ in range(PIECES)]
    kept = pieces[::64]
    held = rss_bytes()
    del pieces
    give_back()
    assert held - rss_bytes() > 0.8 * PIECE * PIECES
    assert len(kept) == PIECES // 64


@linux_only
def test_a_forgotten_peak_starts_from_what_is_held_now() -> None:
    large = torch.ones(128 << 20, dtype=torch.uint8)
    peak = peak_rss_bytes()
    del large
    assert forget_peak()
    assert peak - peak_rss_bytes() > 100 << 20
