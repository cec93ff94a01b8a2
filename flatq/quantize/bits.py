"""Bits of every linear: by rule (``overrides``), or by a budget and measured errors (``average_bits``).

Greedy allocation: every unit of linears starts with the fewest bits; the step that reduces the error most per bit is
taken until the average is reached. A unit is a set of linears that read the same activation and that inference servers
fuse into one matrix: q, k, v; o; gate, up; down. The errors are measured by ``quantize.bit_errors``.

Left out: bits per expert or per head, and other searches. The greedy search is exact up to its last step because steps
follow the lower convex hull of each unit's errors.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from flatq.model.decoder import LINEARS, DecoderConfig
from flatq.model.names import Stem, stems_of
from flatq.recipe.blocks import GptqSpec, OverrideSpec

UNITS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears that get the same bits.

    Attributes:
        stems: names of the linears, such as ``layers.3.q``.
        weights: total number of weights.
        errors: bits -> error of quantizing the unit to so many bits, in the same unit for all.
    """

    stems: tuple[str, ...]
    weights: int
    errors: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Pinned:
    """Number of weights whose bits the overrides fix, and their total bits."""

    total: int
    spent: int


def override_of(stem: str, spec: GptqSpec) -> OverrideSpec:
    """Settings of the patterns that match a linear; for each key the longest pattern wins, independent of order."""
    found: dict[str, object] = {}
    for pattern in sorted(spec.overrides, key=lambda pattern: (len(pattern), pattern)):
        if fnmatchcase(stem, pattern):
            found |= spec.overrides[pattern].model_dump(exclude_unset=True)
    return OverrideSpec.model_validate(found)


def unmatched(config: DecoderConfig, spec: GptqSpec) -> list[str]:
    """Patterns that no linear of the model matches."""
    stems = stems_of(config)
    return [
        f"stages.gptq.overrides: {pattern!r} matches no linear; they are called layers.0.q to {stems[-1]}, with "
        f"{', '.join(LINEARS)} in each layer"
        for pattern in spec.overrides
        if not any(fnmatchcase(stem, pattern) for stem in stems)
    ]


def out_of_reach(config: DecoderConfig, spec: GptqSpec) -> list[str]:
    """A message if ``average_bits`` is below the smallest average that its choices and the overrides allow."""
    if spec.average_bits is None:
        return []
    pinned, units = free_units(config, spec)
    total = pinned.total + sum(unit.weights for unit in units)
    least = (pinned.spent + min(spec.bit_choices) * sum(unit.weights for unit in units)) / max(total, 1)
    if not units or least > spec.average_bits + 1e-9:
        return [
            f"stages.gptq.average_bits: {spec.average_bits} cannot be reached: the smallest of bit_choices and the "
            f"overrides give {least:.2f}; choose a higher average, or add a smaller choice"
        ]
    return []


def choose(config: DecoderConfig, spec: GptqSpec, errors: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """Bits of every linear whose bits the overrides do not fix, by stem.

    Args:
        config: planned widths; the average is over their weights.
        errors: by the first stem of a unit, the error for each of ``bit_choices``; bits as text, as JSON keys.
    """
    pinned, units = free_units(config, spec)
    units = [
        Unit(unit.stems, unit.weights, {int(bits): cost for bits, cost in errors[unit.stems[0]].items()})
        for unit in units
    ]
    total = pinned.total + sum(unit.weights for unit in units)
    assert spec.average_bits is not None
    bits = spend(units, spec.average_bits * total - pinned.spent)
    return {stem: each for unit, each in zip(units, bits, strict=True) for stem in unit.stems}


def expected(config: DecoderConfig, spec: GptqSpec) -> dict[str, int]:
    """A choice with the wanted average before errors are measured, assuming that each bit quarters the same error."""
    _, units = free_units(config, spec)
    guess = {unit.stems[0]: {str(bits): unit.weights * 4.0**-bits for bits in spec.bit_choices} for unit in units}
    return choose(config, spec, guess)


def spend(units: Sequence[Unit], budget: float) -> list[int]:
    """Bits of each unit that minimize the sum of errors, with weights times bits within the budget."""
    hulls = [_hull(unit.errors) for unit in units]
    chosen = [0] * len(units)
    left = budget - sum(unit.weights * hull[0] for unit, hull in zip(units, hulls, strict=True))
    queue: list[tuple[float, int]] = []

    def offer(number: int) -> None:
        hull, step = hulls[number], chosen[number]
        if step + 1 < len(hull):
            unit = units[number]
            gained = unit.errors[hull[step]] - unit.errors[hull[step + 1]]
            heapq.heappush(queue, (-gained / (unit.weights * (hull[step + 1] - hull[step])), number))

    for number in range(len(units)):
        offer(number)
    while queue:
        _, number = heapq.heappop(queue)
        hull, step = hulls[number], chosen[number]
        cost = units[number].weights * (hull[step + 1] - hull[step])
        if cost <= left + 1e-6 * abs(budget):
            left -= cost
            chosen[number] += 1
            offer(number)
    return [hull[step] for hull, step in zip(hulls, chosen, strict=True)]


def _hull(errors: Mapping[int, float]) -> list[int]:
    """The choices on the lower convex hull of errors over bits, fewest bits first; error falls with every step."""
    hull: list[int] = []
    for bits in sorted(errors):
        if hull and errors[bits] >= errors[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(errors, hull[-2], hull[-1]) >= _slope(errors, hull[-1], bits):
            hull.pop()
        hull.append(bits)
    return hull


def _slope(errors: Mapping[int, float], fewer: int, more: int) -> float:
    return (errors[more] - errors[fewer]) / (more - fewer)


def free_units(config: DecoderConfig, spec: GptqSpec) -> tuple[Pinned, list[Unit]]:
    """The weights that the overrides fix, and the remaining units (without errors), whose bits are to be chosen."""
    total = spent = 0
    units = []
    for index, dims in enumerate(config.layers):
        for names in UNITS:
            free: dict[str, int] = {}
            for name in names:
                rows, columns = dims.shape(name, config.d_model)
                stem = str(Stem(index, name))
                rule = override_of(stem, spec)
                if rule.quantize and rule.bits is not None:
                    total, spent = total + rows * columns, spent + rows * columns * rule.bits
                elif rule.quantize:
                    free[stem] = rows * columns
            if free:
                units.append(Unit(tuple(free), sum(free.values()), {}))
    return Pinned(total, spent), units
