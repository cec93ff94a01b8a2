"""Reasons why a model cannot be written as GGUF with given options, each with a remedy."""

from __future__ import annotations

from collections.abc import Mapping

from flatq.export import FAMILIES, LINEARS, DecoderConfig, Grid
from flatq_gguf import k_quants
from flatq_gguf.blocks import carrier
from flatq_gguf.layouts import RANK_MULTIPLE, architecture
from flatq_gguf.options import GgufOptions


def objections(config: DecoderConfig, grids: Mapping[str, Grid], options: GgufOptions) -> list[str]:
    """Reasons why this model cannot be written with these options, each with a remedy."""
    if config.family not in FAMILIES:
        return [f"gguf: family {config.family!r} is not supported; supported: {', '.join(FAMILIES)}"]
    chosen = architecture(config, options).name
    found = [*_shapes(config), *_grids(grids, options), *k_quants.objections(options.precision, options.quantize_with)]
    found += _compact(config) if chosen == "mimo2" else _switches(config, chosen)
    return [f"gguf: {problem}" for problem in found]


def _shapes(config: DecoderConfig) -> list[str]:
    found = []
    attention = {(dims.heads, dims.kv_heads, dims.d_qk) for dims in config.layers}
    if len(attention) > 1:
        found.append("layers differ in heads or d_qk; no architecture of llama.cpp supports that, keep them equal")
    wide = [index for index, dims in enumerate(config.layers) if dims.d_v > dims.d_qk]
    if wide:
        found.append(f"d_v is larger than d_qk in layers {wide}; value heads can only be padded, so lower d_v")
    return found


def _grids(grids: Mapping[str, Grid], options: GgufOptions) -> list[str]:
    if options.precision in ("f32", "f16", "bf16"):
        return []
    if options.precision != "codes":
        if not grids:
            return []
        return [
            f"precision: {options.precision} would round the weights a second time, because the model is already "
            "quantized; use precision: codes, or remove the gptq stage"
        ]
    if not grids:
        return [
            "precision: codes writes the codes of a quantized model, but nothing is quantized; add a gptq stage to "
            "the recipe or use precision: f16"
        ]
    found = []
    for grid in dict.fromkeys(grids.values()):
        first = next(stem for stem, other in grids.items() if other == grid)
        if carrier(grid) is None:
            found.append(
                f"{first} has {grid.bits}-bit asymmetric codes, which no block type of llama.cpp can store; quantize "
                "with symmetric: true, or use precision: f16"
            )
        elif grid.group_size % 32 and grid.group_size != -1:
            found.append(
                f"{first} has group_size {grid.group_size}; blocks of llama.cpp hold 32 columns with one scale, so it "
                "must be -1 or a multiple of 32, or use precision: f16"
            )
    return found


def _switches(config: DecoderConfig, chosen: str) -> list[str]:
    found = []
    dims = config.layers[0]
    if config.qk_norm and chosen != "qwen3":
        found.append(
            f"{config.family} models have norms on q and k, which the architecture for narrowed models (deci) does not "
            "support; remove the flat stage and quantize only, or export to onnx"
        )
    biased = [name for name in LINEARS if config.has_bias(name)]
    known = {"qwen2": ("q", "k", "v"), "qwen3": ("q", "k", "v")}.get(chosen, LINEARS)
    if unknown := [name for name in biased if name not in known]:
        found.append(f"architecture {chosen} of llama.cpp has no bias on {', '.join(unknown)}; export to onnx")
    if chosen == "qwen2" and dims.heads * dims.d_qk != config.d_model:
        found.append(
            f"architecture qwen2 needs heads * d_qk = d_model, not {dims.heads} * {dims.d_qk} and {config.d_model}; "
            "use layout: deci"
        )
    return found


def _compact(config: DecoderConfig) -> list[str]:
    found = []
    ranks = sorted({dims.d_v for dims in config.layers})
    if len(ranks) > 1:
        found.append(
            f"layout: compact has one d_v for all layers, this model has {ranks}; set uniform: true and "
            f"rank_multiple: {RANK_MULTIPLE} in the flat stage, or use layout: deci"
        )
    if odd := [rank for rank in ranks if rank % RANK_MULTIPLE]:
        found.append(
            f"layout: compact needs d_v to be a multiple of {RANK_MULTIPLE}, not {odd} (V caches have blocks of "
            f"{RANK_MULTIPLE}); set rank_multiple: {RANK_MULTIPLE} in the flat stage, or use layout: deci"
        )
    if config.tied_head:
        found.append(
            "layout: compact needs an untied head, and this model's head is tied to its embedding: the file would "
            f"store it twice ({config.vocab * config.d_model:,} weights more); use layout: deci"
        )
    if config.rope.scaling == "llama3":
        found.append("layout: compact does not support the rope factors of Llama 3; use layout: deci")
    switches = [name for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm") if getattr(config, name)]
    if switches:
        found.append(f"layout: compact does not support {', '.join(switches)}; use layout: deci")
    return found
