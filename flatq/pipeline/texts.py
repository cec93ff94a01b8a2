"""The calibration and evaluation tokens of a run, including text that the dense model generates."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from flatq.artifact import Artifact, tokenizer_in
from flatq.calibration.self_text import SelfText
from flatq.calibration.tokens import Tokens, self_tokens, token_batches
from flatq.machine import distributed
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source, open_model


def run_tokens(recipe: Recipe, source: Source, folder: RunFolder, device: str) -> Tokens:
    """The tokens of a run; generating text with the model is a separate phase.

    Raises:
        RecipeError: a text cannot be read or generated, or is too short.
    """
    writer = SelfText(source, folder.work / "self-text", device, recipe.calibration.precision)

    def drawn() -> Tokens:
        return distributed.on_first(
            lambda: token_batches(recipe.calibration, recipe.evaluation, source.tokenizer(), writer)
        )

    if self_tokens(recipe.calibration, recipe.evaluation):
        folder.phase("self-text", lambda: drawn().description, dict[str, Any])
    return drawn()


def tokens_of(recipe: Recipe, artifact: Artifact) -> Tokens:
    """The texts of a finished artifact; the dense model is opened again if it generated some of them.

    Raises:
        RecipeError: a text cannot be read, or the dense model is not available.
    """
    if not self_tokens(recipe.calibration, recipe.evaluation):
        return token_batches(recipe.calibration, recipe.evaluation, tokenizer_in(artifact.root))
    source = open_model(recipe.model.path, revision=recipe.model.revision, dtype=recipe.model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        writer = SelfText(source, Path(folder), precision=recipe.calibration.precision)
        return token_batches(recipe.calibration, recipe.evaluation, source.tokenizer(), writer)
