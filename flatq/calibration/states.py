"""Hidden states of all calibration tokens, on disk, with one batch in memory.

A 7B model at 128 x 2048 tokens has 4 GB of hidden states, a 70B model 8 GB: more than the rest of a walk needs. They
are in a memory-mapped file. Touched pages count as resident memory until they are released, so ``HiddenStates``
releases them after every batch; the system keeps them cached as long as the memory is free.

They are stored as float32, or as bfloat16, which halves disk space and traffic (accuracy: docs/decisions/0021).

Several processes (see ``machine.distributed``) map the same file and each uses its share of the samples, so that a run
can be resumed with another number of processes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from flatq.machine import distributed
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import QuantizedWeight
from flatq.recipe.blocks import CalibrationSpec

BATCH_TOKENS = 2048  # at most, per forward pass: enough for efficient matrix products, small enough to reuse the heap
WORKING_SET = 512 << 20  # bytes of a batch's activations, unless a single sample needs more
LARGE = 2 << 30  # bytes of float32 states from which on ``auto`` stores bfloat16


@dataclass(frozen=True, slots=True)
class Execution:
    """Settings of the forward passes.

    Attributes:
        precision: of the matrix products, see ``precision.forward_precision``.
        states: dtype of the hidden states on disk, ``float32``, ``bfloat16`` or ``auto`` (by their size).
        device: where blocks run.
        working_set_bytes: bytes for the activations of a batch.
    """

    precision: str = "auto"
    states: str = "auto"
    device: str = "cpu"
    working_set_bytes: int = WORKING_SET

    @classmethod
    def of(cls, text: CalibrationSpec, device: str, working_set_bytes: int) -> Execution:
        """The settings of the recipe's calibration block."""
        return cls(text.precision, text.states, device, working_set_bytes)


AUTO = Execution()


class HiddenStates:
    """Hidden states [samples, seq, d_model] in a memory-mapped file.

    Disk blocks are allocated before the file is mapped, so that a full disk raises ``OSError`` now. Writing to a sparse
    file through the map would kill the process with SIGBUS in the middle of the walk.

    Attributes:
        states: all hidden states, ``dtype`` [samples, seq, d_model].
        mine: range of the samples of this process.
        batch_tokens: tokens per batch (at least one sample).
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
        batch_tokens: int | None = None,
    ) -> None:
        self.path, self.batch_tokens = path, batch_tokens or BATCH_TOKENS
        self.mine = distributed.share(shape[0])
        size = shape[0] * shape[1] * shape[2] * dtype.itemsize
        _allocate(path, size)
        with path.open("rb+") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self.states: Tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)

    def embed(self, tokens: Tensor, table: Tensor | QuantizedWeight) -> None:
        """Write the embeddings of int64 tokens [samples, seq], from a dense or quantized table [vocab, d_model]."""
        for batch in self.batches():
            self.states[batch] = embedded(tokens[batch], table)

    def everyone(self) -> Tensor:
        """States of the samples of all processes, [samples, seq, d_model]; all processes must call it together."""
        if distributed.size() == 1:
            return self.states
        found, own = torch.zeros(self.states.shape), slice(self.mine.start, self.mine.stop)
        found[own] = self.states[own]
        return distributed.all_reduce(found)

    def flush(self) -> None:
        """Sync the states to disk; call it before the resume state is written."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def forget(self) -> None:
        """Release the resident pages (``madvise``); the data is in the file and is read again on access."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def batches(self) -> Iterator[slice]:
        """Slices of this process's samples, at most ``batch_tokens`` tokens each (at least one sample).

        There are none for a process without samples: no pass of a model ever sees an empty batch.
        """
        step = max(1, self.batch_tokens // self.states.shape[1])
        for start in range(self.mine.start, self.mine.stop, step):
            yield slice(start, min(start + step, self.mine.stop))
            self.forget()


def embedded(tokens: Tensor, table: Tensor | QuantizedWeight) -> Tensor:
    """Embedding lookup, int64 [...] -> float32 [..., d_model]; only the requested rows are dequantized."""
    if isinstance(table, QuantizedWeight):
        codes, scale, zero = (functional.embedding(tokens, part) for part in (table.codes, table.scale, table.zero))
        rows = QuantizedWeight(codes.flatten(0, -2), scale.flatten(0, -2), zero.flatten(0, -2), table.grid)
        return rows.dequantize().view(codes.shape)
    return functional.embedding(tokens, table).float()


def pieces(tokens: Tensor, length: int, most: int) -> Tensor:
    """Part of a text, cut into shorter rows so that it covers as many samples as possible, int64 [k, <= length].

    The first row of each sample comes first, then the second rows, and so on; ``most`` tokens in total, or a single
    row. Shorter rows also make attention cheaper.

    Args:
        tokens: [samples, seq].
        length: tokens per row, at most.
        most: total number of tokens, at most.
    """
    samples, seq = tokens.shape
    length = min(length, seq)
    each = seq // length
    rows = tokens[:, : each * length].reshape(samples, each, length).transpose(0, 1).reshape(-1, length)
    return rows[: max(1, most // length)]


def batch_tokens(config: DecoderConfig, working_set_bytes: int = WORKING_SET) -> int:
    """Tokens per batch, so that the activations of half a layer fit into ``working_set_bytes``."""
    return max(1, min(BATCH_TOKENS, working_set_bytes // activation_bytes(config)))


def activation_bytes(config: DecoderConfig) -> int:
    """Activation bytes of one token in the widest MLP, float32: gate, up, their product, and the residual stream."""
    return 4 * max(3 * dims.d_ff + 4 * config.d_model for dims in config.layers)


def stored_as(wanted: str, tokens: int, d_model: int) -> torch.dtype:
    """The dtype of the hidden states; ``auto`` depends on their size only, not on the machine."""
    if wanted == "auto":
        wanted = "bfloat16" if 4 * tokens * d_model >= LARGE else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def _allocate(path: Path, size: int) -> None:
    """Allocate disk blocks for ``size`` bytes of a file; existing content is kept."""
    path.touch()
    with path.open("rb+") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        missing = size - file.seek(0, os.SEEK_END)
        while missing > 0:
            missing -= file.write(bytes(min(missing, 1 << 24)))
