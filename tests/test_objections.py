"""What is missing or does not fit is said by check and plan, and stops a run before work."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from flatq.errors import RecipeError
from flatq.export.planned import planned_exports
from flatq.export.protocols import exporter_named
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.plan.decide import draft
from flatq.plan.objections import exporter_objections, raise_early_objections
from flatq.recipe.grammar import Recipe
from flatq.sources.source import open_model
from tests.conftest import FLAT, MakeRecipe, flatq
from tests.models import tiny_artifact, tiny_config

HEAD = "version: 1\nmodel: some/model\nstages: [{gptq: {}}]\n"
WIDE = {"gptq": {"bits": 4, "group_size": 32}}
ONNX = [{"onnx": {"precision": "fp32"}}]
WORDS = {
    "gguf": ("llama_cpp", "llama-cpp-python", "pip install 'flatq[llamacpp]'"),
    "onnx": ("onnxruntime", "onnxruntime", "pip install 'flatq[cpu]'"),
    "safetensors": ("compressed_tensors", "compressed-tensors", "pip install 'flatq[hf]'"),
}


@pytest.fixture(params=sorted(WORDS))
def absent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A format whose runtime cannot be imported, and what must be said of it."""
    module, package, command = WORDS[request.param]
    monkeypatch.setitem(sys.modules, module, None)
    said = f"cannot be verified: the package {package} is not installed; install it with `{command}`"
    return request.param, f"exports.{request.param}: {said}"


@pytest.mark.parametrize("verb", ["check", "plan"])
def test_check_and_plan_say_what_is_not_installed(verb: str, absent: tuple[str, str], make_recipe: MakeRecipe) -> None:
    form, words = absent
    shown = flatq(verb, make_recipe(stages=[WIDE], exports=[{form: {}}]))
    assert shown.exit_code == 0, shown.stderr
    assert f"! {words}" in shown.stdout
    silenced = flatq(verb, make_recipe(stages=[WIDE], exports=[{form: {"verify": False}}]))
    assert silenced.exit_code == 0, silenced.stderr
    assert "not installed" not in silenced.stdout


def test_a_run_is_refused_before_work(absent: tuple[str, str], make_recipe: MakeRecipe, tmp_path: Path) -> None:
    form, words = absent
    shown = flatq("run", make_recipe(stages=[WIDE], exports=[{form: {}}]), "--out", tmp_path / "out")
    assert shown.exit_code == 2
    assert words in shown.stderr
    assert "`verify: false` in the recipe or --no-verify on the command line" in shown.stderr
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_one_more_export_is_written_unverified_where_the_user_says_so(absent: tuple[str, str], tmp_path: Path) -> None:
    form, words = absent
    config = tiny_config(d_qk=32, d_v=(32, 32))
    artifact = tiny_artifact(tmp_path / "artifact", config, grid=Grid(4, 32))
    refused = flatq("export", artifact.root, "--format", form, "--out", tmp_path / "new")
    assert refused.exit_code == 2
    assert words.partition(": ")[2] in refused.stderr
    assert not (tmp_path / "new").exists()
    shown = flatq("export", artifact.root, "--format", form, "--out", tmp_path / "new", "--no-verify")
    assert shown.exit_code == 0, shown.stderr
    assert all(Path(file).stat().st_size for file in shown.stdout.split())


def test_a_run_whose_recipe_says_verify_false_reports_it_in_red_and_measures_what_it_can(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    exports = [{"gguf": {"precision": "f32", "verify": False}}, *ONNX]
    bench = {"prompt": 4, "new_tokens": 2, "repeats": 1, "threads": 1, "baseline": False}
    shown = flatq("run", make_recipe(stages=[FLAT], exports=exports, bench=bench), "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.stderr
    assert "exports.gguf: not verified: verification was disabled" in caplog.messages
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    gguf, onnx = report["exports"]
    assert (gguf["verify"], gguf["unverified"]) == (None, "verification was disabled")
    assert onnx["verify"] is not None
    assert onnx["unverified"] == ""
    assert [entry["name"] for entry in report["bench"]] == ["onnx"]
    assert list((tmp_path / "out" / "exports" / "gguf").glob("*.gguf"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<small class="unverified">not verified</small>' in page
    assert ".unverified, small.unverified { color: light-dark(#c62828," in page
    assert "**not verified**: verification was disabled" in (tmp_path / "out" / "report.md").read_text()


def test_verify_true_is_the_default_and_changes_no_digest() -> None:
    plain, said, unverified = (
        Recipe.parse(f"{HEAD}exports: [{{onnx: {{{key}}}}}]") for key in ("", "verify: true", "verify: false")
    )
    assert plain.digest() == said.digest()
    assert plain.digest() != unverified.digest()
    assert "verify" not in plain.model_dump()["exports"][0]["onnx"]
    assert Recipe.model_validate(unverified.model_dump()).exports[0].verify is False
    assert unverified.exports[0].options == {}


@pytest.mark.parametrize("value", ["3", "'no'", "null"])
def test_verify_is_true_or_false(value: str) -> None:
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(f"{HEAD}exports:\n  - onnx:\n      verify: {value}\n")
    (problem,) = raised.value.problems
    assert problem.startswith("recipe.yaml:6: exports[0].onnx.verify: ")
    assert problem.endswith("is not allowed; true or false")


@pytest.fixture
def only_config(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with a config.json and nothing else."""
    (tmp_path / "shapes").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "shapes")
    return tmp_path / "shapes"


def test_check_reads_a_local_configuration(only_config: Path, make_recipe: MakeRecipe) -> None:
    shown = flatq("check", make_recipe(model=str(only_config), exports=ONNX, stages=[FLAT]))
    assert shown.exit_code == 0, shown.stderr
    assert "llama: 3 layers, d_model 64, 4 heads of 16 on 2 key-value heads, d_ff 128" in shown.stdout


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"stages": [{"gptq": {"group_size": 128}}]}, "group_size"),
        ({"stages": [{"flat": {"size": "1kB"}}]}, "cannot be reached"),
        ({"exports": [{"onnx": {"precision": "int4"}}], "stages": [FLAT]}, "nothing is quantized"),
        ({"exports": [{"gguf": {}}], "stages": [{"gptq": {"group_size": 16}}]}, "multiple of 32"),
    ],
    ids=["groups", "budget", "onnx", "gguf"],
)
def test_check_hears_the_objections_to_a_local_model(
    changed: dict[str, object], words: str, only_config: Path, make_recipe: MakeRecipe
) -> None:
    shown = flatq("check", make_recipe(model=str(only_config), **changed))
    assert shown.exit_code == 2, shown.stdout
    assert words in shown.stderr


def test_check_names_a_family_that_is_not_supported(only_config: Path, make_recipe: MakeRecipe) -> None:
    settings = json.loads((only_config / "config.json").read_text()) | {"model_type": "mamba"}
    (only_config / "config.json").write_text(json.dumps(settings))
    shown = flatq("check", make_recipe(model=str(only_config), exports=ONNX, stages=[FLAT]))
    assert shown.exit_code == 2
    assert "mamba" in shown.stderr


STAGES: dict[str, list[dict[str, Any]]] = {
    "nothing quantized": [],
    "4 bits": [{"gptq": {"bits": 4, "group_size": 32}}],
    "asymmetric": [{"gptq": {"bits": 3, "group_size": 32, "symmetric": False}}],
    "with its embedding": [{"gptq": {"bits": 4, "group_size": 32, "embedding": {"bits": 8, "group_size": 32}}}],
    "small groups": [{"gptq": {"bits": 4, "group_size": 16}}],
}
BUDGETS = (0.85, 0.7, 0.55)  # plans in which no width is that of another


def one_option_at_a_time(options: type[BaseModel]) -> Iterator[dict[str, Any]]:
    """No option, and every value of every option that has named values."""
    yield {}
    for name, field in options.model_fields.items():
        values = [value for kind in (field.annotation, *get_args(field.annotation)) for value in get_args(kind)]
        kinds = (field.annotation, *get_args(field.annotation))
        values = [value for value in values if isinstance(value, str | int)] + [True, False] * (bool in kinds)
        for value in values:
            with contextlib.suppress(ValidationError):
                options(**{name: value})
                yield {name: value}


@pytest.mark.parametrize("form", sorted(WORDS))
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_what_an_exporter_says_whatever_the_widths_stops_a_run_before_work(
    form: str, stages: list[dict[str, Any]], tiny_model: Path
) -> None:
    source, told = open_model(str(tiny_model), need_weights=False), set[str]()
    for options in one_option_at_a_time(exporter_named(form).Options):
        recipes = [planned_recipe(tiny_model, keep, stages, {form: options}) for keep in BUDGETS]
        exports, words = planned_exports(recipes[0]), []
        for recipe in recipes:
            widths = draft(recipe, source).layers
            words.append(set(exporter_objections(recipe, source.config.with_layers(widths), exports)))
        always = set.intersection(*words)
        if always:
            with pytest.raises(RecipeError) as raised:
                raise_early_objections(recipes[0], source, exports)
            assert always <= set(raised.value.problems)
        told |= always
    assert told, "otherwise this test would see nothing"


def planned_recipe(model: Path, keep: float, stages: list[dict[str, Any]], export: dict[str, Any]) -> Recipe:
    flat = {"flat": {"keep_ratio": keep, "rank_multiple": 2, "width_multiple": 8, "uniform": True}}
    texts = {"calibration": {"dataset": "python-docs", "samples": 64, "seq_len": 64}, "evaluation": {"seq_len": 64}}
    stated = {"version": 1, "model": str(model), **texts, "stages": [flat, *stages], "exports": [export]}
    return Recipe.model_validate(stated)


@pytest.mark.parametrize("form", sorted(WORDS))
def test_only_what_every_plan_would_hear_is_said_before_the_widths_are_known(
    form: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(str(tiny_model), need_weights=False)
    exporter, usual = exporter_named(form), [{"gptq": {"bits": 4, "group_size": 32}}]

    def check(_: object, config: DecoderConfig, *__: object) -> list[str]:
        return ["always", f"d_ff is {config.layers[-1].d_ff}", f"d_v is {config.layers[-1].d_v}"]

    monkeypatch.setattr(type(exporter), "check", check)
    recipe = planned_recipe(tiny_model, 0.7, usual, {form: {}})
    with pytest.raises(RecipeError) as raised:
        raise_early_objections(recipe, source, planned_exports(recipe))
    assert raised.value.problems == [f"exports.{form}: always"]
    unmeasured = recipe.model_dump()
    unmeasured["stages"][0]["flat"]["allocation"] = "uniform"
    with pytest.raises(RecipeError) as raised:
        raise_early_objections(Recipe.model_validate(unmeasured), source, planned_exports(recipe))
    assert len(raised.value.problems) == 3, "nothing is measured, so this plan is the one"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "compressed-tensors"}, "no linear is quantized"),
        ({"format": "fp16", "pad_values": True}, "one MLP width, the layers of this model differ"),
    ],
    ids=str,
)
def test_a_run_says_before_work_what_check_and_plan_say(
    make_recipe: MakeRecipe, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    recipe = make_recipe(stages=[FLAT], exports=[{"safetensors": options}])
    shown = [flatq("check", recipe), flatq("plan", recipe), flatq("run", recipe, "--out", tmp_path / "out")]
    assert [each.exit_code for each in shown] == [2, 2, 2]
    assert words in shown[0].stderr
    assert shown[0].stderr == shown[1].stderr == shown[2].stderr
    assert not (tmp_path / "out").exists()
