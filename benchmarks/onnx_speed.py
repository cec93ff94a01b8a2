"""Our narrowed and dense int4 graphs beside the graph of onnxruntime-genai's builder and beside llama.cpp.

    python benchmarks/onnx_speed.py --narrow RUN --narrow RUN --dense RUN --builder FOLDER --gguf FOLDER --threads 1

RUN is a finished run (or artifact) with 4-bit codes; it is exported for ``target: ort`` into ``--work``, once for each
``--cache``: keys and values in float, or in int8. FOLDER is what
``python -m onnxruntime_genai.models.builder -i HF_FOLDER -o FOLDER -p int4 -e cpu --extra_options
int4_accuracy_level=4 hf_token=false`` wrote (blocks of 32), run in plain onnxruntime in two ways: as any program would,
with a cache that every step copies, and with past and present in one buffer, the best it can do. ``--gguf`` is a folder
with a Q4_0 file.

Each graph lives in a process of its own, all take turns, and what is printed are medians with the whole range and the
ratio to the builder's graph in its better way. Where a process lies in memory moves its speed by some percent for as
long as it lives, so ``--launches`` starts all anew and takes the median of the launches. Results are kept in
``--work``/onnx_speed.json, a key for each number of threads and prompt length, so that several short calls add up to
one table.

``--one-process`` opens all in one process and times each step, so that all live in the same memory at the same time.
``--processor-time`` does so with one thread and counts processor time: for machines that others use, where wall time
says little. Neither is kept in a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from flatq.export.bench import BenchResult, Load, OpenRunner, Spread, bench_side_by_side
from flatq.export.protocols import Runner
from flatq.files import write_json
from flatq.verbs import export
from flatq_gguf import GgufExporter, GgufOptions
from flatq_onnx import OnnxExporter, OnnxOptions

KINDS = ("prefill_tokens_per_second", "decode_tokens_per_second")
BEST, PLAIN = "builder, one buffer", "builder, cache copied"


def open_builder(root: Path, threads: int, growth: str) -> Runner:
    """Someone else's graph with the cache handled in one way."""
    from flatq_onnx.foreign import contract_of
    from flatq_onnx.runner import OnnxRunner

    contract = contract_of(root).model_copy(update={"growth": growth})
    return OnnxRunner(root, provider="cpu", threads=threads, contract=contract)


CACHES: dict[str, dict[str, Any]] = {
    "of floats": {},
    "of int8": {"cache_type": "int8"},
}


def exported(run: Path, work: Path, cache: str) -> Path:
    """The run's graph for ``target: ort``, written once."""
    out = work / f"{run.name}, cache {cache}"
    if not out.exists():
        work.mkdir(parents=True, exist_ok=True)
        export(run, out, "onnx", CACHES[cache])
    return out


def openers(options: argparse.Namespace, threads: int) -> dict[str, OpenRunner]:
    found: dict[str, OpenRunner] = {
        BEST: partial(open_builder, options.builder, threads, "shared"),
        PLAIN: partial(open_builder, options.builder, threads, "returned"),
    }
    for run, cache in product([*options.dense, *options.narrow], options.cache or CACHES):
        root = exported(run, options.work, cache)
        found[f"flatq {root.name}"] = partial(OnnxExporter().open, root, OnnxOptions(), provider="cpu", threads=threads)
    if options.gguf is not None:
        gguf = GgufExporter().open
        found["llama.cpp Q4_0"] = partial(gguf, options.gguf, GgufOptions(), provider="cpu", threads=threads)
    return found


def in_one_process(
    options: argparse.Namespace, threads: int, prompt: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Tokens per second of a clock, in the form of a ``BenchResult``'s fields."""
    runners = {name: opener() for name, opener in openers(options, threads).items()}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runners}
    random = np.random.default_rng(0)
    for turn in range(options.repeats):
        for name in list(runners)[:: 1 if turn % 2 == 0 else -1]:
            runner, (prefill, decode) = runners[name], times[name]
            assert runner is not None
            began = clock()
            token = runner.start(random.integers(32_000, size=(1, prompt)), prompt + options.new_tokens).argmax(-1)
            prefill.append(prompt / (clock() - began))
            for _ in range(options.new_tokens):
                began = clock()
                token = runner.step(token).argmax(-1)
                decode.append(1 / (clock() - began))
    return [
        {"name": name, **{kind: asdict(Spread.of(part)) for kind, part in zip(KINDS, parts, strict=True)}}
        for name, parts in times.items()
    ]


def launched(options: argparse.Namespace, threads: int, load: Load) -> list[dict[str, Any]]:
    """Median of the launches' medians, and the whole range, in the form of some of a ``BenchResult``'s fields."""
    launches: list[list[BenchResult]] = [
        bench_side_by_side(openers(options, threads), load, repeats=options.repeats, threads=threads)
        for _ in range(options.launches)
    ]
    rows = []
    for same in zip(*launches, strict=True):
        row: dict[str, Any] = {"name": same[0].name, "repeats": options.repeats, "launches": options.launches}
        for kind in KINDS:
            spreads: list[Spread] = [getattr(result, kind) for result in same]
            median = statistics.median(spread.median for spread in spreads)
            row[kind] = asdict(Spread(median, min(one.low for one in spreads), max(one.high for one in spreads)))
        rows.append(row)
    return rows


def table(results: list[dict[str, Any]]) -> str:
    """Median, range and ratio of each runner as Markdown."""
    best = results[0]
    lines = [
        "| | decode tok/s | range | ratio | prefill tok/s | range | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        cells = [result["name"]]
        for kind in reversed(KINDS):
            spread = result[kind]
            cells += [
                f"{spread['median']:.1f}",
                f"{spread['low']:.1f}-{spread['high']:.1f}",
                f"{spread['median'] / best[kind]['median']:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--narrow", type=Path, action="append", default=[])
    parser.add_argument("--dense", type=Path, action="append", default=[])
    parser.add_argument("--builder", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--cache", action="append", choices=list(CACHES), help="all if not given")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--prompt", type=int, action="append", help="128, 256 and 1024 if not given")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--launches", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/onnx-speed"))
    parser.add_argument("--one-process", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    file = options.work / "onnx_speed.json"
    for threads in [1] if options.processor_time else options.threads or [1, 2]:
        for prompt in options.prompt or [128, 256, 1024]:
            if options.processor_time or options.one_process:
                clock, kind = (time.thread_time, "processor") if options.processor_time else (time.perf_counter, "wall")
                rows = in_one_process(options, threads, prompt, clock)
                print(f"\n{threads} threads, prompt {prompt}, one process, {kind} time\n\n{table(rows)}", flush=True)
                continue
            load = Load(prompt, options.new_tokens, batch=1, vocab=32_000)
            rows = launched(options, threads, load)
            kept = json.loads(file.read_text()) if file.exists() else {}
            kept[f"{threads} threads, prompt {prompt}"] = rows
            write_json(file, kept)
            print(f"\n{threads} threads, prompt {prompt}, {options.new_tokens} new tokens\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
