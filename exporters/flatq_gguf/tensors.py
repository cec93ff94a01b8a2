"""The tensors of the file, planned from shapes, and their conversion from the artifact.

Sizes are computed from ``planned``, and the file's tensor table is written from it before any weight is read, so
``tensor`` must return what was planned. One tensor of the artifact is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flatq.export import (
    FAMILIES,
    LINEARS,
    ROPE_DIVISORS,
    DecoderConfig,
    ExportError,
    Grid,
    QuantizedWeight,
    Rope,
    Weights,
    dense,
    matrix_shape,
    tensor_shapes,
)
from flatq_gguf.blocks import BLOCK, carried, carrier, fits, stored_bytes
from flatq_gguf.k_quants import K_QUANTS
from flatq_gguf.layouts import QKV, Architecture, architecture, native_rope
from flatq_gguf.options import GgufOptions
from flatq_gguf.placement import Placement

TABLES = ("embed", "head")
OF_EXPERTS = ("gate", "up", "down")
ALIGNMENT = 32
# Types whose numbers or scales are float16, and how many scales the largest number of a block is.
HALF_SCALED = {"F16": 1.0, "Q4_0": 8.0, "Q4_1": 7.5, "Q5_0": 16.0, "Q8_0": 127.0}
FEWEST_STEPS = 16  # of float16's smallest number in the largest scale of a tensor; with fewer it has no precision
STILL = 1e30  # divisor of a pair that stands still


@dataclass(frozen=True, slots=True)
class Planned:
    """A planned tensor.

    Attributes:
        name: in the file.
        source: name of the artifact's tensor; empty for rope factors.
        shape: [o, i] or [o].
        kind: ggml's name of the type.
        carries_codes: whether the artifact's codes are stored exactly.
        more: names of further tensors of the artifact whose rows follow.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: str
    carries_codes: bool = False
    more: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return stored_bytes(self.kind, self.shape)


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything that determines the content of the file."""

    config: DecoderConfig
    grids: Mapping[str, Grid]
    options: GgufOptions
    architecture: Architecture

    @classmethod
    def of(cls, config: DecoderConfig, grids: Mapping[str, Grid], options: GgufOptions) -> Contents:
        """The contents of one export."""
        return cls(config, grids, options, architecture(config, options))

    def planned(self) -> Iterator[Planned]:
        """All tensors in the order in which they are written."""
        if not native_rope(self.config.rope):
            yield Planned(ROPE_DIVISORS, "", (self.config.layers[0].d_qk // 2,), "F32")
        shapes = shapes_of(self.architecture.written)
        for name, flat in shapes.items():
            shape = self._stacked(name, flat)
            whole = len(shape) == 1 or name.endswith(".router.weight")  # a rounded router chooses other experts
            kind, carries = ("F32", False) if whole else self._type(name.removesuffix(".weight"), shape)
            plan = Planned(self.name(name), name, shape, kind, carries)
            if not self.architecture.graph.fused or name.split(".")[-2] not in QKV:
                yield plan
            elif name.endswith("q.weight"):
                yield self._fused(plan, [name.replace("q.weight", f"{linear}.weight") for linear in "kv"], shapes)

    def _stacked(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file: linears of experts have the experts as first axis."""
        experts, linear = self.config.experts, name.split(".")[-2]
        if not experts or linear not in OF_EXPERTS:
            return shape
        rows, columns = shape
        return (experts, rows, columns // experts) if linear == "down" else (experts, rows // experts, columns)

    def matrix(self, stem: str) -> Planned:
        """One matrix as if it were written alone; queries, keys and values are fused only in ``planned``."""
        written = self.architecture.written
        shape = matrix_shape(written, stem)
        kind, carries = self._type(stem, shape)
        return Planned(stem, f"{stem}.weight", shape, kind, carries)

    def name(self, source: str) -> str:
        """Name in the file of a tensor of the artifact."""
        if self.architecture.graph.fused and source.split(".")[-2] in QKV:
            return f"blk.{source.split('.')[1]}.attn_qkv.weight"
        return FAMILIES[self.config.family].names.to_gguf(source)

    def _fused(self, first: Planned, others: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Planned:
        """The matrix of queries, keys and values; codes are stored if all three have one type."""
        rows = sum(shapes[name][0] for name in [first.source, *others])
        shape = (rows, first.shape[1])
        types = {(first.kind, first.carries_codes)} | {
            self._type(name.removesuffix(".weight"), shapes[name]) for name in others
        }
        kind, carries = types.pop() if len(types) == 1 else (self._rounded(self.options.otherwise, shape), False)
        return Planned(first.name, first.source, shape, kind, carries, tuple(others))

    def tensor(self, planned: Planned, weights: Weights) -> NDArray[np.generic]:
        """The data of a planned tensor: float32, float16, or uint8 [o, bytes of a row].

        Raises:
            ExportError: the artifact's tensor does not have the shape of its configuration, or a number is too large
                for float16.
        """
        if not planned.source:
            return rope_divisors(self.config)
        parts = [self._rows(source, planned, weights) for source in (planned.source, *planned.more)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _rows(self, source: str, planned: Planned, weights: Weights) -> NDArray[np.generic]:
        """The rows of one tensor of the artifact."""
        stored = weights.tensor(source)
        self._expect(source, tuple(stored.shape))
        stem = source.rpartition(".")[0]
        place = self.placement(stem)
        experts = self.config.experts if stem.endswith(".down") and place is not None else 0
        places = [place] if place is None or not experts else place.by_columns(experts)
        parts = [self._placed(source, stored, one, planned) for one in places]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _placed(
        self, source: str, stored: Tensor | QuantizedWeight, place: Placement | None, planned: Planned
    ) -> NDArray[np.generic]:
        if planned.carries_codes and isinstance(stored, QuantizedWeight):
            kind = carrier(stored.grid)
            assert kind is not None
            return carried(stored, place or Placement.whole(*stored.shape), kind)
        values = dense(stored).numpy()
        if (factor := self.architecture.factor(source)) != 1:
            values = values * np.float32(factor)
        if place is not None:
            values = place.vector(values) if source.endswith(".bias") else place.matrix(values)
        return encoded(values, planned)

    def _expect(self, name: str, found: tuple[int, ...]) -> None:
        expected = shapes_of(self.config)[name]
        if found != expected:
            raise ExportError(
                f"gguf: {name} has shape {list(found)}, the artifact's config.json gives {list(expected)}; run again "
                "with --fresh"
            )

    def placement(self, stem: str) -> Placement | None:
        """Placement of a linear of a layer; None for tensors that are not reordered or padded."""
        parts = stem.split(".")
        if parts[0] != "layers" or parts[2] not in LINEARS:
            return None
        index = int(parts[1])
        source, written = self.config.layers[index], self.architecture.written.layers[index]
        return Placement.of(
            parts[2],
            source,
            written,
            self.config.d_model,
            paired=self.architecture.paired,
            experts=self.config.mlp_parts,
        )

    def _type(self, stem: str, shape: tuple[int, ...]) -> tuple[str, bool]:
        """Type of a matrix, and whether its codes are stored exactly."""
        wanted, grid = self.options.precision, self.grids.get(stem)
        if wanted in K_QUANTS:
            return "F16", False
        if wanted == "codes":
            scaled = self.architecture.factor(f"{stem}.weight") != 1
            if grid is not None and not scaled and (kind := carrier(grid)) is not None:
                place = self.placement(stem) or Placement.whole(*shape)
                if fits(grid, self._inputs(stem, shape), place.columns):
                    return kind.name, True
            wanted = self.options.otherwise
        elif stem in TABLES and wanted not in ("f32", "f16", "bf16"):
            wanted = "q8_0"
        return self._rounded(wanted, shape), False

    def _rounded(self, wanted: str, shape: tuple[int, ...]) -> str:
        """The wanted type, or F16 if the rows are no whole blocks."""
        return "F16" if wanted[0] == "q" and shape[-1] % BLOCK else wanted.upper()

    def _inputs(self, stem: str, shape: tuple[int, ...]) -> int:
        """Columns of a matrix in the artifact."""
        if stem in TABLES:
            return shape[1]
        _, index, linear = stem.split(".")
        return self.config.layers[int(index)].shape(linear, self.config.d_model)[1]


@lru_cache(maxsize=4)
def shapes_of(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """``flatq.model.weights.tensor_shapes`` with a cache, because it builds the model (on device meta) in each call."""
    return tensor_shapes(config)


def rope_divisors(config: DecoderConfig) -> NDArray[np.float32]:
    """Divisors of the unscaled rope frequencies, as llama.cpp stores them, float32 [d_qk / 2]."""
    d_qk = config.layers[0].d_qk
    found = config.rope.inverse_frequencies(d_qk)
    plain = Rope(config.rope.theta).inverse_frequencies(d_qk)
    divisors: NDArray[np.float32] = torch.where(found > 0, plain / found, STILL).numpy()
    return divisors


def encoded(values: NDArray[np.generic], planned: Planned) -> NDArray[np.generic]:
    """Numbers converted to the planned type, rounded to nearest by the gguf package."""
    import gguf

    largest, levels = float(np.abs(values).max(initial=0)), HALF_SCALED.get(planned.kind)
    if levels is not None and not largest <= levels * float(np.finfo(np.float16).max):
        raise ExportError(
            f"gguf: {planned.source}: its largest number {largest:g} is beyond float16; use precision "
            "bf16 or f32 (with codes: otherwise: f32)"
        )
    if levels is not None and 0 < largest < FEWEST_STEPS * levels * float(np.finfo(np.float16).smallest_subnormal):
        raise ExportError(
            f"gguf: {planned.source}: its largest number {largest:g} is too small for float16; use precision bf16 or "
            "f32 (with codes: otherwise: f32)"
        )
    values = np.ascontiguousarray(values, np.float32)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[planned.kind])
