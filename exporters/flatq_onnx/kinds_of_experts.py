"""Where onnxruntime's node for experts, QMoE, is exact.

This module does not import onnx, so that recipes can be checked with only the core installed.
"""

from __future__ import annotations

from collections.abc import Mapping

from packaging.version import Version

from flatq.export import DecoderConfig, Grid
from flatq_onnx.options import OnnxOptions
from flatq_onnx.tensors import Blocks, block_of

TRIED_BLOCKS = (16, 32, 64, 128)
CODES_SINCE, WEIGHTS_SINCE = Version("1.24"), Version("1.25")


def computes_all(config: DecoderConfig, index: int, grids: Mapping[str, Grid], options: OnnxOptions) -> str:
    """Why every expert of a layer is computed for every token; empty if onnxruntime's node computes only those used.

    Args:
        grids: of the linears that become codes.
    """
    if options.target in ("web", "cuda") or options.activations == "fp16":
        return "onnxruntime's node for experts was only tried with float32 on CPUs"
    if config.activation != "silu" or config.mlp_bias:
        return "onnxruntime's node has only the gated silu without biases"
    found = [grids.get(f"layers.{index}.{name}") for name in ("gate", "up", "down")]
    gate, up, down = found
    if gate is None or down is None or gate != up:
        return "onnxruntime's node needs gate, up and down of an expert quantized alike"
    each = config.layers[index].d_ff // config.experts
    sizes = {block_of(gate, config.d_model), block_of(down, each)}
    layouts = [Blocks.of(gate, 1, config.d_model), Blocks.of(down, 1, each)]
    if len(sizes) > 1 or layouts[0].has_zeros != layouts[1].has_zeros or any(one.bits != 4 for one in layouts):
        return "onnxruntime's node is exact only for 4 bits, with one group size and one kind of zero points"
    whole = all(one.block in TRIED_BLOCKS and one.columns % one.block == 0 for one in layouts)
    if not whole or any(one.has_zeros and one.count == 1 for one in layouts):
        return "onnxruntime's node needs rows of whole groups of 16 to 128, and two or more for zero points"
    return ""


def _reasons(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
    """``computes_all`` of every layer; empty without experts."""
    used = grids if options.precision == "int4" else {}
    return [computes_all(config, index, used, options) for index in range(len(config.layers) if config.experts else 0)]


def node_since(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[Version]:
    """Oldest onnxruntime with which a graph's node for experts is exact; empty for one that every version has."""
    has_node = "" in _reasons(config, grids, options)
    return [CODES_SINCE if config.normed_routing else WEIGHTS_SINCE] if has_node else []


def words_on_experts(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
    """A sentence for the export's notes if any layer computes all experts for every token."""
    reasons = [reason for reason in _reasons(config, grids, options) if reason]
    if not reasons:
        return []
    return [
        f"in {len(reasons)} of {len(config.layers)} layers every expert is computed for every token, which is exact "
        f"and slow, because {'; '.join(dict.fromkeys(reasons))}"
    ]
