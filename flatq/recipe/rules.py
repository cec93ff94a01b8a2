"""Rules between keys of a recipe, which no single field can state.

They are judged on the file's plain values, not on the validated models, so that a broken rule is reported beside
every other mistake and not only after those are mended. A value of the wrong type is the grammar's business: rules
pass over it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from flatq.recipe.blocks import MOST_TOKENS, FlatSpec
from flatq.recipe.reader import Place

ORDER = ("flat", "gptq")
BUDGETS = ("keep_ratio", "size", "decode_bytes")

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Broken = Iterator[tuple[Place, str]]


def broken_rules(recipe: Mapping[str, Any]) -> Broken:
    """Each broken rule as (place, sentence)."""
    yield from _stages(_entries(recipe, "stages"))
    yield from _exports(_entries(recipe, "exports"))
    for block in ("calibration", "evaluation"):
        yield from _text(block, _mapping(recipe, block))
    yield from _amounts(_mapping(recipe, "calibration"), _mapping(recipe, "evaluation"))
    if not recipe.get("stages") and not recipe.get("exports"):
        yield (), "nothing to do; add at least one stage or one export"


def _stages(entries: list[tuple[int, str, Any]]) -> Broken:
    seen: list[str] = []
    narrowing: Mapping[str, Any] = {}
    for index, kind, options in entries:
        if kind == "flat" and isinstance(options, Mapping):
            yield from _flat(("stages", index, kind), options)
            narrowing = options
        if kind == "gptq" and isinstance(options, Mapping) and _number(options.get("correction")):
            yield from _corrected_twice(("stages", index, kind, "correction"), narrowing)
        if kind in seen:
            yield ("stages", index), f"a second {kind} stage; keep one"
        elif kind == "flat" and "gptq" in seen:
            yield (
                ("stages", index),
                "flat comes after gptq, but narrowing would undo the rounding; move flat before gptq",
            )
        seen.append(kind)


def _flat(place: Place, options: Mapping[str, Any]) -> Broken:
    given = [key for key in BUDGETS if options.get(key) is not None]
    if len(given) != 1:
        examples = "keep_ratio: 0.8, size: 90MB, decode_bytes: 75MB"
        yield place, f"{' and '.join(given) or 'no budget'} given; exactly one of {examples} is needed"
    if options.get("context") is not None and "decode_bytes" not in given:
        yield (*place, "context"), "only read with decode_bytes; remove it, or give that budget"
    if options.get("uniform") is True and options.get("allocation") == "iprs":
        yield (
            (*place, "uniform"),
            "the same widths for all layers leave iprs nothing to share out; remove `uniform` or `allocation`",
        )


def _corrected_twice(place: Place, flat: Mapping[str, Any]) -> Broken:
    if not flat or not (flat.get("correction") is None or _number(flat["correction"])):
        return
    given: dict[str, Any] = {key: flat.get(key) for key in ("method", "correction", "keep_ratio")}
    stage = FlatSpec.model_construct(**given)
    if stage.corrects:
        yield (
            place,
            f"the flat stage takes back {stage.parts.correction} of the drift from the dense model already; leave it "
            "out here, or set correction: 0 in the flat stage",
        )


def _number(value: Any) -> bool:
    """Whether it is one, and not 0."""
    return isinstance(value, int | float) and value != 0


def _exports(entries: list[tuple[int, str, Any]]) -> Broken:
    taken: set[str] = set()
    for index, form, options in entries:
        given = isinstance(options, Mapping) and "name" in options
        place: Place = ("exports", index, form, "name") if given else ("exports", index)
        name = options["name"] if given else form
        if isinstance(options, Mapping) and not isinstance(options.get("verify", True), bool):
            yield ("exports", index, form, "verify"), f"{options['verify']!r:.60} is not allowed; true or false"
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            yield (
                place,
                f"{name!r:.60} is no plain folder name; letters, digits, '.', '_' and '-', a letter first",
            )
        elif name.casefold() in taken:
            yield place, f"a second export is called {name!r}; give each its own `name: ...` among its options"
        else:
            taken.add(name.casefold())


def _text(block: str, spec: Mapping[str, Any]) -> Broken:
    path, dataset = spec.get("path"), spec.get("dataset")
    if dataset == "text" and path is None:
        yield (block,), "dataset text needs `path:`, a .txt or .jsonl file"
    elif path is not None and dataset != "text":
        yield (block, "path"), "only read with `dataset: text`; set that or remove path"
    elif isinstance(path, str) and not path.endswith((".txt", ".jsonl")):
        yield (block, "path"), f"{path!r:.60} is not allowed; a file that ends in .txt or .jsonl"


def _amounts(calibration: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Broken:
    samples, seq_len = calibration.get("samples", 128), calibration.get("seq_len", 2048)
    if isinstance(samples, int) and isinstance(seq_len, int) and samples * seq_len > MOST_TOKENS:
        yield ("calibration",), f"samples x seq_len is {samples * seq_len:,} tokens; at most {MOST_TOKENS:,}"
    tokens, length = evaluation.get("tokens", 8192), evaluation.get("seq_len", 512)
    if isinstance(tokens, int) and isinstance(length, int) and tokens < length:
        yield ("evaluation", "tokens"), f"{tokens} is not allowed; at least one sequence of seq_len = {length} tokens"


def _entries(recipe: Mapping[str, Any], key: str) -> list[tuple[int, str, Any]]:
    """(index, key, value) of the one-key mappings in a list."""
    entries = recipe.get(key)
    if not isinstance(entries, list | tuple):
        return []
    single = [(i, entry) for i, entry in enumerate(entries) if isinstance(entry, Mapping) and len(entry) == 1]
    return [(index, key, value) for index, entry in single for key, value in entry.items()]


def _mapping(recipe: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = recipe.get(key)
    return value if isinstance(value, Mapping) else {}
