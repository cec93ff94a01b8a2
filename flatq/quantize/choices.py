"""The grids that a budget chooses from: what the exports can store, without those that never pay.

A unit is a set of linears that share a choice: q, k, v; o; gate, up; down; the embedding; the head. ``overrides`` of
the gptq stage fix a part of a choice, or all of it, for single linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.model.names import Stem
from flatq.quantize.bits import UNITS, override_of
from flatq.recipe.blocks import GptqSpec

ALMOST = 1.05  # a grid with zero points is preferred to the same without, up to this factor of the size
GridPrice = Callable[[Grid], float]


@dataclass(frozen=True, slots=True)
class Choice:
    """A unit at one grid: the grid of each of its linears, None for a linear that is not quantized."""

    name: str
    grids: Mapping[str, Grid | None]


@dataclass(frozen=True, slots=True)
class ChoiceUnit:
    """Linears, or a table, that share a choice; the first stem names it."""

    stems: tuple[str, ...]
    choices: tuple[Choice, ...]

    @property
    def name(self) -> str:
        """The first stem."""
        return self.stems[0]


def named(grid: Grid | None) -> str:
    """A grid as a key of JSON: ``4-64-zeros``."""
    if grid is None:
        return "none"
    return f"{grid.bits}-{grid.group_size}{'' if grid.symmetric else '-zeros'}"


def candidates(
    bits: Sequence[int], group_sizes: Sequence[int], stored: Callable[[Grid], bool], price: GridPrice
) -> list[Grid]:
    """The grids worth measuring, cheapest first.

    Left out: what the exports cannot store; of a grid with zero points and the same without the second, unless it is
    clearly smaller; at 8 bits all but the largest groups, because their error is negligible; and what is no smaller
    than a grid that is finer in every respect.

    Args:
        bits: to choose from.
        group_sizes: to choose from; -1 is a whole row.
        stored: whether the exports can store a grid.
        price: bytes of a typical matrix.
    """
    found: list[Grid] = []
    for each in sorted(set(bits)):
        sizes = sorted(set(group_sizes), key=lambda size: size if size > 0 else 1 << 30)
        for size in sizes[-1:] if each == 8 else sizes:
            with_zeros, without = Grid(each, size, False), Grid(each, size, True)
            if stored(with_zeros) and each != 8:
                found.append(with_zeros)
            if stored(without) and (with_zeros not in found or price(with_zeros) > ALMOST * price(without)):
                found.append(without)
    kept = [grid for grid in found if not any(_beaten(grid, other, price) for other in found)]
    return sorted(kept, key=lambda grid: (price(grid), named(grid)))


def _beaten(grid: Grid, other: Grid, price: GridPrice) -> bool:
    """Whether ``other`` is at least as fine in every respect, finer in one, and no larger."""
    size, finest = (g.group_size if g.group_size > 0 else 1 << 30 for g in (grid, other))
    as_fine = other.bits > grid.bits or (other.bits == grid.bits and (grid.symmetric or not other.symmetric))
    return as_fine and finest <= size and other != grid and price(other) <= price(grid)


def layer_units(
    config: DecoderConfig, spec: GptqSpec | None, grids: Sequence[Grid]
) -> Iterator[tuple[int, int, ChoiceUnit]]:
    """The units of all layers: (layer, number in ``UNITS``, unit); without a gptq stage nothing is quantized."""
    for index in range(len(config.layers)):
        for number, names in enumerate(UNITS):
            stems = tuple(str(Stem(index, name)) for name in names)
            yield index, number, ChoiceUnit(stems, _choices(stems, spec, grids))


def _choices(stems: Sequence[str], spec: GptqSpec | None, grids: Sequence[Grid]) -> tuple[Choice, ...]:
    if spec is None:
        return (Choice(named(None), dict.fromkeys(stems)),)
    found: dict[tuple[Grid | None, ...], Choice] = {}
    for grid in grids:
        fixed = {stem: _with_override(stem, spec, grid) for stem in stems}
        found.setdefault(tuple(fixed.values()), Choice(named(grid), fixed))
    return tuple(found.values())


def _with_override(stem: str, spec: GptqSpec, grid: Grid) -> Grid | None:
    """The grid with what the overrides fix for a linear."""
    rule = override_of(stem, spec)
    if not rule.quantize:
        return None
    symmetric = grid.symmetric if rule.symmetric is None else rule.symmetric
    return Grid(rule.bits or grid.bits, rule.group_size or grid.group_size, symmetric)


def table_units(
    config: DecoderConfig, spec: GptqSpec | None, grids: Mapping[str, Sequence[Grid | None]]
) -> list[ChoiceUnit]:
    """Embedding and head; a tied head is the embedding.

    Args:
        grids: choices by stem, ``embed`` and ``head``.
    """
    found = []
    for stem in ("embed",) if config.tied_head else ("embed", "head"):
        some = grids[stem]
        if spec is None:
            some = [None]
        elif spec.embedding is not None:
            some = [Grid(spec.embedding.bits, spec.embedding.group_size, True)]
        found.append(ChoiceUnit((stem,), tuple(Choice(named(grid), {stem: grid}) for grid in some)))
    return found
