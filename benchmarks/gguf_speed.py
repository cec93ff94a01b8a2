"""Decode speed and size in llama.cpp: a compressed model beside the dense one in Q4_0, in turns, a process for each.

    python benchmarks/gguf_speed.py RUN                  the GGUF export of a run, and the model that it was made from
    python benchmarks/gguf_speed.py RUN --threads 1 --threads 2 --repeats 9

The dense model is written by the same exporter in the type that llama-quantize would give it: Q4_0, its embedding in
Q8_0. Needs `make llamacpp`. Sizes are of tensors in the layers, of everything else, and of the value and key caches as
llama.cpp reports them.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import gguf
import numpy as np

from flatq.artifact import Artifact
from flatq.export.baseline import dense_artifact
from flatq.export.bench import BenchResult, Load, bench_side_by_side
from flatq.sources.source import open_model
from flatq_gguf import GgufExporter, GgufOptions
from flatq_gguf.files import model_files
from flatq_gguf.runner import LOG, LlamaCppRunner

CONTEXT = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode speed and size of a run's GGUF export beside the dense Q4_0.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--export", default="gguf", help="folder below RUN/exports")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    artifact = Artifact.open(options.run)
    with tempfile.TemporaryDirectory(prefix="flatq-gguf-") as work:
        folders = {
            "dense Q4_0": dense_twin(artifact, Path(work)),
            "compressed": options.run / "exports" / options.export,
        }
        sizes(folders, artifact)
        load = Load(options.prompt, options.new_tokens, 1, artifact.config.vocab)
        for threads in options.threads or [1, 2]:
            openers = {
                name: partial(GgufExporter().open, root, GgufOptions(), provider="cpu", threads=threads)
                for name, root in folders.items()
            }
            results = bench_side_by_side(openers, load, repeats=options.repeats, threads=threads)
            report(results, threads, options.repeats)


def report(results: list[BenchResult], threads: int, repeats: int) -> None:
    """Print the two models and how they compare."""
    for result in results:
        decode, prefill = result.decode_tokens_per_second, result.prefill_tokens_per_second
        spread = f"{decode.median:.1f} ({decode.low:.1f}-{decode.high:.1f})"
        print(f"{threads} threads, {result.name}: decode {spread} tokens/s, prefill {prefill.median:.0f}")
    dense, ours = (result.decode_tokens_per_second for result in results)
    print(f"{threads} threads: decode {ours.median / dense.median:.3f} times the dense model's, medians of {repeats}")


def dense_twin(artifact: Artifact, work: Path) -> Path:
    """The model before compression, in Q4_0."""
    source = open_model(artifact.manifest["source"]["origin"])
    out = work / "export"
    out.mkdir()
    GgufExporter().write(dense_artifact(source, work / "artifact"), out, GgufOptions(precision="q4_0"))
    return out


def sizes(folders: dict[str, Path], artifact: Artifact) -> None:
    """Print what the files and the caches take."""
    layers = {}
    for name, root in folders.items():
        tensors = [tensor for file in model_files(root) for tensor in gguf.GGUFReader(file).tensors]
        total = sum(file.stat().st_size for file in model_files(root))
        layers[name] = sum(int(tensor.n_bytes) for tensor in tensors if tensor.name.startswith("blk."))
        kinds: dict[str, int] = {}
        for tensor in tensors:
            kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        with get_context("spawn").Pool(1) as alone:
            keys, values = alone.apply(caches, (root,))
        print(
            f"{name}: file {total:,} bytes, layers {layers[name]:,}, other {total - layers[name]:,}; tensors {kinds}; "
            f"cache of {CONTEXT} positions: K {keys:.2f} + V {values:.2f} MiB"
        )
    kept = artifact.manifest["plan"]["achieved"]
    print(f"layers: {layers['compressed'] / layers['dense Q4_0']:.4f} of the dense bytes, {kept:.4f} of its parameters")


def caches(root: Path) -> tuple[float, float]:
    """MiB of the key and value caches, from llama.cpp's log."""
    runner = LlamaCppRunner(root, provider="cpu", threads=1)
    LOG.clear()
    runner.start(np.zeros((1, 1), np.int64), CONTEXT)
    keys, values = (
        sum(float(found) for found in re.findall(rf"{letter} \(f16\): +([\d.]+) MiB", runner.log)) for letter in "KV"
    )
    runner.close()
    return keys, values


if __name__ == "__main__":
    main()
