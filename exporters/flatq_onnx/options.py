"""What a recipe may say about an ONNX export, and the objections to a model that cannot be written so.

Nothing here needs onnx: a recipe is checked on a machine that only has the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq_onnx.tensors import LEAST_BLOCK, block_of

CUDA_ROWS = 64
INT8_SINCE = Version("1.28")


# What each consumer needs; a recipe may still say otherwise, as long as `objections` has nothing against it.
TARGETS: Mapping[str, Mapping[str, Any]] = {
    "ort": {},
    "mobile": {},
    "genai": {"attention": "gqa"},
    "optimum": {"attention": "gqa", "left_padding": True},
    "cuda": {"attention": "gqa", "activations": "fp16"},
}


class OnnxOptions(BaseModel):
    """Options of ``exports: - onnx: {...}``.

    Attributes:
        target: the program that will run the graph; sets the layout, the type of numbers and the files beside it.
            ``ort`` is onnxruntime itself on a CPU; ``genai`` onnxruntime-genai (``genai_config.json`` and tokenizer);
            ``optimum`` ORTModelForCausalLM, right for left-padded batches (configuration and tokenizer as
            transformers 4 reads them); ``cuda`` onnxruntime on CUDA; ``mobile`` one ``.ort`` file, which
            onnxruntime's builds for phones read.
        attention: ``reduced`` has a value cache as narrow as the model's value heads, written in place, and is right
            for left- and right-padded batches. ``gqa`` is onnxruntime's GroupQueryAttention, whose value heads are as
            wide as the keys' (missing columns are zero): the usual cache shape, which other programs expect.
        cache_layout: only for ``reduced``: ``heads`` [b, kv, t, width], or ``tokens`` [b, t, kv * width], which decodes
            faster on a CPU if the model is small and the context a few hundred tokens, and slower else.
        precision: ``fp32``, ``fp16``, or ``int4`` for MatMulNBits nodes that hold the artifact's own codes, whatever
            their bits (the name is that of the usual case); linears without a grid stay plain.
        activations: type of all numbers that are not codes, the cache included.
        accuracy_level: what MatMulNBits may compute in: 4 int8 activations (fast), 0 and 1 float32.
        cache_type: ``int8`` keeps keys and values in 8 bits, one scale per channel, measured on calibration text: a
            quarter of the memory, and faster decoding the longer the context. Only for ``gqa`` without
            ``left_padding``, on a CPU. ``float`` is the type of ``activations``.
        prompt_branch: only with ``cache_type: int8``, which reads prompts in another way than tokens: ``attention``
            branches in every layer; ``model`` once around all layers, which decodes a small model's tokens faster but
            makes onnxruntime hold the weights twice.
        left_padding: only for ``gqa``: rotary embedding and mask outside the attention node, so that left-padded
            batches are right. Without it a padded batch must be padded on the right.
        last_logits_only: whether a program that does not set the input ``logits_from`` gets the last position's
            logits only.
        context_length: positions in the rotary tables of ``gqa`` without ``left_padding``; None is the model's own
            limit. The other layouts compute the angles and have no limit.
        external_data_above: weights of more bytes than this go into a file of their own (protobuf ends at 2 GB).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Literal["ort", "genai", "optimum", "cuda", "mobile"] = "ort"
    attention: Literal["reduced", "gqa"] = "reduced"
    cache_layout: Literal["heads", "tokens"] = "heads"
    precision: Literal["fp32", "fp16", "int4"] = "int4"
    activations: Literal["fp32", "fp16"] = "fp32"
    accuracy_level: Literal[0, 1, 4] = 4
    left_padding: bool = False
    cache_type: Literal["float", "int8"] = "float"
    prompt_branch: Literal["attention", "model"] = "attention"
    last_logits_only: bool = False
    context_length: int | None = Field(default=None, ge=1)
    external_data_above: int = Field(default=1_500_000_000, ge=0, le=1_500_000_000)

    @model_validator(mode="before")
    @classmethod
    def _as_the_target_wants(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        half = {"activations": "fp16"} if data.get("precision") == "fp16" else {}
        wanted = data.get("target", "ort")
        grouped = {"attention": "gqa"} if data.get("cache_type") == "int8" else {}
        return {**half, **grouped, **TARGETS.get(wanted if isinstance(wanted, str) else "", {}), **data}

    @property
    def fused_rope(self) -> bool:
        """Whether GroupQueryAttention itself rotates and masks, by the number of valid tokens in each row."""
        return self.attention == "gqa" and not self.left_padding


def objections(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
    """Why this model cannot be written with these options, each with the way out."""
    return [
        *_target_objections(config, grids, options),
        *_shape_objections(config, options),
        *_grid_objections(grids, options),
    ]


def _target_objections(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
    found = []
    target, floats = options.target, {"fp32": "fp32", "fp16": "fp16"}.get(options.precision, options.activations)
    if floats != options.activations:
        found.append(f"onnx: precision {floats} with activations {options.activations}; leave activations out")
    if target in ("genai", "optimum", "cuda") and options.attention != "gqa":
        found.append(f"onnx: target: {target} needs attention: gqa, for it has one cache shape; leave attention out")
    if target == "optimum" and not options.left_padding:
        found.append("onnx: target: optimum pads on the left; leave left_padding out")
    if target == "cuda" and options.left_padding:
        found.append(
            "onnx: target: cuda with left_padding takes CUDA's slow path; leave it out, or use target: optimum"
        )
    if target == "cuda" and options.activations != "fp16":
        found.append("onnx: target: cuda computes in fp16; leave activations out, or use precision: fp16")
    if target == "cuda" and options.precision == "int4":
        found += _cuda_shapes(config, grids)
    return found


def _cuda_shapes(config: DecoderConfig, grids: Mapping[str, Grid]) -> list[str]:
    """CUDA's fast product with codes takes outputs in 64s and whole blocks of inputs."""
    found: dict[str, list[str]] = {}
    for index, dims in enumerate(config.layers):
        for linear in ("o", "gate", "up", "down"):  # q, k and v are filled up, embedding and head are not narrowed
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
        f"onnx: target: cuda needs {what}, not so in {places[0]} and {len(places) - 1} more; set the flat stage's "
        "rank_multiple and width_multiple so, or use a smaller group_size"
        for what, places in found.items()
    ]


def _shape_objections(config: DecoderConfig, options: OnnxOptions) -> list[str]:
    found = []
    if options.left_padding and options.attention == "reduced":
        found.append("onnx: left_padding is an option of attention: gqa; reduced always handles it, so leave it out")
    if options.cache_layout == "tokens" and options.attention != "reduced":
        found.append("onnx: cache_layout: tokens is an option of attention: reduced; leave it out, or use reduced")
    if options.context_length is not None and not options.fused_rope:
        found.append("onnx: context_length only matters where rotary tables are stored (attention: gqa); leave it out")
    if options.cache_type == "int8":
        found += _int8_objections(options)
    elif options.prompt_branch == "model":
        found.append("onnx: prompt_branch: model is an option of cache_type: int8; leave it out, or use int8")
    head_sizes = sorted({dims.d_qk for dims in config.layers})
    if len(head_sizes) > 1:
        found.append(f"onnx: layers have different d_qk {head_sizes}; one rotary table serves all, so keep d_qk equal")
    if any(size % 2 for size in head_sizes):
        found.append(f"onnx: d_qk {head_sizes} is odd; the rotary embedding needs pairs of columns")
    step = 16 if options.fused_rope else 8  # what the kernels refuse; the narrower limit is that of their own rope
    if options.attention == "gqa" and any(size % step for size in head_sizes):
        found.append(
            f"onnx: attention: gqa needs d_qk to be a multiple of {step}, it is {head_sizes}; use attention: reduced"
        )
    wide = [index for index, dims in enumerate(config.layers) if dims.d_v > dims.d_qk]
    if options.attention == "gqa" and wide:
        found.append(f"onnx: attention: gqa needs d_v <= d_qk, not so in layers {wide}; use attention: reduced")
    return found


def too_old_for_int8() -> str:
    """Why the onnxruntime that is installed here must not run a cache of int8; empty if it may, or is not there."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(PackageNotFoundError):
            found = version(package)
            if Version(found) < INT8_SINCE:
                return (
                    f"a cache of int8 needs onnxruntime {INT8_SINCE} (older ones compute it wrongly), here is {found}"
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
        f"onnx: cache_type: int8 is for GroupQueryAttention with its own rotary embedding, in float32 on a CPU, not "
        f"for {name}; leave one of the two out"
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
            found.append(f"onnx: {first} has {grid.bits} bits; MatMulNBits takes 2, 3 (stored as 4), 4 and 8")
        if block_of(grid, 1) is None:
            found.append(
                f"onnx: {first} has group_size {grid.group_size}; it must be -1 or a multiple of {LEAST_BLOCK} "
                "(32 and 128 are the fastest)"
            )
    return found
