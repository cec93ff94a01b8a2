"""Reasons why a model cannot be written as ONNX with given options, each with a remedy.

This module does not import onnx, so that recipes can be checked with only the core installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from flatq.export import DecoderConfig, Grid
from flatq_onnx.kinds_of_experts import node_since
from flatq_onnx.options import OnnxOptions
from flatq_onnx.tensors import LEAST_BLOCK, block_of

CUDA_ROWS = 64
# The oldest onnxruntime that opens a graph and gives its numbers; `make interop-versions` measures them.
SINCE, INT8_SINCE = Version("1.23"), Version("1.28")
CAPPED_SINCE = Version("1.27")  # older versions cap scores after the mask, so that no position is hidden
TWO_BITS_SINCE = {"fp32": Version("1.24"), "fp16": Version("1.28")}


def objections(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
    """Reasons why this model cannot be written with these options, each with a remedy."""
    return [
        *_target_objections(config, grids, options),
        *_speculation_objections(options),
        *_shape_objections(config, options),
        *_grid_objections(grids, options),
    ]


def _target_objections(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
    found = []
    target, floats = options.target, {"fp32": "fp32", "fp16": "fp16"}.get(options.precision, options.activations)
    if floats != options.activations:
        found.append(f"onnx: precision {floats} with activations {options.activations}; leave activations out")
    if options.activations == "fp16" and options.precision == "int4" and options.accuracy_level == 4:
        found.append(
            "onnx: accuracy_level: 4 with activations fp16 gives zeros on a CPU below onnxruntime's highest "
            "optimization level; leave accuracy_level out"
        )
    if target in ("genai", "optimum", "cuda") and options.attention != "gqa":
        found.append(f"onnx: target: {target} supports only attention: gqa; leave attention out")
    if target == "optimum" and not options.left_padding:
        found.append("onnx: target: optimum pads on the left; leave left_padding out")
    if target == "cuda" and options.left_padding:
        found.append("onnx: target: cuda with left_padding uses a slow kernel; leave it out, or use target: optimum")
    if options.decode_on_load and (target != "web" or options.precision != "int4"):
        found.append("onnx: decode_on_load is for target: web with precision: int4; leave it out")
    if target == "cuda" and options.activations != "fp16":
        found.append("onnx: target: cuda computes in fp16; leave activations out, or use precision: fp16")
    if target == "cuda" and options.precision == "int4":
        found += _cuda_shapes(config, grids)
    return found


def _speculation_objections(options: OnnxOptions) -> list[str]:
    if options.ngram_size is not None and options.target != "genai":
        return ["onnx: ngram_size is an option of onnxruntime-genai; use target: genai, or leave it out"]
    if options.max_draft_tokens is not None and options.ngram_size is None:
        return ["onnx: max_draft_tokens limits what ngram_size proposes, which is not set; set it, or leave this out"]
    return []


def _cuda_shapes(config: DecoderConfig, grids: Mapping[str, Grid]) -> list[str]:
    """Objections to shapes that CUDA's fast kernel of MatMulNBits does not support."""
    found: dict[str, list[str]] = {}
    for index, dims in enumerate(config.layers):
        for linear in ("o", "gate", "up", "down"):  # q, k and v are padded, embedding and head are not narrowed
            grid = grids.get(f"layers.{index}.{linear}")
            block = None if grid is None else block_of(grid, dims.shape(linear, config.d_model)[1])
            if block is None:
                continue
            rows, columns = dims.shape(linear, config.d_model)
            if rows % CUDA_ROWS:
                found.setdefault(f"outputs in multiples of {CUDA_ROWS}", []).append(f"layers.{index}.{linear} {rows}")
            if columns % block:
                found.setdefault(f"inputs in whole blocks of {block}", []).append(f"layers.{index}.{linear} {columns}")
    return [
        f"onnx: target: cuda needs {what}, but {places[0]} and {len(places) - 1} more differ; set rank_multiple and "
        "width_multiple of the flat stage, or use a smaller group_size"
        for what, places in found.items()
    ]


def _shape_objections(config: DecoderConfig, options: OnnxOptions) -> list[str]:
    found = []
    if options.left_padding and options.attention == "reduced":
        found.append("onnx: left_padding is an option of attention: gqa; reduced always supports it, so leave it out")
    if options.context_length is not None and options.context_length > config.max_positions:
        found.append(
            f"onnx: context_length {options.context_length} is beyond the model's {config.max_positions} positions; "
            "lower it, or leave it out"
        )
    if options.cache_type == "int8":
        found += _int8_objections(options)
    head_sizes = sorted({dims.d_qk for dims in config.layers})
    if len(head_sizes) > 1:
        found.append(f"onnx: layers have different d_qk {head_sizes}; they share rotary tables, so keep d_qk equal")
    if any(size % 2 for size in head_sizes):
        found.append(f"onnx: d_qk {head_sizes} is odd; the rotary embedding needs pairs of columns")
    step = 16 if options.fused_rope else 8  # requirements of the kernels; 16 is for their fused rotary embedding
    if options.attention == "gqa" and any(size % step for size in head_sizes):
        found.append(
            f"onnx: attention: gqa needs d_qk to be a multiple of {step}, it is {head_sizes}; use attention: reduced"
        )
    wide = [index for index, dims in enumerate(config.layers) if dims.d_v > dims.d_qk]
    if options.attention == "gqa" and wide:
        found.append(f"onnx: attention: gqa needs d_v <= d_qk, but layers {wide} differ; use attention: reduced")
    return found


def oldest_onnxruntime(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> str:
    """Version that opens such a graph and gives its numbers, as older ones do not."""
    needed = [SINCE]
    two_bits = any(grid.bits == 2 for stem, grid in grids.items() if stem != "embed")  # the lookup has them in 4
    needed += [TWO_BITS_SINCE[options.activations]] if two_bits and options.precision == "int4" else []
    needed += [CAPPED_SINCE] if config.attention_cap is not None and options.attention == "reduced" else []
    needed += [INT8_SINCE] if options.cache_type == "int8" else []
    needed += node_since(config, grids, options)
    return str(max(needed))


def too_old_for_int8() -> str:
    """A message if the installed onnxruntime does not support an int8 cache; empty if it does, or is not installed."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(PackageNotFoundError):
            found = version(package)
            if Version(found) < INT8_SINCE:
                return (
                    f"an int8 cache needs onnxruntime {INT8_SINCE} (older versions give wrong results), {found} is "
                    "installed"
                )
    return ""


def _int8_objections(options: OnnxOptions) -> list[str]:
    wrong = {
        "attention: reduced": options.attention == "reduced",
        "left_padding": options.left_padding,
        "target: cuda": options.target == "cuda",
        "fp16": options.activations == "fp16",
    }
    found = [f"onnx: {old}; update it, or leave cache_type out"] if (old := too_old_for_int8()) else []
    return found + [
        f"onnx: cache_type: int8 supports only GroupQueryAttention with fused rotary embedding, in float32 on a CPU, "
        f"not {name}; leave one of the two out"
        for name, there in wrong.items()
        if there
    ]


def _grid_objections(grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
    if options.precision != "int4":
        return []
    if not grids:
        return [
            "onnx: precision: int4 writes the codes of a quantized model, but nothing is quantized; add a gptq stage "
            "to the recipe or use precision: fp32"
        ]
    found = []
    for grid in dict.fromkeys(grids.values()):
        first = next(name for name, other in grids.items() if other == grid)
        if grid.bits not in (2, 3, 4, 8):
            found.append(f"onnx: {first} has {grid.bits} bits; MatMulNBits supports 2, 3 (stored as 4), 4 and 8")
        if block_of(grid, 1) is None:
            found.append(
                f"onnx: {first} has group_size {grid.group_size}; it must be -1 or a multiple of {LEAST_BLOCK} "
                "(32 and 128 are the fastest)"
            )
    return found
