"""Predicted speed of an export: measured products at any width, plus what a layer takes besides them.

Products are measured at a few widths (``POINTS``) and interpolated between them. Kernels work in steps (blocks of
columns, tiles of rows), so the true curve is a staircase around the interpolated line; below the smallest measured
width, the floor, a product is priced like that width.

The rest of a layer is what the exporter's graphs of one and of many layers take beyond their products: attention,
norms, rotary embedding, writes to the cache, activation, the fixed cost of nodes. It is measured at two value widths
and two MLP widths and is linear in both. These graphs have as many layers as the model, or enough to be larger than the
processor's caches, so that the time of one plan is measured as a whole, and products are needed only for differences.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from flatq.export import (
    LINEARS,
    DecoderConfig,
    ExportError,
    Grid,
    Grids,
    LayerDims,
    QuantizedWeight,
    Seconds,
    SpeedLoad,
    SpeedModel,
    tensor_shapes,
)
from flatq_onnx.contract import Contract
from flatq_onnx.graph import draw
from flatq_onnx.kernels import KernelTable, clock, random_weight, stored_grid, typical
from flatq_onnx.options import OnnxOptions
from flatq_onnx.runner import OnnxRunner

POINTS = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1)  # measured widths, as fractions of the widest
STEP = 32  # measured widths are multiples of it
INTO_STREAM = ("o", "down")  # linears whose output is added to the residual stream
SAMPLE_GRID = Grid(4, 32)  # of the graphs in which the rest of a layer is measured
SAMPLE_VOCAB, SAMPLE_WEIGHTS = 64, 1 << 28  # rows of its embedding; enough weights in its layers
TURNS, STEPS = 5, 24  # of the sample graphs: prompts, and decoded tokens after each


@dataclass(frozen=True, slots=True)
class Rest:
    """What is no product: ``ends`` of a call, ``layer`` of the dense widths, slopes per unit of d_v and of d_ff."""

    ends: Seconds
    layer: Seconds
    per_value: Seconds
    per_channel: Seconds


class OnnxSpeed(SpeedModel):
    """See ``flatq.export.SpeedModel``; measures when asked.

    Args:
        config: the widths before compression.
        options: of the export.
        load: of the prediction.

    Raises:
        ExportError: these options, or this load, cannot be predicted.
    """

    def __init__(self, config: DecoderConfig, options: OnnxOptions, load: SpeedLoad) -> None:
        if options.activations != "fp32" or options.target == "web":
            raise ExportError(
                f"onnx: the speed of target: {options.target} with activations: {options.activations} cannot be "
                "predicted on this CPU; limit the size, or use target: ort, genai or optimum with fp32"
            )
        if config.experts:
            raise ExportError("onnx: the speed of a mixture of experts cannot be predicted; limit the size")
        self.config, self.options, self.load = config, options, load
        self.limit = options.positions(config)
        if max(load.context, load.prompt) > self.limit - STEPS:
            raise ExportError(
                f"onnx: the speed at {max(load.context, load.prompt)} positions cannot be predicted for a model of "
                f"{self.limit}; use at most {self.limit - STEPS}"
            )
        self.table = KernelTable(load.threads)
        self.dims = config.layers[0]
        self._lines: dict[tuple[Grid | None, bool], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = {}

    def linears(self, dims: LayerDims, grids: Grids) -> Seconds:
        """See ``SpeedModel.linears``; those with one grid are one node, see ``Linears.project``."""
        shapes = {name: self._shape(dims, name) for name in grids}
        if any(name in grids for name in INTO_STREAM):
            ((name, grid),) = grids.items()
            return self._line(grid, shapes[name][1], into=True)
        if len(set(grids.values())) == 1:
            return self._line(next(iter(grids.values())), sum(rows for rows, _ in shapes.values()), into=False)
        parts = (self._line(grid, shapes[name][0], into=False) for name, grid in grids.items())
        return sum(parts, Seconds())

    def rest(self, half: str, dims: LayerDims) -> Seconds:
        """See ``SpeedModel.rest``."""
        rest = self._rest
        if half == "mlp":
            return scaled(rest.per_channel, dims.d_ff)
        wider = scaled(rest.per_value, dims.d_v - self.dims.d_v)
        return rest.layer + wider + scaled(rest.per_channel, -self.dims.d_ff)

    def ends(self, grids: Grids) -> Seconds:
        """See ``SpeedModel.ends``."""
        tied, tokens = self.config.tied_head, 1 if self.options.chooses_logits else self.load.prompt
        grid = self._stored(grids.get("embed" if tied else "head"), self.config.d_model, lookup=tied)
        head = (self._product(grid, self.config.vocab, self.config.d_model, count) for count in (1, tokens))
        choice = self._choice()
        return self._rest.ends + Seconds(*head) + Seconds(choice, choice)

    @cached_property
    def _rest(self) -> Rest:
        """Measured in graphs of few layers, minus their products."""
        dims, weights = self.dims, self.dims.parameters(self.config.d_model)
        many = max(2, min(len(self.config.layers), -(-SAMPLE_WEIGHTS // weights)))
        lean = replace(dims, d_v=max(8, dims.d_v // 16 * 8))
        slim = replace(dims, d_ff=max(STEP, dims.d_ff // 64 * STEP))
        one, whole, less_value, less_channels = (
            self._sampled([(dims, 1), (dims, many), (lean, many), (slim, many)], number) for number in range(4)
        )
        layer = scaled(whole + scaled(one, -1), 1 / (many - 1))
        ends = one + scaled(layer, -1)
        rests = [
            scaled(total + scaled(ends, -1), 1 / many) + scaled(self._sample_products(wide), -1)
            for total, wide in ((whole, dims), (less_value, lean), (less_channels, slim))
        ]
        per_value = slope(rests[0], rests[1], dims.d_v - lean.d_v)
        return Rest(ends, rests[0], per_value, slope(rests[0], rests[2], dims.d_ff - slim.d_ff))

    def _shape(self, dims: LayerDims, name: str) -> tuple[int, int]:
        """Rows and columns of a linear in the file."""
        wide = replace(dims, d_v=dims.d_qk) if name == "v" and self.options.attention == "gqa" else dims
        return wide.shape(name, self.config.d_model)

    def _line(self, grid: Grid | None, width: int, *, into: bool) -> Seconds:
        """Interpolated time of a product with one width d_model and the other ``width``."""
        columns = width if into else self.config.d_model
        stored = self._stored(grid, columns)
        if (stored, into) not in self._lines:
            widths = self._widths(into=into)
            times = [self._both(stored, each, into) for each in widths]
            decode, prefill = (np.array([getattr(time_, name) for time_ in times]) for name in ("decode", "prefill"))
            self._lines[stored, into] = np.array(widths), decode, prefill
        widths_, decode, prefill = self._lines[stored, into]
        return Seconds(float(np.interp(width, widths_, decode)), float(np.interp(width, widths_, prefill)))

    def _widths(self, *, into: bool) -> list[int]:
        """Measured widths: fractions of the widest, and that of the dense attention."""
        dims = self.dims
        heads = dims.heads * dims.d_v if into else (dims.heads + dims.kv_heads) * dims.d_qk + dims.kv_heads * dims.d_v
        widest = max(heads, dims.d_ff if into else 2 * dims.d_ff)
        return sorted({heads, *(max(STEP, int(widest * part) // STEP * STEP) for part in POINTS), widest})

    def _both(self, grid: Grid | None, width: int, into: bool) -> Seconds:
        shape = (self.config.d_model, width) if into else (width, self.config.d_model)
        return Seconds(*(self._product(grid, *shape, tokens) for tokens in (1, self.load.prompt)))

    def _product(self, grid: Grid | None, rows: int, columns: int, tokens: int) -> float:
        return self.table.product(grid, rows, columns, tokens, self.options.accuracy_level)

    def _stored(self, grid: Grid | None, columns: int, *, lookup: bool = False) -> Grid | None:
        return stored_grid(grid if self.options.precision == "int4" else None, columns, lookup=lookup)

    def _sample_products(self, dims: LayerDims) -> Seconds:
        """All products of a layer of the sample graphs."""
        units = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
        return sum((self.linears(dims, dict.fromkeys(unit, SAMPLE_GRID)) for unit in units), Seconds())

    def _choice(self) -> float:
        """Copying the logits out of the runtime's buffer, and the choice of a token."""
        name, logits = f"choice of {self.config.vocab}", np.zeros((1, 1, self.config.vocab), np.float32)

        def measured() -> dict[str, float]:
            return {name: typical([lambda: logits[:, -1].astype(np.float32).argmax(-1)], clock(1))}

        return self.table.seconds(name, measured)

    def _sampled(self, samples: Sequence[tuple[LayerDims, int]], number: int) -> Seconds:
        """Measured times of one of the sample graphs, which take turns."""
        text = json.dumps(
            [replace(self.config, vocab=SAMPLE_VOCAB).to_dict(), self.options.model_dump(), repr(samples)]
        )
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        kinds = {"decode": f"context {self.load.context}", "prefill": f"prompt {self.load.prompt}"}

        def measured() -> dict[str, float]:
            with tempfile.TemporaryDirectory() as folder:
                graphs = [
                    self._graph(Path(folder) / str(index), dims, count) for index, (dims, count) in enumerate(samples)
                ]
                found = alternately(graphs, self.load, self.limit)
            return {
                f"sample {digest}.{index}, {kind} {kinds[kind]}": getattr(one, kind)
                for index, one in enumerate(found)
                for kind in kinds
            }

        return Seconds(
            *(self.table.seconds(f"sample {digest}.{number}, {kind} {kinds[kind]}", measured) for kind in kinds)
        )

    def _graph(self, root: Path, dims: LayerDims, count: int) -> OnnxRunner:
        """An export of ``count`` equal layers with random weights, opened."""
        kind_of = (self.config.kind_of * count)[:count]
        config = replace(self.config, vocab=SAMPLE_VOCAB, layers=(dims,) * count, kind_of=kind_of)
        stems = [f"layers.{index}.{name}" for index in range(count) for name in LINEARS]
        grids = dict.fromkeys([*stems, "embed", *([] if config.tied_head else ["head"])], SAMPLE_GRID)
        if self.options.precision != "int4":
            grids = {}
        shapes = tensor_shapes(config)

        def read(name: str) -> Tensor | QuantizedWeight:
            if len(shapes[name]) == 1:
                return torch.ones(shapes[name])
            rows, columns = shapes[name]
            return random_weight(grids.get(name.removesuffix(".weight")), rows, columns, name)

        ranges = {
            f"layers.{index}.{part}": torch.ones(dims.kv_heads, dims.d_qk)
            for index in range(count)
            for part in ("key", "value")
        }
        path = root / self.options.model_file
        path.parent.mkdir(parents=True)
        ir.save(draw(config, grids, read, self.options, {}, ranges), path)
        contract = Contract.of(config, grids, {}, self.options)
        return OnnxRunner(root, provider="cpu", threads=self.load.threads, contract=contract)


def alternately(graphs: Sequence[OnnxRunner], load: SpeedLoad, limit: int) -> list[Seconds]:
    """Median seconds of a prompt and of a step of each graph, measured in turns."""
    now, draw = clock(load.threads), np.random.default_rng(0)
    prompt, context = (draw.integers(SAMPLE_VOCAB, size=(1, size)) for size in (load.prompt, load.context))
    prompts: list[list[float]] = [[] for _ in graphs]
    steps: list[list[float]] = [[] for _ in graphs]
    for _ in range(TURNS):
        for graph, first, later in zip(graphs, prompts, steps, strict=True):
            began = now()
            graph.start(prompt, min(limit, load.prompt + STEPS))
            first.append(now() - began)
            token = graph.start(context, min(limit, load.context + STEPS)).argmax(-1)
            for _ in range(STEPS):
                began = now()
                token = graph.step(token).argmax(-1)
                later.append(now() - began)
    for graph in graphs:
        graph.close()
    return [Seconds(median(later), median(first)) for first, later in zip(prompts, steps, strict=True)]


def scaled(seconds: Seconds, factor: float) -> Seconds:
    """Both times multiplied."""
    return Seconds(seconds.decode * factor, seconds.prefill * factor)


def slope(wide: Seconds, narrow: Seconds, difference: int) -> Seconds:
    """Seconds per unit of width; not below zero, which only noise would give."""
    step = scaled(wide + scaled(narrow, -1), 1 / max(1, difference))
    return Seconds(max(0.0, step.decode), max(0.0, step.prefill))
