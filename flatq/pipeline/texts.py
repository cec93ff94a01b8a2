"""The calibration and evaluation tokens of a run, including text that the dense model generates."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from flatq.calibration.self_text import SelfText
from flatq.calibration.tokens import SELF_TEXT, Tokens, self_tokens, token_batches
from flatq.errors import RecipeError
from flatq.machine import distributed
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source, open_named


def run_tokens(recipe: Recipe, source: Source, folder: RunFolder, device: str, place: Path) -> Tokens:
    """The tokens of a run; generating text with the model is a separate phase.

    Args:
        place: folder of the generated text, which may be that of several runs: its files are found by what they hold.

    Raises:
        RecipeError: a text cannot be read or generated, or is too short.
    """
    writer = SelfText(source, place / SELF_TEXT, device, recipe.calibration.precision)

    further = 0 if recipe.recover is None else recipe.recover.samples

    def drawn() -> Tokens:
        return distributed.on_first(lambda: _drawn(recipe, source.tokenizer(), source.config.vocab, writer, further))

    if self_tokens(recipe.calibration, recipe.evaluation, further):
        folder.phase("self-text", lambda: drawn().description, dict[str, Any])
    return drawn()


def tokens_of(recipe: Recipe, tokenizer: Any, rows: int) -> Tokens:
    """The texts of a finished run; the dense model is opened again if it generated some of them.

    Args:
        recipe: of the run.
        tokenizer: of its artifact.
        rows: of the embedding.

    Raises:
        RecipeError: a text cannot be read, or the dense model is not available.
    """
    if not self_tokens(recipe.calibration, recipe.evaluation):
        return _drawn(recipe, tokenizer, rows)
    source = open_named(recipe.model)
    with tempfile.TemporaryDirectory() as folder:
        writer = SelfText(source, Path(folder), precision=recipe.calibration.precision)
        return _drawn(recipe, source.tokenizer(), source.config.vocab, writer)


def _drawn(recipe: Recipe, tokenizer: Any, rows: int, writer: SelfText | None = None, further: int = 0) -> Tokens:
    tokens = token_batches(recipe.calibration, recipe.evaluation, tokenizer, writer, recovery=further)
    refuse_beyond(tokens.calibration, tokenizer, rows, f"calibration: {recipe.calibration.label}")
    if tokens.recovery is not None:
        refuse_beyond(tokens.recovery, tokenizer, rows, f"recover: {recipe.calibration.label}")
    for text in tokens.evaluation:
        refuse_beyond(text.tokens, tokenizer, rows, f"evaluation: {text.name}")
    return tokens


def refuse_beyond(tokens: Tensor, tokenizer: Any, rows: int, where: str) -> None:
    """Refuse a text with a token that the model has no embedding for, naming it.

    Args:
        tokens: ids, int64 of any shape.
        tokenizer: the model's.
        rows: of the embedding.
        where: the text, for the message.

    Raises:
        RecipeError: there is such a token.
    """
    largest = int(tokens.max())
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise RecipeError(
            f"{where} holds the token {token!r} (id {largest}), and the model's embedding has {rows} rows; "
            "take the token out of the text, or resize the model's embedding (resize_token_embeddings in transformers)"
        )
