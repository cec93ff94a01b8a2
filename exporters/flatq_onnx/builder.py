"""A thin pen for ONNX graphs: every tensor it draws gets a name, a type and a shape.

onnx's checker does not look into onnxruntime's own operators, so shapes behind them cannot be inferred: they are
known here and written down as value_info. Weights are lazy: they are read and packed when the file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

OPSET = 23
IR_VERSION = 11  # the one that came with opset 23
MICROSOFT = "com.microsoft"

FLOAT, INT64, INT32, UINT8, BOOL = (
    ir.DataType.FLOAT,
    ir.DataType.INT64,
    ir.DataType.INT32,
    ir.DataType.UINT8,
    ir.DataType.BOOL,
)

Dims = Sequence[int | str]


class Builder:
    """Collects inputs, nodes and initializers of one graph."""

    def __init__(self) -> None:
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._taken: dict[str, int] = {}
        self._domains = {"": OPSET}

    def input(self, name: str, shape: Dims, dtype: Any) -> Any:
        """A graph input."""
        value = self._value(name, shape, dtype)
        self._inputs.append(value)
        return value

    def optional_input(self, name: str, default: NDArray[Any]) -> Any:
        """A graph input that may be left out: an initializer that the caller can override."""
        value = self.constant(name, default)
        self._inputs.append(value)
        return value

    def output(self, value: Any, name: str) -> None:
        """Make a value an output of the graph."""
        value.name = name
        self._outputs.append(value)

    def constant(self, name: str, array: NDArray[Any]) -> Any:
        """A small initializer, made now; asking again for the same name gives the same value."""
        return self.weight(name, array.shape, ir.DataType.from_numpy(array.dtype), lambda: array)

    def weight(self, name: str, shape: Sequence[int], dtype: Any, make: Callable[[], NDArray[Any]]) -> Any:
        """An initializer whose content is made when the file is written."""
        if name not in self._initializers:
            value = self._value(name, shape, dtype)
            value.const_value = ir.LazyTensor(
                lambda: ir.Tensor(make(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
            )
            self._initializers[name] = value
        return self._initializers[name]

    def op(
        self, kind: str, inputs: Sequence[Any], shape: Dims, *, dtype: Any = FLOAT, domain: str = "", **attributes: Any
    ) -> Any:
        """A node with one output."""
        return self.ops(kind, inputs, [shape], dtype=dtype, domain=domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[Any],
        shapes: Sequence[Dims],
        *,
        dtype: Any = FLOAT,
        domain: str = "",
        **attributes: Any,
    ) -> list[Any]:
        """A node with several outputs of one type."""
        name = self._fresh(kind)
        outputs = [self._value(f"{name}.{index}", shape, dtype) for index, shape in enumerate(shapes)]
        self._domains.setdefault(domain, 1)
        self._nodes.append(ir.node(kind, inputs, attributes, domain=domain, outputs=outputs, name=name))
        return outputs

    def model(self, name: str, metadata: dict[str, str]) -> Any:
        """The finished model."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=self._domains,
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="flatq", metadata_props=metadata)

    def _fresh(self, kind: str) -> str:
        self._taken[kind] = self._taken.get(kind, -1) + 1
        return f"{kind}_{self._taken[kind]}"

    @staticmethod
    def _value(name: str, shape: Dims, dtype: Any) -> Any:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def ints(*values: int) -> NDArray[np.int64]:
    """A vector of int64."""
    return np.array(values, np.int64)
