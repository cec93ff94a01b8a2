"""Reasons why a model cannot be written as GGUF with given options, each with a remedy."""

from __future__ import annotations

from collections.abc import Mapping

from flatq.export import FAMILIES, LINEARS, DecoderConfig, Grid
from flatq_gguf import k_quants
from flatq_gguf.blocks import carrier
from flatq_gguf.layouts import GEMMA2_27B, RANK_MULTIPLE, Architecture, Graph, architecture, native_rope
from flatq_gguf.options import GgufOptions


def objections(config: DecoderConfig, grids: Mapping[str, Grid], options: GgufOptions) -> list[str]:
    """Reasons why this model cannot be written with these options, each with a remedy."""
    if config.family not in FAMILIES:
        return [f"gguf: family {config.family!r} is not supported; supported: {', '.join(FAMILIES)}"]
    chosen = architecture(config, options)
    found = [*_shapes(config), *_grids(grids, options), *k_quants.objections(options.precision, options.quantize_with)]
    found += _compact(config) if chosen.name == "mimo2" else _switches(config, chosen)
    found += _experts(config, options) if config.experts else []
    return [f"gguf: {problem}" for problem in found]


def _experts(config: DecoderConfig, options: GgufOptions) -> list[str]:
    wrong = {
        f"layout: {options.layout} has no experts; leave layout out": options.layout != "auto",
        f"precision: {options.precision} is not made of experts; use precision: codes": options.precision
        in k_quants.K_QUANTS,
        "imatrix is not made of experts; leave it out": options.imatrix,
    }
    return [words for words, there in wrong.items() if there]


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


def _switches(config: DecoderConfig, chosen: Architecture) -> list[str]:
    """Differences between the model and the graph of its architecture."""
    graph, found = chosen.graph, []
    of_heads = "rotated heads" if config.norm_after_rope else "heads"
    qk_norm = ("width" if config.wide_qk_norm else of_heads) if config.qk_norm else "none"
    wrong = {
        f"the activation {graph.activation}, not {config.activation}": graph.activation != config.activation,
        _having(graph.pre_norms, "norms before attention and MLP"): graph.pre_norms != config.pre_norms,
        _having(graph.post_norms, "norms after attention and MLP"): graph.post_norms != config.post_norms,
        f"norms on q and k: {graph.qk_norm}, not {qk_norm}": graph.qk_norm != qk_norm,
        "no experts": config.experts > 0 and graph.experts is False,
        "experts": config.experts == 0 and graph.experts is True,
        "experts whose weights add up to 1": config.experts > 0 and not config.normed_routing,
        "a head that is tied to the embedding": graph.tied is True and not config.tied_head,
        "an untied head": graph.tied is False and config.tied_head,
        "no rope factors per frequency": not graph.factors and not native_rope(config.rope),
        **{
            _having(cap in graph.caps, f"a cap of {what}"): (
                graph.caps_required if getattr(config, cap) is None else cap not in graph.caps
            )
            for cap, what in (("attention_cap", "scores"), ("logit_cap", "logits"))
        },
        **_kinds(config, graph),
    }
    if differences := [what for what, differs in wrong.items() if differs]:
        found.append(
            f"architecture {chosen.name} of llama.cpp has {'; '.join(differences)}; "
            f"{'leave layout out, or ' if chosen.name == 'deci' else ''}export to onnx"
        )
    if unknown := [name for name in LINEARS if config.has_bias(name) and name not in graph.biases]:
        found.append(f"architecture {chosen.name} of llama.cpp has no bias on {', '.join(unknown)}; export to onnx")
    dims = config.layers[0]
    if graph.square and dims.heads * dims.d_qk != config.d_model:
        way = "use layout: deci" if graph.like_llama else "export to onnx"
        found.append(
            f"architecture {chosen.name} needs heads * d_qk = d_model, not {dims.heads} * {dims.d_qk} and "
            f"{config.d_model}; {way}"
        )
    if chosen.name == "gemma2" and len(config.layers) == GEMMA2_27B:
        found.append("llama.cpp scales the scores of Gemma 2 27B in another way; export to onnx")
    return found


def _having(there: bool, what: str) -> str:
    return what if there else f"no {what.removeprefix('a ')}"


def _kinds(config: DecoderConfig, graph: Graph) -> dict[str, bool]:
    """Differences in window and rotary embedding per kind of layer, and whether each is one."""
    layers = range(len(config.layers))
    still = [config.kind(index).rope is None for index in layers]
    rotating = [(kind.window, kind.rope) for kind in config.kinds if kind.rope is not None]
    windowed = [(window, rope) for window, rope in rotating if window is not None]
    expected = [graph.still and (index + 1) % 4 == 0 for index in layers]
    plain = all(
        rope.scaling is None and (rope.theta == config.rope.theta or not graph.one_theta) for _, rope in windowed
    )
    return {
        "no rotary embedding in every 4th layer, and only there"
        if graph.still
        else "a rotary embedding in every layer": (still != expected),
        "one window": graph.windows and len(windowed) > 1,
        "one rotary embedding for all layers": not graph.windows and len({rope for _, rope in rotating}) > 1,
        "no rope scaling in layers with a window" + (", and one rope base" if graph.one_theta else ""): (
            graph.windows and not plain
        ),
    }


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
    if config.rope.scaling is not None or config.rope.rotated != 1:
        found.append("layout: compact does not support the rope factors of this model; use layout: deci")
    switches = [name for name in config.switches() if name != "sliding_window"]
    if switches:
        found.append(f"layout: compact does not support {', '.join(switches)}; use layout: deci")
    return found
