"""Times of onnxruntime's kernels on this machine, measured once and cached in the user's cache folder.

A product is timed in a graph of equal nodes over different matrices, in several sessions that take turns. Together they
are larger than a third-level cache, because a decoder reads every weight once per token: its speed is that of the
memory as much as that of the kernel. What is not a product (attention, norms, rotary embedding, writes to the
cache, the fixed cost of nodes and of a call) is timed in graphs that the exporter itself builds, see ``speed.py``.

All times are medians, and with one thread those of the processor, so that other programs on the machine count only as
far as they slow its memory. Least times would be those of moments in which the weights lie in the cache.

Axes: n out_features, k in_features, m tokens.
"""

from __future__ import annotations

import os
import statistics
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from flatq.export import Grid, QuantizedWeight, cpu_name, recall, remember
from flatq_onnx.builder import Builder
from flatq_onnx.linears import TOKENS, Linears, Part
from flatq_onnx.session import CPU, session_options
from flatq_onnx.tensors import Blocks

Clock = Callable[[], float]
KEPT = "kernels"  # folder of the cache
SESSIONS, SESSION_BYTES = 4, 16 << 20  # of one measurement: together more than a third-level cache
LARGEST = 1 << 26  # weights of one measured product; larger ones take proportionally longer
SECONDS, LEAST_ROUNDS = 0.06, 6  # per product


class KernelTable:
    """Seconds by name, kept in one file per processor, version of onnxruntime and number of threads.

    Args:
        threads: of onnxruntime; 0 is its default.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.machine = f"{cpu_name()}, {os.cpu_count()} processors, onnxruntime {ort.__version__}, {threads} threads"
        self._seconds = self._kept()

    def seconds(self, name: str, measure: Callable[[], Mapping[str, float]]) -> float:
        """The time with this name; ``measure`` gives it, perhaps among others, if it is not in the table."""
        if name not in self._seconds:
            self._seconds |= measure()
            remember(KEPT, self.machine, {**self._kept(), **self._seconds})
        return self._seconds[name]

    def _kept(self) -> dict[str, float]:
        return recall(KEPT, self.machine, dict[str, float]) or {}

    def product(self, grid: Grid | None, rows: int, columns: int, tokens: int, accuracy_level: int) -> float:
        """Seconds of one linear [n, k] with this grid (None: float32), for ``tokens`` rows of input."""
        held = max(1, min(rows, LARGEST // columns))
        kind = "float32" if grid is None else f"{grid.bits} bits, {grid.group_size}, {grid.symmetric}, {accuracy_level}"
        name = f"product {kind}: {held} x {columns}, {tokens} tokens"
        found = self.seconds(
            name, lambda: {name: measured_product(grid, held, columns, tokens, accuracy_level, self.threads)}
        )
        return found * rows / held


def stored_grid(grid: Grid | None, columns: int, *, lookup: bool = False) -> Grid | None:
    """The grid as the file has it: block size, and 3 bits (2 bits in a table) as 4 symmetric ones."""
    if grid is None:
        return None
    blocks = Blocks.of(grid, 1, columns, lookup=lookup)
    return Grid(blocks.bits, blocks.block, not blocks.has_zeros)


def measured_product(
    grid: Grid | None, rows: int, columns: int, tokens: int, accuracy_level: int, threads: int
) -> float:
    """Seconds of one node, measured now; arguments as in ``KernelTable.product``."""
    weight = 4 * rows * columns if grid is None else grid.stored_bytes(rows, columns)
    copies = max(1, SESSION_BYTES // weight) if tokens == 1 else 1
    graph = _products(grid, rows, columns, copies, accuracy_level)
    runs = [_opened(graph, columns, tokens, threads) for _ in range(SESSIONS if tokens == 1 else 1)]
    return typical(runs, clock(threads)) / copies


def clock(threads: int) -> Clock:
    """Processor time where all work is done by the calling thread, else wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def typical(runs: list[Callable[[], object]], now: Clock) -> float:
    """Median seconds of several calls, made in turn until ``SECONDS`` have passed; the first round is not counted."""
    for run in runs:
        run()
    found, until = list[float](), time.perf_counter() + SECONDS
    while len(found) < LEAST_ROUNDS * len(runs) or time.perf_counter() < until:
        for run in runs:
            began = now()
            run()
            found.append(now() - began)
    return statistics.median(found)


def random_weight(grid: Grid | None, rows: int, columns: int, name: str) -> Tensor | QuantizedWeight:
    """A matrix [n, k], another one for another name: onnxruntime keeps equal matrices only once, in the cache."""
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if grid is None:
        return torch.randn(rows, columns, generator=draw)
    codes = torch.randint(grid.levels + 1, (rows, columns), generator=draw, dtype=torch.uint8)
    scale, zero = torch.rand(rows, grid.groups(columns), generator=draw), torch.full_like(codes[:, :1], grid.middle)
    return QuantizedWeight(codes, scale.half(), zero.expand(scale.shape).contiguous(), grid)


def _products(grid: Grid | None, rows: int, columns: int, copies: int, accuracy_level: int) -> bytes:
    """A graph of products, each with another matrix."""
    builder = Builder()
    x = builder.input("x", [*TOKENS, columns])
    parts = [Part(f"w{index}", rows, columns) for index in range(copies)]
    grids = {} if grid is None else {part.stem: grid for part in parts}

    def read(name: str) -> Tensor | QuantizedWeight:
        return random_weight(grid, rows, columns, name)

    linears = Linears(builder, grids, read, accuracy_level)
    for part in parts:
        builder.output(linears.stacked(x, [part]), f"y.{part.stem}")
    serialized: bytes = ir.to_proto(builder.model("products", {})).SerializeToString()
    return serialized


def _opened(graph: bytes, columns: int, tokens: int, threads: int) -> Callable[[], object]:
    """A session of ``_products`` with all inputs and outputs bound: a call runs it."""
    options, _ = session_options(threads)
    session = ort.InferenceSession(graph, options, providers=[CPU])
    binding: Any = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(np.ones((1, tokens, columns), np.float32)))
    for output in session.get_outputs():
        shape = (1, tokens, output.shape[-1])
        binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)))
    return lambda: session.run_with_iobinding(binding)
