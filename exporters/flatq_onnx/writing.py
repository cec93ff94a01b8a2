"""Write the graph: one file, or two if the weights are large."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from flatq.export import Artifact, ExportError, FlatqError
from flatq_onnx.graph import draw
from flatq_onnx.options import OnnxOptions

SMALL = 1024  # smaller tensors stay in the graph's file, so that shape inference can use them


def save_model(artifact: Artifact, out: Path, options: OnnxOptions, metadata: dict[str, str]) -> list[Path]:
    """Write the graph and, above the options' threshold, its weights as external data; each atomically.

    Raises:
        ExportError: a tensor cannot be read or a file cannot be written; errors of flatq are passed on.
    """
    ranges = artifact.cache_ranges() if options.cache_type == "int8" else None
    model = draw(artifact.config, artifact.grids, artifact.tensor, options, metadata, ranges)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    path = out / options.model_file
    external = options.data_file if weights > options.external_data_above else None
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        ir.save(model, partial, format="protobuf", external_data=external, size_threshold_bytes=SMALL)
    except (ir.serde.SerdeError, OSError) as problem:
        partial.unlink(missing_ok=True)
        cause = _first_cause(problem)
        if isinstance(cause, FlatqError):
            raise cause from None
        raise ExportError(f"{out}: the graph cannot be written: {cause}; fix that and export again") from problem
    _appear(partial, path)
    return [path] if external is None else [path, path.with_name(external)]


def _appear(partial: Path, path: Path) -> None:
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _first_cause(problem: BaseException) -> BaseException:
    """The innermost cause: onnx-ir wraps an error once for every level of the graph."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return problem
