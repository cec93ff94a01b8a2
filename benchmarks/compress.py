"""Where the time and the memory of a compression go, and how both grow.

    python benchmarks/compress.py memory llama2-7b --layers 2 4    peak memory, independent of the number of layers
    python benchmarks/compress.py phases llama2-7b --layers 1      seconds by part, and the cubic share at full length
    python benchmarks/compress.py growth                           tokens and layers at three points each, with slopes

The models are noise with true shapes (``synthetic.py``); each measurement is ``flatq run`` in a process of its own,
with stopwatches around the functions that do the work. Seconds by part are those of the processors, all threads
together; with ``--device cuda`` they are the clock's, and ``--gpu-memory 24`` allows torch no more gigabytes than that.
The text is python-docs. Numbers are in docs/decisions/0021.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from synthetic import SHAPES, generate

Found = dict[str, Any]  # what a run reported: seconds by part and phase, peaks
EVALUATED = 1024  # tokens, at most
RECIPE_TOKENS = 128 * 2048  # of recipes/llama2-7b-flat30-int4.yaml
# What is timed: part -> functions as (module, attribute). A part's time excludes that of parts that it calls.
PARTS = {
    "forward and Grams": ["flatq.calibration.block:Block.observe", "flatq.calibration.block:Block.advance"],
    "read weights": ["flatq.calibration.walk:load_half"],
    "elimination": ["flatq.compress.error_curves:eliminate", "flatq.compress.stage:eliminate"],
    "leverage": ["flatq.compress.stage:ridge_leverage"],
    "least squares": ["flatq.compress.stage:nystroem"],
    "GPTQ factor": ["flatq.quantize.gptq:_feedback"],
    "GPTQ clip search": ["flatq.model.grid:Grid.fit"],
    "GPTQ rows": ["flatq.quantize.stage:gptq"],
}
CUBIC = ("elimination", "leverage", "least squares", "GPTQ factor")


def gpu_time() -> float:
    """The clock when the GPU is done with what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds by (phase, part), each counted once.

    On CPUs those of the processor: other people's work on the machine does not show.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._clock = clock
        self.phase, self._running, self._since = "", ["other"], clock()

    def _switch(self) -> None:
        now = self._clock()
        self.seconds[self.phase, self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the enclosed time for this part and not for the one around it."""
        self._switch()
        self._running.append(name)
        yield
        self._switch()
        self._running.pop()

    def wrap(self, place: str, part: str) -> None:
        """Time a function of flatq wherever it is called through this name."""
        module, _, attribute = place.partition(":")
        owner: Any = functools.reduce(getattr, attribute.split(".")[:-1], __import__(module, fromlist=["_"]))
        name = attribute.split(".")[-1]
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return plain(*args, **kwargs)

        setattr(owner, name, timed)

    def follow_phases(self) -> None:
        """Know which phase of the run it is."""
        from flatq.run_folder import RunFolder

        plain = RunFolder.phase

        def phase(folder: RunFolder, name: str, compute: Callable[[], Any], kind: type[Any]) -> Any:
            self._switch()
            self.phase = name
            result = plain(folder, name, compute, kind)
            self._switch()
            self.phase = ""
            return result

        RunFolder.phase = phase  # type: ignore[method-assign, assignment]


def child(recipe: Path, out: Path, device: str, gpu_memory: float) -> None:
    """One run with stopwatches; its findings in a file beside the recipe."""
    from flatq.pipeline import run as pipeline
    from flatq.recipe.grammar import Recipe

    on_gpu = device.startswith("cuda")
    if on_gpu and gpu_memory:
        torch.cuda.set_per_process_memory_fraction(1e9 * gpu_memory / torch.cuda.get_device_properties(0).total_memory)
    watch = Stopwatch(gpu_time if on_gpu else time.process_time)
    for part, places in PARTS.items():
        for place in places:
            watch.wrap(place, part)
    watch.follow_phases()
    pipeline.run(Recipe.load(recipe), out, device=device)
    report = json.loads((out / "report.json").read_text())
    parts = [[phase, part, seconds] for (phase, part), seconds in watch.seconds.items() if phase]
    found = {"parts": parts, "timing": report["timing"], "memory": report["memory"], "peak": report["peak_rss_bytes"]}
    found["gpu"] = max(report["device_memory"].values(), default=0)
    recipe.with_suffix(".json").write_text(json.dumps(found))


def measured(given: argparse.Namespace, work: Path, shape: str, layers: int, samples: int, seq_len: int) -> Found:
    """Run a synthetic model of this shape in a process of its own."""
    model = work / f"{shape.replace('/', '-')}-{layers}"
    if not (model / "model.safetensors").exists():
        generate(SHAPES[shape], layers, model)
    recipe, out = work / "recipe.yaml", work / "out"
    shutil.rmtree(out, ignore_errors=True)
    content = {
        "version": 1,
        "model": str(model),
        "calibration": {"dataset": "python-docs", "samples": samples, "seq_len": seq_len},
        "evaluation": {"tokens": EVALUATED, "seq_len": min(seq_len, EVALUATED)},
        "stages": [
            {"flat": given.flat},
            {"gptq": {"bits": 4, "group_size": 128 if SHAPES[shape].d_model > 1000 else 32}},
        ],
    }
    recipe.write_text(yaml.safe_dump(content))
    command = [sys.executable, __file__, "child", str(recipe), str(out), given.device, str(given.gpu_memory)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    shutil.rmtree(out)
    found: Found = json.loads(recipe.with_suffix(".json").read_text())
    return found


def memory(given: argparse.Namespace, work: Path) -> None:
    """Peak resident memory of whole runs."""
    for layers in given.layers:
        found = measured(given, work, given.shape, layers, given.samples, given.seq_len)
        phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["timing"].items())
        print(f"{given.shape}, {layers} layers: {peaks(found)} ({phases})", flush=True)


def phases(given: argparse.Namespace, work: Path) -> None:
    """Seconds by phase and part, and the share of the cubic parts when the calibration is as long as the recipe's."""
    (layers,) = given.layers
    found = measured(given, work, given.shape, layers, given.samples, given.seq_len)
    for phase, part, seconds in sorted(found["parts"], key=lambda entry: -entry[2]):
        if seconds > 0.05:
            print(f"{phase:12} {part:20} {seconds:8.1f} s")
    shares(found, given.samples * given.seq_len)


def peaks(found: Found) -> str:
    """Largest resident memory, and what was held of the GPU."""
    held = f", GPU {found['gpu'] / 1e9:.2f} GB" if found["gpu"] else ""
    return f"peak RSS {found['peak'] / 1e9:.2f} GB{held}"


def shares(found: Found, tokens: int) -> None:
    """Only the compression's forward passes grow with the calibration; the other phases look at a fixed few tokens."""
    calibrated = sum(s for phase, part, s in found["parts"] if (phase, part) == ("compress", "forward and Grams"))
    considered = [entry for entry in found["parts"] if entry[0] not in ("baseline", "evaluate")]
    cubic = sum(s for _, part, s in considered if part in CUBIC)
    total = sum(s for *_, s in considered)
    for wanted in (tokens, RECIPE_TOKENS):
        whole = total + calibrated * (wanted / tokens - 1)
        print(f"at {wanted:,} calibration tokens: cubic in a width {cubic / whole:.1%} of {whole:.0f} s")
    print(peaks(found))


def growth(given: argparse.Namespace, work: Path) -> None:
    """Three points each; the slope in log-log is the power of growth, that of a straight line is seconds per unit."""
    shape = "llama2-7b/8"

    @functools.cache  # one point belongs to both series
    def seconds(layers: int, samples: int) -> float:
        runs = [measured(given, work, shape, layers, samples, 512) for _ in range(given.repeats)]
        peak = max(found["memory"]["compress"] for found in runs) / 1e9
        times = [sum(spent for phase, _, spent in found["parts"] if phase == "compress") for found in runs]
        spread = ", ".join(f"{spent:.1f}" for spent in times)
        print(f"{layers} layers, {512 * samples:,} tokens: peak {peak:.3f} GB, {spread} s", flush=True)
        return float(min(times))

    measured(given, work, shape, 1, 8, 512)  # the first run of a machine reads torch from the disk
    series = {
        "tokens": [(512 * samples, seconds(2, samples)) for samples in (32, 64, 128)],
        "layers": [(layers, seconds(layers, 32)) for layers in (2, 4, 8)],
    }
    for what, points in series.items():
        line = ", ".join(f"{x:,}: {y:.2f} s" for x, y in points)
        (x0, y0), (x1, y1) = points[0], points[-1]
        middle = abs(points[1][1] - (y0 + (y1 - y0) * (points[1][0] - x0) / (x1 - x0))) / points[1][1]
        print(
            f"{what}: {line}; {1e3 * (y1 - y0) / (x1 - x0):.3f} ms each, power {math.log(y1 / y0, x1 / x0):.2f}, "
            f"the middle point is {middle:.1%} off the line through the others"
        )


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "phases", "growth"])
    parser.add_argument("shape", choices=SHAPES, nargs="?", default="llama2-7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[1])
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="of each point of growth; the least time counts")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--flat", type=yaml.safe_load, default={}, help="more keys of the flat stage, as YAML")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpu-memory", type=float, default=0.0, help="gigabytes that torch may take, 0 for all")
    parser.add_argument("--work", type=Path, help="keeps the models for the next call")
    given = parser.parse_args()
    given.flat = {"keep_ratio": given.keep, **given.flat}
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        {"memory": memory, "phases": phases, "growth": growth}[given.what](given, work)


if __name__ == "__main__":
    main()
