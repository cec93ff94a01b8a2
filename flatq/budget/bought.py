"""A plan for a budget in words: what was narrowed, which bits were given, and what that costs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby

from flatq.budget.joint import JointPlan
from flatq.budget.problem import Problem
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.quantize.bits import UNITS

NAMES = {"d_v": "value heads", "d_ff": "MLP"}
MOST_GROUPS = 4  # of layers with equal widths that are listed one by one


def bought(problem: Problem, plan: JointPlan, *, measured: bool = True) -> list[str]:
    """Sentences on a plan, each a line.

    Args:
        problem: that was solved.
        plan: its solution.
        measured: False if errors were guessed, so predicted losses mean nothing.
    """
    dense, planned, prices = problem.config, problem.config.with_layers(plan.ranks.layers), problem.prices
    limit = "" if prices.limit == float("inf") else f" of {prices.shown(prices.limit)}"
    lines = [f"budget: {prices.shown(plan.ranks.achieved)}{limit} ({prices.where})"]
    if measured:
        lines[0] += f"; predicted loss {plan.predicted:.3f} nats per token"
        if plan.from_widths > 0:
            lines[0] += f", {plan.from_widths / plan.predicted:.0%} of it from narrowing"
    return [*lines, *_widths(problem, dense, planned), *_bits(problem, plan)]


def _widths(problem: Problem, dense: DecoderConfig, planned: DecoderConfig) -> list[str]:
    if problem.flat is None:
        return []
    if dense.layers == planned.layers:
        return ["narrowing does not pay at this budget: fewer bits lose less"]
    found = []
    for part, name in NAMES.items():
        pairs = [(getattr(a, part), getattr(b, part)) for a, b in zip(dense.layers, planned.layers, strict=True)]
        narrowed = [index for index, (whole, left) in enumerate(pairs) if left < whole]
        if not narrowed:
            found.append(f"{name}: no layer narrowed")
            continue
        groups = list(_runs((pairs[index], index) for index in narrowed))
        if len(groups) <= MOST_GROUPS:
            words = "; ".join(f"{_layers(some)}: {left:,} of {whole:,}" for (whole, left), some in groups)
        else:
            left = [pairs[index][1] for index in narrowed]
            words = f"{_layers_listed(narrowed)}: {min(left):,} to {max(left):,} of {pairs[0][0]:,}"
        found.append(f"{name} narrowed in {words}")
    return found


def _runs(pairs: Iterable[tuple[tuple[int, int], int]]) -> Iterable[tuple[tuple[int, int], list[int]]]:
    """Groups of consecutive layers with equal widths."""
    numbered = enumerate(pairs)

    def key(entry: tuple[int, tuple[tuple[int, int], int]]) -> Hashable:
        place, (widths, layer) = entry
        return widths, layer - place

    for _, some in groupby(numbered, key):
        entries = list(some)
        yield entries[0][1][0], [layer for _, (_, layer) in entries]


def _layers(some: Sequence[int]) -> str:
    return f"layer {some[0]}" if len(some) == 1 else f"layers {some[0]} to {some[-1]}"


def _layers_listed(some: Sequence[int]) -> str:
    """``layers 0, 3 to 9``."""
    runs = [[layer for _, layer in group] for _, group in groupby(enumerate(some), lambda pair: pair[1] - pair[0])]
    words = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"layer{'s' if len(some) > 1 else ''} {words}"


def _bits(problem: Problem, plan: JointPlan) -> list[str]:
    """For each kind of unit the grids, the most frequent first, and where the others are."""
    found = []
    for number, names in enumerate(UNITS):
        stems = {index: unit.name for index, each, unit in problem.layers if each == number}
        layers: dict[Grid | None, list[int]] = {}
        for index, stem in stems.items():
            layers.setdefault(plan.grids.get(stem), []).append(index)
        ordered = sorted(layers.items(), key=lambda entry: -len(entry[1]))
        words = [
            f"{grid_words(grid)}" if len(ordered) == 1 else f"{grid_words(grid)} in {_layers_listed(some)}"
            for grid, some in ordered
        ]
        found.append(f"{', '.join(names)}: {'; '.join(words)}")
    for unit in problem.tables:
        name = "embedding and head" if problem.config.tied_head else {"embed": "embedding"}.get(unit.name, unit.name)
        found.append(f"{name}: {grid_words(plan.grids.get(unit.name))}")
    return found if plan.grids else []


def grid_words(grid: Grid | None) -> str:
    """``4 bits in groups of 64 with zero points``."""
    if grid is None:
        return "not quantized"
    groups = "one group per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    return f"{grid.bits} bits in {groups}{'' if grid.symmetric else ' with zero points'}"
