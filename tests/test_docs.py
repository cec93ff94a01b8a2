"""The documentation as text: links lead somewhere, generated pages are not stale, pages keep their form."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from flatq.export.protocols import exporter_named

ROOT = Path(__file__).parents[1]
WRITTEN = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "exporters", "recipes")),
]
LOG = ROOT / "docs" / "log"  # the notebook stays as it was written
PAGES = [page for page in WRITTEN if LOG not in page.parents]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
MOST_WORDS, MOST_DECISION_LINES = 700, 40
LANGUAGES = {"sh", "python", "yaml", "toml", "text"}
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), link
        assert ROOT in place.parents, f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(place), link


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", prose(page))
        todo += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert {named(page) for page in WRITTEN} <= {named(page) for page in seen}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    names = re.findall(
        r"(?<![\w/.])(?:benchmarks|docs|exporters|flatq|recipes|tests)/[\w\-./]+\.(?:py|md|ya?ml|json|svg)",
        page.read_text(),
    )
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_readme_is_short() -> None:
    before_links = (ROOT / "README.md").read_text().partition("\n## Links\n")[0]
    words = [word for word in before_links.split() if re.search(r"\w", word)]
    assert len(words) <= MOST_WORDS


def test_the_readme_states_no_number_that_the_results_do_not_have() -> None:
    results = (ROOT / "docs" / "results.md").read_text()
    costs = (ROOT / "README.md").read_text().partition("## What it costs")[2].partition("\n## ")[0]
    numbers = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]\d)", costs)
    assert len(numbers) > 8
    rounded = {"1.5"}  # of the median that the results have: 1.48
    assert [number for number in numbers if number not in results and number not in rounded] == []


def test_the_tree_that_is_shown_is_the_tree() -> None:
    packages = sorted(path.parent.name for path in (ROOT / "flatq").glob("*/__init__.py"))
    shown = (ROOT / "README.md").read_text().partition("```text\nflatq/\n")[2].partition("```")[0]
    assert sorted(re.findall(r"^  (\w+)/", shown, re.MULTILINE)) == packages
    for folder in re.findall(r"^(\w+)/", shown, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    rows = (ROOT / "docs" / "architecture.md").read_text().partition("## The tree")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)/` \|", rows, re.MULTILINE)) == packages


@pytest.mark.parametrize("script", ["benchmarks/results_page.py", "docs/generate_cli.py"])
def test_a_generated_page_is_not_stale(script: str) -> None:
    shown = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_of_code_says_its_language(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("form", ["onnx", "gguf", "safetensors"])
def test_a_format_s_page_lists_all_options_of_its_exporter(form: str) -> None:
    section = (ROOT / "docs" / f"{form}.md").read_text().split("## All options")[1].split("\n## ")[0]
    listed = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(listed) == sorted(exporter_named(form).Options.model_fields)


def test_there_are_decisions_and_they_are_numbered() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    index = (ROOT / "docs" / "decisions" / "README.md").read_text()
    for page in DECISIONS:
        title = page.read_text().partition("\n")[0].removeprefix(f"# {page.name[:4]}. ")
        assert f"| [{page.name[:4]}]({page.name}) | {title} |" in index


@pytest.mark.parametrize("page", DECISIONS, ids=named)
def test_a_decision_is_short_and_says_what_decided(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) <= MOST_DECISION_LINES
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[:2] == ["Decision", "The numbers that decided"]
    assert set(headings[2:]) <= {"Rejected"}
    assert text.splitlines()[2].startswith("**Status:** ")


@pytest.mark.parametrize("page", DECISIONS, ids=named)
def test_a_decision_s_numbers_are_those_of_a_log_or_of_the_results(page: Path) -> None:
    sources = [*LOG.glob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md"), ROOT / "docs" / "results.md"]
    known = "".join(source.read_text() for source in sources)
    numbers = re.findall(r"(?<![\w.])\d+\.\d+(?:e-\d+)?(?![\w.]\d)", prose(page))
    assert [number for number in numbers if number not in known] == []


def test_comments_name_decisions_that_exist() -> None:
    numbers = {page.name[:4] for page in DECISIONS}
    for file in [*ROOT.glob("flatq/**/*.py"), *ROOT.glob("exporters/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for number in re.findall(r"docs/decisions/(\d{4})", file.read_text()):
            assert number in numbers, named(file)


def test_project_files_agree_on_version_and_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == project["version"]
    named_pythons = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r"Python :: 3\.\d", name)]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())
    assert workflow["jobs"]["check"]["strategy"]["matrix"]["python"] == named_pythons
    assert project["requires-python"] == f">={named_pythons[0]}"
