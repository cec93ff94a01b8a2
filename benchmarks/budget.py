r"""One budget for widths and bits against either alone, at the same bytes, on text that was not calibrated on.

    python benchmarks/budget.py --work /tmp/budget --text wikipedia=wiki.valid.txt
    python benchmarks/budget.py --work /tmp/budget --text wikipedia=wiki.valid.txt --share 0.65 --only joint

For every size (a share of the dense 4-bit file in groups of 64) three plans of the same ``budget: {size}`` for ONNX:
``joint``, ``bits`` (gptq alone: 2, 4 and 8 bits mixed) and ``widths`` (flat, and 4 bits in groups of 64 for every
linear). The plan, one walk, and the damage ``ln(perplexity / dense perplexity)`` on ``--rows`` rows of 512 tokens of
each text: the held-out part of python-docs, which is calibrated on, Python source code, and the texts given.

Measurements are kept in WORK and shared by all rows; a finished row is a line of WORK/rows.jsonl, and the same command
goes on after it. ``--table`` writes benchmarks/results/tables/14-joint.json from all lines.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from calibration_text import LENGTH, SMOLLM2, middle, source_code
from results_page import write_table
from torch import Tensor

from flatq.calibration.perplexity import perplexity
from flatq.calibration.states import WORKING_SET, Execution
from flatq.export.planned import planned_exports
from flatq.job import Job
from flatq.machine.environment import cpu_name
from flatq.model.weights import Weights
from flatq.pipeline.run import compressed, open_source
from flatq.pipeline.texts import tokens_of
from flatq.plan.joint import plan_jointly
from flatq.plan.measure import measure, measure_sensitivity
from flatq.plan.problem import Problem, problem_of
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source

TABLE = Path(__file__).parent / "results/tables/14-joint.json"
SHARES = (0.45, 0.6, 0.7, 0.85, 1.0)
DENSE = 74_900_000  # bytes of the ONNX file of SmolLM2 in 4 bits, groups of 64 with zero points, from shapes
KINDS = ("joint", "bits", "widths")
ONE = "4-64-zeros"  # the choice of ``widths``


def recipe_of(kind: str, size: int, model: str) -> Recipe:
    """The recipe of a row."""
    narrowing: list[dict[str, Any]] = [] if kind == "bits" else [{"flat": {}}]
    return Recipe.model_validate(
        {
            "version": 1,
            "model": model,
            "calibration": {"dataset": "python-docs", "samples": 64, "seq_len": 256},
            "evaluation": {"dataset": "held-out", "tokens": 4096, "seq_len": LENGTH},
            "budget": {"size": f"{size / 1e6:g}MB"},
            "stages": [*narrowing, {"gptq": {}}],
            "exports": [{"onnx": {}}],
        }
    )


def measured(
    given: argparse.Namespace, source: Source, kind: str, share: float, texts: dict[str, Tensor]
) -> dict[str, Any]:
    """A row: the plan, the walk, the damage by text and the size of the export."""
    recipe = recipe_of(kind, round(share * DENSE), given.model)
    (item,) = exports = planned_exports(recipe)
    tokens = tokens_of(recipe, source.tokenizer(), source.config.vocab)
    with tempfile.TemporaryDirectory(dir=given.work) as place:
        folder = RunFolder(Path(place) / "run", recipe)
        with folder.working():
            execution = Execution.of(recipe.calibration, "cpu", WORKING_SET)
            job = Job(recipe, source, tokens, folder, execution, given.work / "measurements")
            problem = problem_of(recipe, source.config, exports, job.itemsize)
            errors = measure(job, problem)
            began = time.monotonic()
            plan = plan_jointly(_only(ONE, problem) if kind == "widths" else problem, errors)
            planned = time.monotonic() - began
            if recipe.flat is not None:
                measure_sensitivity(job, problem)
            few = replace(job, tokens=replace(tokens, calibration=tokens.calibration[: given.samples]))
            artifact = compressed(few, plan.ranks, plan.grids, {"recipe": "", "schema_version": 1})
            out = Path(place) / "export"
            out.mkdir()
            files = item.exporter.write(artifact, out, item.options).files
            stored = sum(path.stat().st_size for path in files if path.suffix in (".onnx", ".data"))
            found = judged(artifact, texts)
    return {
        "kind": kind,
        "share": share,
        "tokens": given.samples * recipe.calibration.seq_len,
        "planned": plan.ranks.achieved,
        "bytes": stored,
        "predicted": plan.predicted,
        "from_widths": plan.from_widths,
        "seconds_of_plan": planned,
        "perplexity": found,
    }


def _only(choice: str, problem: Problem) -> Problem:
    """The problem with one choice for the linears of all layers."""
    units = [
        (index, number, replace(unit, choices=tuple(c for c in unit.choices if c.name == choice)))
        for index, number, unit in problem.layers
    ]
    return replace(problem, layers=tuple(units))


def judged(weights: Weights, texts: dict[str, Tensor]) -> dict[str, float]:
    """Perplexity by text."""
    return {name: perplexity(weights, rows).value for name, rows in texts.items()}


def texts_of(given: argparse.Namespace, source: Source) -> dict[str, Tensor]:
    """Rows of every text, int64 [rows, LENGTH]."""
    tokenizer = source.tokenizer()
    recipe = recipe_of("joint", DENSE, given.model)
    found = {"python-docs": tokens_of(recipe, tokenizer, source.config.vocab).heldout, "code": source_code(tokenizer)}
    for entry in given.text:
        name, _, file = entry.partition("=")
        found[name] = middle([Path(file).read_text(errors="replace")], tokenizer)
    return {name: rows[: given.rows] for name, rows in found.items()}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau of pairs without ties: the excess of pairs in the same order."""
    signs = [math.copysign(1, (a - c) * (b - d)) for (a, b), (c, d) in combinations(pairs, 2)]
    return sum(signs) / len(signs)


def table(rows: Sequence[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """All lines as a table for the results page."""
    dense = next(row for row in rows if row["kind"] == "dense")["perplexity"]
    away = [name for name in dense if name != "python-docs"]
    plans = sorted((row for row in rows if row["kind"] != "dense"), key=lambda row: (row["bytes"], row["kind"]))
    lines, pairs = [], []
    for row in plans:
        damage = {name: math.log(row["perplexity"][name] / dense[name]) for name in dense}
        mean = sum(damage[name] for name in away) / len(away)
        pairs.append((row["predicted"], mean))
        cells = [row["kind"], round(row["bytes"] / 1e6, 2), round(100 * (row["planned"] / row["bytes"] - 1), 2)]
        lines.append([*cells, *(round(x, 3) for x in (row["predicted"], *damage.values(), mean))])
    tau = ""
    if len(pairs) > 2:
        found = f"{rank_correlation(pairs):.2f} ({len(pairs)} plans)"
        tau = f" Kendall's rank correlation of predicted and mean damage: {found}."
    return {
        "section": "Quality at equal bytes",
        "title": "One budget for widths and bits, and either alone",
        "note": "SmolLM2-135M-Instruct as ONNX, calibrated on python-docs "
        f"({plans[0]['tokens']:,} tokens in the walk). Damage in nats on {given.rows} rows of {LENGTH} tokens of each "
        "text; the mean is over the texts that were not calibrated on. bits: gptq alone, mixed; widths: flat, and 4 "
        "bits in groups of 64." + tau,
        "columns": ["plan", "file, MB", "predicted size, % off", "predicted", *dense, "mean, not calibrated on"],
        "machine": f"{cpu_name()}, 2 cores, shared with other work",
        "command": "python benchmarks/budget.py --work DIR --text wikipedia=FILE "
        f"--share 0.6 --share 0.85 --samples {given.samples} --rows {given.rows} --table",
        "rows": lines,
    }


def main() -> None:
    """Measure the rows that are not in WORK/rows.jsonl yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="measurements, rows and temporary files")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--text", action="append", default=[], help="NAME=FILE")
    parser.add_argument("--share", type=float, action="append", help="of the dense 4-bit file")
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--samples", type=int, default=64, help="rows of 256 calibration tokens in the walk")
    parser.add_argument("--rows", type=int, default=8, help="rows of each text that is judged on")
    parser.add_argument("--table", action="store_true", help="write the table of the results page")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    path = given.work / "rows.jsonl"
    source = open_source(recipe_of("joint", DENSE, given.model))
    texts = texts_of(given, source)

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if not any(row["kind"] == "dense" for row in rows()):
        add({"kind": "dense", "perplexity": judged(source, texts)})
    for share in given.share or SHARES:
        for kind in given.only or KINDS:
            if not any((row["kind"], row.get("share")) == (kind, share) for row in rows()):
                add(measured(given, source, kind, share, texts))
    if given.table:
        write_table(TABLE, **table(rows(), given))


if __name__ == "__main__":
    main()
