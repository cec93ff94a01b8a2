r"""One budget for widths and bits against its baselines, at the same bytes, on text that was not calibrated on.

    python benchmarks/budget.py --work /tmp/budget --text wikipedia=wiki.valid.txt
    python benchmarks/budget.py --work /tmp/budget --text wikipedia=wiki.valid.txt --share 0.85 --only joint

For every size (a share of the dense 4-bit file) up to five models for ONNX: the plans of ``budget: {size}`` as
``joint``, ``bits`` (gptq alone) and ``widths`` (flat, and 4 bits in groups of 64 for every linear); ``average``
(``average_bits`` of 2, 4 and 8 in groups of 64 with zero points, by the same measured errors) and ``uniform`` (one
setting for every linear, where one has almost that size). Of each the plan, one walk, and the damage
``ln(perplexity / dense perplexity)`` on ``--rows`` rows of 512 tokens of each text: the held-out part of python-docs,
Python source code, and the texts given. The artifact is scored, which ``flatq`` verifies to be what its exports hold.

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
from pathlib import Path
from statistics import correlation
from typing import Any

from calibration_text import LENGTH, SMOLLM2, middle, source_code
from results_page import write_table
from torch import Tensor

from flatq.budget.bought import bought
from flatq.budget.joint import JointPlan, Measured, plan_jointly
from flatq.budget.measure import measure, measure_sensitivity
from flatq.budget.problem import Problem, problem_of
from flatq.calibration.perplexity import perplexity
from flatq.calibration.self_text import SelfText
from flatq.calibration.states import WORKING_SET, Execution
from flatq.calibration.tokens import Tokens, token_batches
from flatq.compress.plan import RankPlan
from flatq.errors import RecipeError
from flatq.export.planned import planned_exports
from flatq.job import Job
from flatq.machine.environment import cpu_name
from flatq.model.grid import Grid
from flatq.model.weights import Weights
from flatq.pipeline.run import compressed, open_source
from flatq.quantize.bits import choose
from flatq.quantize.choices import named
from flatq.quantize.grids import planned_grids
from flatq.recipe.blocks import GptqSpec
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source

TABLE = Path(__file__).parent / "results/tables/14-joint.json"
SHARES = (0.45, 0.625, 0.75, 0.85, 1.0)
DENSE = 74_900_000  # bytes of the ONNX file of SmolLM2 in 4 bits: 72.7 MB in groups of 64, 76.0 MB in groups of 32
NONE = ((0.45, "bits"), (0.45, "average"), (0.45, "uniform"), (0.85, "uniform"))  # nothing of the kind has this size
TEXTS = {"self": "text of the model's own", "python-docs": "python-docs"}
KINDS = ("joint", "bits", "widths", "average", "uniform")
ONE = "4-64-zeros"  # the choice of ``widths``
TABLE_SPEC = {"bits": 4, "group_size": 32}  # of ``average`` and ``uniform``
UNIFORM = {  # the setting with almost the bytes of a share
    0.625: {"bits": 2, "group_size": 64, "symmetric": False},
    0.75: {"bits": 2, "group_size": 16, "symmetric": True},
    1.0: {"bits": 4, "group_size": 64, "symmetric": False},
}


def recipe_of(kind: str, size: int, model: str, text: str = "python-docs") -> Recipe:
    """The recipe of a row; for ``average`` and ``uniform`` that of ``bits``, whose plan is not used."""
    narrowing: list[dict[str, Any]] = [{"flat": {}}] if kind in ("joint", "widths") else []
    return Recipe.model_validate(
        {
            "version": 1,
            "model": model,
            "calibration": {"dataset": text, "samples": 64, "seq_len": 256},
            "evaluation": {"dataset": "python-docs", "tokens": 4096, "seq_len": LENGTH},
            "budget": {"size": f"{size / 1e6:g}MB"},
            "stages": [*narrowing, {"gptq": {}}],
            "exports": [{"onnx": {}}],
        }
    )


def measured(
    given: argparse.Namespace, source: Source, kind: str, share: float, texts: dict[str, Tensor]
) -> dict[str, Any]:
    """A row: the plan, the walk, the damage by text and the size of the export."""
    recipe = recipe_of(kind, round(share * DENSE), given.model, given.calibration)
    (item,) = exports = planned_exports(recipe)
    tokens = drawn(given, source, recipe)
    with tempfile.TemporaryDirectory(dir=given.work) as place:
        folder = RunFolder(Path(place) / "run", recipe)
        with folder.working():
            execution = Execution.of(recipe.calibration, "cpu", WORKING_SET)
            job = Job(recipe, source, tokens, folder, execution, given.work / "measurements")
            problem = problem_of(recipe, source.config, exports, job.itemsize)
            errors = measure(job, problem)
            began = time.monotonic()
            plan = plan_of(kind, share, problem, errors)
            planned = time.monotonic() - began
            if recipe.flat is not None:
                measure_sensitivity(job, problem)
            few = replace(job, tokens=replace(tokens, calibration=tokens.calibration[: given.samples]))
            artifact = compressed(few, plan.ranks, plan.grids, {"recipe": "", "schema_version": 1})
            walked = time.monotonic() - began
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
        "seconds": [round(walked), round(time.monotonic() - began)],
        "perplexity": found,
        "plan": bought(problem, plan),
    }


def drawn(given: argparse.Namespace, source: Source, recipe: Recipe) -> Tokens:
    """Calibration and evaluation tokens; text of the model's own is kept in WORK."""
    return token_batches(
        recipe.calibration, recipe.evaluation, source.tokenizer(), SelfText(source, given.work / "self-text")
    )


def plan_of(kind: str, share: float, problem: Problem, errors: Measured) -> JointPlan:
    """The plan of a row.

    Raises:
        RecipeError: nothing of this kind is small enough.
    """
    if kind in ("joint", "bits"):
        return plan_jointly(problem, errors)
    if kind == "widths":
        return plan_jointly(_only(ONE, problem), errors)
    if kind == "uniform":
        spec = GptqSpec.model_validate({**UNIFORM[share], "embedding": TABLE_SPEC})
        return _made(problem, errors, planned_grids(problem.config, spec))
    settings = {"bit_choices": (2, 4, 8), "group_size": 64, "symmetric": False, "embedding": TABLE_SPEC}
    spec = GptqSpec.model_validate({"average_bits": 4, **settings})
    low, high, best = 2.0, 8.0, JointPlan(RankPlan((), 0, math.inf), {}, math.inf, 0)
    for _ in range(12):
        spec = spec.model_copy(update={"average_bits": (low + high) / 2})
        bits = choose(problem.config, spec, {name: _by_bits(costs) for name, costs in errors.errors.items()})
        plan = _made(problem, errors, planned_grids(problem.config, spec, bits))
        if plan.ranks.achieved <= problem.prices.limit:
            low, best = (low + high) / 2, plan
        else:
            high = (low + high) / 2
    if not best.grids:
        raise RecipeError("average_bits: no average is small enough")
    return best


def _by_bits(costs: dict[str, float]) -> dict[str, float]:
    """Errors in groups of 64; 8 bits have one group size, whose error is negligible."""
    return {"2": costs["2-64-zeros"], "4": costs["4-64-zeros"], "8": min(costs.values())}


def _made(problem: Problem, errors: Measured, grids: dict[str, Grid]) -> JointPlan:
    """Grids as a plan without narrowing, predicted where its choices were measured, with or without zero points."""
    loss = 0.0
    for unit in problem.units:
        costs, name = errors.errors[unit.name], named(grids[unit.name])
        loss += costs.get(name, costs.get(f"{name}-zeros", math.nan))
    cost = problem.prices.exact(problem.config, grids)
    return JointPlan(RankPlan(problem.config.layers, cost, cost, "size"), grids, loss / 2, 0.0)


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
    recipe = recipe_of("bits", DENSE, given.model)
    found = {"python-docs": drawn(given, source, recipe).heldout, "code": source_code(tokenizer)}
    for entry in given.text:
        name, _, file = entry.partition("=")
        found[name] = middle([Path(file).read_text(errors="replace")], tokenizer)
    return {name: rows[: given.rows] for name, rows in found.items()}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's correlation of pairs without ties: that of their ranks."""
    ranks = [[sorted(values).index(value) for value in values] for values in zip(*pairs, strict=True)]
    return correlation(*ranks)


def table(rows: Sequence[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """All lines as a table for the results page."""
    dense = next(row for row in rows if row["kind"] == "dense")["perplexity"]
    away = [name for name in dense if name != given.calibration]
    plans = sorted((row for row in rows if row["kind"] != "dense"), key=lambda row: (row["share"], row["kind"]))
    lines, pairs = [], []
    for row in plans:
        damage = {name: math.log(row["perplexity"][name] / dense[name]) for name in dense}
        mean = sum(damage[name] for name in away) / len(away)
        predicted = math.isfinite(row["predicted"])
        pairs += [(row["predicted"], mean)] if predicted else []
        cells = [row["kind"], round(row["bytes"] / 1e6, 2), round(100 * (row["planned"] / row["bytes"] - 1), 2) + 0.0]
        shown = [f"{row['predicted']:.3f}" if predicted else "", *(f"{x:.3f}" for x in (*damage.values(), mean))]
        lines.append([*cells, *shown])
    known = [(row["share"], row["kind"]) for row in plans] + list(NONE)
    missing = [(share, kind) for share in SHARES for kind in KINDS if (share, kind) not in known]
    listed = ", ".join(f"{kind} at {share * DENSE / 1e6:.1f} MB" for share, kind in missing)
    more = f" Not measured: {listed}." if listed else ""
    if len(pairs) > 2:
        found = f"{rank_correlation(pairs):.2f} ({len(pairs)} plans)"
        more += f" Spearman's rank correlation of predicted and mean damage: {found}."
    return {
        "section": "Quality at equal bytes",
        "title": "One budget for widths and bits, and its baselines",
        "note": f"SmolLM2-135M-Instruct as ONNX, calibrated on {TEXTS[given.calibration]}, {plans[0]['tokens']:,} "
        f"tokens in the walk. Damage in nats on {given.rows} rows of {LENGTH} tokens of each text; the mean is over "
        "those that were not calibrated on. joint: flat and gptq by one budget; bits: gptq alone by the same budget, "
        "2, 4 and 8 bits mixed; widths: flat, and 4 bits in groups of 64; average: `average_bits` of 2, 4 and 8; "
        "uniform: one setting for all linears, where one has nearly this size (by size: 2 bits in groups of 64 with "
        "zero points, 2 bits in groups of 16 without, 4 bits in groups of 64 with zero points). Embedding and head of "
        "the last two: 4 bits in groups of 32. Bits alone cannot make less than 45.8 MB." + more,
        "columns": ["plan", "file, MB", "predicted size, % off", "predicted", *dense, "mean, not calibrated on"],
        "machine": f"{cpu_name()}, one of 2 cores, shared with other work",
        "command": "python benchmarks/budget.py --work DIR --text wikipedia=FILE "
        f"--calibration {given.calibration} --samples {given.samples} --rows {given.rows} --table",
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
    parser.add_argument("--calibration", default="self", choices=("self", "python-docs"))
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
            if kind == "uniform" and share not in UNIFORM:
                continue
            if not any((row["kind"], row.get("share")) == (kind, share) for row in rows()):
                try:
                    add(measured(given, source, kind, share, texts))
                except RecipeError as refused:  # bits alone do not reach every size
                    print(f"{kind} {share}: {refused}", flush=True)
    if given.table:
        write_table(TABLE, **table(rows(), given))


if __name__ == "__main__":
    main()
