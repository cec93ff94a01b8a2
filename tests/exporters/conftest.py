"""What every exporter's tests need: tiny artifacts and their reference logits."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flatq.artifact import Artifact
from flatq.model.decoder import DecoderConfig
from flatq.model.weights import load_decoder
from tests.models import tiny_artifact

MakeArtifact = Callable[..., Artifact]


@pytest.fixture
def make_artifact(tmp_path: Path) -> MakeArtifact:
    """A factory of tiny artifacts, each in a folder of its own."""
    made: list[Artifact] = []

    def make(config: DecoderConfig, **grids: object) -> Artifact:
        made.append(tiny_artifact(tmp_path / f"artifact{len(made)}", config, **grids))  # type: ignore[arg-type]
        return made[-1]

    return make


def printed_by_the_readme(folder: Path) -> str:
    """What the only block of Python in an export's README prints, run run there without flatq; nothing on stderr."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
    return ran.stdout.decode(errors="replace").strip("\n")


def some_tokens(config: DecoderConfig, batch: int, length: int, seed: int = 7) -> NDArray[np.int64]:
    """Deterministic random tokens, [b, s]."""
    return np.random.default_rng(seed).integers(0, config.vocab, (batch, length))


def reference_logits(
    artifact: Artifact, tokens: NDArray[np.int64], valid: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """What the artifact itself says, [b, s] -> [b, s, vocab]."""
    mask = None if valid is None else torch.from_numpy(valid)
    logits: NDArray[np.float32] = load_decoder(artifact)(torch.from_numpy(tokens), valid=mask).numpy()
    return logits
