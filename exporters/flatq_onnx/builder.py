"""Builder for ONNX graphs in which every tensor has a name, a type and a shape.

onnx's shape inference does not support onnxruntime's operators, so shapes are given explicitly and written as
value_info. Weights are lazy: they are read and packed when the file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from flatq.export import ExportError

OPSET = 23  # the first with RMSNormalization and Attention
IR_VERSION = 11  # the one that came with opset 23
MICROSOFT = "com.microsoft"

FLOAT, FLOAT16, INT64, INT32, INT8, UINT8, BOOL = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.INT64,
    ir.DataType.INT32,
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.BOOL,
)

Dims = Sequence[int | str]


class Builder:
    """Collects inputs, nodes and initializers of one graph.

    Args:
        float_type: default type of tensors.
    """

    def __init__(self, float_type: Any = FLOAT) -> None:
        self.float_type = float_type
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._taken: dict[str, int] = {}
        self._domains = {"": OPSET}

    def input(self, name: str, shape: Dims, dtype: Any = None) -> Any:
        """A graph input."""
        value = self._value(name, shape, dtype)
        self._inputs.append(value)
        return value

    def output(self, value: Any, name: str) -> None:
        """Make a value an output of the graph."""
        value.name = name
        self._outputs.append(value)

    def constant(self, name: str, array: NDArray[Any]) -> Any:
        """A small initializer; the same name returns the same value."""
        return self.weight(name, array.shape, lambda: array, ir.DataType.from_numpy(array.dtype))

    def weight(self, name: str, shape: Sequence[int], make: Callable[[], NDArray[Any]], dtype: Any = None) -> Any:
        """An initializer whose content is computed, and cast to its type, when the file is written."""
        if name not in self._initializers:
            value = self._value(name, shape, dtype)
            wanted = value.dtype.numpy()

            def tensor() -> Any:
                return ir.Tensor(_cast(make(), wanted, name), name=name)

            value.const_value = ir.LazyTensor(tensor, dtype=value.dtype, shape=ir.Shape(shape), name=name)
            self._initializers[name] = value
        return self._initializers[name]

    def op(
        self, kind: str, inputs: Sequence[Any], shape: Dims, *, dtype: Any = None, domain: str = "", **attributes: Any
    ) -> Any:
        """A node with one output."""
        return self.ops(kind, inputs, [shape], dtype=dtype, domain=domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[Any],
        shapes: Sequence[Dims | None],
        *,
        dtype: Any = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[Any]:
        """A node with several outputs.

        Args:
            inputs: None omits an optional input.
            shapes: of the outputs; None omits an optional output.
            dtype: of all outputs, or a list with one for each.
        """
        name = self._fresh(kind)
        inputs = list(inputs)
        while inputs and inputs[-1] is None:
            inputs.pop()
        dtypes = dtype if isinstance(dtype, list) else [dtype] * len(shapes)
        outputs = [
            ir.Value(name="") if shape is None else self._value(f"{name}.{index}", shape, one)
            for index, (shape, one) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        self._domains.setdefault(domain, 1)
        self._nodes.append(ir.node(kind, inputs, attributes, domain=domain, outputs=outputs, name=name))
        return outputs

    def either(self, condition: Any, then: Callable[[], Sequence[Any]], otherwise: Callable[[], Sequence[Any]]) -> Any:
        """An If node; ``then`` and ``otherwise`` add the nodes of their branch and return values of the same shapes."""
        branches = {"then_branch": self._branch(then), "else_branch": self._branch(otherwise)}
        values = branches["then_branch"].outputs
        return self.ops("If", [condition], [v.shape for v in values], dtype=[v.dtype for v in values], **branches)

    def _branch(self, draw: Callable[[], Sequence[Any]]) -> Any:
        """The nodes added by ``draw`` as a subgraph, which can use all values of the outer graph."""
        outside, self._nodes = self._nodes, []
        try:
            outputs = draw()
            return ir.Graph([], outputs, nodes=self._nodes, name=self._fresh("branch"))
        finally:
            self._nodes = outside

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

    def _value(self, name: str, shape: Dims, dtype: Any) -> Any:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype or self.float_type))


def ints(*values: int) -> NDArray[np.int64]:
    """An int64 vector of constants."""
    return np.array(values, np.int64)


def _cast(array: NDArray[Any], wanted: np.dtype[Any], name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        found = array.astype(wanted, copy=False)
    if wanted == np.float16 and bool((np.isinf(found) & ~np.isinf(array)).any()):
        raise ExportError(
            f"onnx: {name}: its largest number {np.abs(array).max():g} is beyond float16; use activations: fp32"
        )
    return found
