"""Tiny ONNX exports of every target, opened by several versions of onnxruntime, each in an environment of its own.

    python -m tests.interop.onnx_versions .venv-ort-1.25.1/bin/python .venv-ort-1.32.0/bin/python

prints a table: is a graph's answer that of the artifact, at the highest optimization level, with none, and at the
highest without constant folding? Ends with 1 if a version that ``flatq_onnx.json`` allows gives anything else.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from flatq.artifact import RANGES, save_shard
from flatq.calibration.cache_ranges import cache_ranges
from flatq.model.grid import Grid
from flatq.model.weights import load_decoder
from flatq_onnx import OnnxExporter, OnnxOptions
from flatq_onnx.cache import empty_cache
from flatq_onnx.contract import Contract
from tests.models import tiny_artifact, tiny_config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import results_page

SHARE = 0.25  # of the logits' spread, what activations in 8 bits may move a logit by; zeros are 3 or more away
LEVELS = ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL", "ORT_ENABLE_ALL ConstantFolding")
TOKENS = 9

# Reads a folder, and for each level prints how far the logits are from the wanted ones, or why there are none.
OPEN = """
import sys, numpy, onnxruntime
root, *levels = sys.argv[1:]
feeds = dict(numpy.load(root + "/feeds.npz"))
wanted, path = feeds.pop("wanted"), root + "/" + str(feeds.pop("path"))
for level in levels:
    name, *without = level.split()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, name)
    settings = {"disabled_optimizers": without} if without else {}
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], **settings)
        found = session.run(["logits"], feeds)[0].astype(numpy.float32)
        print(numpy.nan_to_num(abs(found - wanted), nan=numpy.inf).max() / wanted.std(-1).mean(), flush=True)
    except Exception as problem:
        print("refused:", " ".join(str(problem).split()), flush=True)
"""


def cases() -> dict[str, tuple[dict[str, Any], Grid | None]]:
    """Options and grid of each row of the table."""
    four, eight, two = Grid(4, 32), Grid(8, 32), Grid(2, 32)
    return {
        "ort, float32": ({"precision": "fp32"}, None),
        "ort, 4 bits": ({}, four),
        "ort, 8 bits": ({}, eight),
        "ort, 2 bits": ({}, two),
        "ort, 4 bits, cache of int8": ({"cache_type": "int8"}, four),
        "genai, float32": ({"target": "genai", "precision": "fp32"}, None),
        "genai, 4 bits": ({"target": "genai"}, four),
        "genai, 8 bits": ({"target": "genai"}, eight),
        "genai, 2 bits": ({"target": "genai"}, two),
        "optimum, 4 bits": ({"target": "optimum"}, four),
        "web, float32": ({"target": "web", "precision": "fp32"}, None),
        "web, 4 bits": ({"target": "web"}, four),
        "web, 4 bits, decoded on loading": ({"target": "web", "decode_on_load": True}, four),
        "cuda, 4 bits": ({"target": "cuda"}, four),
        "cuda, 8 bits": ({"target": "cuda"}, eight),
        "cuda, 2 bits": ({"target": "cuda"}, two),
    }


def written(root: Path, options: dict[str, Any], grid: Grid | None) -> Contract:
    """Export a tiny model into ``root``, with what it is fed and what it should answer beside it."""
    artifact = tiny_artifact(root / "artifact", tiny_config(d_ff=(64, 128)), grid=grid, embed_grid=grid)
    random = np.random.default_rng(0)
    calibration = torch.from_numpy(random.integers(0, artifact.config.vocab, (8, 32)))
    save_shard(artifact.root / RANGES, cache_ranges(artifact, calibration))
    OnnxExporter().write(artifact, root, OnnxOptions(**options))
    contract = Contract.load(root)
    tokens = random.integers(0, artifact.config.vocab, (2, TOKENS))
    reduced = "cache_position" in contract.inputs
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    feeds |= {"num_logits_to_keep": np.array(0)} if "num_logits_to_keep" in contract.inputs else {}
    feeds |= empty_cache(contract, 2, TOKENS if reduced else 0)
    feeds |= {"cache_position": np.zeros(2, np.int64)} if reduced else {}
    wanted = load_decoder(artifact)(torch.from_numpy(tokens)).numpy()
    np.savez(root / "feeds.npz", wanted=wanted, path=np.array(contract.model), **feeds)
    return contract


def answers(python: str, root: Path) -> dict[str, str]:
    """By level: ``equal``, ``wrong``, ``crashed``, or why the graph was refused."""
    found: dict[str, str] = {}
    while len(found) < len(LEVELS):
        left = LEVELS[len(found) :]
        ran = subprocess.run([python, "-c", OPEN, root, *left], capture_output=True, text=True, check=False)
        for level, said in zip(left, ran.stdout.splitlines(), strict=False):
            found[level] = said if said.startswith("refused") else _judged(float(said))
        if ran.returncode:
            found[LEVELS[len(found)]] = f"crashed ({ran.returncode})"
    return found


def _judged(share: float) -> str:
    return "equal" if share < SHARE else f"wrong ({share:.2g} of the spread)"


def version_of(python: str) -> str:
    """Of the onnxruntime that a Python has."""
    code = "import onnxruntime; print(onnxruntime.__version__)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main(pythons: list[str], table: Path | None) -> int:
    """Print the table; 1 if a version that is allowed does not give the artifact's answer.

    Args:
        pythons: of environments with onnxruntime and numpy.
        table: also written there, for docs/results.md.
    """
    rows: list[list[str]] = []
    versions, reasons, wrong = {version_of(python): python for python in pythons}, dict[str, int](), list[str]()
    print("| export | needs | " + " | ".join(versions) + " |\n|---|---|" + "---|" * len(versions))
    with tempfile.TemporaryDirectory() as folder:
        for name, (options, grid) in cases().items():
            root = Path(folder) / name.replace(", ", "-").replace(" ", "-")
            root.mkdir()
            least = written(root, options, grid).onnxruntime
            cells = []
            for version, python in versions.items():
                found = answers(python, root)
                if Version(version) >= Version(least):
                    wrong += [f"{name}, {version}, {level}: {said}" for level, said in found.items() if said != "equal"]
                cells.append(_cell(found, reasons))
            rows.append([name, least, *cells])
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    print("\n" + "\n".join(f"[{number}] {reason}" for reason, number in reasons.items()))
    print("\n".join(["", "Wrong though allowed:", *wrong]) if wrong else "\nAll versions that are allowed are equal.")
    if table is not None:
        note = "; ".join(f"[{number}] {reason}" for reason, number in reasons.items())
        results_page.write_table(
            table,
            section="Programs and versions",
            title="Tiny exports of every ONNX target in versions of onnxruntime",
            note=f"Equal: at three optimization levels. {note}",
            columns=["export", "needs", *versions],
            machine="any",
            command="make interop-versions",
            rows=rows,
        )
    return 1 if wrong else 0


def _cell(found: dict[str, str], reasons: dict[str, int]) -> str:
    """What all levels said, in short; reasons are numbered and printed below the table."""
    words = []
    for said in found.values():
        if said.startswith("refused: "):
            said = f"refused [{reasons.setdefault(_reason(said), len(reasons) + 1)}]"
        words.append(said)
    return words[0] if len(set(words)) == 1 else "; ".join(words)


def _reason(said: str) -> str:
    """What onnxruntime says without its own signatures and our paths."""
    said = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed:|/onnxruntime_src/\S+ ", "", said)
    said = re.sub(r"[\w: ]*onnxruntime::[^)]*\)(?: \[with[^]]*\])?", "", said)
    return " ".join(said.removeprefix("refused: ").split())[:200]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", help="Python of an environment with onnxruntime and numpy")
    parser.add_argument("--table", type=Path, help="JSON file for the results page")
    given = parser.parse_args()
    sys.exit(main(given.pythons, given.table))
