"""The quantization grid of every weight, and why one is impossible; from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from flatq.model.decoder import LINEARS, DecoderConfig
from flatq.model.grid import Grid
from flatq.model.names import Stem, stems_of
from flatq.quantize.bits import expected, free_units, out_of_reach, override_of, unmatched
from flatq.recipe.blocks import GptqSpec

GROUPS = (16, 32, 64, 128, 256, 512, 1024)


def planned_grids(
    config: DecoderConfig, spec: GptqSpec | None, bits: Mapping[str, int] | None = None
) -> dict[str, Grid]:
    """Grid of every weight that will be quantized, by stem (``layers.3.q``, ``embed``, ``head``).

    Args:
        bits: chosen for ``average_bits``, by stem; None uses an estimate with the same average (``bits.expected``).
    """
    if spec is None:
        return {}
    if bits is None:
        bits = {} if spec.average_bits is None else expected(config, spec)
    grids = {}
    for stem in stems_of(config):
        rule = override_of(stem, spec)
        if rule.quantize:
            grids[stem] = Grid(
                bits.get(stem, rule.bits or spec.bits),
                rule.group_size or spec.group_size,
                spec.symmetric if rule.symmetric is None else rule.symmetric,
            )
    if spec.embedding is not None:
        table = Grid(spec.embedding.bits, spec.embedding.group_size, True)
        grids |= dict.fromkeys(("embed",) if config.tied_head else ("embed", "head"), table)
    return grids


def possible_grids(config: DecoderConfig, spec: GptqSpec | None) -> list[dict[str, Grid]]:
    """The grids that a recipe can lead to, for exporters to check; with ``average_bits`` one per choice."""
    if spec is None or spec.average_bits is None:
        return [planned_grids(config, spec)]
    stems = [stem for unit in free_units(config, spec)[1] for stem in unit.stems]
    return [planned_grids(config, spec, dict.fromkeys(stems, bits)) for bits in sorted(set(spec.bit_choices))]


def objections(config: DecoderConfig, spec: GptqSpec | None, grids: Mapping[str, Grid] | None = None) -> list[str]:
    """Messages with the reasons why a model of these widths cannot be quantized with ``spec``.

    Args:
        config: planned widths.
        spec: the stage.
        grids: of every weight; None are those of ``planned_grids``.
    """
    if spec is None:
        return []
    planned = planned_grids(config, spec) if grids is None else grids
    found = _too_wide(config, planned) + unmatched(config, spec) + out_of_reach(config, spec)
    return found + _of_experts(config, spec, planned) if config.experts else found


def _of_experts(config: DecoderConfig, spec: GptqSpec, grids: Mapping[str, Grid]) -> list[str]:
    """Messages about what is not possible with experts: groups over two of them, and parts of the method."""
    found = [
        f"stages.gptq.{key}: {value} is not possible for the experts of {config.family}; leave it out"
        for key, value, default in (
            ("average_bits", spec.average_bits, None),
            ("correction", spec.correction, 0),
            ("tune_steps", spec.tune_steps, 0),
        )
        if value != default
    ]
    widths = sorted({dims.d_ff // config.experts for dims in config.layers})
    sizes = {grid.group_size for stem, grid in grids.items() if stem.endswith(".down")}
    for size in sorted(sizes):
        if odd := [width for width in widths if size == -1 or width % size]:
            possible = [some for some in GROUPS if not any(width % some for width in widths)]
            way = f"choose {' or '.join(map(str, possible))} for down" if possible else "no group size divides it"
            found.append(
                f"stages.gptq.group_size: {size}: a group of down would span experts of {odd[0]} channels; {way}, or "
                "set width_multiple of the flat stage to a multiple of the group size"
            )
    return found


def _too_wide(config: DecoderConfig, grids: Mapping[str, Grid]) -> list[str]:
    """A message if a group is larger than a row of its weight."""
    found: dict[str, list[str]] = {}
    sizes: set[int] = set()
    for stem, grid in grids.items():
        columns = config.d_model
        if (linear := Stem.parse(stem)) is not None:
            columns = linear.shape(config)[1]
        if grid.group_size > columns:
            kind = linear.linear if linear is not None else stem
            found.setdefault(f"{kind} ({columns} inputs)", []).append(stem)
            sizes.add(grid.group_size)
    if not found:
        return []
    return [
        f"stages.gptq.group_size: {', '.join(map(str, sorted(sizes)))} is wider than {', '.join(found)}; "
        f"choose at most {_widest(config)}, or -1 for one group per row"
    ]


def _widest(config: DecoderConfig) -> int:
    narrowest = min(dims.shape(name, config.d_model)[1] for dims in config.layers for name in LINEARS)
    return max((size for size in GROUPS if size <= narrowest), default=-1)
