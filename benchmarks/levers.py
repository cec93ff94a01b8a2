"""What do the optional levers bring? Rounding alone and FLAT alone, each with and without them. One command, resumable.

    python benchmarks/levers.py                      # all rows: hours on two cores
    python benchmarks/levers.py --only W3            # those whose name holds this

Calibrated on text that the model writes (the quickstart's 64 x 256 tokens), scored on three texts of kinds that nothing
was calibrated on: code of the standard library, numpy's licences, the held-out part of python-docs. Damage is
``ln(perplexity / dense perplexity)``. Each row is a line of ``results/levers.jsonl``; when all are there the table
``results/tables/14-levers.json`` is written.
"""

from __future__ import annotations

import logging
import math
import platform
import sys
import tempfile
import time
from importlib.metadata import files
from pathlib import Path
from typing import Annotated, Any

import calibration_text as ct
import typer
from results_page import write_table

from flatq.calibration.states import WORKING_SET, Execution
from flatq.calibration.tokens import token_batches
from flatq.job import Job
from flatq.pipeline.run import compressed
from flatq.plan.decide import bit_plan, rank_plan
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder

log = logging.getLogger("levers")
HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results/levers.jsonl", HERE / "results/tables/14-levers.json"
WORK = Path(tempfile.gettempdir()) / "flatq-levers"
STEPS = 200


def gptq(bits: int, group: int, *, symmetric: bool, steps: int = 0) -> list[dict[str, Any]]:
    """The stages of a row that only rounds; ``steps`` trains codes and scales."""
    return [{"gptq": {"bits": bits, "group_size": group, "symmetric": symmetric, "tune_steps": steps}}]


def rows(steps: int) -> dict[str, list[dict[str, Any]]]:
    """Stages by name of the row."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, bits, group, symmetric in (("W4 g32", 4, 32, True), ("W3 g128", 3, 128, True), ("W2 g64", 2, 64, False)):
        found[f"{name}, GPTQ"] = gptq(bits, group, symmetric=symmetric)
        found[f"{name}, GPTQ, tune_steps: {steps}"] = gptq(bits, group, symmetric=symmetric, steps=steps)
    return found | {f"FLAT, {1 - keep:.0%} removed": [{"flat": {"keep_ratio": keep}}] for keep in (0.8, 0.7, 0.5)}


def measured(lab: ct.Laboratory, name: str, stages: list[dict[str, Any]], model: str) -> dict[str, Any]:
    """Perplexities of a row, and the seconds of one processor that the walk took."""
    text = {**ct.SELF, "samples": 64, "seq_len": 256, "seed": 42}
    scored = {"dataset": "held-out", "tokens": ct.ROWS * ct.LENGTH, "seq_len": ct.LENGTH}
    recipe = Recipe.model_validate(
        {"version": 1, "model": model, "calibration": text, "evaluation": scored, "stages": stages}
    )
    tokens = token_batches(recipe.calibration, recipe.evaluation, lab.source.tokenizer(), lab.writer)
    with tempfile.TemporaryDirectory(dir=lab.work) as place:
        folder = RunFolder(Path(place) / "run", recipe)
        with folder.working():
            job = Job(recipe, lab.source, tokens, folder, Execution.of(recipe.calibration, "cpu", WORKING_SET))
            plan = rank_plan(job)
            grids, busy, started = bit_plan(job, plan), time.process_time(), time.monotonic()
            artifact = compressed(job, plan, grids, {"recipe": "", "schema_version": 1})
            busy, took = time.process_time() - busy, time.monotonic() - started
            found = lab.judge(artifact)
    return {"name": name, "perplexity": found, "cpu_seconds": round(busy, 1), "seconds": round(took, 1)}


def table(lines: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """All rows for ``results_page.py``."""
    by_name = {line["name"]: line for line in lines}
    dense = by_name["dense"]["perplexity"]
    found = []
    for name in names:
        damage = {text: math.log(value / dense[text]) for text, value in by_name[name]["perplexity"].items()}
        mean = sum(damage.values()) / len(damage)
        found.append([name, *(round(d, 3) for d in damage.values()), round(mean, 3), by_name[name]["cpu_seconds"]])
    shown = ", ".join(f"{text} {value:.2f}" for text, value in dense.items())
    return {
        "section": "Quality by calibration text, and by method",
        "title": "Optional levers: trained rounding",
        "note": f"SmolLM2, calibrated on 64 x 256 tokens of self; damage on texts not calibrated on, {ct.ROWS} rows of "
        f"{ct.LENGTH} tokens each; dense perplexity: {shown}. Seconds of one processor for the walk.",
        "columns": ["", *dense, "mean", "seconds"],
        "machine": f"{platform.machine()}, shared with other work",
        "command": "python benchmarks/levers.py",
        "rows": found,
    }


def laboratory(model: str, work: Path) -> ct.Laboratory:
    """The model and the texts it is judged on."""
    licences = [Path(str(file.locate())) for file in files("numpy") or [] if file.name == "LICENSE.txt"]
    longest = max(licences, key=lambda path: path.stat().st_size)
    lab = ct.laboratory(model, [f"licence={longest}"], work)
    del lab.texts["self"]  # what it is calibrated on
    return lab


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Folder, hub id, .gguf file or package:DIST/FILE.")] = ct.SMOLLM2,
    out: Annotated[Path, typer.Option(help="Results, JSON lines.")] = RESULTS,
    steps: Annotated[int, typer.Option(help="Steps of the trained rounding.")] = STEPS,
    only: Annotated[list[str] | None, typer.Option(help="Only rows whose name holds this.")] = None,
) -> None:
    """Measure the rows that are not in ``--out`` yet."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("flatq").setLevel(logging.WARNING)
    WORK.mkdir(parents=True, exist_ok=True)
    wanted = {name: stages for name, stages in rows(steps).items() if not only or any(part in name for part in only)}
    missing = [name for name in ["dense", *wanted] if name not in {line["name"] for line in ct.lines(out)}]
    if missing:
        lab = laboratory(model, WORK)
        for name in missing:
            found = {"name": "dense", "perplexity": lab.judge(lab.source)}
            ct._add(out, found if name == "dense" else measured(lab, name, wanted[name], model))
    if not only:
        write_table(TABLE, **table(ct.lines(out), list(wanted)))
        print(TABLE)


if __name__ == "__main__":
    app()
