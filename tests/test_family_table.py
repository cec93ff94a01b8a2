"""The page of families is what was measured, and can be measured again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from flatq.model.families import FAMILIES
from flatq.model.measured import TABLE, Cell, lines
from tests.family_table import COLUMNS, MODELS, measured, save_tokenizer

DOCS = Path(__file__).parents[1] / "docs"
WRITTEN: dict[str, dict[str, Cell]] = json.loads(TABLE.read_text())
EXACT_GELU, EXACT = 0.05, 5e-4  # llama.cpp looks GELU up in a table of float16 numbers
LLAMA = importlib.util.find_spec("llama_cpp") is not None
QUICK = ("phi3, longrope, partial",)


def test_every_family_is_measured() -> None:
    assert list(WRITTEN) == list(MODELS)
    assert {name.partition(",")[0] for name in MODELS} == set(FAMILIES)
    assert all(tuple(row) == COLUMNS for row in WRITTEN.values())


@pytest.mark.parametrize("name", MODELS)
def test_what_was_measured_is_right(name: str) -> None:
    row = WRITTEN[name]
    for column, cell in row.items():
        if isinstance(cell, float):
            assert cell < (EXACT_GELU if name.startswith("gemma") and "gguf" in column else EXACT), column
    assert isinstance(row["parity"], float)
    assert isinstance(row["full rank"], float)
    assert (row["flat"], row["gptq"]) == ("yes", "yes")


def test_the_page_is_generated_from_the_table() -> None:
    spec = importlib.util.spec_from_file_location("generate_families", DOCS / "generate_families.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.page(WRITTEN) == (DOCS / "families.md").read_text()


def test_ls_lists_every_row() -> None:
    shown = list(lines())
    assert [line.split("  ")[0] for line in shown] == list(MODELS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODELS]
)
def test_a_row_can_be_measured_again(name: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    again = measured(name, tmp_path / "work", tmp_path / "tokenizer")
    for column, cell in again.items():
        if isinstance(cell, float):
            written = WRITTEN[name][column]
            assert isinstance(written, float)
            assert cell < max(10 * written, 1e-4), column
        elif not LLAMA and "llama-cpp-python is not installed" in cell:
            assert "gguf" in column, "only these columns are run in llama.cpp"
        else:
            assert cell == WRITTEN[name][column]
