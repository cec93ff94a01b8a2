"""Structure of the code: imports between folders, length of files and functions, plain wording."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "flatq").rglob("*.py"))
EXPORTERS = sorted(folder.name for folder in (ROOT / "exporters").iterdir() if (folder / "__init__.py").exists())
PLUG_INS = sorted((ROOT / "exporters").rglob("*.py"))
SOURCES = [*CORE, *PLUG_INS]
NUMERICS = ["compress/heads", "compress/mlp", "compress/allocate", "quantize/gptq", "model/grid"]
WITHOUT_TORCH = ["flatq", "flatq.recipe", "flatq.cli", "flatq.errors", "flatq.units"]
# From top to bottom: a folder (or file) imports only what stands below it, or itself.
FLOORS = [
    "cli", "verbs", "doctor", "sweep", "pipeline", "plan", "budget", "stages", "report", "evaluate", "integrity", "job",
    "compress",
    "export", "quantize", "sources", "hf", "calibration", "artifact", "run_folder", "phases", "needs",
    "kept", "chats", "tokenizer", "model", "recipe",
    "machine", "units", "linalg", "digests", "cache", "files", "errors",
]  # fmt: skip
ENTRIES = ("__init__", "__main__")  # the package itself, which names things of every floor
MOST_LINES, MOST_FUNCTION_LINES = 350, 60
TEXTS = [*SOURCES, *sorted((ROOT / "flatq").rglob("*.j2")), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Private idiom and metaphors, as regular expressions, with the standard words that a reader searches for.
BANNED = {
    r"of (its|their|his|her|one's) own": "separate, its, no word at all",
    r"nothing but": "only",
    r"go(es)? on on": "continue on",
    r"as (it|they) stands?": "unchanged, today",
    r"for (there|they|it|that|he) (is|are|has|have|was|were)": "because",
    r"(and|,) so (is|are|has|have|does|do|was|were) (a|an|the|what|its|their|all|every|each)": "also, as well",
    r"whatever (it|they|he) likes?": "any",
    r"anew": "again",
    r"(?<!')told": "reported, broadcast, given",
    r"minds?": "Fisher information, is affected by",
    r"heard": "objections",
    r"played": "run, estimated",
    r"agreed": "broadcast",
    r"hand(s|ed)? out": "broadcast, distribute",
    r"distrusts?": "relative ridge, shrinkage, regularized",
    r"(house|door|room|roof|cellar)s?": "package, interface, space, capacity",
    r"(neighbour|stranger|rival|twin|witness|guest|landlord)(s|es)?": "adjacent, unexpected, baseline, copy",
    r"luck|honest|a hair": "measured, unbiased, rounding",
    r"mend(s|ed)?": "fix",
    r"judgedtexts?": "EvaluationText",
    r"misshapen": "wrong shape",
    r"fill(s|ed)? up": "pad with zeros",
    r"likeliest(?! token as the original)": "most likely",
    r"(make|makes|made|making) up for": "compensate",
    r"(take|takes|taken|taking) back": "compensate, undo",
    r"walked along": "the walk also runs",
    r"without a word": "silently",
    r"dress(ed|es)?": "written as",
    r"at hand": "available",
    r"all the same": "anyway",
    r"(quick|quicker|quickest)": "fast",
    r"everybody|anybody|nobody|whoever": "name the reader or caller",
    r"travels?": "is copied",
    r"stand(s)? (beside|behind|before|against|where|in the way)": "is next to, follows, precedes, is not supported",
}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at whatever depth; ``from a import b`` counts as ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(imported: set[str], package: str) -> set[str]:
    return {name for name in imported if f"{name}.".startswith(f"{package}.")}


def floor_of(module: str) -> str:
    """``flatq.model.grid`` stands on the floor ``model``."""
    return module.split(".")[1]


def modules_imported(path: Path) -> set[str]:
    """The modules of flatq that a file imports; of ``from flatq import X`` the module X."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "flatq":
            found |= {f"flatq.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.startswith("flatq.") and not floor_of(name).startswith("__")}


def test_every_file_of_the_core_stands_on_a_floor() -> None:
    there = {path.relative_to(ROOT / "flatq").parts[0].removesuffix(".py") for path in CORE} - set(ENTRIES)
    assert there == set(FLOORS)


@pytest.mark.parametrize("path", CORE, ids=named)
def test_a_folder_imports_only_what_stands_below_it(path: Path) -> None:
    here = path.relative_to(ROOT / "flatq").parts[0].removesuffix(".py")
    if here in ENTRIES:
        return
    upwards = {name for name in modules_imported(path) if FLOORS.index(floor_of(name)) < FLOORS.index(here)}
    assert not upwards, f"{named(path)} stands on the floor {here!r} and imports from above: {sorted(upwards)}"


@pytest.mark.parametrize("path", CORE, ids=named)
def test_the_core_never_imports_an_exporter_or_its_runtime(path: Path) -> None:
    for package in (*EXPORTERS, "onnx", "onnx_ir", "onnxruntime"):
        assert not within(imports(path), package)


@pytest.mark.parametrize("path", PLUG_INS, ids=named)
def test_an_exporter_imports_from_flatq_nothing_but_the_plug_in_api(path: Path) -> None:
    from flatq import export

    assert within(imports(path), "flatq") <= {f"flatq.export.{name}" for name in export.__all__}


def test_every_name_of_the_plug_in_api_is_there_and_the_core_does_not_use_it() -> None:
    from flatq import export

    assert all(hasattr(export, name) for name in export.__all__)
    modules = {path.stem for path in (ROOT / "flatq" / "export").glob("*.py")}
    assert not modules & set(export.__all__), "importing flatq.export.X would replace the name X of the API"
    assert export.__all__ == sorted(export.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    for path in CORE:
        shortcuts = within(imports(path), "flatq.export") & {f"flatq.export.{name}" for name in export.__all__}
        assert not shortcuts, f"{named(path)}: import from the module that defines it"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_json_is_parsed_in_one_place_only(path: Path) -> None:
    """Elsewhere a damaged file would be a traceback; ``from_json`` is for text that is no file of its own."""
    called = {
        f"{node.func.value.id}.{node.func.attr}" if isinstance(node.func.value, ast.Name) else f".{node.func.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    parsers = {call for call in called if call in ("json.load", "json.loads") or call.endswith(".model_validate_json")}
    assert not parsers or named(path) == "flatq/files.py", f"{named(path)}: {parsers}; use read_json or from_json"


@pytest.mark.parametrize("module", NUMERICS)
def test_numerics_know_neither_model_nor_recipe(module: str) -> None:
    imported = imports(ROOT / "flatq" / f"{module}.py")
    for package in ("flatq.model.decoder", "flatq.recipe", "flatq.pipeline", "flatq.model.weights", "transformers"):
        assert not within(imported, package)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_module_that_must_be_quick_brings_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def test_no_module_hides_a_public_name() -> None:
    import flatq

    modules = {path.stem if path.name != "__init__.py" else path.parent.name for path in (ROOT / "flatq").glob("*.py")}
    assert not modules & set(flatq.__all__), "importing flatq.X would replace the function flatq.X by the module"


def test_every_public_name_is_there() -> None:
    import flatq

    for name in flatq.__all__:
        assert getattr(flatq, name) is not None
        assert name in dir(flatq)


def test_a_wrong_public_name_is_an_attribute_error_that_lists_the_right_ones() -> None:
    import flatq

    with pytest.raises(AttributeError, match="public names: Artifact, Recipe"):
        _ = flatq.Recipee


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_file_and_its_functions_are_short_enough_to_read(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= MOST_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_file_starts_by_saying_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert path.stem not in {"utils", "helpers", "common", "base", "manager"}


def banned(text: str) -> list[tuple[int, str]]:
    """Line and complaint of every banned phrase in a text; a phrase may be broken over lines or stand in a name."""
    found = []
    for phrase, words in BANNED.items():
        pattern = re.compile(rf"(?<![a-z])(?:{phrase})(?![a-z])".replace(" ", r"[\s_#]+"), re.IGNORECASE)
        for hit in pattern.finditer(text):
            found.append((text.count("\n", 0, hit.start()) + 1, f"{hit[0]!r}: write {words}"))
    return sorted(found)


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_a_text_has_no_private_idiom(path: Path) -> None:
    assert [f"{named(path)}:{line}: {complaint}" for line, complaint in banned(path.read_text())] == []


def test_the_schemas_texts_have_no_private_idiom() -> None:
    from flatq.recipe.grammar import json_schema

    assert banned(json.dumps(json_schema(), indent=2)) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one\ntwo of its own", 2),
        ("a file of\n    its own", 1),
        ("# it is nothing\n# but noise", 1),
        ("def heard(): ...", 1),
        ("its_neighbours = 3", 1),
        ("3 bits, for there is no kernel", 1),
    ],
)
def test_a_banned_phrase_is_found_with_its_line(text: str, line: int) -> None:
    assert [place for place, _ in banned(text)] == [line]


def test_words_that_only_contain_a_banned_one_are_allowed() -> None:
    assert banned("headroom reminds an artist of households; intold strangeness") == []


def test_no_file_has_conflict_markers() -> None:
    """In a docstring they are valid Python, so no other check sees them."""
    files = [
        path for folder in ("flatq", "exporters", "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*")
    ]
    texts = [path for path in files if path.suffix in (".py", ".md", ".j2", ".yaml", ".json")]
    marker = re.compile(r"^\s*(<{7} |>{7} )", re.MULTILINE)
    assert [named(path) for path in texts if marker.search(path.read_text())] == []
