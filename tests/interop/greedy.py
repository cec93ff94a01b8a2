"""The text that other programs should write."""

from __future__ import annotations

import numpy as np

from flatq.artifact import Artifact
from flatq.export.generate import DecoderRunner
from flatq.export.protocols import Runner
from flatq.tokenizer import open_tokenizer


def greedy(artifact: Artifact, text: str, new: int, runner: Runner | None = None) -> list[int]:
    """Tokens with which the artifact itself goes on, or an export of it."""
    return follow(artifact, open_tokenizer(artifact.root)(text)["input_ids"], new, runner)


def follow(artifact: Artifact, ids: list[int], new: int, runner: Runner | None = None) -> list[int]:
    """Tokens that follow ``ids``."""
    tokens = np.array([ids])
    runner, written = runner or DecoderRunner(artifact), list[int]()
    logits = runner.start(tokens, tokens.shape[1] + new)
    while len(written) < new:
        written.append(int(logits[0].argmax()))
        logits = runner.step(np.array(written[-1:]))
    return written
