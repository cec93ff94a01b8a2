"""Rules between several keys of a recipe.

They are checked on the plain values of the file, not on the validated models, so that a broken rule is reported
together with all other errors. Values of a wrong type are ignored here, because the models report them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from flatq.recipe.blocks import MOST_TOKENS, FlatSpec, rows_by_share
from flatq.recipe.budget import LIMITS, SPEEDS
from flatq.recipe.reader import Place

READ_WITH = {  # keys of the block budget, and the limits with which they are read
    "context": ("decode_bytes", "memory", "decode_tokens_per_second"),
    "prompt": ("prefill_ms",),
    "threads": SPEEDS,
}
BUDGETS = ("keep_ratio", "size", "decode_bytes")
CHOSEN = ("bits", "average_bits", "bit_choices", "group_size", "symmetric")  # keys of gptq that a budget chooses

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Broken = Iterator[tuple[Place, str]]


def broken_rules(recipe: Mapping[str, Any]) -> Broken:
    """Each broken rule as (place, message)."""
    whole = recipe.get("budget")
    yield from _stages(_entries(recipe, "stages"), whole is not None)
    if isinstance(whole, Mapping):
        yield from _budget(whole, recipe)
    yield from _tuned(recipe)
    yield from _recovered(recipe)
    yield from _exports(_entries(recipe, "exports"))
    yield from _calibration(recipe)
    yield from _evaluation(recipe)
    if not recipe.get("stages") and not recipe.get("exports"):
        yield (), "nothing to do; add at least one stage or one export"


def said_twice(recipe: Mapping[str, Any]) -> Broken:
    """Keys of the gptq stage that are written although the block ``budget`` chooses their values.

    Only for a file: a validated recipe has values for all keys.
    """
    if not isinstance(recipe.get("budget"), Mapping):
        return
    for index, kind, options in _entries(recipe, "stages"):
        for key in CHOSEN if kind == "gptq" and isinstance(options, Mapping) else ():
            if options.get(key) is not None:
                yield (
                    ("stages", index, kind, key),
                    "the block `budget` chooses it; remove this key, restrict the choice with `bits` or `group_sizes` "
                    "of the budget, or fix some linears with `overrides`",
                )


def _budget(spec: Mapping[str, Any], recipe: Mapping[str, Any]) -> Broken:
    given = [key for key in (*LIMITS, *SPEEDS) if spec.get(key) is not None]
    if len(given) != 1:
        examples = "size: 60MB, decode_bytes: 75MB, memory: 120MB, max_damage: 0.1, "
        examples += "decode_tokens_per_second: 250, prefill_ms: 300"
        yield ("budget",), f"{' and '.join(given) or 'no limit'} given; exactly one of {examples} is needed"
    for key, limits in READ_WITH.items():
        if spec.get(key) is not None and not set(limits) & set(given):
            known = " or ".join(limits)
            yield ("budget", key), f"only read with {known}; remove it, or give one of these limits"
    if set(SPEEDS) & set(given) and not _entries(recipe, "exports"):
        yield ("budget",), "the speed of an export is predicted, and there is none; add `- onnx: {}` to exports"
    if not _entries(recipe, "stages"):
        yield ("budget",), "nothing to spend it on; add `- flat: {}` (widths), `- gptq: {}` (bits), or both to stages"
    exports = _entries(recipe, "exports")
    names = [options.get("name", form) if isinstance(options, Mapping) else form for _, form, options in exports]
    if spec.get("export") is not None and spec["export"] not in names:
        known = ", ".join(map(str, names)) or "none; remove this key, and the artifact is counted"
        yield ("budget", "export"), f"{spec['export']!r:.60} is no export of this recipe; those are: {known}"
    if isinstance(recipe.get("baselines"), list | tuple) and "quantized" in recipe["baselines"]:
        yield (
            ("baselines",),
            "quantized is the model at the bits of the gptq stage, which a budget chooses; use same_bytes, or remove "
            "it",
        )


def _stages(entries: list[tuple[int, str, Any]], budgeted: bool = False) -> Broken:
    seen: list[str] = []
    narrowing: Mapping[str, Any] = {}
    for index, kind, options in entries:
        if kind == "flat" and isinstance(options, Mapping):
            yield from _flat(("stages", index, kind), options, budgeted)
            narrowing = options
        if kind == "gptq" and isinstance(options, Mapping) and _number(options.get("correction")):
            yield from _corrected_twice(("stages", index, kind, "correction"), narrowing)
        if kind in seen:
            yield ("stages", index), f"a second {kind} stage; keep one"
        elif kind == "flat" and "gptq" in seen:
            yield (
                ("stages", index),
                "flat comes after gptq, which would discard the quantization; move flat before gptq",
            )
        seen.append(kind)


def _flat(place: Place, options: Mapping[str, Any], budgeted: bool) -> Broken:
    given = [key for key in BUDGETS if options.get(key) is not None]
    if budgeted:
        for key in given:
            yield (*place, key), "the block `budget` is the limit; remove this key, or the block"
        if options.get("allocation") not in (None, "curves"):
            yield (*place, "allocation"), "a budget is spent by error curves; remove this key, or use `curves`"
        if options.get("method") == "paper" and options.get("allocation") is None:
            yield (*place, "method"), "a budget is spent by error curves; add `allocation: curves`, or remove this key"
    elif len(given) != 1:
        examples = "keep_ratio: 0.8, size: 90MB, decode_bytes: 75MB"
        yield place, f"{' and '.join(given) or 'no budget'} given; exactly one of {examples} is needed"
    if options.get("context") is not None and "decode_bytes" not in given:
        yield (*place, "context"), "only read with decode_bytes; remove it, or give that budget"
    if options.get("uniform") is True and options.get("allocation") == "iprs":
        yield (
            (*place, "uniform"),
            "iprs allocates by layer, and uniform gives all layers the same widths; remove `uniform` or `allocation`",
        )


def _corrected_twice(place: Place, flat: Mapping[str, Any]) -> Broken:
    if not flat or not (flat.get("correction") is None or _number(flat["correction"])):
        return
    given: dict[str, Any] = {key: flat.get(key) for key in ("method", "correction", "keep_ratio")}
    stage = FlatSpec.model_construct(**given)
    if stage.corrects:
        yield (
            place,
            f"the flat stage already corrects {stage.parts.correction} of the error with respect to the dense model; "
            "remove this key, or set correction: 0 in the flat stage",
        )


def _tuned(recipe: Mapping[str, Any]) -> Broken:
    for index, kind, options in _entries(recipe, "stages"):
        if kind != "gptq" or not isinstance(options, Mapping) or not _number(options.get("tune_steps")):
            continue
        place: Place = ("stages", index, kind, "tune_steps")
        if _number(options.get("correction")):
            yield place, "trains towards the outputs before rounding, which undoes `correction`; remove one of the two"
        if _mapping(recipe, "calibration").get("samples") == 1:
            yield place, "a tenth of the sequences is held out of the training; set calibration.samples to 2 or more"


def _recovered(recipe: Mapping[str, Any]) -> Broken:
    kinds = [kind for _, kind, _ in _entries(recipe, "stages")]
    for index, kind, _ in _entries(recipe, "stages"):
        place: Place = ("stages", index)
        if kind != "recover":
            continue
        if kinds.index(kind) < len(kinds) - 1 and kinds[-1] != kind:
            yield place, "recover comes before a stage that changes the weights again; move it to the end"
        if not {"flat", "gptq"} & set(kinds):
            yield place, "nothing to recover; add `- flat: {...}` or `- gptq: {...}` before it, or remove it"
        if _mapping(recipe, "budget").get("max_damage") is not None:
            yield place, "max_damage is searched by walks without it; remove this stage, or give a size"


def _number(value: Any) -> bool:
    """Whether the value is a number other than 0."""
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


def _calibration(recipe: Mapping[str, Any]) -> Broken:
    place: Place = ("calibration",)
    spec = _mapping(recipe, "calibration")
    mix, alone = spec.get("mix"), spec.get("dataset")
    if isinstance(recipe.get("calibration"), Mapping) and not mix and alone is None:
        yield place, "no text; give `dataset:`, or `mix:` with several"
    if mix:
        for key in ("dataset", "path", "field", "chat_template"):
            if spec.get(key):
                yield (*place, key), "excluded by `mix:`; remove one of the two, or move this into a part of the mix"
        yield from _mix((*place, "mix"), mix, spec.get("samples", 128))
    yield from _text(place, spec)
    samples, seq_len = spec.get("samples", 128), spec.get("seq_len", 2048)
    if isinstance(samples, int) and isinstance(seq_len, int) and samples * seq_len > MOST_TOKENS:
        yield place, f"samples x seq_len is {samples * seq_len:,} tokens; at most {MOST_TOKENS:,}"


def _mix(place: Place, mix: Any, samples: Any) -> Broken:
    parts = list(mix) if isinstance(mix, list | tuple) else []
    seen: list[Any] = []
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping):
            continue
        yield from _text((*place, index), part)
        text = [part.get(key) for key in ("dataset", "path")]
        if text in seen:
            yield (*place, index), "a second part of the same text; add its share to the first"
        seen.append(text)
    shares = [part.get("share") for part in parts if isinstance(part, Mapping)]
    if isinstance(samples, int) and samples > 0 and shares and all(map(_positive, shares)):
        for index, count in enumerate(rows_by_share([float(share) for share in shares if share], samples)):
            if count == 0:
                yield (
                    (*place, index, "share"),
                    f"{shares[index]:g} of {sum(share for share in shares if share):g} is less than one of {samples} "
                    "samples; raise samples or this share",
                )


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _evaluation(recipe: Mapping[str, Any]) -> Broken:
    given = recipe.get("evaluation")
    listed = list(enumerate(given)) if isinstance(given, list | tuple) else [(None, given)]
    names: list[Any] = []
    for index, spec in listed:
        if not isinstance(spec, Mapping):
            continue
        place: Place = ("evaluation",) if index is None else ("evaluation", index)
        yield from _text(place, spec)
        if spec.get("name") is not None and spec["name"] in names:
            yield (*place, "name"), f"a second text is called {spec['name']!r:.60}; give each its own"
        names.append(spec.get("name"))
        if spec.get("name") is not None and spec.get("dataset") is None:
            yield (*place, "name"), "one name for two texts; write `dataset: held-out` or `dataset: other`"
        for key in ("task_limit", "task_folder"):
            if spec.get(key) is not None and not spec.get("tasks"):
                yield (*place, key), "only read with `tasks`; name them, or remove it"
        tokens, length = spec.get("tokens", 8192), spec.get("seq_len", 512)
        if isinstance(tokens, int) and isinstance(length, int) and tokens < length:
            yield (*place, "tokens"), f"{tokens} is not allowed; at least one sequence of seq_len = {length} tokens"


def _text(place: Place, spec: Mapping[str, Any]) -> Broken:
    path, dataset = spec.get("path"), spec.get("dataset")
    if dataset == "text" and path is None:
        yield place, "dataset text needs `path:`, a .txt or .jsonl file"
    elif path is not None and dataset != "text":
        yield (*place, "path"), "only read with `dataset: text`; set that or remove path"
    elif isinstance(path, str) and not path.endswith((".txt", ".jsonl")):
        yield (*place, "path"), f"{path!r:.60} is not allowed; a file that ends in .txt or .jsonl"
    elif spec.get("chat_template") is True and not (isinstance(path, str) and path.endswith(".jsonl")):
        yield (*place, "chat_template"), "only read with `dataset: text` and a .jsonl file; remove it, or give that"


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
