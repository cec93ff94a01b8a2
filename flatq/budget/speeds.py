"""Predicted speed of a recipe's exports on this machine, for ``flatq plan --speed``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flatq.errors import ExportError
from flatq.export.planned import PlannedExport
from flatq.export.speed import SpeedLoad
from flatq.model.config import DecoderConfig
from flatq.model.grid import Grid
from flatq.recipe.blocks import BenchSpec
from flatq.recipe.grammar import Recipe
from flatq.units import seconds


def load_of(bench: BenchSpec | None) -> SpeedLoad:
    """What a bench measures, for one row: its prompt, and decoding in the middle of its new tokens."""
    asked = bench or BenchSpec()
    return SpeedLoad(asked.prompt + asked.new_tokens // 2, asked.prompt, asked.threads)


def predicted_speeds(
    recipe: Recipe,
    dense: DecoderConfig,
    planned: DecoderConfig,
    grids: Mapping[str, Grid],
    exports: Sequence[PlannedExport],
) -> list[str]:
    """A line for each export; measures kernels that no earlier prediction has measured.

    Args:
        recipe: its ``bench`` defines prompt, context and threads.
        dense: the widths before compression.
        planned: the widths of the plan.
        grids: grid of each linear that will be quantized, by stem.
        exports: of the recipe.
    """
    load, lines = load_of(recipe.bench), list[str]()
    for item in exports:
        try:
            found = item.exporter.speed_model(dense, item.options, load).predict(planned, grids)
        except ExportError as refused:
            lines.append(f"export {item.name}: no predicted speed: {refused}")
            continue
        lines.append(
            f"export {item.name}: about {1 / found.decode:.3g} tokens/s decoding at a context of {load.context:,}, "
            f"a prompt of {load.prompt:,} tokens in {seconds(found.prefill)} (predicted for the CPU, threads: "
            f"{load.threads or 'default'})"
        )
    return lines
