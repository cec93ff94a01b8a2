"""The tensors of a folder, planned from shapes, and their conversion from the artifact.

Sizes and shards are computed from ``planned``, and the file is written from ``made``, which must return what was
planned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from flatq.export import (
    FAMILIES,
    LINEARS,
    DecoderConfig,
    ExportError,
    Grid,
    QuantizedWeight,
    dense,
    matrix_shape,
    tensor_shapes,
)
from flatq_safetensors.configs import NAMES, family_settings
from flatq_safetensors.grouping import ENDS, split_groups
from flatq_safetensors.options import SafetensorsOptions
from flatq_safetensors.packing import pack_compressed, pack_gptq, words
from flatq_safetensors.padding import pad_dense, pad_quantized, padded_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Planned:
    """Shape and type of a planned tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that determines the content of a folder.

    Attributes:
        source: the artifact's widths.
        config: the written widths, after padding.
        grids: grids of the weights that stay quantized, by stem; group sizes divide the row, -1 is one group per row.
        dtype: of unquantized and dequantized tensors.
        vectors: dtype of the norms and biases that keep the artifact's.
    """

    source: DecoderConfig
    config: DecoderConfig
    grids: Mapping[str, Grid]
    options: SafetensorsOptions
    dtype: torch.dtype
    vectors: Mapping[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        grids: Mapping[str, Grid],
        options: SafetensorsOptions,
        stored: torch.dtype,
        vectors: Mapping[str, torch.dtype] | None = None,
    ) -> Layout:
        """The layout of one export.

        Args:
            config: of the artifact.
            grids: of the artifact.
            options: of the export.
            stored: the artifact's own dtype.
            vectors: dtype of norms and biases in the artifact, by name; kept where ``options`` ask for no dtype.
        """
        written = padded_config(config) if options.pad_values else config
        kept = options.written_grids(config, grids) if options.keeps_codes else {}
        wanted = options.dtype if options.keeps_codes else options.format
        if wanted is not None:
            return cls(config, written, kept, options, DTYPES[wanted])
        return cls(config, written, kept, options, stored, vectors or {})

    @property
    def plain(self) -> bool:
        """Whether the folder is a standard checkpoint of the model's family."""
        return family_settings(self.config, codes=bool(self.grids)) is not None

    def _written(self, name: str) -> list[str]:
        """Names in the files of an unquantized tensor; in a standard checkpoint every expert has a tensor."""
        if not (self.config.experts and self.plain):
            return [NAMES.to_hf(name)]
        hub = FAMILIES[self.config.family].names.to_hf(name)
        return [hub.replace("*", str(number)) for number in range(self.config.experts)] if "*" in hub else [hub]

    def names(self) -> list[str]:
        """The artifact's tensors in the order in which they are written."""
        return list(shapes_of(self.source))

    def planned(self, name: str) -> dict[str, Planned]:
        """The written tensors for one tensor of the artifact, by name in the files."""
        hub, stem = NAMES.to_hf(name), name.removesuffix(".weight")
        if stem not in self.grids or not name.endswith(".weight"):
            written, shape = self._written(name), list(self._shape(name))
            shape[_axis_of_experts(name)] //= len(written)
            return dict.fromkeys(written, Planned(tuple(shape), self.vectors.get(name, self.dtype)))
        (rows, columns), grid = matrix_shape(self.config, stem), self.grids[stem]
        groups, bits = grid.groups(columns), grid.bits
        if self.options.gptq_version is not None:
            parts = {
                "qweight": Planned((words(columns, bits), rows), torch.int32),
                "qzeros": Planned((groups, words(rows, bits)), torch.int32),
                "scales": Planned((groups, rows), torch.float16),
                "g_idx": Planned((columns,), torch.int32),
            }
        else:
            parts = {
                "weight_packed": Planned((rows, words(columns, bits)), torch.int32),
                "weight_scale": Planned((rows, groups), torch.float16),
                "weight_shape": Planned((2,), torch.int64),
            }
            if not grid.symmetric:
                parts["weight_zero_point"] = Planned((words(rows, bits), groups), torch.int32)
        module = hub.removesuffix(".weight")
        return {f"{module}.{part}": plan for part, plan in parts.items()}

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of a written tensor; that of a matrix follows from the widths, without building the model."""
        stem, _, part = name.rpartition(".")
        matrix = part == "weight" and (stem in ENDS or stem.rpartition(".")[2] in LINEARS)
        return matrix_shape(self.config, stem) if matrix else shapes_of(self.config)[name]

    def made(self, name: str, stored: Tensor | QuantizedWeight) -> dict[str, Tensor]:
        """The planned tensors with their data.

        Raises:
            ExportError: a zero that format gptq (v1) cannot store; a number too large for float16; the artifact's
                tensor does not have the shape of its configuration.
        """
        tensors = self._packed(name, stored) if self._keeps(name, stored) else self._decoded(name, stored)
        found = {key: Planned(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        if found != self.planned(name):
            raise ExportError(f"{name}: the artifact gives {found}, config.json needs {self.planned(name)}")
        return tensors

    def _keeps(self, name: str, stored: Tensor | QuantizedWeight) -> bool:
        return isinstance(stored, QuantizedWeight) and name.removesuffix(".weight") in self.grids

    def _packed(self, name: str, stored: Tensor | QuantizedWeight) -> dict[str, Tensor]:
        assert isinstance(stored, QuantizedWeight)
        stem = name.removesuffix(".weight")
        weight = split_groups(stored, self.grids[stem])
        if self.options.pad_values and stem not in ENDS:
            _, index, linear = stem.split(".")
            weight = pad_quantized(weight, linear, self.source.layers[int(index)])
        if self.options.gptq_version is None:
            parts = pack_compressed(weight)
        else:
            parts = pack_gptq(weight, version=self.options.gptq_version, name=stem).tensors
        module = NAMES.to_hf(name).removesuffix(".weight")
        return {f"{module}.{part}": tensor for part, tensor in parts.items()}

    def _decoded(self, name: str, stored: Tensor | QuantizedWeight) -> dict[str, Tensor]:
        tensor = dense(stored)
        if self.options.pad_values and name.startswith("layers."):
            tensor = pad_dense(tensor, name, self.source.layers[int(name.split(".")[1])])
        cast = tensor.to(self.vectors.get(name, self.dtype))
        if not bool(cast.isfinite().all()):
            raise ExportError(
                f"{name}: its largest number {float(tensor.abs().max()):g} is beyond {self.dtype}; write bf16 or fp32"
            )
        written = self._written(name)
        parts = cast.chunk(len(written), _axis_of_experts(name))
        return {hub: part.contiguous() for hub, part in zip(written, parts, strict=True)}


def _axis_of_experts(name: str) -> int:
    return 1 if name.endswith(".down.weight") else 0


@lru_cache(maxsize=4)
def shapes_of(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """``flatq.model.weights.tensor_shapes`` with a cache, because it builds the model (on device meta) in each call."""
    return tensor_shapes(config)
