"""How far llama.cpp's answers are from the artifact's: divergence by type, greedy text, and the caches it allocates.

    python benchmarks/gguf_fidelity.py RUN                              in float32, float16, and with the codes
    python benchmarks/gguf_fidelity.py RUN --layout compact --untie     the same with truly narrower values

`--untie` gives the model a head of its own, a copy of its embedding: `compact` knows no tied heads. Tokens are held-out
text of python-docs. Needs `make llamacpp`.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flatq.artifact import Artifact, tokenizer_in
from flatq.calibration.tokens import token_batches
from flatq.export.generate import DecoderRunner
from flatq.export.protocols import FloatArray, IntArray, Runner
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import QuantizedWeight
from flatq.recipe.blocks import CalibrationSpec, EvaluationSpec
from flatq_gguf import GgufExporter, GgufOptions
from flatq_gguf.runner import LOG, LlamaCppRunner

ROWS, LENGTH, PROMPT, NEW = 2, 128, 16, 64
CONTEXT = 4096


class Untied(Artifact):
    """An artifact whose embedding is also stored as its head."""

    @property
    def config(self) -> DecoderConfig:
        """As stored, but untied."""
        return replace(self._config, tied_head=False)

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """As stored; the head is the embedding."""
        return super().tensor("embed.weight" if name == "head.weight" else name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Divergence of llama.cpp from an artifact, by type of the file.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--layout", choices=("auto", "deci", "compact"), default="auto")
    parser.add_argument("--untie", action="store_true")
    options = parser.parse_args()
    tied = Artifact.open(options.run)
    artifact = Untied.open(options.run) if options.untie else tied
    if options.untie and "embed" in artifact.grids:
        artifact.grids["head"] = artifact.grids["embed"]
    tokens = text(tied)
    reference = DecoderRunner(tied)
    logits, greedy = reference.logits(tokens), written(reference, tokens)
    for precision in ("f32", "f16", *(("codes",) if artifact.grids else ())):
        chosen = GgufOptions.model_validate({"layout": options.layout, "precision": precision})
        with tempfile.TemporaryDirectory(prefix="flatq-gguf-") as folder:
            exported = GgufExporter().write(artifact, Path(folder), chosen)
            runner = LlamaCppRunner(Path(folder), provider="cpu", threads=1, exact=precision == "f32")
            found = runner.logits(tokens)
            same = int((written(runner, tokens) == greedy).sum())
            keys, values = caches(runner)
            runner.close()
        error, top = np.abs(found - logits).max(), np.mean(found.argmax(-1) == logits.argmax(-1))
        print(
            f"{precision} as {exported.details['architecture']}: KL {divergence(logits, found):.2e} nats, largest "
            f"logit error {error:.2e}, likeliest token the same {top:.2%}, greedy text {same} of {NEW} tokens, "
            f"cache of {CONTEXT} positions K {keys:.2f} + V {values:.2f} MiB"
        )


def text(artifact: Artifact) -> IntArray:
    """Held-out tokens, int64 [rows, length]."""
    seen = CalibrationSpec(dataset="python-docs", samples=1, seq_len=LENGTH)
    judged = EvaluationSpec(dataset="held-out", tokens=ROWS * LENGTH, seq_len=LENGTH)
    return token_batches(seen, [judged], tokenizer_in(artifact.root)).heldout.numpy()


def written(runner: Runner, tokens: IntArray) -> IntArray:
    """Tokens that a runner writes greedily after the beginning of the first row, int64 [NEW]."""
    token = runner.start(tokens[:1, :PROMPT], PROMPT + NEW).argmax(-1)
    found = [token]
    for _ in range(NEW - 1):
        token = runner.step(token).argmax(-1)
        found.append(token)
    return np.concatenate(found)


def divergence(reference: FloatArray, found: FloatArray) -> float:
    """Mean of KL(reference || found)."""
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def caches(runner: LlamaCppRunner) -> tuple[float, float]:
    """MiB of the key and value caches, from llama.cpp's log."""
    LOG.clear()
    runner.start(np.zeros((1, 1), np.int64), CONTEXT)
    keys, values = (
        sum(float(mib) for mib in re.findall(rf"{letter} \(f\d+\): +([\d.]+) MiB", runner.log)) for letter in "KV"
    )
    return keys, values


if __name__ == "__main__":
    main()
