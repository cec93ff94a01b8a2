"""Hidden states of all calibration tokens, on disk, with a batch of them in memory.

A 7B model at 128 x 2048 tokens has 4 GB of hidden states, a 70B model 8 GB: more than the rest of a walk needs. They
live in a memory-mapped file. Pages that were touched count as resident memory until they are given back, so a feed
gives them back after every batch; the system keeps them cached for as long as nobody needs the memory.

Stored as float32, or as bfloat16, which halves the disk and the traffic. What that costs is in docs/decisions/0021.

Several processes (see ``machine.distributed``) map the same file and each uses its own samples, so that another number
of processes can go on where these stopped.
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

BATCH_TOKENS = 2048  # at most, per forward pass: enough for the matrix kernels, and what it needs stays in the heap
WORKING_SET = 512 << 20  # bytes of a batch's activations, unless one sample alone needs more
LARGE = 2 << 30  # bytes of float32 states from which on bfloat16 is the better use of the disk


@dataclass(frozen=True, slots=True)
class Execution:
    """How tokens are sent through a model.

    Attributes:
        precision: of the matrix products, see ``precision.forward_precision``.
        states: how hidden states are stored, ``float32``, ``bfloat16`` or ``auto`` (by their size).
        device: where blocks run.
        working_set_bytes: bytes for the activations of a batch.
    """

    precision: str = "auto"
    states: str = "auto"
    device: str = "cpu"
    working_set_bytes: int = WORKING_SET

    @classmethod
    def of(cls, text: CalibrationSpec, device: str, working_set_bytes: int) -> Execution:
        """As the recipe's calibration block says."""
        return cls(text.precision, text.states, device, working_set_bytes)


AUTO = Execution()


class HiddenStates:
    """Hidden states [samples, seq, d_model] in a memory-mapped file.

    Its blocks are allocated before it is mapped: a full disk is then an ``OSError`` now. Written through the map,
    a sparse file would end the process with SIGBUS in the middle of the walk.

    Attributes:
        states: all of them, ``dtype`` [samples, seq, d_model].
        mine: the samples of this process.
        batch_tokens: tokens that are in memory at a time (at least one sample).
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
        """Begin with the embeddings of int64 tokens [samples, seq], whatever the table is stored as."""
        for batch in self.batches():
            self.states[batch] = embedded(tokens[batch], table)

    def flush(self) -> None:
        """Wait until the states are on the disk: the resume state must never be ahead of them."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def forget(self) -> None:
        """Give the pages back: what they hold is in the file, and is read again when it is touched again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def batches(self) -> Iterator[slice]:
        """Slices of this process's samples, at most ``batch_tokens`` tokens each (at least one sample).

        A process without samples gets one empty slice: the shapes of what it measures are then the same as elsewhere.
        """
        step = max(1, self.batch_tokens // self.states.shape[1])
        for start in range(self.mine.start, max(self.mine.stop, self.mine.start + 1), step):
            yield slice(start, min(start + step, self.mine.stop))
            self.forget()


def embedded(tokens: Tensor, table: Tensor | QuantizedWeight) -> Tensor:
    """Rows of an embedding, float32 [..., d_model]; only the rows that are asked for are decoded."""
    if isinstance(table, QuantizedWeight):
        codes, scale, zero = (functional.embedding(tokens, part) for part in (table.codes, table.scale, table.zero))
        rows = QuantizedWeight(codes.flatten(0, -2), scale.flatten(0, -2), zero.flatten(0, -2), table.grid)
        return rows.dequantize().view(codes.shape)
    return functional.embedding(tokens, table).float()


def pieces(tokens: Tensor, length: int, most: int) -> Tensor:
    """A part of a text in shorter rows, so that it comes from as many places as there are, int64 [k, <= length].

    The beginnings of all samples come first, then what follows them; ``most`` tokens in all, or a single row. Shorter
    rows also take less attention.

    Args:
        tokens: [samples, seq].
    """
    samples, seq = tokens.shape
    length = min(length, seq)
    each = seq // length
    rows = tokens[:, : each * length].reshape(samples, each, length).transpose(0, 1).reshape(-1, length)
    return rows[: max(1, most // length)]


def batch_tokens(config: DecoderConfig, working_set_bytes: int = WORKING_SET) -> int:
    """How many tokens go through half a layer together, so that their activations fit into ``working_set_bytes``."""
    return max(1, min(BATCH_TOKENS, working_set_bytes // activation_bytes(config)))


def activation_bytes(config: DecoderConfig) -> int:
    """Of one token in the widest MLP, float32: gate, up and their product, and the stream around them."""
    return 4 * max(3 * dims.d_ff + 4 * config.d_model for dims in config.layers)


def stored_as(wanted: str, tokens: int, d_model: int) -> torch.dtype:
    """The dtype of the states: ``auto`` is bfloat16 for large models, whatever machine this is."""
    if wanted == "auto":
        wanted = "bfloat16" if 4 * tokens * d_model >= LARGE else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def _allocate(path: Path, size: int) -> None:
    """Give a file real blocks on disk for ``size`` bytes; what it holds stays."""
    path.touch()
    with path.open("rb+") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        missing = size - file.seek(0, os.SEEK_END)
        while missing > 0:
            missing -= file.write(bytes(min(missing, 1 << 24)))
