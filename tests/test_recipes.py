"""The recipes that come with flatq, and the examples in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flatq.errors import RecipeError
from flatq.export.protocols import exporter_named
from flatq.recipe.grammar import Recipe

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").glob("**/*.y*ml"))
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
EXAMPLES = [
    pytest.param(text, id=f"{page.name}-{index}")
    for page in PAGES
    for index, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL))
    if text.startswith("version:")
]


def test_there_are_recipes_and_examples() -> None:
    assert len(FILES) >= 4
    assert EXAMPLES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_loads_and_its_name_says_what_it_does(file: Path) -> None:
    recipe = Recipe.load(file)
    named = re.search(r"-flat(\d+)", file.stem)
    assert (named is None) == (recipe.flat is None)
    if named and recipe.flat:
        assert round(100 * (1 - (recipe.flat.keep_ratio or 1))) == int(named[1])
    coded = re.search(r"-int(\d)", file.stem)
    assert (coded is None) == (recipe.gptq is None)
    if coded and recipe.gptq:
        assert recipe.gptq.bits == int(coded[1])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_exporters_accept_the_options_of_a_recipe(file: Path) -> None:
    for export in Recipe.load(file).exports:
        exporter_named(export.format).Options(**export.options)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_is_in_the_table(file: Path) -> None:
    assert f"({file.name})" in (ROOT / "recipes" / "README.md").read_text()


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_of_the_documentation_is_a_recipe(text: str) -> None:
    try:
        Recipe.parse(text)
    except RecipeError as error:
        pytest.fail(str(error))


def test_the_folder_holds_only_data() -> None:
    assert {file.suffix for file in (ROOT / "recipes").rglob("*") if file.is_file()} <= {".yaml", ".md"}
