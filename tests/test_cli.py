"""The command line: what it says, on which stream, with which exit code."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import flatq
from flatq.cli import app, summary
from flatq.errors import RecipeError
from flatq.recipe.grammar import Recipe, json_schema
from flatq.verbs import parse_options
from tests.conftest import MakeRecipe

VERBS = [
    "init", "run", "check", "plan", "export", "verify", "bench", "eval", "compare", "generate", "ls", "doctor",
    "schema", "sweep", "front",
]  # fmt: skip
GOOD = "version: 1\nmodel: a/b\nstages: [{flat: {keep_ratio: 0.7}}, {gptq: {}}]\nexports: [{onnx: {name: mine}}]\n"
BAD = "version: 1\nmodel: a/b\nstages: [{flat: {keep_ratio: 70}}, {gptq: {'[b]its': 4}}]\n"

cli = CliRunner()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("flatq")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], _, _ = before
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_help_lists_every_verb() -> None:
    shown = cli.invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert all(f"{verb} " in shown.stdout for verb in VERBS)


def test_nothing_asked_for_is_answered_with_help() -> None:
    assert "Usage" in cli.invoke(app, []).output


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_its_options(verb: str) -> None:
    shown = cli.invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    assert verb in shown.stdout


def test_version_is_the_package_s() -> None:
    assert cli.invoke(app, ["--version"]).stdout == f"flatq {flatq.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["schema"], ["ls", "recipes"]])
def test_quick_answers_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from flatq.cli import app\ntry: app(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


def test_schema_prints_json() -> None:
    assert json.loads(cli.invoke(app, ["schema"]).stdout) == json_schema()


@pytest.mark.parametrize("verb", ["run", "check", "plan"])
def test_a_bad_recipe_is_exit_code_2_and_every_problem_on_stderr(verb: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(BAD)
    shown = cli.invoke(app, [verb, str(file)])
    assert shown.exit_code == 2
    assert shown.stdout == ""
    first, second = shown.stderr.strip().split("\n")
    assert first.startswith(
        f"{file}:3: stages[0].flat.keep_ratio: 70 is not allowed; a number in (0, 1] or null; did you mean 0.7"
    )
    assert "'[b]its': unknown key; did you mean 'bits'?" in second, "brackets are text, not markup"
    assert sorted(tmp_path.iterdir()) == [file], "nothing is left behind"


def test_a_missing_recipe_is_exit_code_2(tmp_path: Path) -> None:
    shown = cli.invoke(app, ["run", str(tmp_path / "none.yaml")])
    assert shown.exit_code == 2
    assert "none.yaml: cannot be read: No such file or directory" in shown.stderr


def test_the_traceback_is_shown_on_demand_only(tmp_path: Path) -> None:
    arguments = ["check", str(tmp_path / "none.yaml")]
    assert "Traceback" not in cli.invoke(app, arguments).stderr
    assert "Traceback" in cli.invoke(app, ["--debug", *arguments]).stderr


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(path: object) -> Recipe:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "load", interrupted)
    shown = cli.invoke(app, ["check", str(tmp_path)])
    assert shown.exit_code == 130
    assert "interrupted" in shown.stderr


def test_ls_tells_each_recipe_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text(BAD)
    shown = cli.invoke(app, ["ls", str(tmp_path)])
    assert shown.exit_code == 0
    good, bad = shown.stdout.strip().split("\n")
    assert good.endswith("a.yaml  a/b: flat keeps 70% of the decoder's parameters; gptq 4 bit, groups of 128; to mine")
    assert "not usable:" in bad


def test_ls_of_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    assert cli.invoke(app, ["ls", str(tmp_path)]).exit_code == 2


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ("[{gptq: {}}]", "m: gptq 4 bit, groups of 128"),
        ("[{flat: {keep_ratio: 1}}]", "m: flat keeps 100% of the decoder's parameters"),
    ],
)
def test_a_summary_leaves_out_what_is_not_there(stages: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: m\nstages: {stages}")
    assert summary(tmp_path / "r.yaml") == line


def test_options_of_an_exporter_are_read_like_a_recipe() -> None:
    given = ["precision=int4", "opset=23", "left_padding=true", "name=a=b", "empty="]
    read = {"precision": "int4", "opset": 23, "left_padding": True, "name": "a=b", "empty": None}
    assert parse_options(given) == read


@pytest.mark.parametrize("given", [["precision"], ["=1"], ["a=1", "a=2"], ["a=[1"], ["a=&x 1"]])
def test_a_bad_option_is_a_recipe_error(given: list[str]) -> None:
    with pytest.raises(RecipeError, match="--option"):
        parse_options(given)


@pytest.mark.parametrize(
    ("flags", "level"),
    [([], "INFO"), (["-v"], "DEBUG"), (["-vv"], "DEBUG"), (["-q"], "ERROR"), (["-q", "-v"], "ERROR")],
)
def test_verbosity_sets_the_level_of_the_log(flags: list[str], level: str) -> None:
    assert cli.invoke(app, [*flags, "schema"]).exit_code == 0
    assert logging.getLevelName(logging.getLogger("flatq").level) == level


def test_a_plan_of_a_configuration_imports_nothing_that_only_a_run_needs(
    tiny_model: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    run_only = "{'transformers', 'datasets', 'onnxruntime', 'onnx_ir', 'matplotlib', 'jinja2', 'lm_eval'}"
    code = (
        "import sys\nfrom flatq.cli import app\n"
        "try: app()\n"
        f"finally: assert not (found := {run_only} & set(sys.modules)), found"
    )
    shutil.copy(tiny_model / "config.json", tmp_path)
    exports = [{"onnx": {}}, {"gguf": {"precision": "f16"}}, {"safetensors": {"format": "bf16"}}]
    recipe = make_recipe(model=str(tmp_path), exports=exports)
    done = subprocess.run([sys.executable, "-c", code, "plan", str(recipe)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "export gguf" in done.stdout
