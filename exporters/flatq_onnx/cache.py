"""The KV cache, bound to a session's inputs and outputs so that it stays on the device.

``Contract.growth`` names three ways in which past becomes present. In two of them new positions are written into the
buffer of the past. The buffer is allocated for more positions than it holds and grows by a fraction of its size, which
needs a copy now and then and keeps all shapes constant in between. It is not allocated at full capacity because the
time of ``attention: reduced`` depends on the allocated size. Constant shapes also let onnxruntime plan its memory only
once, and allow CUDA graphs. A CUDA graph reads and writes fixed addresses, so the buffers of a step keep their address,
also from one text to the next.

Axes: b batch, s new positions, t positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flatq.export import ExportError, FloatArray, IntArray
from flatq_onnx.contract import Contract

STEP = 64  # the allocated size is a multiple of this many positions
NO_GRAPH = -1  # onnxruntime's graph id for a run without a CUDA graph


class Cache:
    """An empty cache of one batch.

    Args:
        session: onnxruntime's.
        capacity: maximum number of positions.
        device: ``cpu`` or ``cuda``.
        graphs: unused graph ids of the session, to capture single steps as CUDA graphs; only for ``growth: fixed``.
            None disables CUDA graphs.
    """

    def __init__(
        self,
        session: Any,
        contract: Contract,
        batch: int,
        capacity: int,
        device: str,
        *,
        graphs: Iterator[int] | None = None,
    ) -> None:
        self._session, self._contract, self._device = session, contract, device
        self.batch, self.capacity, self.length, self.allocated = batch, capacity, 0, 0
        self._graphs, self._graph = graphs, NO_GRAPH
        self._binding = session.io_binding()
        self._valid = np.zeros((batch, 0), np.int64)
        self._buffers: dict[str, Any] = {}
        self._logits: Any = None
        self._made: dict[tuple[str, bool], tuple[tuple[int, ...], Any]] = {}
        self._bound: dict[str, Any] = {}
        if "num_logits_to_keep" in contract.inputs:
            self._bind("num_logits_to_keep", np.ones((), np.int64))
        self._binding.bind_output("logits", "cpu")  # outputs are returned in the order of their first binding
        if contract.growth == "returned":
            self._keep([_value(np.zeros(shape, contract.cache_number), device) for _, shape in self._shapes(0)])

    def restart(self, batch: int, capacity: int) -> bool:
        """Remove all positions but keep buffers and CUDA graphs; returns False if that has no advantage."""
        if self._graphs is None or batch != self.batch:
            return False
        self.capacity, self.length = capacity, 0
        self._valid[:] = 0
        return True

    def append(self, tokens: IntArray) -> FloatArray:
        """Run new tokens, [b, s] -> logits of the last position [b, vocab]."""
        first, new = self.length, tokens.shape[1]
        if first + new > self.capacity:
            raise ExportError(f"the cache is full ({self.capacity} positions); start with a larger capacity")
        self._allocate(first + new)
        self.length += new
        self._valid[:, first : self.length] = 1
        single = new == 1
        self._bind("input_ids", tokens, single=single)
        # GroupQueryAttention recognises a prompt by a mask of the same length.
        whole = self._contract.growth == "fixed" and (single or "cache_position" in self._contract.inputs)
        self._bind("attention_mask", self._valid if whole else self._valid[:, : self.length], single=single)
        if "cache_position" in self._contract.inputs:
            self._bind("cache_position", np.full(self.batch, first), single=single)
        if "position_ids" in self._contract.inputs:
            places = np.arange(first, self.length)
            self._bind("position_ids", np.tile(places, (self.batch, 1)), single=single)
        return self._run(single=single)

    def _run(self, *, single: bool) -> FloatArray:
        returned = self._contract.growth == "returned"
        options = None if self._graphs is None else run_options(self._graph if single else NO_GRAPH)
        if single:
            self._binding.bind_ortvalue_output("logits", self._step_logits())
        else:
            self._binding.bind_output("logits", "cpu")
        if returned:
            for name, _ in self._shapes(0):
                self._binding.bind_output(f"present.{name}", self._device)
        self._session.run_with_iobinding(self._binding, options)
        if returned:
            self._keep(self._binding.get_outputs()[1:])
        logits = self._step_logits() if single else self._binding.get_outputs()[0]
        rows: NDArray[np.float32] = logits.numpy()
        return rows[:, -1].astype(np.float32)  # a copy, because the next step overwrites the buffer

    def _step_logits(self) -> Any:
        """One logits buffer for all steps, because ``get_outputs`` wraps the whole cache (3 % of the time)."""
        if self._logits is None:
            shape = (self.batch, 1, self._contract.vocab)
            self._logits = _value(np.zeros(shape, self._contract.float_type), self._device)
        return self._logits

    def _allocate(self, needed: int) -> None:
        """Allocate at least ``needed`` positions, an eighth more to avoid frequent copies, at most the capacity."""
        if needed <= self.allocated:
            return
        allocated = min(self.capacity, -(-(needed + needed // 8) // STEP) * STEP)
        self._valid = np.pad(self._valid, ((0, 0), (0, allocated - self.allocated)))
        if self._contract.growth != "returned":
            for name, shape in self._shapes(allocated):
                wider = np.zeros(shape, self._contract.cache_number)
                if self.length:
                    wider[:, :, : self.length] = self._buffers[name].numpy()[:, :, : self.length]
                self._buffers[name] = _value(wider, self._device)
                self._binding.bind_ortvalue_input(f"past_key_values.{name}", self._buffers[name])
                self._binding.bind_ortvalue_output(f"present.{name}", self._buffers[name])
        self.allocated = allocated
        if self._graphs is not None:
            self._graph = next(self._graphs)

    def _bind(self, name: str, array: IntArray, *, single: bool = False) -> None:
        """Bind an input of prompts or of single steps; a buffer of the same shape is updated in place."""
        array = np.asarray(array, np.int64, order="C")
        shape, value = self._made.get((name, single), (None, None))
        if value is not None and shape == array.shape:
            value.update_inplace(array)
        else:
            value = _value(array.copy(), self._device)
            self._made[name, single] = array.shape, value
        if self._bound.get(name) is not value:
            self._binding.bind_ortvalue_input(name, value)
            self._bound[name] = value

    def _keep(self, cache: list[Any]) -> None:
        """Bind the returned cache as the past of the next step."""
        for (name, _), value in zip(self._shapes(0), cache, strict=True):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)

    def _shapes(self, positions: int) -> list[tuple[str, tuple[int, ...]]]:
        return cache_shapes(self._contract, self.batch, positions)


def run_options(graph: int) -> Any:
    """Options of a run that captures, or replays, the CUDA graph with this id."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _value(array: NDArray[Any], device: str) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(array, device)


def empty_cache(contract: Contract, batch: int, positions: int) -> dict[str, NDArray[Any]]:
    """An initial cache of zeros, allocated for ``positions``, by input name."""
    return {
        f"past_key_values.{name}": np.zeros(shape, contract.cache_number)
        for name, shape in cache_shapes(contract, batch, positions)
    }


def cache_shapes(contract: Contract, batch: int, positions: int) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each cache tensor, in the graph's order."""
    return [
        (f"{index}.{part}", (batch, layer.heads, positions, width))
        for index, layer in enumerate(contract.cache)
        for part, width in (("key", layer.key_width), ("value", layer.value_width))
    ]
