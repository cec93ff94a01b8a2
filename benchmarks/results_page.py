"""Writes ``docs/results.md``, its figure and the README's table from what lies in ``results/``.

    python benchmarks/results_page.py            write them
    python benchmarks/results_page.py --check    write nothing; exit code 1 if one of them is stale

Measurements with a program of their own keep their files (``quality.json``, ``gptq.json``,
``calibration_text.jsonl``). Every other measured table is one JSON file in ``results/tables/``: a title, columns, rows,
and the machine, date, commit and command that they are of. The commit is the one that recorded the numbers. Files are
read in the order of their names.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import quality_summary
import quality_tables
import typer
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flatq.files import write_json

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
FIGURE = "docs/images/results.svg"
README_TABLE, SPEED_TABLE, BUDGET_TABLE = "01-quickstart", "20-onnx-speed", "14-joint"

INTRODUCTION = f"""# Results

Every measured table, with the command that measures it. `python benchmarks/results_page.py` generates this page from
[benchmarks/results](../benchmarks/results); do not edit it. How each number is measured is said in
[benchmarks/README.md](../benchmarks/README.md), what was decided by it in [decisions](decisions/README.md).

The model is SmolLM2-135M-Instruct where nothing else is said. *Damage* is `ln(perplexity / dense perplexity)` on
held-out text: 0 is no loss, 0.1 is a perplexity 10.5 % higher.

![Damage by share removed, damage by size of the file, and decoding speed]({FIGURE.removeprefix("docs/")})

## Quality

In brackets: the ratio to FLAT-LLM as published (`paper iprs`). Deviations are over the calibration seeds. Every row,
seconds, and GPTQ on top of FLAT are in [quality.md](../benchmarks/results/quality.md). The baselines `svd`, `svd-llm`,
`slicegpt` and `magnitude` are small implementations of ours, one seed each. Rows may be of different versions of the
code, whose digest is beside each row in `quality.json`. FILE is the validation text of WikiText-2:

```sh
python benchmarks/quality.py --keep 0.8 --only paper --only default --only truncation
python benchmarks/quality.py --text FILE --keep 0.8 --keep 0.7 --keep 0.5 --seed 42 --seed 43 --seed 44 \\
  --only "default curves" --only "paper iprs"
python benchmarks/quality.py --text FILE --keep 0.8 --keep 0.7 --keep 0.5 --seed 42 --only svd --only slicegpt \\
  --only magnitude
python benchmarks/quality.py --text python-docs --score-text FILE --keep 0.8 --only "default curves" --only "paper iprs"
```
"""


class Table(BaseModel):
    """One measured table.

    Attributes:
        columns: column headings; the first one heads the row labels.
        rows: one list per row, as long as ``columns``; numbers are shown as they are written.
        commit: the commit that recorded the numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    section: str = Field(min_length=1)
    title: str = Field(min_length=1)
    note: str
    columns: list[str]
    rows: list[list[int | float | str]]
    machine: str = Field(min_length=1)
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    commit: str = Field(min_length=1)
    command: str = Field(min_length=1)

    @model_validator(mode="after")
    def _rectangular(self) -> Table:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: row {row[0]!r} has {len(row)} cells for {len(self.columns)} columns")
        return self

    def grid(self) -> str:
        """The table alone, in Markdown."""
        lines = ["| " + " | ".join(self.columns) + " |", "|---|" + "---:|" * (len(self.columns) - 1)]
        lines += ["| " + " | ".join(_shown(cell) for cell in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def markdown(self) -> str:
        """Heading, note, table and origin."""
        note = f"{self.note}\n\n" if self.note else ""
        origin = f"`{self.command}` · {self.machine} · {self.date} · commit {self.commit}"
        return f"### {self.title}\n\n{note}{self.grid()}\n{origin}\n"


def write_table(file: Path, **about: Any) -> None:
    """Write a table that was measured now.

    Args:
        file: JSON, usually in ``results/tables/``.
        about: the fields of ``Table`` but ``date`` and ``commit``, which are today's and the checkout's.
    """
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=HERE).strip()
    table = Table(**about, date=date.today().isoformat(), commit=commit)
    write_json(file, table.model_dump())


def _shown(cell: float | str) -> str:
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def read_tables(folder: Path) -> dict[str, Table]:
    """All tables of a folder, by file name without suffix, in the order of their names."""
    return {file.stem: Table.model_validate_json(file.read_bytes()) for file in sorted(folder.glob("*.json"))}


def page(results: Path = RESULTS) -> str:
    """The text of ``docs/results.md``."""
    parts = [INTRODUCTION, quality_summary.markdown(read_quality(results))]
    parts.append("#" + (results / "calibration_text.md").read_text())
    parts.append("## GPTQ beside GPTQModel\n\n2,656 calibration tokens of WikiText-2, scored on 3,072 others.\n")
    parts.append((results / "gptq.md").read_text())
    parts.append("`python benchmarks/gptq.py FILE --peer PYTHON`\n")
    tables = read_tables(results / "tables")
    for section, members in itertools.groupby(tables.values(), key=lambda table: table.section):
        parts.append(f"## {section}\n")
        parts += [table.markdown() for table in members]
    return "\n".join(parts)


def read_quality(results: Path) -> dict[str, quality_tables.Result]:
    """The rows of ``quality.json``."""
    rows: dict[str, quality_tables.Result] = json.loads((results / "quality.json").read_text())["rows"]
    return rows


def readme(text: str, results: Path = RESULTS) -> str:
    """The README's text with its table as it should be.

    Raises:
        SystemExit: the text has no markers for it.
    """
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"README.md has no {BEGIN} followed by {END}; put both where the table belongs")
    table = Table.model_validate_json((results / "tables" / f"{README_TABLE}.json").read_bytes())
    return f"{before}{BEGIN}\n{table.grid()}{END}{after}"


def figure(results: Path = RESULTS) -> str:
    """Damage of the two methods, damage by bytes, and speed of the graphs side by side: the text of an SVG file."""
    with matplotlib.rc_context({"svg.hashsalt": "flatq", "font.size": 9, "svg.fonttype": "none"}):
        drawing = Figure(figsize=(12.0, 3.0), layout="constrained")
        left, middle, right = drawing.subplots(1, 3)
        groups = quality_tables.grouped(read_quality(results).values())
        for label, name in (("paper iprs", "FLAT-LLM as published"), ("default curves", "flatq's default")):
            chosen = [g for g in groups if g[0]["label"] == label and len(g) == 3 and not g[0]["gptq"]]
            points = sorted((100 * (1 - g[0]["keep_ratio"]), quality_tables.damage(g) or 0.0) for g in chosen)
            left.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        left.set(xlabel="% of the decoder removed", ylabel="damage, ln(ppl / dense ppl)", ylim=(0, None))
        left.set_title("WikiText-2, three seeds", loc="left")
        left.legend(frameon=False)
        budget = Table.model_validate_json((results / "tables" / f"{BUDGET_TABLE}.json").read_bytes())
        for kind in sorted({str(row[0]) for row in budget.rows}):
            points = sorted((float(row[1]), float(row[-1])) for row in budget.rows if row[0] == kind)
            middle.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=kind)
        middle.set(xlabel="ONNX file, MB", ylabel="damage, other texts", yscale="log")
        middle.set_title("Widths and bits at equal bytes", loc="left")
        middle.legend(frameon=False)
        speed = Table.model_validate_json((results / "tables" / f"{SPEED_TABLE}.json").read_bytes())
        column = speed.columns.index("2 threads, 128")
        bars = right.barh(
            [str(row[0]) for row in speed.rows], [float(str(row[column]).split()[0]) for row in speed.rows]
        )
        right.bar_label(bars, padding=2)
        right.invert_yaxis()
        right.margins(x=0.15)
        right.set_title("decode, tokens/s, 2 CPU threads", loc="left")
        file = io.StringIO()
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue().rstrip() + f"\n{_stamp(results)}\n"


def _stamp(results: Path) -> str:
    """What the figure was drawn from: its text differs between versions of matplotlib, its data must not."""
    tables = ((results / "tables" / f"{name}.json").read_bytes() for name in (BUDGET_TABLE, SPEED_TABLE))
    data = b"".join(((results / "quality.json").read_bytes(), *tables))
    return f"<!-- drawn from {hashlib.sha256(data).hexdigest()} -->"


def stale(root: Path = ROOT, results: Path = RESULTS) -> list[str]:
    """Paths of the generated files that are not what ``results`` gives."""
    written = {name: (root / name).read_text() if (root / name).exists() else "" for name in _FILES}
    found = [] if written["docs/results.md"] == page(results) else ["docs/results.md"]
    found += [] if written["README.md"] == readme(written["README.md"], results) else ["README.md"]
    return found + ([] if _stamp(results) in written[FIGURE] else [FIGURE])


_FILES = ("docs/results.md", "README.md", FIGURE)


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a generated file is stale.")] = False,
) -> None:
    """Write the results page, its figure and the README's table, or check them."""
    old = stale()
    if check:
        if old:
            sys.exit(f"stale: {', '.join(old)}; run python benchmarks/results_page.py")
        return
    (ROOT / "docs/results.md").write_text(page())
    (ROOT / "README.md").write_text(readme((ROOT / "README.md").read_text()))
    if FIGURE in old:
        (ROOT / FIGURE).parent.mkdir(exist_ok=True)
        (ROOT / FIGURE).write_text(figure())


if __name__ == "__main__":
    typer.run(main)
