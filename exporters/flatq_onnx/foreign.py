"""The contract of an ONNX decoder of another program: onnxruntime-genai's builder, optimum, a script.

It is derived from the graph: inputs ``input_ids``, ``attention_mask``, ``position_ids`` and ``past_key_values.N.key``,
outputs ``logits`` and ``present.N.key``, the names that those programs use. Other names raise an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
from pydantic import BaseModel

from flatq.export import ExportError, read_json
from flatq_onnx.contract import CacheShape, Contract

KNOWN = {"input_ids", "attention_mask", "position_ids", "num_logits_to_keep"}
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
FLOATS = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}


class GenaiDecoder(BaseModel):
    """``model.decoder`` of ``genai_config.json``."""

    head_size: int


class GenaiModel(BaseModel):
    """``model`` of ``genai_config.json``."""

    decoder: GenaiDecoder


class GenaiConfig(BaseModel):
    """The part of ``genai_config.json`` that is read here."""

    model: GenaiModel


def contract_of(root: Path) -> Contract:
    """The contract of the only graph in a folder.

    Raises:
        ExportError: there is not exactly one graph, or it is no supported decoder.
    """
    files = sorted(root.glob("*.onnx"))
    if len(files) != 1:
        raise ExportError(f"{root}: holds {len(files)} .onnx files; give a folder with exactly one decoder graph")
    graph = onnx.load(files[0], load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value.type.tensor_type for value in graph.input if value.name not in weights}
    outputs = {value.name: value.type.tensor_type for value in graph.output}
    unknown = [name for name in inputs if name not in KNOWN and not PAST.fullmatch(name)]
    cache = _cache(files[0], inputs)
    presents = [name.replace("past_key_values", "present") for name in inputs if PAST.fullmatch(name)]
    missing = [name for name in ["logits", *presents] if name not in outputs]
    if unknown or missing:
        raise ExportError(
            f"{files[0]}: is no decoder of onnxruntime-genai or optimum; unknown inputs {unknown or 'none'}, "
            f"missing outputs {missing or 'none'}"
        )
    kinds = _kinds(graph)
    return Contract(
        model=files[0].name,
        attention="foreign",
        precision="int4" if "MatMulNBits" in kinds else "fp32",
        left_padding="position_ids" in inputs,
        growth="shared" if "GroupQueryAttention" in kinds else "returned",
        float_type=FLOATS[outputs["logits"].elem_type],
        cache_type="int8" if inputs["past_key_values.0.key"].elem_type == onnx.TensorProto.INT8 else "float",
        context_length=None,
        sliding_window=None,
        vocab=_sizes(outputs["logits"])[-1],
        token_ids={},
        inputs=list(inputs),
        outputs=["logits", *presents],
        layers=[],
        cache=cache,
    )


def _kinds(graph: Any) -> set[str]:
    """Names of all operators, including those in branches."""
    found = {node.op_type for node in graph.node}
    inside = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return found.union(*map(_kinds, inside))


def _cache(path: Path, inputs: dict[str, Any]) -> list[CacheShape]:
    cache: list[CacheShape] = []
    stated = _head_size(path.parent)
    while f"past_key_values.{len(cache)}.key" in inputs:
        key, value = (_sizes(inputs[f"past_key_values.{len(cache)}.{part}"]) for part in ("key", "value"))
        cache.append(CacheShape(heads=key[1], key_width=key[3] or stated, value_width=value[3] or stated))
    if not cache or any(0 in (layer.heads, layer.key_width, layer.value_width) for layer in cache):
        raise ExportError(f"{path}: its inputs past_key_values.N.key have no fixed heads and widths; it cannot be run")
    return cache


def _head_size(root: Path) -> int:
    """Head size in onnxruntime-genai's configuration, for graphs without fixed widths; 0 without that file.

    Raises:
        ExportError: there is one, and it is damaged.
    """
    path = root / "genai_config.json"
    if not path.is_file():
        return 0  # the caller raises an error
    return read_json(path, GenaiConfig, "create the folder again", error=ExportError).model.decoder.head_size


def _sizes(tensor: Any) -> list[int]:
    """Sizes of a tensor's axes, 0 where it is not fixed."""
    return [axis.dim_value for axis in tensor.shape.dim]
