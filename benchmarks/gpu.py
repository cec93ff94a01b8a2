"""One session on a machine with a GPU: tests, a whole 7B model with true shapes, and decoding speed.

    python benchmarks/gpu.py --work /tmp/gpu
    python benchmarks/gpu.py --work /tmp/gpu --genai-python .venv-genai/bin/python
    python benchmarks/gpu.py --work /tmp/toy --shape toy --layers 2 --device cpu  # the same steps without a GPU

A GPU is often lent for minutes, so every step keeps its result in WORK/gpu.json and is not done again by a second call;
no step starts after ``--seconds``. Steps, most wanted first:

    tests       pytest -m gpu
    checkpoint  the model, made of noise on the device (synthetic.py)
    compress    30 % removed and 4 bits, calibrated on --tokens tokens, exported as fp16 and int4 for CUDA and verified:
                seconds and peak memory of every phase
    dense       4 bits alone; little calibration, because speed depends on shapes
    less        20 % removed and 4 bits, likewise
    speed       decode and prefill of the three int4 exports, in turns
    genai       decoding of the 30 % and the dense export in onnxruntime-genai with CUDA graphs, given --genai-python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import synthetic
import yaml

from flatq.export.bench import Load, bench_side_by_side
from flatq.export.protocols import exporter_named
from flatq.files import write_json
from flatq.machine.device import gpu_names
from flatq.machine.environment import cpu_name
from flatq.pipeline.run import run
from flatq.recipe.grammar import Recipe
from flatq.verbs import export

KEEP = {"compress": 0.7, "dense": 1.0, "less": 0.8}
SPARSE_TOKENS = 4096  # calibration tokens of the models that are only timed
GENAI = """
import json, sys, time, onnxruntime_genai
model = onnxruntime_genai.Model(sys.argv[1])
settings = onnxruntime_genai.GeneratorParams(model)
prompt, new = int(sys.argv[2]), int(sys.argv[3])
settings.set_search_options(max_length=prompt + new, min_length=prompt + new, do_sample=False)
seconds = []
for _ in range(4):
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens([7 + number % 200 for number in range(prompt)])
    generator.generate_next_token()
    began = time.perf_counter()
    for _ in range(new - 1):
        generator.generate_next_token()
    seconds.append((time.perf_counter() - began) / (new - 1))
print("FOUND", json.dumps(1 / min(seconds)))
"""


class Session:
    """The steps of one call, and the file with their results."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.cuda = given.device != "cpu"
        self.file: Path = given.work / "gpu.json"
        self.found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.until = time.monotonic() + given.seconds

    def step(self, name: str, work: Callable[[], Any]) -> None:
        """Do a step unless it was done, the time is over, or ``--only`` does not name it."""
        if name in self.found or (self.given.only and name not in self.given.only):
            return
        if time.monotonic() > self.until:
            print(f"{name}: not started, the time is over", flush=True)
            return
        began = time.monotonic()
        result = work()
        self.found[name] = {"seconds": round(time.monotonic() - began, 1), "result": result}
        write_json(self.file, self.found)
        print(f"{name}: {json.dumps(self.found[name])}", flush=True)

    def tests(self) -> str:
        """The last line of pytest; a failure is a result, too."""
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        return done.stdout.strip().splitlines()[-1]

    def checkpoint(self) -> str:
        """Folder of the dense model."""
        shape = synthetic.SHAPES[self.given.shape]
        folder = self.given.work / "model"
        return str(synthetic.generate(shape, self.given.layers or shape.layers, folder, device=self.given.device))

    def compressed(self, name: str) -> dict[str, Any]:
        """A whole run; its times and peaks by phase, and what verification found."""
        run(Recipe.load(self.recipe(name)), self.given.work / name, device=self.given.device)
        report = json.loads((self.given.work / name / "report.json").read_text())
        exports = {item["name"]: {key: item[key] for key in ("bytes", "error", "verify")} for item in report["exports"]}
        return {key: report[key] for key in ("timing", "memory", "device_memory")} | {"exports": exports}

    def recipe(self, name: str) -> Path:
        """The recipe of a run, written to the work folder."""
        length = min(2048, self.given.tokens // 2)
        tokens = self.given.tokens if name == "compress" else min(self.given.tokens, SPARSE_TOKENS)
        calibration = {"dataset": "python-docs", "samples": max(1, tokens // length), "seq_len": length}
        allocation = {} if name == "compress" else {"allocation": "uniform"}
        exports = ["int4", "fp16"] if name == "compress" and self.cuda else ["int4"]
        target = "cuda" if self.cuda else "ort"
        recipe = {
            "version": 1,
            "model": str(self.given.work / "model"),
            "calibration": calibration,
            "evaluation": {"dataset": "python-docs", "tokens": 2 * length, "seq_len": length},
            "stages": [
                {"flat": {"keep_ratio": KEEP[name], **allocation}},
                {"gptq": {"bits": 4, "group_size": 128 if self.cuda else 32}},
            ],
            "exports": [{"onnx": {"name": each, "target": target, "precision": each}} for each in exports],
            "stop_above": None,  # noise has no quality to lose
        }
        file: Path = self.given.work / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return file

    def speed(self) -> list[dict[str, Any]]:
        """Decode and prefill of the int4 exports that are there, each in a process, in turns."""
        exporter, provider = exporter_named("onnx"), "cuda" if self.cuda else "cpu"
        options = exporter.Options.model_validate({"target": "cuda" if self.cuda else "ort", "precision": "int4"})
        there = {name: self.given.work / name / "exports" / "int4" for name in KEEP if name in self.found}
        openers = {
            name: partial(exporter.open, at, options, provider=provider, threads=0) for name, at in there.items()
        }
        load = Load(self.given.prompt, self.given.new_tokens, batch=1, vocab=256)
        return [asdict(result) for result in bench_side_by_side(openers, load, repeats=5)]

    def genai(self) -> dict[str, float]:
        """Tokens per second of greedy decoding in onnxruntime-genai; on CUDA with CUDA graphs."""
        speeds = {}
        for name in ("compress", "dense"):
            out = self.given.work / "genai" / name
            if not out.exists():
                activations = {"activations": "fp16"} if self.cuda else {}
                export(self.given.work / name, out, "onnx", {"target": "genai", "precision": "int4", **activations})
            if self.cuda:
                file = out / "genai_config.json"
                config = json.loads(file.read_text())
                session = config["model"]["decoder"]["session_options"]
                session["provider_options"] = [{"cuda": {"enable_cuda_graph": "1"}}]
                write_json(file, config)
            numbers = [str(self.given.prompt), str(self.given.new_tokens)]
            command = [self.given.genai_python, "-c", GENAI, str(out), *numbers]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"genai: {name}: {done.stderr.strip().splitlines()[-1:]}")
            speeds[name] = json.loads(done.stdout.rsplit("FOUND ", 1)[1])
        return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=synthetic.SHAPES, default="llama2-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=32_768, help="calibration tokens of the 30 % run")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=480, help="no step starts later than this")
    parser.add_argument("--genai-python", help="Python of an environment with onnxruntime-genai")
    parser.add_argument("--only", action="append", help="this step; may be repeated")
    given = parser.parse_args()
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    session = Session(given)
    session.found["machine"] = {"gpus": gpu_names(), "cpu": cpu_name()}
    if session.cuda:
        session.step("tests", session.tests)
    session.step("checkpoint", session.checkpoint)
    for name in KEEP:
        session.step(name, partial(session.compressed, name))
    session.step("speed", session.speed)
    if given.genai_python:
        session.step("genai", session.genai)


if __name__ == "__main__":
    main()
