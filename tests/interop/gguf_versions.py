"""Which versions of llama.cpp read which architecture that flatq writes: a table.

    python -m tests.interop.gguf_versions FOLDER... [--table FILE]

Each FOLDER has a version of node-llama-cpp in ``node_modules``, with its built llama.cpp: the table names the release
of llama.cpp. Every model is tiny, random and in float32; it is read if at least five of six greedy texts are the
artifact's (a cache in float16 may decide a tie).

Not part of ``make interop``: the versions are 85 MB each, and what they read does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from flatq.artifact import Artifact
from flatq.export.generate import DecoderRunner
from flatq.model.decoder import DecoderConfig
from flatq_gguf import GgufExporter, GgufOptions
from tests.exporters.test_gguf_llamacpp import MODELS
from tests.family_table import save_tokenizer
from tests.models import tiny_artifact

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import results_page

HERE = Path(__file__).parent / "gguf"
PROMPTS, NEW = np.random.default_rng(0).integers(3, 300, (6, 7)).tolist(), 4
# Row of the table -> case of the tests; models with windows are not here, because a tiny window is
# refused where a real one is not.
ROWS = {
    "llama": "not narrowed",
    "llama, llama3 rope": "llama3 rope",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "olmo2": "olmo2",
    "hunyuan-dense": "hunyuan",
    "deci": "narrowed",
    "deci, tied head, biases": "biases",
    "llama, rope factors": "half of the head rotates",
    "openelm": "qwen3, narrowed, as openelm",
    "mimo2 (layout: compact)": "compact",
}


def model(root: Path, config: DecoderConfig) -> Artifact:
    """A random artifact with a tokenizer, whose layers matter more than its embedding, so that it repeats no token."""
    artifact = tiny_artifact(root, replace(config, vocab=320))
    save_tokenizer(root)
    ends = load_file(root / "ends.safetensors")
    save_file(ends | {"embed.weight": 0.05 * ends["embed.weight"]}, root / "ends.safetensors")
    return artifact


def greedy(artifact: Artifact) -> list[list[int]]:
    """The artifact's own tokens after each prompt."""
    found = []
    for prompt in PROMPTS:
        runner, written = DecoderRunner(artifact), list[int]()
        logits = runner.start(np.array([prompt]), len(prompt) + NEW)
        while len(written) < NEW:
            written.append(int(logits[0].argmax()))
            logits = runner.step(np.array(written[-1:]))
        found.append(written)
    return found


def answer(folder: Path, file: Path, wanted: list[list[int]]) -> str:
    """``yes``, or what a version did instead."""
    index = folder.resolve() / "node_modules" / "node-llama-cpp" / "dist" / "index.js"
    task = json.dumps({"prompts": PROMPTS, "newTokens": NEW})
    try:
        ran = subprocess.run(
            ["node", HERE / "run.mjs", file, task],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "NODE_LLAMA": index.as_uri()},
        )
    except subprocess.TimeoutExpired:
        return "no answer in 120 s"
    if ran.returncode:
        return "refused"
    found: list[Any] = json.loads(ran.stdout)
    equal = sum(row["written"] == text for row, text in zip(found, wanted, strict=True))
    return "yes" if equal >= len(wanted) - 1 else f"other tokens in {len(wanted) - equal} of {len(wanted)}"


def release(folder: Path) -> str:
    """Of llama.cpp, in a version of node-llama-cpp."""
    package = folder / "node_modules" / "node-llama-cpp"
    built = json.loads((package / "llama" / "binariesGithubRelease.json").read_text())["release"]
    return f"{built} (node-llama-cpp {json.loads((package / 'package.json').read_text())['version']})"


def main(folders: list[Path], table: Path | None) -> None:
    """Print the table, and write it for docs/results.md."""
    columns = [release(folder) for folder in folders]
    print("| architecture | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for number, (name, case) in enumerate(ROWS.items()):
            config, options = MODELS[case]
            artifact = model(Path(place) / str(number), config)
            out = Path(place) / f"{number}-gguf"
            out.mkdir()
            GgufExporter().write(artifact, out, GgufOptions.model_validate({"precision": "f32", **options}))
            wanted, (file,) = greedy(artifact), out.glob("*.gguf")
            rows.append([name, *(answer(folder, file, wanted) for folder in folders)])
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    if table is not None:
        results_page.write_table(
            table,
            section="Programs and versions",
            title="Architectures of GGUF files in releases of llama.cpp",
            note="Yes: at least five of six greedy texts of a tiny random model in float32 are the artifact's.",
            columns=["architecture", *columns],
            machine="any",
            command="python -m tests.interop.gguf_versions FOLDER...",
            rows=rows,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folder with node-llama-cpp in node_modules")
    parser.add_argument("--table", type=Path, help="JSON file for the results page")
    given = parser.parse_args()
    main(given.folders, given.table)
