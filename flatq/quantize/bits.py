"""Which linear gets how many bits: by rule (``overrides``), or by a budget and measured errors (``average_bits``).

The budget is spent like a budget for ranks: every unit of linears begins with the fewest bits, and again and again the
step that takes most error away per bit is bought, until the average is reached. A unit is what servers fuse into one
matrix and what reads one activation: q, k, v; o; gate, up; down. What a unit's errors are is measured elsewhere
(``quantize.bit_errors``); here are only numbers.

Left out: bits per expert or per head, and any search beyond this greedy one, which is exact up to its last step because
prices are taken from the lower convex hull of each unit's errors.
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
        stems: their names, ``layers.3.q``.
        weights: how many they hold in all.
        errors: bits -> what quantizing them so costs, in a unit that is the same for all.
    """

    stems: tuple[str, ...]
    weights: int
    errors: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Pinned:
    """Weights whose bits the overrides fix, and the bits that they take."""

    total: int
    spent: int


def override_of(stem: str, spec: GptqSpec) -> OverrideSpec:
    """What the patterns say about a linear; for each key the longest pattern wins, whatever their order."""
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
    """Whether ``average_bits`` lies below what its choices and the overrides can give."""
    if spec.average_bits is None:
        return []
    pinned, units = free_units(config, spec)
    total = pinned.total + sum(unit.weights for unit in units)
    least = (pinned.spent + min(spec.bit_choices) * sum(unit.weights for unit in units)) / max(total, 1)
    if not units or least > spec.average_bits + 1e-9:
        return [
            f"stages.gptq.average_bits: {spec.average_bits} cannot be reached: the fewest of bit_choices and the "
            f"overrides make {least:.2f}; choose more, or add a smaller choice"
        ]
    return []


def choose(config: DecoderConfig, spec: GptqSpec, errors: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """Bits of every linear that the overrides leave open, by stem.

    Args:
        config: planned widths; the average is over their weights.
        errors: by the first stem of a unit, what each of ``bit_choices`` costs; bits as text, as JSON has them.
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
    """A choice of the wanted average before anything is measured, as if each bit quartered the same error."""
    _, units = free_units(config, spec)
    guess = {unit.stems[0]: {str(bits): unit.weights * 4.0**-bits for bits in spec.bit_choices} for unit in units}
    return choose(config, spec, guess)


def spend(units: Sequence[Unit], budget: float) -> list[int]:
    """Bits of each unit, so that weights times bits stay within the budget and the errors' sum is small."""
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
    """What the overrides fix, and the units (without errors) that are left to choose for."""
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
