"""The combinations of a grid, each a complete recipe: ``--grid flat.keep_ratio=0.9,0.8 --grid gptq.bits=3,4``.

A key is a path in the recipe: ``calibration.samples``, ``flat.keep_ratio`` and ``gptq.bits`` in the stages,
``exports.NAME.OPTION`` in the export of that name. Values have the syntax of a recipe. Every combination is validated
as a recipe before any work, and all mistakes are reported together.

To every combination that narrows and quantizes belongs one that only quantizes, with the same other values. It shows
what narrowing buys.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from flatq.errors import RecipeError
from flatq.kept import key_of
from flatq.recipe.grammar import Recipe
from flatq.recipe.reader import Unreadable, read

STAGES = ("flat", "gptq")
MOST_POINTS = 200
LONGEST_NAME = 100
ALONE = "quantized"  # first part of the name of a combination without the flat stage


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Combination:
    """One recipe of a grid.

    Attributes:
        name: of its folder; plain letters, digits and ``=,.+-``.
        changed: values by key.
        recipe: the validated recipe; its text is what the folder's ``recipe.yaml`` holds.
        added: whether it is a quantization alone that the grid does not contain.
    """

    name: str
    changed: Mapping[str, Any]
    recipe: Recipe
    added: bool = False


def axes_of(given: Sequence[str]) -> list[Axis]:
    """Parse ``["flat.keep_ratio=0.9,0.8", "gptq.bits=3,4"]``.

    Raises:
        RecipeError: lists everything that is wrong.
    """
    found, problems = list[Axis](), list[str]()
    for entry in given:
        key, equals, text = (part.strip() for part in entry.partition("="))
        try:
            found.append(_axis(key, text if equals else "", [axis.key for axis in found]))
        except (ValueError, Unreadable) as error:
            problems.append(f"--grid {entry}: {error}")
    points = 1
    for axis in found:
        points *= len(axis.values)
    if points > MOST_POINTS:
        problems.append(f"--grid: {points:,} combinations; at most {MOST_POINTS}: use fewer values, or several sweeps")
    if not given:
        problems.append("--grid: none given; for example --grid flat.keep_ratio=0.9,0.8 --grid gptq.bits=3,4")
    if problems:
        raise RecipeError(problems)
    return found


def _axis(key: str, text: str, taken: Sequence[str]) -> Axis:
    if not re.fullmatch(r"\w+(\.[\w-]+)*", key) or not text:
        raise ValueError("write it as KEY=VALUE,VALUE, for example gptq.bits=3,4")
    if key in taken:
        raise ValueError(f"a second grid of {key}; give all its values in one")
    values = read(f"[{text}]").value
    if any(values.count(value) > 1 for value in values):
        raise ValueError("a value is given twice; keep one of the two")
    if not values:
        raise ValueError("no value; write it as KEY=VALUE,VALUE")
    return Axis(key, tuple(values))


def combinations(recipe: Recipe, axes: Sequence[Axis], *, alone: bool = True) -> list[Combination]:
    """Every combination of the values, the first axis slowest; then the quantizations alone.

    Args:
        recipe: the base, as read from a file.
        axes: keys and values.
        alone: add the combinations that only quantize.

    Raises:
        RecipeError: lists all mistakes, each with the combinations that have it.
    """
    base = read(recipe.text).value
    short = _short_keys([axis.key for axis in axes])
    found, problems = list[Combination](), dict[str, list[str]]()
    for values in itertools.product(*(axis.values for axis in axes)):
        changed = dict(zip([axis.key for axis in axes], values, strict=True))
        name = _unique(_name(changed, short), changed, found)
        for point in _validated(base, recipe, name, changed, problems):
            found.append(point)
    if problems:
        everywhere = len(problems) == 1 or len(found) == 0
        raise RecipeError([_problem(words, names, everywhere) for words, names in problems.items()])
    return found + (_alone(base, recipe, found, short) if alone else [])


def _problem(words: str, names: Sequence[str], everywhere: bool) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"--grid: {words} (in {names[0]}{more})"


def _validated(
    base: Any, recipe: Recipe, name: str, changed: Mapping[str, Any], problems: dict[str, list[str]]
) -> Iterator[Combination]:
    """The combination, unless it is wrong; its mistakes are added to ``problems`` with its name."""
    try:
        yield Combination(name, changed, parsed(with_values(base, changed), recipe.name, changed))
    except RecipeError as error:
        for problem in error.problems:
            problems.setdefault(re.sub(r"^[^:]*\.yaml:\d+: ", "", problem), []).append(name)


def _alone(base: Any, recipe: Recipe, points: Sequence[Combination], short: Mapping[str, str]) -> list[Combination]:
    """The quantizations alone of the combinations that narrow and quantize, unless the grid contains them."""

    def other(point: Combination) -> dict[str, Any]:
        return {key: value for key, value in point.changed.items() if not key.startswith("flat.")}

    have = [other(point) for point in points if not narrows(point.recipe)]
    found = list[Combination]()
    for point in points:
        changed = other(point)
        if not narrows(point.recipe) or point.recipe.gptq is None or changed in have:
            continue
        have.append(changed)
        document = with_values(base, changed)
        document["stages"] = [stage for stage in document["stages"] if "flat" not in stage]
        name = _unique(",".join(filter(None, [ALONE, _name(changed, short)])), changed, [*points, *found])
        found.append(Combination(name, changed, parsed(document, recipe.name, changed, "without flat"), added=True))
    return found


def narrows(recipe: Recipe) -> bool:
    """Whether a recipe may narrow the model."""
    return recipe.flat is not None and recipe.flat.keep_ratio != 1


def with_values(base: Any, changed: Mapping[str, Any]) -> Any:
    """A copy of the content of a recipe file with other values, by key; raises as ``put``."""
    document = copy.deepcopy(base)
    for key, value in changed.items():
        put(document, key, value)
    return document


def put(document: Any, key: str, value: Any) -> None:
    """Set a value in the content of a recipe file.

    Raises:
        RecipeError: the recipe has no such stage or export, or the place is inside of a value.
    """
    first, *rest = key.split(".")
    if first in STAGES:
        place, rest = _entry(document, "stages", first, f"add `- {first}: {{}}` to its stages"), [first, *rest]
    elif first == "exports" and rest:
        name, *rest = rest
        entry = _export(document, name)
        place, rest = entry, [next(iter(entry)), *rest]
    else:
        place, rest = document, [first, *rest]
    for step in rest[:-1]:
        inside = place.get(step)
        if step == "model" and isinstance(inside, str):
            inside = {"path": inside}
        if inside is None:
            inside = {}
        if not isinstance(inside, dict):
            raise RecipeError(f"{key}: {step} of the recipe is {type(inside).__name__}, not a mapping; change its file")
        place[step] = inside
        place = inside
    place[rest[-1]] = value


def _entry(document: Mapping[str, Any], block: str, name: str, remedy: str) -> dict[str, Any]:
    for entry in document.get(block) or []:
        if isinstance(entry, dict) and name in entry:
            return entry
    raise RecipeError(f"{name}: the recipe has none; {remedy}")


def _export(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    exports = document.get("exports") or []
    names = [(options or {}).get("name", form) for entry in exports for form, options in entry.items()]
    if name not in names:
        raise RecipeError(f"exports.{name}: the recipe has no export of this name; it has {', '.join(names) or 'none'}")
    return exports[names.index(name)]


def parsed(document: Any, name: str, changed: Mapping[str, Any], also: str = "") -> Recipe:
    """A recipe with its text, from the content of a file."""
    words = [f"{key}: {json.dumps(value)}" for key, value in changed.items()] + ([also] if also else [])
    title = "".join(f"# {line}\n" for line in [f"{name}, with", *(f"  {word}" for word in words)])
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    if read(text).value != document:  # PyYAML writes YAML 1.1, which reads some plain text as other values
        text = json.dumps(document, indent=2) + "\n"
    return Recipe.parse(title + text, f"{name}.yaml")


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key if no other key has the same, else the whole key."""
    last = [key.split(".")[-1] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}


def _name(changed: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """``keep_ratio=0.9,bits=3``; characters that are not safe in a file name become ``-``."""
    parts = [f"{short[key]}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
    return re.sub(r"[^A-Za-z0-9=,._+-]+", "-", ",".join(parts))


def _unique(name: str, changed: Mapping[str, Any], taken: Sequence[Combination]) -> str:
    """The name, with a digest of its values if it is too long or taken (also in other upper and lower case)."""
    names = {point.name.casefold() for point in taken}
    if len(name) <= LONGEST_NAME and name.casefold() not in names:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{key_of(changed)[:8]}"
