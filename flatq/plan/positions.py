"""Lengths that do not go together: rows of text, the model's positions, what verification and the exports need."""

from __future__ import annotations

from flatq.export.planned import PlannedExport
from flatq.export.protocols import Exporter
from flatq.export.verify import NEW_TOKENS, PROMPT
from flatq.model.decoder import DecoderConfig
from flatq.recipe.grammar import Recipe


def rows_that_do_not_fit(recipe: Recipe, config: DecoderConfig, exports: list[PlannedExport]) -> list[str]:
    """Objections to lengths that a run would stumble over after hours of work, each with the way out.

    Args:
        config: of the dense model, for its positions.
        exports: those that are verified are compared on rows of text, and evaluated on all of them.
    """
    opened = [item for item in exports if item.verify and type(item.exporter).open is not Exporter.open]
    found = _too_long(recipe, config.max_positions, "the model", "")
    for item in exports:
        limit = getattr(item.options, "context_length", None)
        if limit is not None and item in opened:
            found += _too_long(recipe, limit, f"the export {item.name}", f", or raise its context_length of {limit}")
    needed = PROMPT + NEW_TOKENS
    first = recipe.evaluation[0].seq_len if recipe.evaluation else needed
    if opened and first < needed:
        found.append(
            f"evaluation.seq_len: {first} is too short to verify exports, which takes rows of {needed} tokens; raise "
            "it, or write them unverified with verify: false"
        )
    return found


def _too_long(recipe: Recipe, limit: int, what: str, way_out: str) -> list[str]:
    """Rows of text, and what is read and written when speed is measured, with more positions than there are."""
    asked = {"calibration.seq_len": recipe.calibration.seq_len} if what == "the model" else {}
    asked["evaluation.seq_len"] = max((spec.seq_len for spec in recipe.evaluation), default=0)
    if recipe.bench is not None:
        asked["bench.prompt + bench.new_tokens"] = recipe.bench.prompt + recipe.bench.new_tokens
    return [
        f"{key}: {length} is more than the {limit} positions of {what}; lower it to at most {limit}{way_out}"
        for key, length in asked.items()
        if length > limit
    ]
