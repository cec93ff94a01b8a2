"""Turn pydantic's validation errors into messages that refer to the recipe file.

pydantic reports what is invalid, but not every valid value and not the closest known key. Both are read from the
model's JSON Schema, so a new option needs no message here: its type, range and choices are the message. This works for
the recipe and for the options of any exporter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from flatq.recipe.reader import Place

Schema = Mapping[str, Any]
MOST_PROBLEMS = 50


def explain(error: ValidationError, model: type[BaseModel], *, under: Place = ()) -> list[tuple[Place, str]]:
    """Each error as (place, message without the place), at most ``MOST_PROBLEMS`` of them.

    Args:
        error: what pydantic raised.
        model: what the value was validated against.
        under: path of the validated value in the file; prepended to each place.
    """
    root = _schema(model)
    faults = error.errors(include_url=False)
    lines = [((*under, *fault["loc"]), _sentence(root, fault)) for fault in faults[:MOST_PROBLEMS]]
    if len(faults) > MOST_PROBLEMS:
        lines.append(((*under, *faults[MOST_PROBLEMS]["loc"]), f"and {len(faults) - MOST_PROBLEMS} problems more"))
    return lines


def written(place: Place) -> str:
    """A place as text: ``stages[0].flat.keep_ratio``."""
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            name = step if step.replace("-", "_").isidentifier() else repr(step)
            text += f".{name}" if text else name
    return text or "recipe"


def shown(value: Any) -> str:
    """A value as YAML text, shortened and safe to print."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping" if value else "{}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list" if value else "[]"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The message for an unknown key, with the closest known key."""
    near = get_close_matches(key.lower()[:60], known, n=1, cutoff=0.6)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key; {guess}allowed: {', '.join(known) or 'none'}"


@cache
def _schema(model: type[BaseModel]) -> Schema:
    return model.model_json_schema()


def _sentence(root: Schema, fault: Any) -> str:
    place = tuple(fault["loc"])
    if fault["type"] == "extra_forbidden":
        return unknown_key(str(place[-1]), list(_keys(root, place[:-1])))
    allowed = " or ".join(dict.fromkeys(_words(branch) for branch in _at(root, place)))
    if fault["type"] == "union_tag_invalid":
        return unknown_key(fault["ctx"]["tag"], list(_keys(root, place)))
    if fault["type"] == "union_tag_not_found":
        kinds = " or ".join(_keys(root, place))
        return f"{shown(fault['input'])} is not allowed; a mapping with one key, {kinds}, that holds the options"
    if fault["type"] == "missing":
        return f"missing; {allowed}"
    if fault["type"] in ("value_error", "assertion_error"):
        return str(fault["ctx"]["error"])
    value = fault["input"]
    sentence = f"{shown(value)} is not allowed; {allowed or fault['msg']}"
    if place[-1:] == ("keep_ratio",) and isinstance(value, int | float) and 1 < value <= 100:
        sentence += f"; did you mean {value / 100:g} (the share that is kept)?"
    elif isinstance(value, str):
        choices = [choice for branch in _at(root, place) for choice in _choices(branch) if isinstance(choice, str)]
        near = get_close_matches(value.lower()[:60], choices, n=1)
        sentence += f"; did you mean {near[0]!r}?" if near else ""
    return sentence


def _branches(root: Schema, schema: Schema) -> Iterator[Schema]:
    """The alternatives of a schema, with references resolved."""
    if "$ref" in schema:
        yield from _branches(root, root["$defs"][schema["$ref"].rsplit("/", 1)[-1]])
        return
    alternatives = [part for word in ("anyOf", "oneOf", "allOf") for part in schema.get(word, ())]
    if not alternatives:
        yield schema
    for part in alternatives:
        yield from _branches(root, part)


def _at(root: Schema, place: Place) -> Iterator[Schema]:
    """The alternatives that the schema has at a place."""
    found = list(_branches(root, root))
    for step in place:
        inside = [
            part["items"] if isinstance(step, int) else part["properties"][step]
            for part in found
            if ("items" in part if isinstance(step, int) else step in part.get("properties", ()))
        ]
        found = [branch for part in inside for branch in _branches(root, part)]
    yield from found


def _keys(root: Schema, place: Place) -> Iterator[str]:
    for branch in _at(root, place):
        yield from branch.get("properties", ())


def _choices(schema: Schema) -> list[Any]:
    return list(schema["enum"]) if "enum" in schema else [schema["const"]] if "const" in schema else []


def _words(schema: Schema) -> str:
    choices = _choices(schema)
    if choices:
        listed = ", ".join(str(choice) if isinstance(choice, str) else shown(choice) for choice in choices)
        return listed if len(choices) == 1 else f"one of {listed}"
    match schema.get("type"):
        case "integer":
            return "a whole number" + _range(schema)
        case "number":
            return "a number" + _range(schema)
        case "boolean":
            return "true or false"
        case "string":
            return "text" if "pattern" not in schema else f"text that matches {schema['pattern']}"
        case "array":
            return "a list"
        case "object" if "properties" in schema:
            return f"a mapping with the keys {', '.join(schema['properties'])}"
        case "object":
            return "a mapping"
        case "null":
            return "null"
    return "any value"


def _range(schema: Schema) -> str:
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    low, high = (least if above is None else above), (most if below is None else below)
    if low is not None and high is not None:
        return f" in {'[' if above is None else '('}{low}, {high}{']' if below is None else ')'}"
    if low is not None:
        return f" {'>=' if above is None else '>'} {low}"
    return "" if high is None else f" {'<=' if below is None else '<'} {high}"
