"""Writing the graph: one file, or two when the weights are large."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from flatq.artifact import Artifact
from flatq.errors import ExportError, FlatqError
from flatq_onnx.contract import DATA, MODEL
from flatq_onnx.graph import draw
from flatq_onnx.options import OnnxOptions

SMALL = 1024  # tensors of fewer bytes stay in the graph's file, where shape inference can read them


def save_model(artifact: Artifact, out: Path, options: OnnxOptions, metadata: dict[str, str]) -> list[Path]:
    """Write ``model.onnx`` and, above the options' threshold, ``model.onnx.data``; each appears whole or not at all.

    Raises:
        ExportError: a tensor cannot be read or a file cannot be written; an error of flatq's own comes as it is.
    """
    model = draw(artifact.config, artifact.grids, artifact.tensor, options, metadata)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    external = DATA if weights > options.external_data_above else None
    partial = out / f"{MODEL}.partial"
    try:
        ir.save(model, partial, format="protobuf", external_data=external, size_threshold_bytes=SMALL)
    except (ir.serde.SerdeError, OSError) as problem:
        partial.unlink(missing_ok=True)
        cause = _first_cause(problem)
        if isinstance(cause, FlatqError):
            raise cause from None
        raise ExportError(f"{out}: the graph cannot be written: {cause}; mend that and export again") from problem
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(out / MODEL)
    return [out / MODEL] if external is None else [out / MODEL, out / DATA]


def _first_cause(problem: BaseException) -> BaseException:
    """What went wrong first: onnx-ir wraps an error once for every level of the graph."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return problem
