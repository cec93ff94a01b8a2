"""Keys and values of the positions so far, bound to a session's inputs and outputs so that they never leave the device.

Three ways in which past becomes present, named by ``Contract.growth``. Two of them write new positions into the
buffer that holds the old ones. Such a buffer has room for some positions more than it holds, because the work of
``attention: reduced`` goes with the room, not with the positions: it grows by a share of itself, which costs a copy
now and then and leaves every shape as it is in between. Constant shapes also let onnxruntime plan its memory once,
and let CUDA record a step once and replay it. A recorded step reads and writes where the first one did, so whatever
a step is given keeps its place, also from one text to the next.

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

STEP = 64  # positions by which room grows at least
NO_GRAPH = -1  # onnxruntime's number for a run that must not be recorded


class Cache:
    """An empty cache of one batch.

    Args:
        session: onnxruntime's.
        capacity: positions that will be asked for at most.
        device: ``cpu`` or ``cuda``.
        graphs: numbers that the session has not used yet, to record single steps as CUDA graphs; only for
            ``growth: fixed``. None records nothing.
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
        self.batch, self.capacity, self.length, self.room = batch, capacity, 0, 0
        self._graphs, self._graph = graphs, NO_GRAPH
        self._binding = session.io_binding()
        self._valid = np.zeros((batch, 0), np.int64)
        self._buffers: dict[str, Any] = {}
        self._logits: Any = None
        self._made: dict[tuple[str, bool], tuple[tuple[int, ...], Any]] = {}
        self._bound: dict[str, Any] = {}
        if "logits_from" in contract.optional_inputs:
            self._bind("logits_from", np.full(1, -1, np.int64))
        self._binding.bind_output("logits", "cpu")  # outputs come back in the order of their first binding
        if contract.growth == "returned":
            self._keep([_value(np.zeros(shape, contract.cache_number), device) for _, shape in self._shapes(0)])

    def restart(self, batch: int, capacity: int) -> bool:
        """Forget all positions but not what was recorded; False where a new cache is as good."""
        if self._graphs is None or batch != self.batch:
            return False
        self.capacity, self.length = capacity, 0
        self._valid[:] = 0
        return True

    def append(self, tokens: IntArray) -> FloatArray:
        """Run new tokens, [b, s] -> logits of the last one [b, vocab]."""
        first, new = self.length, tokens.shape[1]
        if first + new > self.capacity:
            raise ExportError(f"the cache holds {self.capacity} positions, all used; start with a larger capacity")
        self._make_room(first + new)
        self.length += new
        self._valid[:, first : self.length] = 1
        single = new == 1
        self._bind("input_ids", tokens, single=single)
        # GroupQueryAttention knows a prompt by a mask as long as the prompt.
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
        return rows[:, -1].astype(np.float32)  # a copy: the next step writes where this one did

    def _step_logits(self) -> Any:
        """One buffer for all steps: asking for a step's outputs wraps the whole cache, 3 % of a small model's time."""
        if self._logits is None:
            shape = (self.batch, 1, self._contract.vocab)
            self._logits = _value(np.zeros(shape, self._contract.float_type), self._device)
        return self._logits

    def _make_room(self, needed: int) -> None:
        """At least ``needed`` positions, a share more so that it is seldom done, never more than the capacity."""
        if needed <= self.room:
            return
        room = min(self.capacity, -(-(needed + needed // 8) // STEP) * STEP)
        self._valid = np.pad(self._valid, ((0, 0), (0, room - self.room)))
        if self._contract.growth != "returned":
            for name, shape in self._shapes(room):
                wider = np.zeros(shape, self._contract.cache_number)
                if self.length:
                    wider[:, :, : self.length] = self._buffers[name].numpy()[:, :, : self.length]
                self._buffers[name] = _value(wider, self._device)
                self._binding.bind_ortvalue_input(f"past_key_values.{name}", self._buffers[name])
                self._binding.bind_ortvalue_output(f"present.{name}", self._buffers[name])
        self.room = room
        if self._graphs is not None:
            self._graph = next(self._graphs)

    def _bind(self, name: str, array: IntArray, *, single: bool = False) -> None:
        """Bind an input of prompts or of single steps; one of the same shape as before gets new content where it is."""
        array = np.ascontiguousarray(array, np.int64)
        shape, value = self._made.get((name, single), ((), None))
        if shape == array.shape:
            value.update_inplace(array)
        else:
            value = _value(array.copy(), self._device)
            self._made[name, single] = array.shape, value
        if self._bound.get(name) is not value:
            self._binding.bind_ortvalue_input(name, value)
            self._bound[name] = value

    def _keep(self, cache: list[Any]) -> None:
        """What a step returned is the next one's past."""
        for (name, _), value in zip(self._shapes(0), cache, strict=True):
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)

    def _shapes(self, positions: int) -> list[tuple[str, tuple[int, ...]]]:
        return cache_shapes(self._contract, self.batch, positions)


def run_options(graph: int) -> Any:
    """Options of a run that is recorded as a CUDA graph of this number, or replays it."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _value(array: NDArray[Any], device: str) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(array, device)


def empty_cache(contract: Contract, batch: int, positions: int) -> dict[str, NDArray[Any]]:
    """What a program feeds as its past first: zeros, with room for so many positions."""
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
