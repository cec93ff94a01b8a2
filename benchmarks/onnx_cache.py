"""What a cache of int8 costs: the same graph with a cache of floats and of int8, on the same text.

    python benchmarks/onnx_cache.py RUN TEXT --tokens 2048 --tokens 8192

RUN is a finished run (or artifact), TEXT a file that it was not calibrated on. The ranges of keys and values are
measured on the run's own calibration text, with each number of ``--tokens``. Each row of the text is read in two
pieces, the first token and all others behind it, so that every later position looks at what the cache has rounded.
Products are exact (no int8 activations), so what is left is the cache. KL is in nats from the float cache's
predictions, mean over all positions; the change of ln(perplexity) is that of the text's own next tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flatq.artifact import Artifact, tokenizer_in
from flatq.calibration.cache_ranges import cache_ranges
from flatq.pipeline.texts import tokens_of
from flatq.verbs import recipe_of
from flatq_onnx import OnnxExporter, OnnxOptions
from flatq_onnx.cache import empty_cache
from flatq_onnx.runner import OnnxRunner


def predictions(artifact: Artifact, options: OnnxOptions, rows: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Log-probabilities of each row's positions but the first, [s - 1, vocab]."""
    with tempfile.TemporaryDirectory() as folder:
        OnnxExporter().write(artifact, Path(folder), options)
        runner = OnnxRunner(Path(folder), provider="cpu", exact=True)
        return [_behind_the_first(runner, row[None]) for row in rows]


def _behind_the_first(runner: OnnxRunner, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    session, contract = runner.session.ort, runner.contract
    past, mask = empty_cache(contract, 1, 0), np.ones_like(tokens)
    past["num_logits_to_keep"] = np.array(0)  # logits of all positions
    held = session.run(contract.outputs[1:], {"input_ids": tokens[:, :1], "attention_mask": mask[:, :1], **past})
    past |= dict(zip([name for name in past if name.startswith("past")], held, strict=True))
    logits = session.run(["logits"], {"input_ids": tokens[:, 1:], "attention_mask": mask, **past})[0][0]
    found: NDArray[np.float64] = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument(
        "--tokens", type=int, action="append", help="to measure ranges on; 2048, 8192 and 16384 if not given"
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    artifact = Artifact.open(options.run)
    recipe, tokenizer = recipe_of(artifact), tokenizer_in(artifact.root)
    calibration = tokens_of(recipe, tokenizer, artifact.config.vocab).calibration
    ids = tokenizer(options.text.read_text()[: 20 * options.rows * options.length])["input_ids"]
    rows = np.array(ids[: options.rows * options.length]).reshape(options.rows, options.length)
    precision: dict[str, Any] = {"precision": "int4" if artifact.grids else "fp32"}
    before = predictions(artifact, OnnxOptions(attention="gqa", **precision), rows)
    print("| tokens for the ranges | KL | largest | change of ln(perplexity) |\n|---:|---:|---:|---:|")
    for tokens in options.tokens or [2048, 8192, 16384]:
        ranges = cache_ranges(artifact, calibration[: max(1, tokens // calibration.shape[1])])
        artifact.cache_ranges = lambda ranges=ranges: ranges  # type: ignore[method-assign, misc]
        after = predictions(artifact, OnnxOptions(cache_type="int8", **precision), rows)
        divergence = np.stack([(np.exp(p) * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)])
        worse = np.stack(before)[:, :-1] - np.stack(after)[:, :-1]  # the last position predicts what is not there
        change = np.take_along_axis(worse, rows[:, 2:, None], -1).mean()
        print(f"| {tokens} | {divergence.mean():.4f} | {divergence.max():.3f} | {change:+.4f} |", flush=True)


if __name__ == "__main__":
    main()
