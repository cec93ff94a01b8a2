"""Decode at the widths of a 7B model: share of the machine's memory bandwidth, and what 30 % fewer parameters give.

    python benchmarks/onnx_wide.py --threads 1
    python benchmarks/onnx_wide.py --provider cuda --layers 32

Layers with the shapes of Llama-2-7B, embedding and head, 4-bit codes of noise: speed does not depend on what they
say. A decoded token reads every weight once (of the embedding one row), so its time sets a bandwidth; the machine's own
is measured in the same process before and after, as the better of a copy (read and written bytes) and of a sum over
an array as large as the weights, on as many threads or on the GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flatq.artifact import Artifact
from flatq.bench import Load, OpenRunner, bench_side_by_side
from flatq.decoder import LINEARS, DecoderConfig, LayerDims, Rope
from flatq.export import exporter_named
from flatq.quantize.grid import Grid, QuantizedWeight
from flatq.weights import tensor_shapes
from flatq_onnx import OnnxExporter, OnnxOptions

WIDE, NARROW = LayerDims(32, 32, 128, 128, 11008), LayerDims(32, 32, 128, 80, 7040)  # 0.70 of the parameters
VOCAB, D_MODEL = 32_000, 4096


class Noise(Artifact):
    """An artifact whose tensors are made when they are read."""

    def __init__(self, dims: LayerDims, layers: int, group_size: int) -> None:
        config = DecoderConfig("llama", D_MODEL, VOCAB, (dims,) * layers, Rope(), 1e-5, False, 4096)
        grid = Grid(4, group_size)
        stems = ["embed", "head", *(f"layers.{index}.{linear}" for index in range(layers) for linear in LINEARS)]
        settings = {"decoder": config.to_dict(), "grids": {stem: asdict(grid) for stem in stems}}
        super().__init__(Path(), settings, {}, {})
        self._shapes, self._random = tensor_shapes(config), np.random.default_rng(0)

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """Codes of noise, scales that keep activations near 1; norms of ones."""
        shape, stem = self._shapes[name], name.removesuffix(".weight")
        if stem not in self.grids:
            return torch.ones(shape)
        grid, codes = self.grids[stem], self._random.integers(0, 16, shape, dtype=np.uint8)
        groups = (shape[0], grid.groups(shape[1]))
        scale = torch.full(groups, 0.2 * shape[1] ** -0.5, dtype=torch.float16)
        return QuantizedWeight(torch.from_numpy(codes), scale, torch.full(groups, 8, dtype=torch.uint8), grid)


def bandwidth(size: int, threads: int) -> float:
    """Bytes per second that this machine moves at best."""
    source, target = np.ones(size // 8), np.empty(size // 8)
    cuts = [slice(part * len(source) // threads, (part + 1) * len(source) // threads) for part in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(lambda cut: np.copyto(target[cut], source[cut]), cuts))
            copied = 2 * source.nbytes / (time.perf_counter() - began)
            began = time.perf_counter()
            list(pool.map(lambda cut: float(source[cut].sum()), cuts))
            best = max(best, copied, source.nbytes / (time.perf_counter() - began))
    return best


def bandwidth_of_gpu(size: int) -> float:
    """The same of a GPU; its allocations last no longer than the measurement."""
    source = torch.ones(size // 4, device="cuda")
    target = torch.empty_like(source)
    works: list[tuple[Callable[[], Tensor], int]] = [(partial(target.copy_, source), 2 * size), (source.sum, size)]
    best = 0.0
    for work, moved in works * 20:
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = max(best, moved / (time.perf_counter() - began))
    del source, target, works, work
    torch.cuda.empty_cache()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/onnx-wide"))
    options = parser.parse_args()
    exporter = exporter_named("onnx")
    on_gpu, openers = options.provider == "cuda", dict[str, OpenRunner]()
    measured = bandwidth_of_gpu if on_gpu else partial(bandwidth, threads=options.threads)
    chosen = OnnxOptions(target="cuda" if on_gpu else "ort")
    read: dict[str, int] = {}
    assert isinstance(exporter, OnnxExporter)
    for name, dims in (("7B widths", WIDE), ("30 % narrower", NARROW)):
        out = options.work / f"{options.provider}-{options.layers}-{dims.d_ff}-{options.group_size}"
        noise = Noise(dims, options.layers, options.group_size)
        if not (out / "model.onnx").exists():
            out.mkdir(parents=True, exist_ok=True)
            exporter.write(noise, out, chosen)
        table = VOCAB * D_MODEL // 2 + 4 * VOCAB * noise.grids["embed"].groups(D_MODEL)
        read[name] = sum(path.stat().st_size for path in out.glob("model.onnx*")) - table
        openers[name] = partial(exporter.open, out, chosen, provider=options.provider, threads=options.threads)
    size = read["7B widths"]
    before = measured(size)
    load = Load(prompt=16, new_tokens=24, batch=1, vocab=VOCAB)
    results = bench_side_by_side(openers, load, repeats=options.repeats, threads=options.threads)
    best = max(before, measured(size))
    place = torch.cuda.get_device_name() if on_gpu else f"{options.threads} threads"
    print(f"\n{place}, {options.layers} layers, groups of {options.group_size}; {best / 1e9:.1f} GB/s can be moved\n")
    print("| | bytes per token | tokens/s | range | GB/s | share | ratio |\n|---|---:|---:|---:|---:|---:|---:|")
    first = results[0].decode_tokens_per_second.median
    for result in results:
        speed, moved = result.decode_tokens_per_second, read[result.name]
        print(
            f"| {result.name} | {moved / 1e6:.0f} MB | {speed.median:.2f} | {speed.low:.2f}-{speed.high:.2f} "
            f"| {speed.median * moved / 1e9:.1f} | {speed.median * moved / best:.0%} | {speed.median / first:.2f} |"
        )


if __name__ == "__main__":
    main()
