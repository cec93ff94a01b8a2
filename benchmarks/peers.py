r"""Rounding alone, side by side with other programs: the same weights, calibration rows, scored texts and scorer.

    make peer-autoround                              # an environment of its own for AutoRound (1 GB)
    python benchmarks/peers.py --text wikipedia=FILE --autoround .venv-autoround/bin/python
    python benchmarks/peers.py --text wikipedia=FILE --layers 4 ...    # only the first four layers are rounded

Calibrated on the quickstart's 64 x 256 tokens that the model writes. Peers get those rows as token numbers and their
own default settings; they give back the weights that their codes stand for, and flatq scores these like its own, in
float32. The embedding and the head stay as they are. Damage is ``ln(perplexity / dense perplexity)`` on texts that
nobody was calibrated on: code of the standard library, the held-out part of python-docs, and the files given.

A peer that trains takes hours on two cores for a whole model. With ``--layers`` only the first layers are rounded, by
everybody, and the model with its other layers dense is scored. Each result is a line of ``--out``; the same command
goes on after it. ``--write`` makes the table of the results page.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import calibration_text as ct
import typer
from gptq import Rounding
from quality_lab import Overlay
from results_page import write_table
from safetensors.torch import load_file
from torch import Tensor

log = logging.getLogger("peers")
HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results/peers.jsonl", HERE / "results/tables/16-peers.json"
WORK = Path(tempfile.gettempdir()) / "flatq-peers"
ROWS: dict[str, dict[str, Any]] = {
    "W4 g128": {"bits": 4, "group_size": 128, "symmetric": True},
    "W4 g32": {"bits": 4, "group_size": 32, "symmetric": True},
    "W3 g128": {"bits": 3, "group_size": 128, "symmetric": True},
    "W2 g64": {"bits": 2, "group_size": 64, "symmetric": False},
}
STEPS = 200
WAYS = ("round-to-nearest", "flatq", f"flatq, tune_steps: {STEPS}", "AutoRound")


@dataclass
class Bench(Rounding):
    """One model, the first ``layers`` of which (0: all) are rounded by each program."""

    texts: list[str]
    autoround: Path | None

    @cached_property
    def lab(self) -> ct.Laboratory:
        """The texts that are scored, and the rows for calibration."""
        lab = ct.laboratory(self.model, self.texts, WORK)
        del lab.texts["self"]  # what everybody is calibrated on
        return lab

    @cached_property
    def calibration(self) -> Tensor:
        """Token numbers, int64 [64, 256]."""
        return self.lab.writer.rows(64, 256, 42)

    @property
    def ways(self) -> dict[str, Callable[[dict[str, Any]], tuple[Overlay, dict[str, Any]]]]:
        """What rounds, by name."""
        ours = [self.nearest, self.ours, lambda row: self.ours(row | {"tune_steps": STEPS})]
        return dict(zip(WAYS, [*ours, *([self.auto_round] if self.autoround else [])], strict=False))

    def auto_round(self, row: dict[str, Any]) -> tuple[Overlay, dict[str, Any]]:
        """AutoRound with its defaults, in its own environment."""
        settings = {"bits": row["bits"], "group_size": row["group_size"], "sym": row["symmetric"]}
        with tempfile.TemporaryDirectory(dir=WORK) as root:
            dense, rows, out = self.folder(Path(root)), Path(root, "rows.json"), Path(root, "out.safetensors")
            rows.write_text(json.dumps(self.calibration.tolist()))
            script = Path(__file__).absolute().with_name("peer_autoround.py")
            command = [str(self.autoround and self.autoround.absolute()), str(script), str(dense), str(rows), str(out)]
            done = subprocess.run(
                [*command, json.dumps(settings)], cwd=root, stdout=subprocess.PIPE, text=True, check=True
            )
            state = load_file(out)
        return self.theirs(state), json.loads(done.stdout.splitlines()[-1])


def table(found: list[dict[str, Any]]) -> dict[str, Any]:
    """All results, for ``results_page.py``."""
    dense = next(line for line in found if line["row"] == "dense")["perplexity"]
    rows = []
    measured = (line for line in found if line["row"] != "dense")
    for line in sorted(
        measured, key=lambda line: ([*ROWS].index(line["row"]), line["layers"], WAYS.index(line["way"]))
    ):
        damage = [math.log(value / dense[text]) for text, value in line["perplexity"].items()]
        mean = sum(damage) / len(damage)
        rounded = f"{line['row']}, {line['layers'] or 'all'}"
        rows.append([rounded, line["way"], *(round(d, 3) for d in damage), round(mean, 3), line["cpu_seconds"]])
    shown = ", ".join(f"{text} {value:.2f}" for text, value in dense.items())
    return {
        "section": "Quality by calibration text, and by method",
        "title": "Rounding alone, beside AutoRound",
        "note": "SmolLM2; only so many of its 30 layers are rounded, the others are dense. All programs are calibrated "
        "on the same 64 x 256 tokens of self, at their default settings (AutoRound 0.16.1: 200 steps). Damage on texts "
        f"not calibrated on, {ct.ROWS} rows of {ct.LENGTH} tokens each; dense perplexity: {shown}. W4 and W3 are "
        "symmetric, W2 is asymmetric. Seconds are of one processor. One seed.",
        "columns": ["bits, group; layers", "", *dense, "mean", "seconds"],
        "machine": "AMD EPYC, one of 2 cores, shared with other work",
        "command": "python benchmarks/peers.py --text wikipedia=FILE --autoround PYTHON --layers 4 --row 'W3 g128' "
        "--write",
        "rows": rows,
    }


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE, or NAME=FILE,FILE; may be repeated.")] = None,
    model: Annotated[str, typer.Option(help="Folder, hub id, .gguf file or package:DIST/FILE.")] = ct.SMOLLM2,
    autoround: Annotated[Path | None, typer.Option(help="python of an environment with AutoRound.")] = None,
    layers: Annotated[int, typer.Option(help="Only the first so many layers are rounded; 0: all.")] = 0,
    row: Annotated[list[str] | None, typer.Option(help=f"Only these of {', '.join(ROWS)}; may be repeated.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="Only ways whose name holds this; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Results, JSON lines.")] = RESULTS,
    write: Annotated[bool, typer.Option(help="Write the table of the results page.")] = False,
) -> None:
    """Measure what is not in ``--out`` yet."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("flatq").setLevel(logging.WARNING)
    WORK.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, layers, text or [], autoround)
    done = {(line["row"], line["way"], line["layers"]) for line in ct.lines(out)}
    if ("dense", "", layers) not in done:
        ct._add(out, {"row": "dense", "way": "", "layers": layers, "perplexity": bench.lab.judge(bench.whole)})
    for name in row or ROWS:
        for way_, rounds in bench.ways.items():
            if (name, way_, layers) in done or (way and not any(part in way_ for part in way)):
                continue
            made, took = rounds(ROWS[name])
            ct._add(out, {"row": name, "way": way_, "layers": layers, **took, "perplexity": bench.lab.judge(made)})
    if write:
        write_table(TABLE, **table(ct.lines(out)))
        print(TABLE)


if __name__ == "__main__":
    app()
