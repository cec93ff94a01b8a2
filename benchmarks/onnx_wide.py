"""Decode at the widths of a 7B model: share of the machine's memory bandwidth, and what 30 % fewer parameters give.

    python benchmarks/onnx_wide.py --threads 1
    python benchmarks/onnx_wide.py --provider cuda --layers 32

Layers with the shapes of Llama-2-7B, embedding and head, 4-bit codes of noise: speed does not depend on what they
say. A decoded token reads every weight once (of the embedding one row), so its time sets a bandwidth; the machine's own
is measured in the same process before and after, on an array as large as the weights and on as many threads, or on the
GPU: what a copy moves (read and written bytes) and what is read alone.
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
from flatq.export.bench import Load, OpenRunner, bench_side_by_side
from flatq.export.protocols import exporter_named
from flatq.model.decoder import LINEARS, DecoderConfig, LayerDims, Rope
from flatq.model.grid import Grid, QuantizedWeight
from flatq.model.weights import tensor_shapes
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


def bandwidth(size: int, threads: int) -> tuple[float, float]:
    """Bytes per second that this machine moves at best: by a copy, which reads and writes, and by reading alone."""
    source, target = np.ones(size // 8, np.int64), np.empty(size // 8, np.int64)
    cuts = [slice(part * len(source) // threads, (part + 1) * len(source) // threads) for part in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def each(work: Callable[[slice], object]) -> Callable[[], object]:
            return lambda: list(pool.map(work, cuts))

        copied = quickest(each(lambda cut: np.copyto(target[cut], source[cut])))
        return 2 * source.nbytes / copied, source.nbytes / quickest(each(lambda cut: int(source[cut].max())))


def bandwidth_of_gpu(size: int) -> tuple[float, float]:
    """The same of a GPU."""
    source = torch.ones(size // 4, device="cuda")
    target = torch.empty_like(source)

    def copied() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return 2 * size / quickest(copied), size / quickest(lambda: source.max().item())


def quickest(work: Callable[[], object]) -> float:
    """Least seconds of some calls."""
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


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
    copied, read_alone = map(max, zip(before, measured(size), strict=True))
    place = torch.cuda.get_device_name() if on_gpu else f"{options.threads} threads"
    print(
        f"\n{place}, {options.layers} layers, groups of {options.group_size}; "
        f"a copy moves {copied / 1e9:.1f} GB/s, {read_alone / 1e9:.1f} are read alone\n"
    )
    print("| | bytes per token | tokens/s | range | GB/s | of a copy's | of reading | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    first = results[0].decode_tokens_per_second.median
    for result in results:
        speed, moved = result.decode_tokens_per_second, read[result.name]
        print(
            f"| {result.name} | {moved / 1e6:.0f} MB | {speed.median:.2f} | {speed.low:.2f}-{speed.high:.2f} "
            f"| {speed.median * moved / 1e9:.1f} | {speed.median * moved / copied:.0%} "
            f"| {speed.median * moved / read_alone:.0%} | {speed.median / first:.2f} |"
        )


if __name__ == "__main__":
    main()
