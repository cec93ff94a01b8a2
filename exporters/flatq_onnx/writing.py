"""Write the graph: one file, or two if the weights are large, or an ``.ort`` file of onnxruntime."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from flatq.export import Artifact, ExportError, FlatqError
from flatq_onnx.contract import DATA, MOBILE, MODEL
from flatq_onnx.graph import draw
from flatq_onnx.options import OnnxOptions

SMALL = 1024  # smaller tensors stay in the graph's file, so that shape inference can use them


def save_model(artifact: Artifact, out: Path, options: OnnxOptions, metadata: dict[str, str]) -> list[Path]:
    """Write ``model.onnx`` and, above the options' threshold, ``model.onnx.data``; each atomically.

    For ``target: mobile`` the file is ``model.ort``.

    Raises:
        ExportError: a tensor cannot be read or a file cannot be written; errors of flatq are passed on.
    """
    ranges = artifact.cache_ranges() if options.cache_type == "int8" else None
    model = draw(artifact.config, artifact.grids, artifact.tensor, options, metadata, ranges)
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
        raise ExportError(f"{out}: the graph cannot be written: {cause}; fix that and export again") from problem
    if options.target == "mobile":
        return [_converted(partial, out, external)]
    _appear(partial, out / MODEL)
    return [out / MODEL] if external is None else [out / MODEL, out / DATA]


def convert(source: Path, target: Path, form: str, *, optimize: bool = False) -> None:
    """Load a graph and save it in another format, ``ORT`` or ``ONNX``.

    ``optimize`` applies only optimizations that are independent of the processor; weights are not prepacked.
    """
    import onnxruntime as ort  # not needed to write a graph

    options = ort.SessionOptions()
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if optimize else levels.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", form)
    options.add_session_config_entry("session.disable_prepacking", "1")
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _converted(graph: Path, out: Path, external: str | None) -> Path:
    import onnxruntime as ort

    partial = out / f"{MOBILE}.partial"
    try:
        convert(graph, partial, "ORT", optimize=True)
    except Exception as problem:  # onnxruntime's exceptions have no other common base class
        partial.unlink(missing_ok=True)
        raise ExportError(f"{out}: onnxruntime {ort.__version__} cannot write {MOBILE}: {problem}") from problem
    finally:
        graph.unlink()
        if external is not None:
            (out / external).unlink()
    _appear(partial, out / MOBILE)
    return out / MOBILE


def _appear(partial: Path, path: Path) -> None:
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _first_cause(problem: BaseException) -> BaseException:
    """The innermost cause: onnx-ir wraps an error once for every level of the graph."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return problem
