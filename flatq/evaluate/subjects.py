"""Models to evaluate: an artifact, a pretrained model, or an export in its runtime; loaded when needed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flatq.artifact import Artifact, artifact_in, tokenizer_in
from flatq.digests import combined_digest
from flatq.errors import FlatqError, RecipeError
from flatq.export.deliver import opened
from flatq.export.folder import DESCRIPTION, Description, description_of, tokenizer_of
from flatq.export.generate import DecoderRunner
from flatq.export.protocols import Runner
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source, open_model, open_named
from flatq.tokenizer import end_tokens

log = logging.getLogger(__name__)
DENSE = "dense"


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        name: ``dense``, ``artifact`` or the name of an export; also the name of its folder of results.
        digest: of its files; identifies the model.
        vocab: rows of the embedding.
        positions: maximum number of positions.
        settings: ``bos_token_id`` and ``eos_token_id``, if the model defines them.
        tokenizer: loads a transformers tokenizer.
        open: loads the model.
    """

    name: str
    digest: str
    vocab: int
    positions: int
    settings: Mapping[str, Any]
    tokenizer: Callable[[], Any]
    open: Callable[[], Runner]

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        return end_tokens(self.settings)

    @property
    def prefix(self) -> int:
        """Token that is inserted before a text without a context: the begin token, or an end token.

        Raises:
            RecipeError: the model defines neither.
        """
        begin = self.settings.get("bos_token_id")
        if begin is None and not self.ends:
            raise RecipeError(f"{self.name}: its configuration has neither bos_token_id nor eos_token_id; add one")
        return min(self.ends) if begin is None else int(begin)


def subjects_of(
    model: str, *, provider: str = "auto", dense: bool = True, check: bool = True
) -> tuple[list[Subject], Path]:
    """The dense model of a compressed model (if wanted), the model itself, and the folder for their results.

    Args:
        model: run, artifact or export folder, or a pretrained model as in a recipe.
        provider: ``auto``, ``cpu`` or ``cuda``, for the runtime of an export.
        dense: include the dense model of a compressed one; logs a warning if it is not available.
        check: compare the files of an artifact or export with their digests first.

    Raises:
        ArtifactError: a file of an artifact or export is missing or damaged.
    """
    path = Path(model)
    if (path / DESCRIPTION).is_file():
        described = description_of(path, check=check)
        beside = path.parent.parent if path.parent.name == "exports" else path.parent
        recipe, one = described.recipe, exported(path, described, provider)
    else:
        if artifact_in(path) is None:
            return [pretrained(open_model(model))], Path("tasks") / re.sub(r"[^\w.-]+", "-", model).strip("-.")
        artifact = Artifact.open(path, check=check)
        beside, recipe, one = artifact.root.parent, artifact.manifest["recipe"], compressed(artifact)
    before = _dense_of(recipe, path) if dense else None
    return [*([before] if before else []), one], beside / "tasks"


def pretrained(source: Source) -> Subject:
    """A pretrained model in flatq's decoder, float32."""
    source.validate()
    config, tokenizer = source.config, source.tokenizer
    digest, settings = combined_digest(source.digests()), source.settings()
    return Subject(DENSE, digest, config.vocab, config.max_positions, settings, tokenizer, partial(_decoder, source))


def compressed(artifact: Artifact) -> Subject:
    """An artifact in flatq's decoder, float32."""
    config, tokenizer = artifact.config, partial(tokenizer_in, artifact.root)
    digest, settings = combined_digest(artifact.manifest["files"]), artifact.settings
    return Subject(
        "artifact", digest, config.vocab, config.max_positions, settings, tokenizer, partial(_decoder, artifact)
    )


def exported(root: Path, described: Description, provider: str) -> Subject:
    """An export in its runtime with default settings."""
    return Subject(
        root.name,
        combined_digest(described.files),
        described.vocab,
        described.context_length,
        described.token_ids,
        partial(tokenizer_of, root),
        partial(opened, root, provider, check=False),  # by now the files were compared, if they were to be
    )


def _decoder(weights: Source | Artifact) -> Runner:
    return DecoderRunner(weights)


def _dense_of(recipe: str, root: Path) -> Subject | None:
    if not recipe:
        log.warning("%s has no recipe, so its dense model is unknown; only the compressed model runs", root)
        return None
    model = Recipe.parse(recipe, str(root)).model
    try:
        return pretrained(open_named(model))
    except FlatqError as gone:
        log.warning("the dense model %s cannot be opened (%s); only the compressed model runs", model.path, gone)
        return None
