"""What a recipe may say about an ONNX export, and the objections to a model that cannot be written so.

Nothing here needs onnx: a recipe is checked on a machine that only has the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from flatq.decoder import DecoderConfig
from flatq.quantize.grid import Grid
from flatq_onnx.blocks import LEAST_BLOCK, block_of


class OnnxOptions(BaseModel):
    """Options of ``exports: - onnx: {...}``.

    Attributes:
        attention: ``reduced`` is the Attention operator of opset 23 with a value cache that is truly narrower; it is
            right for left- and right-padded batches. ``gqa`` is onnxruntime's GroupQueryAttention, whose value heads
            are as wide as the keys' (missing columns are zero): the usual cache shape, updated in place, which other
            programs expect.
        precision: ``fp32``, or ``int4`` for MatMulNBits nodes that hold the artifact's own codes, whatever their
            bits (the name is that of the usual case); linears without a grid stay float32.
        accuracy_level: what MatMulNBits may compute in: 4 int8 activations (fast), 0 and 1 float32.
        left_padding: only for ``gqa``: rotary embedding and mask outside the attention node, so that left-padded
            batches are right. Without it a padded batch must be padded on the right.
        last_logits_only: whether a program that does not set the input ``logits_from`` gets the last position's
            logits only.
        context_length: positions in the rotary tables of ``gqa`` without ``left_padding``; None is the model's own
            limit. The other layouts compute the angles and have no limit.
        external_data_above: weights of more bytes than this go into a file of their own (protobuf ends at 2 GB).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: Literal["reduced", "gqa"] = "reduced"
    precision: Literal["fp32", "int4"] = "int4"
    accuracy_level: Literal[0, 1, 4] = 4
    left_padding: bool = False
    last_logits_only: bool = False
    context_length: int | None = Field(default=None, ge=1)
    external_data_above: int = Field(default=1_500_000_000, ge=0, le=1_500_000_000)

    @property
    def fused_rope(self) -> bool:
        """Whether GroupQueryAttention itself rotates and masks, by the number of valid tokens in each row."""
        return self.attention == "gqa" and not self.left_padding


def objections(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
    """Why this model cannot be written with these options, each with the way out."""
    return [*_shape_objections(config, options), *_grid_objections(grids, options)]


def _shape_objections(config: DecoderConfig, options: OnnxOptions) -> list[str]:
    found = []
    if options.left_padding and options.attention == "reduced":
        found.append("onnx: left_padding is an option of attention: gqa; reduced always handles it, so leave it out")
    if options.context_length is not None and not options.fused_rope:
        found.append("onnx: context_length only matters where rotary tables are stored (attention: gqa); leave it out")
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


def _grid_objections(grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
    if options.precision == "fp32":
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
