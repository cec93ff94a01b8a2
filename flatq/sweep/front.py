"""``flatq front``: a sweep over sizes, ``--size 50MB..120MB --points 8``; at each the budget chooses widths and bits.

The limit is the block ``budget`` of the recipe. Keys of the stages that it chooses instead (``keep_ratio``, ``bits``,
``group_size`` and others) are removed from the base recipe, which is logged, so that any recipe can be the base.
"""

from __future__ import annotations

import logging
from typing import Any

from flatq.errors import RecipeError
from flatq.recipe.budget import LIMITS
from flatq.recipe.grammar import Recipe
from flatq.recipe.reader import read
from flatq.recipe.rules import BUDGETS, CHOSEN
from flatq.sweep.grid import Axis, parsed
from flatq.units import parse_size

log = logging.getLogger(__name__)
KEY = "budget.size"
MOST_POINTS = 50
UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
CHOSEN_BY_THE_BUDGET = {"flat": (*BUDGETS, "context"), "gptq": CHOSEN}


def sizes_of(text: str, points: int) -> Axis:
    """Evenly spaced sizes, the smallest first; both ends are among them.

    Args:
        text: ``50MB..120MB``.
        points: how many.

    Raises:
        RecipeError: lists what is wrong.
    """
    low, dots, high = (part.strip() for part in text.partition(".."))
    problems = [] if 2 <= points <= MOST_POINTS else [f"--points {points}: at least 2, at most {MOST_POINTS}"]
    try:
        if not dots:
            raise ValueError("write it as LOW..HIGH, for example 50MB..120MB")
        first, last = parse_size(low), parse_size(high)
        if first >= last:
            raise ValueError(f"{low} is not smaller than {high}; write the smaller size first")
    except ValueError as error:
        problems.append(f"--size {text}: {error}")
    if problems:
        raise RecipeError(problems)
    unit, factor = next(((name, count) for name, count in UNITS if first >= count), UNITS[-1])
    between = [first + (last - first) * step / (points - 1) for step in range(1, points - 1)]
    return Axis(KEY, (low, *(f"{size / factor:.4g}{unit}" for size in between), high))


def with_budget(recipe: Recipe, size: str) -> Recipe:
    """The recipe with a budget of a size, and without the keys that the budget chooses instead.

    Raises:
        RecipeError: the result is no recipe; lists all errors.
    """
    document = read(recipe.text).value
    removed: list[str] = []
    for entry in document.get("stages") or []:
        for kind, options in entry.items():
            for key in CHOSEN_BY_THE_BUDGET.get(kind, ()):
                if isinstance(options, dict) and options.pop(key, None) is not None:
                    removed.append(f"{kind}.{key}")
    if removed:
        log.warning("the budget chooses in place of %s", ", ".join(removed))
    budget: dict[str, Any] = {k: v for k, v in (document.get("budget") or {}).items() if k not in (*LIMITS, "context")}
    return parsed({**document, "budget": {"size": size, **budget}}, recipe.name, {KEY: size})
