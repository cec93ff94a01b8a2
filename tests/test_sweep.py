"""``flatq sweep``: grids, what runs share, resuming, the table, and the choice of a point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flatq.errors import RecipeError
from flatq.export.bench import BenchResult, Spread
from flatq.kept import kept, read
from flatq.recipe.grammar import Recipe
from flatq.report.render import read_report
from flatq.sweep import running
from flatq.sweep.choice import by_bytes, front, picked, verdicts, wishes_of
from flatq.sweep.front import sizes_of, with_budget
from flatq.sweep.grid import ALONE, axes_of, combinations, put
from flatq.sweep.points import Point, Sweep
from flatq.sweep.running import read_sweep
from tests.conftest import digests, flatq

STAGES = [
    {"flat": {"keep_ratio": 0.8, "rank_multiple": 4, "width_multiple": 16}},
    {"gptq": {"bits": 4, "group_size": 16, "embedding": {"bits": 8, "group_size": 32}}},
]
ONNX = {"onnx": {"attention": "reduced", "precision": "int4"}}
GRID = ["--grid", "flat.keep_ratio=0.9,0.7", "--grid", "gptq.bits=4,3"]
BASE = """
version: 1
model: {path: some/model, dtype: auto}
stages:
  - flat: {keep_ratio: 0.8}
  - gptq: {bits: 4}
exports:
  - onnx: {name: a}
"""


def grid(*given: str, text: str = BASE, alone: bool = False) -> list[Any]:
    return combinations(Recipe.parse(text), axes_of(given), alone=alone)


# --- grids


def test_a_grid_is_the_product_of_its_values_with_a_name_for_each() -> None:
    points = grid("flat.keep_ratio=0.9,0.8", "gptq.bits=3, 4")
    assert [point.name for point in points] == [
        "keep_ratio=0.9,bits=3", "keep_ratio=0.9,bits=4", "keep_ratio=0.8,bits=3", "keep_ratio=0.8,bits=4",
    ]  # fmt: skip
    for point in points:
        assert point.recipe.flat.keep_ratio == point.changed["flat.keep_ratio"]
        assert point.recipe.gptq.bits == point.changed["gptq.bits"]
        assert Recipe.parse(point.recipe.text).digest() == point.recipe.digest()


@pytest.mark.parametrize(
    ("given", "attribute", "values"),
    [
        ("calibration.samples=8,16", lambda recipe: recipe.calibration.samples, [8, 16]),
        ("model.dtype=float32,auto", lambda recipe: recipe.model.dtype, ["float32", "auto"]),
        ("exports.a.attention=gqa,reduced", lambda recipe: recipe.exports[0].options["attention"], ["gqa", "reduced"]),
        ("bench={prompt: 8},null", lambda recipe: recipe.bench and recipe.bench.prompt, [8, None]),
        ("gptq.embedding={bits: 4},{bits: 8}", lambda recipe: recipe.gptq.embedding.bits, [4, 8]),
        ("gptq.bit_choices=[3, 4],[2, 4, 8]", lambda recipe: recipe.gptq.bit_choices, [(3, 4), (2, 4, 8)]),
    ],
)
def test_a_key_is_a_path_in_the_recipe(given: str, attribute: Any, values: list[Any]) -> None:
    text = BASE.replace("stages:", "calibration: {dataset: python-docs}\nstages:")
    assert [attribute(point.recipe) for point in grid(given, text=text)] == values


def test_a_model_written_as_text_gets_a_mapping() -> None:
    text = BASE.replace("{path: some/model, dtype: auto}", "some/model")
    document = yaml.safe_load(text)
    put(document, "model.dtype", "float32")
    assert document["model"] == {"path": "some/model", "dtype": "float32"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["gptq.bits"], "--grid gptq.bits: write it as KEY=VALUE,VALUE"),
        (["gptq.bits="], "write it as KEY=VALUE,VALUE"),
        (["=3"], "write it as KEY=VALUE,VALUE"),
        (["gptq.bits=3,3"], "a value is given twice"),
        (["gptq.bits=[3"], "not valid YAML"),
        (["gptq.bits=3", "gptq.bits=4"], "a second grid of gptq.bits"),
        (["calibration.seed=" + ",".join(map(str, range(300)))], "300 combinations; at most 200"),
        ([], "none given"),
    ],
)
def test_a_grid_that_cannot_be_read_is_an_error(given: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("[", r"\[")):
        axes_of(given)


def test_all_wrong_keys_and_values_are_reported_together_each_once() -> None:
    with pytest.raises(RecipeError) as error:
        grid("flat.keep_ratio=0.9,70", "gptq.bit=3,4", "exports.b.attention=gqa")
    assert len(error.value.problems) == 1, "a missing export is found before the values are looked at"
    with pytest.raises(RecipeError) as error:
        grid("flat.keep_ratio=0.9,70", "gptq.bit=3,4")
    assert error.value.problems == [
        "--grid: stages[1].gptq.bit: unknown key; did you mean 'bits'? allowed: "
        + str(error.value.problems[0]).partition("allowed: ")[2],
        "--grid: stages[0].flat.keep_ratio: 70 is not allowed; a number in (0, 1] or null; did you mean 0.7 (the share "
        "that is kept)? (in keep_ratio=70,bit=3 and 1 more)",
    ]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("exports.b.attention", "no export of this name; it has a"),
        ("version.x", "version of the recipe is int, not a mapping"),
    ],
)
def test_a_place_that_the_recipe_does_not_have_is_an_error(key: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        grid(f"{key}=1")


def test_a_stage_that_the_recipe_does_not_have_is_an_error_with_the_way_out() -> None:
    with pytest.raises(RecipeError, match=r"add `- gptq: \{\}` to its stages"):
        grid("gptq.bits=3", text=BASE.replace("  - gptq: {bits: 4}\n", ""))


def test_names_are_safe_and_different() -> None:
    points = grid("calibration.path=a/b.txt,a b.txt", text=BASE + "calibration: {dataset: text, path: x.txt}\n")
    assert points[0].name == "path=a-b.txt"
    assert points[1].name.startswith("path=a-b.txt-")
    long = grid("model.path=" + "x" * 200)
    assert len(long[0].name) <= 100


def test_keys_of_one_last_part_keep_their_whole_names() -> None:
    assert grid("flat.ridge=0.01", "gptq.embedding.bits=4", "gptq.bits=4")[0].name == (
        "ridge=0.01,gptq.embedding.bits=4,gptq.bits=4"
    )


def test_a_quantization_alone_is_added_once_for_each_of_its_settings() -> None:
    points = grid("flat.keep_ratio=0.9,0.8", "gptq.bits=3,4", alone=True)
    added = [point for point in points if point.added]
    assert [point.name for point in added] == [f"{ALONE},bits=3", f"{ALONE},bits=4"]
    assert all(point.recipe.flat is None for point in added)
    assert [point.recipe.gptq.bits for point in added] == [3, 4]


def test_a_quantization_alone_is_not_added_where_the_grid_has_it() -> None:
    assert not [point for point in grid("flat.keep_ratio=1,0.8", "gptq.bits=3,4", alone=True) if point.added]
    alone = grid("flat.keep_ratio=0.9", alone=True)
    assert [point.name for point in alone] == ["keep_ratio=0.9", ALONE]


# --- the folder of several runs


def test_a_kept_result_is_computed_once_and_again_after_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def compute() -> list[float]:
        calls.append(1)
        (tmp_path / "work").write_text(f"file {len(calls)}")
        return [0.1]

    def ask(about: int) -> list[float]:
        return kept(tmp_path / "shared", "some", {"about": about}, compute, list[float], tmp_path / "work")

    assert ask(1) == ask(1) == [0.1]
    assert len(calls) == 1
    assert ask(2) == [0.1]
    assert len(calls) == 2, "it depends on something else"
    assert ask(1) == [0.1]
    assert (tmp_path / "work").read_text() == "file 1", "the file belongs to the result"
    for entry in (tmp_path / "shared").glob("*.json"):
        entry.write_text(entry.read_text().replace("0.1", "0.2"))
    assert ask(1) == [0.1]
    assert len(calls) == 3
    assert "it is measured again" in caplog.text


def test_a_result_of_another_type_or_without_its_file_is_computed_again(tmp_path: Path) -> None:
    shared, work = tmp_path / "shared", tmp_path / "work"
    made = [kept(shared, "some", {}, lambda: work.write_text("a"), int, work) for _ in range(2)]
    assert made == [1, 1]
    (data,) = shared.glob("*.data")
    data.unlink()
    assert kept(shared, "some", {}, lambda: work.write_text("abc"), int, work) == 3
    data.write_text("abd")
    assert kept(shared, "some", {}, lambda: work.write_text("abcd"), int, work) == 4
    assert read(next(shared.glob("*.json")), dict[str, str]) is None


def test_nothing_is_written_into_a_linked_file(tmp_path: Path) -> None:
    """The file of a run may be a link to the kept one; what is measured again goes into a new file."""
    shared, work = tmp_path / "shared", tmp_path / "work"
    kept(shared, "some", {"a": 1}, lambda: work.write_text("a"), int, work)
    kept(shared, "some", {"a": 2}, lambda: work.write_text("bb"), int, work)
    assert sorted(file.read_text() for file in shared.glob("*.data")) == ["a", "bb"]


def test_without_links_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    shared, work = tmp_path / "shared", tmp_path / "work"
    kept(shared, "some", {}, lambda: work.write_text("a"), int, work)
    work.unlink()
    assert kept(shared, "some", {}, lambda: 9, int, work) == 1
    assert work.read_text() == "a"


# --- whole sweeps


@pytest.fixture(autouse=True, scope="module")
def _without_the_pages_of_runs() -> Iterator[None]:
    """Their figures take more time than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flatq.report.render.render", lambda report, template: "a page")
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> tuple[Path, Path]:
    """A base recipe, and the folder of its finished sweep; never written to by tests."""
    root = tmp_path_factory.mktemp("sweep")
    file = root / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe(tiny_model, text_file)))
    shown = flatq("sweep", file, *GRID, "-o", root / "out")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.strip() == str(root / "out")
    return file, root / "out"


def tiny_recipe(model: Path, text: Path, **changed: Any) -> dict[str, Any]:
    seen = {"dataset": "text", "path": str(text), "samples": 4, "seq_len": 32, "precision": "float32"}
    other = text.with_name("other.txt")
    other.write_text(text.read_text().replace("river", "light bird"))
    judged = [
        {"dataset": "text", "path": str(other), "tokens": 64, "seq_len": 32},
        {"dataset": "held-out", "tokens": 64, "seq_len": 32},
    ]
    return {
        "version": 1, "model": str(model), "calibration": seen, "evaluation": judged, "stages": STAGES,
        "stop_above": None,
    } | changed  # fmt: skip


def test_a_sweep_has_a_run_for_each_combination_and_quantization_alone(swept: tuple[Path, Path]) -> None:
    found = read_sweep(swept[1] / "sweep.json")
    names = ["keep_ratio=0.9,bits=4", "keep_ratio=0.9,bits=3", "keep_ratio=0.7,bits=4", "keep_ratio=0.7,bits=3"]
    names += [f"{ALONE},bits=4", f"{ALONE},bits=3"]
    assert [point.name for point in found.points] == names
    assert [point.kind for point in found.points] == ["stacked"] * 4 + ["quantized"] * 2
    assert {path.name for path in swept[1].iterdir()} == {
        *names, "shared", "sweep.json", "sweep.md", "sweep.html",
    }  # fmt: skip
    for point in found.points:
        report = read_report(swept[1] / point.name / "report.json")
        assert point.bytes == report.result.bytes
        assert (point.kl, point.damage) == (report.quality[0].kl, report.quality[0].damage)
        assert point.judged == ("other",), "the text that was not calibrated on"


def test_the_page_and_the_table_name_every_point(swept: tuple[Path, Path]) -> None:
    for name in ("sweep.md", "sweep.html"):
        text = (swept[1] / name).read_text()
        assert text.count("stacked") >= 4
        assert "For bytes: " in text
        assert "no flat" in text
    page = (swept[1] / "sweep.html").read_text()
    assert "<svg" in page
    assert "keep_ratio=0.9,bits=4" in page


@pytest.mark.parametrize("name", ["keep_ratio=0.7,bits=3", f"{ALONE},bits=4"])
def test_a_run_of_a_sweep_has_the_bytes_of_a_single_run(swept: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    recipe = swept[1] / name / "recipe.yaml"
    assert flatq("run", recipe, "--out", tmp_path / "out").exit_code == 0
    assert digests(tmp_path / "out" / "artifact") == digests(swept[1] / name / "artifact")


def test_a_finished_sweep_does_nothing_again(swept: tuple[Path, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept[1].rglob("*") if "sweep." not in path.name}
    assert flatq("sweep", swept[0], *GRID, "-o", swept[1]).exit_code == 0
    after = {path: path.stat().st_mtime_ns for path in swept[1].rglob("*") if "sweep." not in path.name}
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def counted(monkeypatch: pytest.MonkeyPatch, *places: str) -> dict[str, int]:
    """How often each function was called from now on."""
    calls = dict.fromkeys(places, 0)

    def wrap(place: str) -> None:
        module, _, name = place.rpartition(".")
        real = getattr(sys.modules[module], name)

        def counting(*given: Any, **named: Any) -> Any:
            calls[place] += 1
            return real(*given, **named)

        monkeypatch.setattr(place, counting)

    for place in places:
        wrap(place)
    return calls


MEASURED = (
    "flatq.budget.measure.output_sensitivity",
    "flatq.plan.decide.error_curves",
    "flatq.plan.decide.bit_errors",
    "flatq.pipeline.run.dense_quality",
    "flatq.calibration.self_text.write_rows",
)


def test_what_does_not_depend_on_the_grid_is_measured_once(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, *MEASURED, "flatq.calibration.divergence.final_hidden")
    mixed = [STAGES[0], {"gptq": {"average_bits": 4, "bit_choices": [3, 4], "group_size": 16}}]
    seen = {"dataset": "self", "samples": 2, "seq_len": 32, "precision": "float32"}
    recipe = tiny_recipe(tiny_model, text_file, stages=mixed, calibration=seen)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe))
    shown = flatq(
        "sweep", tmp_path / "a.yaml", "--grid", "flat.keep_ratio=0.9,0.8", "--no-quantized", "-o", tmp_path / "s"
    )
    assert shown.exit_code == 0, shown.stderr
    hidden = calls.pop("flatq.calibration.divergence.final_hidden")
    assert hidden == 2 + 2 * 2, "once for each text of the dense model, and for each text of each result"
    assert calls.pop(MEASURED[-1]) == 2, "two batches of text: for calibration, and for the evaluation"
    assert set(calls.values()) == {1}, calls


def test_a_grid_of_what_a_measurement_depends_on_measures_again(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, *MEASURED[:2])
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tiny_recipe(tiny_model, text_file, stages=STAGES[:1])))
    shown = flatq("sweep", tmp_path / "a.yaml", "--grid", "calibration.seed=1,2", "-o", tmp_path / "s")
    assert shown.exit_code == 0, shown.stderr
    assert set(calls.values()) == {2}
    assert flatq("sweep", tmp_path / "a.yaml", "--grid", "flat.ridge=0.02", "-o", tmp_path / "s").exit_code == 0
    assert calls[MEASURED[1]] == 3, "another seed than the two before, and another ridge"


def test_the_dense_model_is_exported_and_measured_once(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[str]] = []

    def bench(openers: Any, load: Any, **settings: Any) -> list[BenchResult]:
        measured.append(list(openers))
        speeds = [Spread(100.0 * len(measured) + n, 0.0, 999.0) for n in range(len(openers))]
        return [
            BenchResult(name, "cpu", 1, 1, 4, 2, 1, 0.1, speed, speed, speed, 1, 1, None)
            for name, speed in zip(openers, speeds, strict=True)
        ]

    monkeypatch.setattr("flatq.export.deliver.bench_side_by_side", bench)
    calls = counted(monkeypatch, "flatq.export.deliver._dense_export")
    recipe = tiny_recipe(tiny_model, text_file, stages=STAGES[1:], exports=[ONNX], bench={"prompt": 4})
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe))
    for grid_of in ("gptq.bits=4,8", "bench.prompt=8"):
        shown = flatq("sweep", tmp_path / "a.yaml", "--grid", grid_of, "-o", tmp_path / "s")
        assert shown.exit_code == 0, shown.stderr
        if grid_of == "gptq.bits=4,8":
            found = read_sweep(tmp_path / "s" / "sweep.json")
    assert measured == [["baseline", "onnx"], ["onnx"], ["baseline", "onnx"]], "another load is measured again"
    assert calls == {"flatq.export.deliver._dense_export": 2}
    reports = [read_report(tmp_path / "s" / name / "report.json") for name in ("bits=4", "bits=8")]
    assert [[entry.name for entry in report.bench] for report in reports] == [["baseline", "onnx"]] * 2
    assert reports[0].bench[0] == reports[1].bench[0]
    assert (found.dense_decode, found.dense_prefill) == (100.0, 100.0)
    assert [point.decode for point in found.points] == [101.0, 200.0]
    for point, report in zip(found.points, reports, strict=True):
        assert point.kl == report.exports[0].quality[0].kl, "in the export's runtime"
        assert point.bytes == report.exports[0].bytes
    assert "tokens/s prefill in the same format" in (tmp_path / "s" / "sweep.md").read_text()


def test_a_combination_that_fails_is_in_the_table_and_does_not_stop_the_others(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tiny_recipe(tiny_model, text_file, stages=STAGES[1:])))
    real = running.run

    def fragile(recipe: Recipe, *given: Any, **named: Any) -> Any:
        if recipe.gptq is not None and recipe.gptq.bits == 3:
            raise ValueError("a defect")
        return real(recipe, *given, **named)

    monkeypatch.setattr(running, "run", fragile)
    given = ["sweep", tmp_path / "a.yaml", "--grid", "gptq.group_size=256,16", "--grid", "gptq.bits=3,4", "-o"]
    shown = flatq(*given, tmp_path / "s")
    assert shown.exit_code == 3
    found = read_sweep(tmp_path / "s" / "sweep.json")
    errors = {point.name: point.error for point in found.points}
    assert errors["group_size=16,bits=4"] is None
    assert errors["group_size=16,bits=3"] == "ValueError: a defect"
    assert "256 is wider than" in str(errors["group_size=256,bits=4"])
    assert (tmp_path / "s" / "sweep.md").read_text().count("FAILED: ") == 3
    monkeypatch.undo()
    assert flatq("sweep", tmp_path / "a.yaml", "--grid", "gptq.bits=4", "-o", tmp_path / "s").exit_code == 0


def test_a_folder_of_another_recipe_is_refused_before_any_work(
    swept: tuple[Path, Path], tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(tiny_recipe(tiny_model, text_file, stop_above=2.0)))
    shown = flatq("sweep", tmp_path / "b.yaml", *GRID, "-o", swept[1])
    assert shown.exit_code == 2
    assert shown.stderr.count("holds the run of another recipe") == 6


def test_under_torchrun_a_sweep_is_refused(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tiny_recipe(tiny_model, text_file)))
    shown = flatq("sweep", tmp_path / "a.yaml", *GRID, "-o", tmp_path / "s")
    assert (shown.exit_code, (tmp_path / "s").exists()) == (2, False)
    assert "without torchrun" in shown.stderr


SLOWED = """
import sys, time
from pathlib import Path
from flatq.calibration import walk
from flatq.cli import app
import flatq.report.render as pages
pages.render = lambda report, template: "a page"
real = walk.walk
def slow(*given, **named):
    for block in real(*given, **named):
        yield block
        time.sleep(0.1)
import flatq.pipeline.build as build
build.walk = slow
sys.argv = ["flatq", *sys.argv[1:]]
app()
"""


def test_a_sweep_that_is_killed_in_its_second_run_ends_with_the_same_bytes(
    swept: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, finished = swept
    out = tmp_path / "out"
    given = ["sweep", str(recipe), "--grid", "flat.keep_ratio=0.9", "--grid", "gptq.bits=4,3", "--no-quantized"]
    first, second = "keep_ratio=0.9,bits=4", "keep_ratio=0.9,bits=3"
    process = subprocess.Popen([sys.executable, "-c", SLOWED, *given, "-o", str(out)], stderr=subprocess.DEVNULL)
    state = out / second / "work" / "state.json"
    while not state.is_file():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / first / "report.json").is_file()
    assert not (out / second / "report.json").exists()
    assert len(json.loads((out / "sweep.json").read_text())["points"]) == 1
    before = digests(out / first)
    assert flatq(*given, "-o", out).exit_code == 0
    assert digests(out / first) == before
    for name in (first, second):
        assert digests(out / name / "artifact") == digests(finished / name / "artifact")


# --- fronts


@pytest.mark.parametrize(
    ("text", "points", "values"),
    [
        ("50MB..120MB", 2, ("50MB", "120MB")),
        ("50MB..120MB", 8, ("50MB", "60MB", "70MB", "80MB", "90MB", "100MB", "110MB", "120MB")),
        ("1GB..2GB", 4, ("1GB", "1.333GB", "1.667GB", "2GB")),
        ("900kB .. 1.1MB", 3, ("900kB", "1000kB", "1.1MB")),
    ],
)
def test_sizes_are_evenly_spaced_with_both_ends(text: str, points: int, values: tuple[str, ...]) -> None:
    assert sizes_of(text, points).values == values


@pytest.mark.parametrize(
    ("text", "points", "words"),
    [
        ("50MB", 8, "write it as LOW..HIGH"),
        ("60MB..50MB", 8, "60MB is not smaller than 50MB"),
        ("50MB..60MB", 1, "--points 1: at least 2"),
        ("much..more", 8, "'much' is not a size"),
    ],
)
def test_wrong_sizes_are_errors(text: str, points: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        sizes_of(text, points)


def test_a_front_takes_a_budget_in_place_of_what_it_chooses(caplog: pytest.LogCaptureFixture) -> None:
    text = BASE.replace("{bits: 4}", "{bits: 4, group_size: 32, damping: 0.02}")
    recipe = with_budget(Recipe.parse(text), "60MB")
    assert recipe.budget is not None
    assert recipe.flat is not None
    assert recipe.gptq is not None
    assert (recipe.budget.size, recipe.flat.keep_ratio, recipe.gptq.damping) == ("60MB", None, 0.02)
    assert "in place of flat.keep_ratio, gptq.bits, gptq.group_size" in caplog.text
    points = combinations(recipe, [sizes_of("60MB..90MB", 2)])
    assert [point.name for point in points] == [
        "size=60MB", "size=90MB", f"{ALONE},size=60MB", f"{ALONE},size=90MB",
    ]  # fmt: skip
    assert [point.recipe.budget and point.recipe.budget.size for point in points] == ["60MB", "90MB"] * 2
    assert [point.recipe.flat is None for point in points] == [False, False, True, True]


def test_a_budget_of_another_limit_becomes_one_of_a_size() -> None:
    text = BASE.replace("{keep_ratio: 0.8}", "{}").replace("{bits: 4}", "{}")
    limited = with_budget(Recipe.parse(text + "budget: {memory: 80MB, context: 128, bits: [4, 8], export: a}"), "60MB")
    assert limited.budget is not None
    assert (limited.budget.size, limited.budget.memory, limited.budget.context) == ("60MB", None, None)
    assert (limited.budget.bits, limited.budget.export) == ((4, 8), "a")


def test_a_front_measures_once_and_picks_what_is_small_enough(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, "flatq.budget.measure.choice_errors", "flatq.budget.measure.output_sensitivity")
    budget = {"size": "70kB", "bits": [4, 8], "group_sizes": [32]}
    recipe = tiny_recipe(tiny_model, text_file, stages=[{"gptq": {}}], budget=budget)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe))
    given = ["--size", "90kB..120kB", "--points", "2", "--pick", "size=100kB", "-o", tmp_path / "s"]
    shown = flatq("front", tmp_path / "a.yaml", *given)
    assert shown.exit_code == 0, shown.stderr
    assert set(calls.values()) == {1}
    small, large = read_sweep(tmp_path / "s" / "sweep.json").points
    assert (small.bytes or 0) <= 90_000 < (large.bytes or 0) <= 120_000
    chosen = Recipe.load(tmp_path / "s" / "picked.yaml")
    assert chosen.budget is not None
    assert chosen.budget.size == "90kB"


# --- choice


def point(name: str, size: int | None, kl: float | None, **more: Any) -> Point:
    about: dict[str, Any] = {"narrowed": False, "quantized": True, "damage": kl} | more
    return Point(name=name, changed={}, bytes=size, kl=kl, **about)


POINTS = [
    point("small", 50_000_000, 0.5, decode=300.0, prefill=900.0),
    point("middle", 80_000_000, 0.2, decode=260.0, prefill=1500.0, narrowed=True),
    point("large", 90_000_000, 0.1, decode=200.0, prefill=800.0),
    point("dominated", 95_000_000, 0.3, decode=100.0, prefill=700.0, narrowed=True),
    point("failed", None, None, error="it failed"),
]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["size=90MB"], "large"),
        (["size=89.9MB"], "middle"),
        (["tokens_per_second=250"], "middle"),
        (["tokens_per_second=200", "size=85MB"], "middle"),
        (["prefill_tokens_per_second=1000"], "middle"),
        (["max_damage=0.3"], "middle"),
        (["max_damage=0.6"], "small"),
        (["max_damage=0.3", "size=2GB"], "large"),
    ],
)
def test_the_best_quality_that_satisfies_all_conditions_is_picked(given: list[str], name: str) -> None:
    assert picked(POINTS, wishes_of(given)).name == name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["size=40MB"], "no point reaches it; the nearest is small .artifact. with 50 MB"),
        (["tokens_per_second=400"], "the nearest is small .artifact. with 300 tokens/s"),
        (["max_damage=0.01"], "the nearest is large .artifact. with 0.100 nats"),
        (["tokens_per_second=290", "max_damage=0.2"], "no point satisfies tokens_per_second=290 and max_damage=0.2"),
    ],
)
def test_a_condition_that_no_point_satisfies_is_an_error_with_the_nearest(given: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        picked(POINTS, wishes_of(given))


def test_a_condition_on_what_was_not_measured_says_so() -> None:
    with pytest.raises(RecipeError, match="add a `bench` block"):
        picked([point("a", 1, 0.1)], wishes_of(["tokens_per_second=1"]))


def test_wrong_conditions_are_reported_together() -> None:
    with pytest.raises(RecipeError) as error:
        wishes_of(["size=90", "speed=3", "tokens_per_second=fast", "max_damage=0"])
    assert [problem.partition(": ")[0] for problem in error.value.problems] == [
        "--pick speed=3", "--pick tokens_per_second=fast", "--pick max_damage=0",
    ]  # fmt: skip


def test_the_front_has_every_point_that_no_other_beats() -> None:
    assert [one.name for one in front(POINTS, by_bytes)] == ["small", "middle", "large"]
    equal = [point("a", 10, 0.2), point("b", 10, 0.1), point("c", 20, 0.1)]
    assert [one.name for one in front(equal, by_bytes)] == ["b"], "of equal ones only the cheapest"


def test_a_picked_recipe_runs_unchanged(swept: tuple[Path, Path], tmp_path: Path) -> None:
    shown = flatq("sweep", swept[0], *GRID, "-o", swept[1], "--pick", "size=1GB")
    assert shown.exit_code == 0, shown.stderr
    points = read_sweep(swept[1] / "sweep.json").points
    best = min(points, key=lambda one: one.kl or 9)
    picked_recipe = Recipe.load(swept[1] / "picked.yaml")
    (swept[1] / "picked.yaml").unlink()
    assert picked_recipe.digest() == Recipe.load(swept[1] / best.name / "recipe.yaml").digest()


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (
            POINTS,
            "better than 1 of the 2 narrowed and quantized models that it was compared with. large (90 MB, KL 0.1",
        ),
        (
            POINTS[:2],
            "For bytes: narrowing pays. Each quantization alone that is not larger loses more than the narrowed ",
        ),
        (
            POINTS[1:3],
            "For bytes: not known, because no quantization alone of this sweep is as small as middle (80 MB)",
        ),
        (POINTS[1:4], "alone is better than the narrowed and quantized model that it was compared with. large (90"),
        (POINTS[1:4], "For 1 more there is no quantization alone that is as small."),
        ([POINTS[1]], "No quantization alone was run"),
    ],
)
def test_a_sentence_says_where_quantization_alone_is_better(points: list[Point], words: str) -> None:
    assert any(words in line for line in verdicts(points)), verdicts(points)


def test_without_narrowing_there_is_nothing_to_say() -> None:
    assert verdicts([POINTS[0], POINTS[2]]) == []


def test_speed_is_judged_like_bytes() -> None:
    lines = verdicts(POINTS)
    assert [line.partition(":")[0] for line in lines] == ["For bytes", "For decoding", "For prefill"]
    assert "narrowing pays" not in lines[1], "large decodes faster than dominated and loses less"


def test_a_sweep_file_is_read_as_it_was_written(swept: tuple[Path, Path]) -> None:
    found = read_sweep(swept[1] / "sweep.json")
    assert Sweep.model_validate(found.model_dump(mode="json")) == found
