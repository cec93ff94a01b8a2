"""What the documentation tells a reader to type is run: every command and every Python block of README and docs.

Capital words stand for a reader's own things: MODEL is the tiny model, RECIPE and RUN are its recipe and run, EXPORT is
one of its exports, DIR a new folder. What cannot run here (``make``, ``pip``, benchmarks, ``torchrun``) is checked for
what it names.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from flatq.export.protocols import exporter_named
from flatq.recipe.grammar import Recipe
from tests.conftest import flatq

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "recipes")),
]


def blocks(language: str) -> dict[str, str]:
    """Each different block of a language, and the page that has it first."""
    found: dict[str, str] = {}
    for page in PAGES:
        for text in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            found.setdefault(text, str(page.relative_to(ROOT)))
    return found


def commands() -> dict[str, str]:
    """Each different command line, without its comment, and the page that has it first."""
    found: dict[str, str] = {}
    for text, page in blocks("sh").items():
        for line in text.replace("\\\n", " ").splitlines():
            command = re.split(r"\s+# |\s{2,}# ", line)[0].strip()
            if command and not command.startswith("#"):
                found.setdefault(command, page)
    return found


RUN_HERE = {command: page for command, page in commands().items() if command.startswith("flatq ")}
NAMED_ONLY = {command: page for command, page in commands().items() if command not in RUN_HERE}


@pytest.fixture
def things(
    exported_run: tuple[Path, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """What the capital words stand for; the working folder is a new one that has the recipes."""
    recipe, run = exported_run
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    export = str(run / "exports" / "reduced")
    return {"RECIPE": str(recipe), "EXPORT": export, "RUN": str(run), "MODEL": str(tiny_model), "DIR": "new"}


def test_there_is_something_to_run() -> None:
    assert len(RUN_HERE) > 8
    assert blocks("python")


@pytest.mark.parametrize("command", RUN_HERE)
def test_a_command_runs(command: str, things: dict[str, str]) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "run":
        things["RUN"] = "new-run"  # the finished one would be left alone
    filled = [re.sub("|".join(things), lambda found: things[found[0]], word) for word in words]
    shown = flatq(*filled)
    assert shown.exit_code == 0, shown.stderr
    if words[0] != "run":
        assert shown.stdout.strip()


@pytest.mark.parametrize("command", NAMED_ONLY)
def test_a_command_of_another_program_names_what_exists(command: str) -> None:
    words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
    if words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:1] == ["python"] and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text()
        for option in [word for word in words[2:] if word.startswith("--")]:
            name = option.removeprefix("--").partition("=")[0]
            assert f'"{option}"' in source or re.search(rf"\b{name.replace('-', '_')}\b", source), option
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", command)) <= set(extras)
    elif "-m" in words:
        assert words[words.index("-m") + 1] in {"flatq", "onnxruntime_genai.models.builder"}
    else:
        assert words[0] in {"llama-quantize"}, f"{command}: no test looks at this"


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, things: dict[str, str]) -> None:
    filled = re.sub("|".join(rf"\b{word}\b" for word in things), lambda found: things[found[0]], code)
    exec(compile(filled, "documentation", "exec"), {})


@pytest.mark.parametrize("text", [text for text in blocks("yaml") if not text.startswith("version:")])
def test_a_part_of_a_recipe_is_one(text: str, tiny_model: Path) -> None:
    part = yaml.safe_load(text)
    if isinstance(part, list):
        part = {"stages": part}
    rest = {"version": 1, "model": str(tiny_model), "calibration": {"dataset": "python-docs"}}
    stages = {"stages": [{"gptq": {"bits": 4}}]} if "stages" not in part else {}
    recipe = Recipe.parse(yaml.safe_dump(rest | stages | part))
    for export in recipe.exports:
        exporter_named(export.format).Options(**export.options)
