"""The steps of a run: what is refused before work, what each step is given, what a resumed run does not do again."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flatq.calibration.states import Execution
from flatq.errors import ArtifactError, ExportError, FlatqError, RecipeError
from flatq.evaluate.tasks import TaskSet
from flatq.export.protocols import exporter_named
from flatq.job import Job
from flatq.machine import distributed
from flatq.model.decoder import DecoderConfig
from flatq.pipeline.run import finish, open_source, run
from flatq.plan.decide import draft
from flatq.recipe.grammar import Recipe
from flatq.report.render import read_report
from tests.conftest import FLAT, LAYERS, MakeRecipe, digests, manifest_of, usual_recipe

PLAIN = {"gptq": {"bits": 4, "group_size": 16}}
FP32 = {"onnx": {"precision": "fp32"}}
BENCH = {"provider": "cpu", "prompt": 4, "new_tokens": 2, "repeats": 1, "threads": 1, "baseline": False}
BLOCKS = 2 * LAYERS


class Reached(Exception):
    """Work was begun."""


def stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def reached(*_: Any, **__: Any) -> Any:
    raise Reached


def loaded(make_recipe: MakeRecipe, **changed: Any) -> Recipe:
    return Recipe.load(make_recipe(**changed))


@contextlib.contextmanager
def patched(**places: Any) -> Iterator[None]:
    """With other functions in the module of a run, or, by their dotted names with ``__``, in other modules."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in places.items():
            patch.setattr(f"flatq.pipeline.{name.replace('__', '.')}", function)
        yield


# ---- before work


LONG = {"dataset": "python-docs", "samples": 8, "seq_len": 1024}
NO_TASK = {"tokens": 256, "seq_len": 64, "tasks": ["no_such_task"]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"stages": [{"gptq": {"group_size": 128}}]}, "group_size"),
        ({"stages": [{"flat": {"size": "1kB"}}]}, "cannot be reached"),
        ({"stages": [FLAT], "exports": [{"onnx": {"precision": "int4"}}]}, "nothing is quantized"),
        ({"stages": [PLAIN], "calibration": LONG}, "512 positions"),
        ({"stages": [PLAIN], "evaluation": NO_TASK}, "no_such_task"),
        ({"stages": [PLAIN], "exports": [FP32]}, "the package is not here"),
    ],
    ids=["groups", "budget", "exporter", "rows", "task", "package"],
)
def test_what_cannot_be_done_is_refused_before_anything_is_done(
    changed: dict[str, Any], words: str, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(names: list[str], folder: Path | None) -> None:
        raise RecipeError(f"{names} in {folder}")

    if words == "the package is not here":
        monkeypatch.setattr(type(exporter_named("onnx")), "missing", lambda *_, **__: [words])
    monkeypatch.setattr("flatq.plan.objections.absent_for_tasks", lambda recipe: [])
    with patched(run__run_tokens=reached, tasks__task_manager=unknown), pytest.raises(RecipeError, match=words):
        run(loaded(make_recipe, **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_all_its_weights_is_refused_before_anything_is_done(
    model_copy: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, model_copy / "model.safetensors", {"format": "pt"})
    recipe = loaded(make_recipe, model=str(model_copy))
    with patched(run__run_tokens=reached), pytest.raises(ArtifactError, match=r"layers\.1\.down\.weight is missing"):
        run(recipe, tmp_path / "out")
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(FlatqError):
        open_source(recipe)


def test_an_objection_to_the_measured_widths_stops_a_run_before_the_walk(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: object, config: DecoderConfig, *__: object) -> list[str]:
        return [f"d_ff is {config.layers[-1].d_ff}"]

    monkeypatch.setattr(type(exporter_named("onnx")), "check", check)
    recipe = loaded(make_recipe, stages=[FLAT], exports=[FP32])
    with (
        patched(run__decided=lambda job, _: (draft(job.recipe, job.source), {}, []), run__compressed=reached),
        pytest.raises(RecipeError, match=r"^exports\.onnx: d_ff is \d+$"),
    ):
        run(recipe, tmp_path / "out")


# ---- what a step is given


@pytest.mark.parametrize("asked", [{}, {"verify": True}, {"verify": False}], ids=str)
def test_exports_are_verified_unless_that_is_left_out(
    asked: dict[str, bool], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    def planned(recipe: Recipe, *, verify: bool) -> None:
        assert verify == asked.get("verify", True)
        raise Reached

    with patched(run__planned_exports=planned), pytest.raises(Reached):
        run(loaded(make_recipe), tmp_path / "out", **asked)


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("predict", [False, True])
def test_the_limit_of_memory_and_the_exports_decide_what_is_held_and_forecast(
    ranges: bool, predict: bool, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def working_set(*given: Any) -> int:
        asked["memory"] = given
        return 1 << 20

    def forecasts(*given: Any, **named: Any) -> dict[str, Any]:
        asked["forecast"] = (*given[2:], named)
        return {}

    def plan_of(job: Job, _: Any) -> Any:
        asked["job"] = job
        raise Reached

    monkeypatch.setattr(type(exporter_named("onnx")), "needs_cache_ranges", lambda *_: ranges)
    recipe = loaded(make_recipe, stages=[PLAIN], exports=[FP32])
    with (
        patched(run__working_set=working_set, run__forecasts=forecasts, run__decided=plan_of),
        patched(run__dense_quality=lambda *_: {}),
        pytest.raises(Reached),
    ):
        run(recipe, tmp_path / "out", device="cpu", memory=1234, **{"predict": True} if predict else {})
    job = asked["job"]
    assert asked["memory"] == (job.source.config, recipe, 1234, ranges)
    assert job.execution == Execution.of(recipe.calibration, "cpu", 1 << 20)
    known = {"device": "cpu", "working_set_bytes": 1 << 20, "ranges": ranges}
    assert asked.get("forecast") == ((job.source.config.layers, known) if predict else None)


# ---- one run with its defaults, whole and broken off


@dataclass(frozen=True)
class Finished:
    recipe: Recipe
    root: Path
    messages: list[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Finished:
    """A run without a flat stage, a quantized head or a bench, of which only the recipe and the folder are given."""
    root, messages = tmp_path_factory.mktemp("finished"), list[str]()
    stated = usual_recipe(tiny_model, text_file) | {"stages": [PLAIN], "exports": [FP32]}
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    ours = logging.getLogger("flatq")
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        recipe = Recipe.parse(yaml.safe_dump(stated))
        # The head stays as it is, so nothing is measured for it; an odd tokenizer is told in the log and in the report.
        with patched(build__head_moment=None, run__tokenizer_cautions=lambda source: ["an odd tokenizer"]):
            assert run(recipe, root / "out") == root / "out"
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
    return Finished(recipe, root / "out", messages)


def test_a_run_does_what_its_recipe_asks_for_and_no_more(finished: Finished) -> None:
    report = read_report(finished.root / "report.json")
    assert list(report.timing) == ["baseline", "compress", "evaluate", "export-onnx", "quality-onnx"]
    assert report.bench == []
    assert report.forecast == {}
    assert report.exports[0].verify is not None
    assert report.exports[0].quality
    assert report.notes == ["an odd tokenizer"]


def test_a_run_says_what_it_found_and_nothing_that_is_not_so(finished: Finished) -> None:
    said = [line.split(":")[0] for line in finished.messages if "perplexity" in line]
    assert said == ["artifact", "artifact", "export onnx", "export onnx"], "a line for each text"
    assert "an odd tokenizer" in finished.messages
    assert not [line for line in finished.messages if "written again" in line or "already" in line]


def test_the_manifest_lists_the_blocks_in_order_with_the_shapes_of_their_linears(finished: Finished) -> None:
    blocks = manifest_of(finished.root)["blocks"]
    names = {"attention": ["k", "o", "q", "v"], "mlp": ["down", "gate", "up"]}
    assert [(block["layer"], block["half"]) for block in blocks] == [
        (layer, half) for layer in range(LAYERS) for half in names
    ]
    for block in blocks:
        assert sorted(block["shapes"]) == names[block["half"]] == sorted(block["errors"])
    assert blocks[1]["shapes"]["down"] == [64, 128]
    assert "perplexity of the original" in manifest_of(finished.root)["quality"]


def test_a_finished_run_is_left_alone_and_a_damaged_one_is_told(finished: Finished, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished.root, tmp_path / "out"))
    before = digests(root)
    assert run(finished.recipe, root) == root
    assert digests(root) == before
    (root / "report.md").write_text("changed")
    with pytest.raises(FlatqError, match=r"report\.md"):
        run(finished.recipe, root)
    assert run(finished.recipe, root, check=False) == root
    assert (root / "report.md").read_text() == "changed"


def test_only_the_first_process_finishes_a_run_and_gives_its_folder(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "part", lambda: False)
        assert run(finished.recipe, finished.root) is None
        with patched(run__finish=reached):
            assert run(finished.recipe, tmp_path / "out") is None
    assert (tmp_path / "out" / "artifact").is_dir()
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_run_that_is_broken_off_twice_does_nothing_twice(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flatq.quantize.stage import GptqStage

    out, apply, applied = tmp_path / "out", GptqStage.apply, list[tuple[int, str]]()

    def noted(stage: GptqStage, block: Any) -> None:
        if len(applied) == 3:
            applied.append((-1, ""))
            raise KeyboardInterrupt
        applied.append((block.index, block.half))
        apply(stage, block)

    monkeypatch.setattr(GptqStage, "apply", noted)
    with pytest.raises(KeyboardInterrupt):
        run(finished.recipe, out)
    with patched(run__summarize=stopped), pytest.raises(KeyboardInterrupt):
        run(finished.recipe, out)
    del applied[3]
    assert applied == [(layer, half) for layer in range(LAYERS) for half in ("attention", "mlp")]
    never = {"run__build": reached, "run__deliver": reached, "run__export_quality": reached, "run__measured": reached}
    with patched(**never, run__tokenizer_cautions=lambda source: ["an odd tokenizer"]):
        assert run(finished.recipe, out) == out
    assert "written again" not in caplog.text
    assert digests(out / "artifact") == digests(finished.root / "artifact")
    assert list(read_report(out / "report.json").timing) == list(read_report(finished.root / "report.json").timing)


def test_what_was_measured_without_a_failed_export_is_measured_again_with_it(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    from flatq.pipeline import run as pipeline

    exports = [{"onnx": {"name": name, "precision": "fp32", "verify": False}} for name in ("one", "two")]
    recipe, out = loaded(make_recipe, stages=[PLAIN], exports=exports, bench=BENCH), tmp_path / "out"
    deliver, benched, tasked, indexed = pipeline.deliver, list[list[str]](), list[Any](), list[Any]()

    def failing(item: Any, *rest: Any) -> Any:
        if item.name == "two":
            raise ExportError("two: the disk is made of wood")
        return deliver(item, *rest)

    def measured(recipe: Recipe, source: Any, folder: Any, items: list[Any], baselines: Any) -> list[Any]:
        assert baselines == {}
        benched.append([item.name for item in items])
        return []

    def run_tasks(subjects: list[Any], tasks: Any, place: Path, **settings: Any) -> list[Any]:
        assert settings == {"limit": 3, "folder": tmp_path}
        assert (place, tasks) == (out / "tasks", {"mine": None})
        tasked.append([subject.name for subject in subjects])
        return []

    def task_manager(names: list[str], folder: Path) -> None:
        indexed.append((names, folder))

    known = {
        "run__measured": measured,
        "tasks__tasks_of": lambda recipe: [TaskSet({"mine": None}, 3, tmp_path)],
        "tasks__run_tasks": run_tasks,
        "tasks__task_manager": task_manager,
    }
    with patched(**known):
        with patched(run__deliver=failing), pytest.raises(ExportError, match=r"^exports\.two: two: the disk"):
            run(recipe, out)
        good, bad = read_report(out / "report.json").exports
        assert (good.error, bad.error, bad.bytes) == (None, "two: the disk is made of wood", 0)
        with patched(run__summarize=stopped), pytest.raises(KeyboardInterrupt):
            run(recipe, out)
        assert indexed == [(["mine"], tmp_path)] * 2, "the tasks were not finished"
        run(recipe, out)
    assert len(indexed) == 2, "they are finished, so their names are not looked up"
    assert benched == [["one"], ["one", "two"]], "it is kept once all exports are there"
    assert tasked == [["dense", "artifact", "one"], ["dense", "artifact", "one", "two"]]
    assert {"bench", "tasks"} <= set(read_report(out / "report.json").timing)


@pytest.mark.parametrize(("bench", "provider"), [(BENCH | {"provider": "cpu"}, "cpu"), (None, "auto")])
def test_the_exports_run_their_tasks_where_they_are_measured(
    bench: dict[str, Any] | None, provider: str, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatq.artifact import Artifact
    from flatq.export.folder import description_of
    from flatq.export.planned import planned_exports
    from flatq.pipeline.tasks import task_results
    from flatq.run_folder import RunFolder

    asked = list[Any]()
    recipe = Recipe.model_validate(finished.recipe.model_dump() | {"bench": bench})
    job: Any = Job(recipe, open_source(recipe), None, RunFolder(finished.root, recipe), Execution())  # type: ignore[arg-type]
    artifact = Artifact.open(finished.root)
    with patched(
        tasks__tasks_of=lambda recipe: [TaskSet({"mine": None}, None, None)],
        tasks__exported=lambda *given: asked.append(given),
        tasks__run_tasks=lambda *_, **__: [],
    ):
        assert task_results(job, artifact, planned_exports(recipe), complete=False) == []
    root = finished.root / "exports" / "onnx"
    assert asked == [(root, description_of(root), provider)]
    with patched(tasks__run_tasks=reached):
        assert task_results(replace(job, recipe=finished.recipe), artifact, [], complete=False) == [], "it names none"


def test_a_baseline_that_is_built_is_not_built_again_and_runs_in_the_bench(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from flatq.pipeline import build as building

    flat = {"flat": {**FLAT["flat"], "method": "paper", "allocation": "uniform"}}
    asked = {"baselines": ["dense", "quantized"], "bench": BENCH}
    recipe, out = loaded(make_recipe, stages=[flat, PLAIN], exports=[FP32], **asked), tmp_path / "out"
    finish, finished, measured = building.finish, list[Path](), list[Any]()

    def once(partial: Path, root: Path, **given: Any) -> Any:
        if finished:
            raise KeyboardInterrupt
        finished.append(root)
        return finish(partial, root, **given)

    def noted(*given: Any) -> list[Any]:
        measured.append(given[-1])
        return []

    caplog.set_level(logging.INFO, "flatq")
    with patched(build__finish=once), pytest.raises(KeyboardInterrupt):
        run(recipe, out)
    with patched(baselines__model_quality=stopped), pytest.raises(KeyboardInterrupt):
        run(recipe, out)
    with patched(baselines__build=reached, run__measured=noted):
        run(recipe, out)
    (found,) = measured
    assert {name: artifact.grids.keys() for name, artifact in found.items()} == {
        "quantized": {
            f"layers.{layer}.{name}" for layer in range(LAYERS) for name in ["q", "k", "v", "o", "gate", "up", "down"]
        }
    }
    assert [line for line in caplog.messages if line.startswith("quantized (4 bit, groups of 16)")]
    (baseline,) = read_report(out / "report.json").baselines
    assert (baseline.name, baseline.description) == ("quantized", "4 bit, groups of 16")


def test_a_walk_for_a_damage_shares_the_sensitivity_and_checks_what_it_built(
    finished: Finished, tmp_path: Path
) -> None:
    from flatq.calibration.sensitivity import FILE
    from flatq.pipeline.fit import _damage
    from flatq.run_folder import RunFolder

    folder, built = RunFolder(tmp_path / "run", finished.recipe), list[Path]()
    folder.work.mkdir(parents=True)
    (folder.work / FILE).write_bytes(b"measured once")
    judged: Any = SimpleNamespace(evaluation=[])
    job: Any = Job(finished.recipe, open_source(finished.recipe), judged, folder, Execution())
    plan: Any = SimpleNamespace(ranks=SimpleNamespace(achieved=1.0), grids={})

    def copied(job: Job, *_: Any) -> None:
        assert (job.folder.work / FILE).samefile(folder.work / FILE)
        shutil.copytree(finished.root / "artifact", job.folder.artifact)
        built.append(job.folder.artifact)

    losses = [{"damage": 0.2, "text": "a"}, {"damage": 0.3, "text": "b"}]
    with patched(fit__build=copied, fit__model_quality=lambda *_: losses, fit__log_quality=lambda *_: None):
        assert _damage(job, 3, plan, {}, {}) == _damage(job, 3, plan, {}, {}) == 0.3  # type: ignore[arg-type]
        assert built == [folder.work / "fits" / "3" / "artifact"], "what is there is not built again"
        damaged = next(built[0].glob("*.safetensors"))
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=damaged.name):
            _damage(job, 3, plan, {}, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [None, "is broken"])
def test_measurements_are_complete_if_no_export_failed(error: str | None) -> None:
    said = list[bool]()
    folder = SimpleNamespace(
        root=Path("RUN"), known=lambda *_: None, timing=dict, peak_rss_bytes=lambda: 0, memory=dict,
        device_memory=dict, seal=lambda: None,
    )  # fmt: skip
    job: Any = SimpleNamespace(folder=folder, recipe=None, source=None)

    def measured(*_: Any, complete: bool) -> list[Any]:
        said.append(complete)
        return []

    with patched(
        run__exported=lambda *_: {"name": "one", "error": error},
        run__benched=measured,
        run__task_results=measured,
        run__summarize=lambda *_, **__: None,
        run__write_report=lambda *_: None,
    ):
        item: Any = SimpleNamespace(name="one")
        with pytest.raises(ExportError, match=r"exports\.one: is broken") if error else contextlib.nullcontext():
            finish(job, [item], None, {}, [], [], {}, [])  # type: ignore[arg-type]
    assert said == [error is None] * 2


def test_a_token_without_an_embedding_is_refused_in_the_rows_for_recovery(finished: Finished) -> None:
    from flatq.pipeline.texts import _drawn

    drawn = SimpleNamespace(calibration=torch.tensor([[1, 2]]), recovery=torch.tensor([[1, 7]]), evaluation=[])
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda number: f"<{number}>")
    with patched(texts__token_batches=lambda *_, **__: drawn):
        with pytest.raises(RecipeError, match=r"recover: .* holds the token '<7>' \(id 7\)"):
            _drawn(finished.recipe, tokenizer, 7)
        drawn.recovery = None
        assert _drawn(finished.recipe, tokenizer, 7) is drawn  # type: ignore[comparison-overlap]
