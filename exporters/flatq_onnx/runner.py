"""Running an export in onnxruntime: prompt in one call, then a token a call, the cache never leaving its device.

``gqa`` graphs update their cache in place: past and present are bound once to one buffer as long as the capacity,
which spares a copy of the whole cache for every token. ``reduced`` graphs return a new cache, and its tensors are
handed back as they are.

Axes: b batch, s new positions, t all positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flatq.errors import ExportError
from flatq.export import FloatArray, IntArray
from flatq_onnx.contract import CacheShape, Contract
from flatq_onnx.session import CUDA, open_session


class OnnxRunner:
    """An open export; satisfies ``flatq.export.Runner``.

    Args:
        root: folder that the exporter wrote.
        provider: ``auto``, ``cpu`` or ``cuda``.
        threads: 0 is one per physical core.
        exact: compute with float32 activations, for comparison with the artifact.

    Raises:
        ExportError: the folder is no ONNX export, or cannot be run as asked.
    """

    def __init__(self, root: Path, *, provider: str = "auto", threads: int = 0, exact: bool = False) -> None:
        self.root, self.contract = root, Contract.load(root)
        path = root / self.contract.model
        if not path.exists():
            raise ExportError(f"{path} is missing; export the model again")
        quantized = self.contract.precision == "int4"
        self.session = open_session(path, provider=provider, threads=threads, exact=exact and quantized)
        self.device = "cuda" if self.session.wanted == CUDA else "cpu"
        self._cache: _SharedCache | _GrowingCache | None = None

    @property
    def provider(self) -> str:
        """What really runs the nodes."""
        return self.session.provider

    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        """Logits of every position without a past, [b, s] -> [b, s, vocab]; ``valid`` is 0 at padding.

        Raises:
            ExportError: left padding in a layout that takes only right padding, or tokens beyond its limit.
        """
        mask = np.ones_like(tokens) if valid is None else np.asarray(valid, np.int64)
        self._allow(tokens.shape[1])
        if not self.contract.left_padding and bool((np.diff(mask, axis=1) > 0).any()):
            raise ExportError(
                f"{self.root}: this attention layout takes padding on the right only; pad there, or export with "
                "attention: reduced or left_padding: true"
            )
        feeds = {
            "input_ids": np.asarray(tokens, np.int64),
            "attention_mask": mask,
            "logits_from": np.zeros(1, np.int64),
        }
        for name, shape in _cache_shapes(self.contract.cache, tokens.shape[0], 0):
            feeds[f"past_key_values.{name}"] = np.zeros(shape, np.float32)
        found: FloatArray = self.session.ort.run(["logits"], feeds)[0]
        return found

    def start(self, tokens: IntArray, capacity: int) -> FloatArray:
        """Forget the past, read a prompt into the cache, return its last logits, [b, s] -> [b, vocab]."""
        if capacity < tokens.shape[1]:
            raise ExportError(f"{self.root}: capacity {capacity} is less than the prompt's {tokens.shape[1]} tokens")
        self._allow(capacity)
        kind = _SharedCache if self.contract.shared_cache else _GrowingCache
        self._cache = kind(self.session.ort, self.contract.cache, tokens.shape[0], capacity, self.device)
        return self._cache.append(tokens)

    def step(self, tokens: IntArray) -> FloatArray:
        """Append one token per row to the cache, [b] -> [b, vocab]."""
        if self._cache is None:
            raise ExportError(f"{self.root}: step was called before start; read a prompt first")
        return self._cache.append(tokens[:, None])

    def close(self) -> None:
        """Free the session and the cache."""
        self._cache = None
        del self.session

    def _allow(self, positions: int) -> None:
        limit = self.contract.context_length
        if limit is not None and positions > limit:
            raise ExportError(f"{self.root}: {positions} positions were asked for, its rotary tables have {limit}")


class _BoundCache:
    """A cache and the binding of inputs and outputs to it."""

    def __init__(self, session: Any, shapes: list[CacheShape], batch: int, capacity: int, device: str) -> None:
        self._session, self._device, self.capacity = session, device, capacity
        self.length = 0
        self._binding = session.io_binding()
        self._valid = np.ones(batch * capacity, np.int64)  # any [b, t] of it is contiguous
        self._bind("logits_from", np.full(1, -1, np.int64))
        self._binding.bind_output("logits", "cpu")  # outputs come back in the order of their first binding

    def append(self, tokens: IntArray) -> FloatArray:
        """Run new tokens, [b, s] -> logits of the last one [b, vocab]."""
        batch, new = tokens.shape
        if self.length + new > self.capacity:
            raise ExportError(f"the cache holds {self.capacity} positions, all used; start with a larger capacity")
        self.length += new
        self._bind("input_ids", np.ascontiguousarray(tokens, np.int64))
        self._bind("attention_mask", self._valid[: batch * self.length].reshape(batch, self.length))
        self._binding.bind_output("logits", "cpu")
        self._bind_outputs()
        self._session.run_with_iobinding(self._binding)
        return self._take_outputs()

    def _bind(self, name: str, array: IntArray) -> None:
        self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))

    def _bind_outputs(self) -> None:
        raise NotImplementedError

    def _take_outputs(self) -> FloatArray:
        raise NotImplementedError


class _SharedCache(_BoundCache):
    """Past and present in one buffer, bound once."""

    def __init__(self, session: Any, shapes: list[CacheShape], batch: int, capacity: int, device: str) -> None:
        super().__init__(session, shapes, batch, capacity, device)
        for name, shape in _cache_shapes(shapes, batch, capacity):
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), device)
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            self._binding.bind_ortvalue_output(f"present.{name}", buffer)

    def _bind_outputs(self) -> None:
        return

    def _take_outputs(self) -> FloatArray:
        return _last_row(self._binding.get_outputs()[0])


class _GrowingCache(_BoundCache):
    """Each call's present is the next call's past."""

    def __init__(self, session: Any, shapes: list[CacheShape], batch: int, capacity: int, device: str) -> None:
        super().__init__(session, shapes, batch, capacity, device)
        empty = _cache_shapes(shapes, batch, 0)
        self._names = [name for name, _ in empty]
        for name, shape in empty:
            value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), device)
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)

    def _bind_outputs(self) -> None:
        for name in self._names:
            self._binding.bind_output(f"present.{name}", self._device)

    def _take_outputs(self) -> FloatArray:
        logits, *cache = self._binding.get_outputs()
        for name, value in zip(self._names, cache, strict=True):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
        return _last_row(logits)


def _last_row(logits: Any) -> FloatArray:
    rows: NDArray[np.float32] = logits.numpy()
    return rows[:, -1]


def _cache_shapes(cache: list[CacheShape], batch: int, positions: int) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Name and shape of each cache tensor, in the graph's order."""
    return [
        (f"{index}.{part}", (batch, layer.heads, positions, width))
        for index, layer in enumerate(cache)
        for part, width in (("key", layer.key_width), ("value", layer.value_width))
    ]
