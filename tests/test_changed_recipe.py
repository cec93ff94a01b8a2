"""A recipe that was changed while its run was unfinished: what changed is said, what does not depend on it is kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from flatq.errors import RecipeError
from flatq.needs import NEEDS, changes, digest_of, facts, needs
from flatq.pipeline.run import run
from flatq.recipe.grammar import Recipe
from flatq.report.render import read_report
from flatq.run_folder import RunFolder
from tests.conftest import digests, usual_recipe

FLAT = {"keep_ratio": 0.75, "rank_multiple": 4, "width_multiple": 16}
GPTQ = {"bits": 4, "group_size": 16}
FP32 = {"onnx": {"precision": "fp32", "verify": False}}
Content = dict[str, Any]


def parsed(content: Content) -> Recipe:
    return Recipe.parse(yaml.safe_dump(content), "mine.yaml")


# ---- what a phase depends on


WHOLE: Content = {
    "version": 1,
    "model": "a/b",
    "calibration": {"dataset": "python-docs", "samples": 8},
    "stages": [{"flat": FLAT}, {"gptq": {**GPTQ, "average_bits": 3.5}}],
    "exports": [FP32, {"onnx": {"name": "other"}}],
}
INPUTS = {"source": 1, "versions": 2, "tokens": {"calibration": 3, "judged": 4}}
PHASES = [*NEEDS, "export-onnx", "bench"]


def affected(before: Recipe, after: Recipe, inputs: Content | None = None) -> set[str]:
    one, other = facts(before, INPUTS), facts(after, INPUTS | (inputs or {}))
    return {phase for phase in PHASES if needs(phase, one) != needs(phase, other)}


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"stop_above": None}, {*NEEDS}),
        ({"bench": {}}, {*NEEDS}),
        ({"exports": []}, {*NEEDS}),
        ({"stages": [{"flat": FLAT | {"keep_ratio": 0.8}}, WHOLE["stages"][1]]},
         {"self-text", "baseline", "sensitivity", "importance", "curves", "bits", "choices", "baseline-quantized"}),
        ({"stages": [{"flat": FLAT | {"ridge": 0.1}}, WHOLE["stages"][1]]},
         {"self-text", "baseline", "sensitivity", "importance", "bits", "choices", "baseline-quantized"}),
        ({"stages": [{"flat": FLAT}, {"gptq": GPTQ | {"average_bits": 3.6}}]},
         {"self-text", "baseline", "sensitivity", "importance", "curves", "bits"}),
        ({"stages": [{"flat": FLAT}, {"gptq": GPTQ | {"average_bits": 3.5, "group_size": 32}}]},
         {"self-text", "baseline", "sensitivity", "importance", "curves"}),
        ({"calibration": WHOLE["calibration"] | {"precision": "float32"}}, {"baseline"}),
        ({"model": "a/c"}, set()),
    ],
    ids=["limit", "bench", "exports", "widths", "ridge", "average", "groups", "precision", "model"],
)  # fmt: skip
def test_a_phase_depends_on_these_keys(changed: Content, kept: set[str]) -> None:
    assert set(PHASES) - affected(parsed(WHOLE), parsed(WHOLE | changed)) == kept


@pytest.mark.parametrize(
    ("inputs", "kept"),
    [
        ({"tokens": {"calibration": 0, "judged": 4}}, {"self-text", "baseline"}),
        (
            {"tokens": {"calibration": 3, "judged": 0}},
            {"self-text", "sensitivity", "importance", "curves", "bits", "choices", "plan", "compress", "cache-ranges"},
        ),
        ({"source": 0}, {"self-text"}),
        ({"versions": 0}, {"self-text"}),
    ],
    ids=["calibration", "evaluation", "source", "versions"],
)
def test_a_phase_depends_on_these_inputs(inputs: Content, kept: set[str]) -> None:
    assert set(NEEDS) - affected(parsed(WHOLE), parsed(WHOLE), inputs) == kept


def test_what_plans_the_walk_is_part_of_what_the_artifact_depends_on() -> None:
    """Else an artifact could be kept whose plan is made again."""
    known = facts(parsed(WHOLE), INPUTS)
    for name in known:
        other = known | {name: "other"}
        measured = ("sensitivity", "importance", "curves", "bits", "choices")
        if any(needs(phase, known) != needs(phase, other) for phase in measured):
            assert needs("compress", known) != needs("compress", other), name
        if needs("compress", known) != needs("compress", other):
            assert needs("evaluate", known) != needs("evaluate", other), name


def test_facts_are_named_by_their_paths() -> None:
    known = facts(parsed(WHOLE), INPUTS)
    assert known["stages.flat.keep_ratio"] == 0.75
    assert known["exports.onnx.precision"] == "fp32"
    assert known["exports.other.format"] == "onnx"
    assert known["inputs.tokens.judged"] == 4
    assert digest_of({"a.b": 1, "a.c": 2, "ab": 3}, ("a", "-a.c")) == digest_of({"a.b": 1}, ("",))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"stages": [{"flat": FLAT | {"keep_ratio": 0.8}}, WHOLE["stages"][1]]},
            ["stages.flat.keep_ratio: 0.75 -> 0.8"],
        ),
        ({"stages": [WHOLE["stages"][1]]}, ["stages.flat: removed"]),
        ({"bench": {}}, ["bench: added"]),
        ({"exports": [FP32]}, ["exports.other: removed"]),
        ({"exports": []}, ["exports: removed"]),
        ({"evaluation": {"tokens": 64, "seq_len": 8}}, ["evaluation: changed"]),
        ({"stop_above": None, "model": "a/c"}, ["model.path: 'a/b' -> 'a/c'", "stop_above: 1.0 -> null"]),
    ],
    ids=str,
)
def test_changes_are_named(changed: Content, words: list[str]) -> None:
    before, after = facts(parsed(WHOLE)), facts(parsed(WHOLE | changed))
    assert changes(before, after) == words
    assert len(changes(after, before)) == len(words)


# ---- the folder


def begun(root: Path, content: Content = WHOLE, *, report: str = "") -> RunFolder:
    folder = RunFolder.open(root, parsed(content))
    with suppress(KeyboardInterrupt), folder.working():
        folder.depend_on(INPUTS)
        for phase in PHASES:
            folder.phase(phase, lambda: 1, int)
        if report:
            (root / "report.json").write_text(report)
        raise KeyboardInterrupt
    return folder


def test_a_folder_says_what_changed_and_keeps_what_does_not_depend_on_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(tmp_path / "run")
    for name in ("other", "onnx", "mine"):
        (tmp_path / "run" / "exports" / name).mkdir(parents=True)
    (tmp_path / "run" / "work" / "phases" / "bench.json").rename(
        tmp_path / "run" / "work" / "phases" / "export-other.json"
    )
    wider = WHOLE | {"stages": [{"flat": FLAT | {"keep_ratio": 0.8}}, WHOLE["stages"][1]], "exports": [FP32]}
    folder = RunFolder.open(tmp_path / "run", parsed(wider))
    with folder.working():
        folder.depend_on(INPUTS)
        kept = "baseline, baseline-quantized, bits, choices, curves, importance, self-text, sensitivity"
        again = "baseline-same_bytes, cache-ranges, compress, evaluate, export-onnx, export-other, plan"
        assert f"kept: {kept}; computed again: {again}" in caplog.text
        assert folder.phase("curves", lambda: pytest.fail("again"), int) == 1
        assert folder.phase("compress", lambda: 2, int) == 2
        assert list(folder.timing()) == ["curves", "compress"], "phases that this recipe does not ask for do not count"
        assert {path.name for path in folder.exports.iterdir()} == {"onnx", "mine"}
    assert (
        "changed since this run was started: exports.other: removed; stages.flat.keep_ratio: 0.75 -> 0.8" in caplog.text
    )
    assert folder.digest() == parsed(wider).digest()


@pytest.mark.parametrize(
    ("changed", "report", "words"),
    [
        ({"model": "a/c"}, "", r"another recipe \(model\.path: 'a/b' -> 'a/c'\); every phase depends on the model"),
        ({"stop_above": 2}, '{"exports": []}', "another recipe, which is finished"),
    ],
)
def test_a_folder_of_which_nothing_could_be_kept_is_refused(
    changed: Content, report: str, words: str, tmp_path: Path
) -> None:
    folder = begun(tmp_path / "run", report=report)
    if report:
        folder.tidy()
    before = digests(tmp_path)
    with pytest.raises(RecipeError, match=words):
        RunFolder.open(tmp_path / "run", parsed(WHOLE | changed))
    (tmp_path / "run" / "recipe.yaml").write_text("version: 2")
    with pytest.raises(RecipeError, match=r"holds the run of another recipe.*--fresh to replace it"):
        RunFolder.open(tmp_path / "run", parsed(WHOLE | changed))
    assert {name: found for name, found in digests(tmp_path).items() if "recipe.yaml" not in name} == {
        name: found for name, found in before.items() if "recipe.yaml" not in name
    }


def test_other_tokens_are_refused_unless_the_recipe_draws_others(tmp_path: Path) -> None:
    other = INPUTS | {"tokens": {"calibration": 0, "judged": 0}}
    begun(tmp_path / "run")
    for recipe in (WHOLE, WHOLE | {"stop_above": None}):
        folder = RunFolder.open(tmp_path / "run", parsed(recipe))
        with pytest.raises(RecipeError, match="tokens changed since"), folder.working():
            folder.depend_on(other)
    for part, value in (("calibration", {"dataset": "python-docs", "samples": 9}), ("evaluation", {"tokens": 512})):
        begun(tmp_path / part)
        folder = RunFolder.open(tmp_path / part, parsed(WHOLE | {part: value}))
        with folder.working():
            folder.depend_on(other)
            with pytest.raises(RecipeError, match="versions changed since"):
                folder.depend_on(other | {"versions": 0})


def test_without_a_place_the_unfinished_runs_of_the_recipe_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING, "flatq")
    folder = RunFolder.open(None, parsed(WHOLE))
    begun(folder.root)
    RunFolder.open(None, parsed(WHOLE | {"model": "a/c"}))
    assert not caplog.messages
    RunFolder.open(None, parsed(WHOLE))
    assert not caplog.messages
    RunFolder.open(None, parsed(WHOLE | {"stop_above": None}))
    assert caplog.messages == [
        f"--out {folder.root} continues an unfinished run of this recipe, before changes: stop_above: 1.0 -> null"
    ]


@pytest.mark.parametrize("note", [None, b"damaged"])
def test_the_walk_of_another_recipe_is_removed_before_this_one_s(
    note: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder.open(tmp_path / "run", parsed(WHOLE))
    assert not folder.has_artifact()
    left = [folder.work / name for name in ("state.json", "states-0", "dense-1", "sensitivity.f32", "dense-states/x")]
    for path in [*left, folder.work / "blocks" / "x", folder.partial / "x"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert not folder.has_artifact()
    assert all(path.exists() for path in left), "they are of this recipe"
    folder.partial.rename(folder.artifact)
    assert folder.has_artifact()
    other = RunFolder(folder.root, parsed(WHOLE | {"stages": [WHOLE["stages"][1]]}))
    if note is not None:
        (folder.work / "walk.json").write_bytes(note)
        other = folder
    assert not other.has_artifact()
    assert [path.name for path in left if path.exists()] == ["sensitivity.f32", "x"]
    assert not any(place.exists() for place in (folder.artifact, folder.partial, folder.work / "blocks"))
    assert ("walk.json: is damaged" in caplog.text) == (note is not None)
    assert not other.has_artifact()


# ---- whole runs


def stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> tuple[Content, Path]:
    """A run that was killed after its last phase."""
    content = usual_recipe(tiny_model, text_file) | {"stages": [{"flat": FLAT}, {"gptq": GPTQ}], "exports": [FP32]}
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flatq.pipeline.run.summarize", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(parsed(content), out)
    return content, out


def with_stage(content: Content, **stages: Content) -> Content:
    return content | {
        "stages": [{kind: stages.get(kind, stage)} for e in content["stages"] for kind, stage in e.items()]
    }


LATER = ["export-onnx", "quality-onnx"]
WALKED = ["compress", "evaluate", *LATER]
CHANGES: dict[str, tuple[Callable[[Content], Content], list[str]]] = {
    "allocation": (lambda old: with_stage(old, flat=FLAT | {"allocation": "uniform"}), WALKED),
    "widths": (lambda old: with_stage(old, flat=FLAT | {"keep_ratio": 0.8}), WALKED),
    "bits": (lambda old: with_stage(old, gptq=GPTQ | {"bits": 3}), WALKED),
    "ridge": (lambda old: with_stage(old, flat=FLAT | {"ridge": 0.5}), ["curves", *WALKED]),
    "limit": (lambda old: old | {"stop_above": None}, LATER),
    "exports": (lambda old: old | {"exports": [{"onnx": {"verify": False, "precision": "fp16"}}]}, LATER),
    "name": (
        lambda old: old | {"exports": [{"onnx": {"name": "x", "precision": "fp32", "verify": False}}]},
        ["export-x", "quality-x"],
    ),
    "evaluation": (lambda old: old | {"evaluation": {"tokens": 128, "seq_len": 64}}, ["baseline", "evaluate", *LATER]),
    "text": (
        lambda old: old | {"calibration": old["calibration"] | {"samples": 4}},
        ["sensitivity", "curves", *WALKED],
    ),
}


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=[] if name == "allocation" else pytest.mark.slow) for name in CHANGES]
)
def test_a_changed_recipe_ends_as_if_it_had_been_the_first_one(
    change: str, unfinished: tuple[Content, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content, left = unfinished
    make, again = CHANGES[change]
    recipe, out = parsed(make(content)), Path(shutil.copytree(left, tmp_path / "out"))
    assert run(recipe, tmp_path / "fresh") == tmp_path / "fresh"
    caplog.set_level(logging.INFO, "flatq")
    caplog.clear()
    assert run(recipe, out) == out
    known = {line.partition(":")[0] for line in caplog.messages if line.endswith("already done")}
    report, wanted = read_report(out / "report.json"), read_report(tmp_path / "fresh" / "report.json")
    assert sorted(set(wanted.timing) - known) == sorted(again)
    for part in ("artifact", "exports"):
        assert digests(out / part) == digests(tmp_path / "fresh" / part)
    assert set(report.timing) == set(wanted.timing)
    aside = {"timing", "memory", "peak_rss_bytes", "environment", "forecast", "device_memory"}
    assert report.model_dump(exclude=aside) == wanted.model_dump(exclude=aside)
