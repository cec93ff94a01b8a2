"""What each phase of a run depends on: keys of the recipe, and inputs such as the tokens.

The record of a finished phase holds the digest of what it depends on. If the recipe of an unfinished run is changed, a
phase whose digest is the same is kept; the others are computed again.

The names in ``NEEDS`` are dotted paths in ``facts``: ``stages.flat`` is the whole stage, ``inputs.tokens.judged`` the
evaluation tokens. A path that starts with ``-`` takes a part out again. A phase that is not listed depends on the whole
recipe: exports and what is measured on them, because an export states the recipe that it was made by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flatq.files import as_json
from flatq.recipe.budget import LIMITS, SPEEDS, BudgetSpec
from flatq.recipe.grammar import Recipe
from flatq.recipe.messages import shown

INPUTS = "inputs"
MODEL = ("model", "inputs.source", "inputs.versions")
OBSERVED = (*MODEL, "calibration.precision", "calibration.states", "inputs.tokens.calibration")
PRICED = "priced"  # the exports of a recipe with a budget, which is spent at their prices
BUILT = (*OBSERVED, "stages", "budget", PRICED)
LIMITED = tuple(f"-budget.{key}" for key in (*LIMITS, *SPEEDS, "context", "prompt", "threads"))
BUDGETED = ("budget", *(f"-budget.{key}" for key in BudgetSpec.model_fields))  # whether there is one
JUDGED = "inputs.tokens.judged"
DRAWN = ("model", "calibration", "evaluation", "stages.recover.samples")
NEEDS: dict[str, tuple[str, ...]] = {
    "self-text": DRAWN,
    "baseline": (*MODEL, JUDGED),
    "sensitivity": OBSERVED,
    "importance": OBSERVED,
    "curves": (*OBSERVED, "stages.flat.ridge", *BUDGETED),
    "bits": (*OBSERVED, "stages.gptq", "-stages.gptq.average_bits"),
    "choices": (*OBSERVED, "stages.gptq", "budget", *LIMITED, PRICED),
    "plan": BUILT,
    "compress": BUILT,
    "recover": (*BUILT, JUDGED, "inputs.tokens.recovery"),
    "evaluate": (*BUILT, JUDGED),
    "baseline-quantized": (*OBSERVED, "stages.gptq", "stages.flat.context", JUDGED),
    "baseline-same_bytes": (*BUILT, JUDGED),
    "cache-ranges": BUILT,
}
EVERYTHING = ("", f"-{INPUTS}")  # the inputs of one recipe cannot change, see ``Phases.depend_on``


def facts(recipe: Recipe, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that a phase can depend on, by dotted path: values of the recipe, and below ``inputs`` the inputs.

    Stages and exports are named (``stages.flat.keep_ratio``, ``exports.onnx.precision``), not numbered; other lists
    are one value.
    """
    content = recipe.model_dump(mode="json")
    content["stages"] = {kind: stage for entry in content["stages"] for kind, stage in entry.items()}
    content["exports"] = {
        options.pop("name"): {"format": form, **options}
        for entry in content["exports"]
        for form, options in entry.items()
    }
    priced = content["exports"] if content["budget"] else None
    return dict(_leaves({**content, PRICED: priced, INPUTS: as_json(dict(inputs or {}))}))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inside in value.items():
            yield from _leaves(inside, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def needs(phase: str, known: Mapping[str, Any]) -> str:
    """Digest of what a phase depends on, hexadecimal.

    Args:
        phase: its name.
        known: the facts.
    """
    return digest_of(known, NEEDS.get(phase, EVERYTHING))


def digest_of(known: Mapping[str, Any], paths: Sequence[str]) -> str:
    """SHA-256 of the facts below some paths, hexadecimal; those below a path that starts with ``-`` do not count."""
    without = [path[1:] for path in paths if path.startswith("-")]
    within = [path for path in paths if not path.startswith("-")]
    chosen = {path: known[path] for path in known if _below(path, within) and not _below(path, without)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _below(path: str, parents: Sequence[str]) -> bool:
    return any(not parent or path == parent or path.startswith(f"{parent}.") for parent in parents)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of facts, in words: ``stages.flat.keep_ratio: 0.9 -> 0.8``, ``bench: added``."""
    before, after = _without_empty(before, after), _without_empty(after, before)
    found = dict[str, str]()
    for path in sorted(path for path in before.keys() | after.keys() if not _below(path, [PRICED])):
        if path not in after:
            found[_first_absent(path, after)] = "removed"
        elif path not in before:
            found[_first_absent(path, before)] = "added"
        elif before[path] != after[path]:
            plain = not isinstance(before[path], list) and not isinstance(after[path], list)
            found[path] = f"{shown(before[path])} -> {shown(after[path])}" if plain else "changed"
    return [f"{path}: {words}" for path, words in found.items()]


def _without_empty(known: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Without a null, or an empty mapping, in the place of a mapping that ``other`` has."""
    blank = [path for path, value in known.items() if value in (None, {})]
    gone = {path for path in blank if any(found.startswith(f"{path}.") for found in other)}
    return {path: value for path, value in known.items() if path not in gone}


def _first_absent(path: str, known: Mapping[str, Any]) -> str:
    """The shortest path above ``path`` below which nothing is known."""
    steps = path.split(".")
    parents = (".".join(steps[:length]) for length in range(1, len(steps) + 1))
    return next(parent for parent in parents if not any(_below(other, [parent]) for other in known))
