"""``flatq eval``: evaluate an artifact, an export in its runtime, or a pretrained model, on one or several texts.

An artifact or export is compared with the dense model of its recipe. If the dense model is not available, an export is
compared with its artifact. Without either, only perplexity is measured; a warning states it.
"""

from __future__ import annotations

import difflib
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flatq.artifact import MANIFEST, Artifact, artifact_in, tokenizer_in
from flatq.calibration.divergence import DenseStates
from flatq.calibration.perplexity import perplexity
from flatq.calibration.tokens import EvaluationText, self_tokens, token_batches
from flatq.errors import ExportError, FlatqError, RecipeError
from flatq.export.deliver import reopened
from flatq.export.folder import DESCRIPTION, artifact_of, description_of, tokenizer_of
from flatq.export.quality import TOKENS, first_rows
from flatq.model.weights import Weights
from flatq.pipeline.quality import export_perplexity, export_quality, model_quality, sentence
from flatq.pipeline.run import open_source
from flatq.pipeline.texts import tokens_of
from flatq.recipe.blocks import CalibrationSpec, EvaluationSpec
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source, open_model

log = logging.getLogger(__name__)
DATASETS = ("wikitext2", "c4", "alpaca", "python-docs", "text")
ALL_TOKENS, SEQ_LEN = 8192, 512


def evaluate(
    model: str,
    *,
    dataset: str | None = None,
    path: Path | None = None,
    field: str | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    check: bool = True,
) -> list[str]:
    """One line for each text.

    Args:
        model: export folder, artifact or run folder, or a model as in a recipe.
        dataset: one text; None is text if ``path`` is given, else the texts of the model's run (python-docs for a
            pretrained model).
        path: file of dataset text.
        field: key of the text in a .jsonl file; None is text.
        tokens: of each text; None is 8,192, for an export 2,048.
        seq_len: of the windows; None is the run's, or 512.
        check: compare the files of an artifact or export with their digests first.

    Raises:
        ArtifactError: a file of an artifact or export is missing or damaged.
        RecipeError: the text is not known or cannot be read.
        ExportError: the runtime of an export is not available.
    """
    dataset = checked_dataset(dataset, path, field)
    texts_of = partial(_texts, dataset=dataset, path=path, field=field, seq_len=seq_len)
    if (Path(model) / DESCRIPTION).is_file():
        return _of_export(Path(model), partial(texts_of, tokens=tokens or TOKENS), check)
    if artifact_in(Path(model)) is None:
        source = open_model(model)
        source.validate()
        text = _one_text(source.tokenizer(), dataset or "python-docs", path, field, tokens or ALL_TOKENS, seq_len)
        return _alone(source, [text])
    artifact = Artifact.open(model, check=check)
    recipe = _recipe(artifact.manifest["recipe"], artifact.root / MANIFEST)
    tokenizer, vocab = tokenizer_in(artifact.root), artifact.config.vocab
    texts = texts_of(recipe, tokenizer, vocab, tokens=tokens or ALL_TOKENS)
    original = _original(recipe)
    if original is None:
        return _alone(artifact, texts)
    with tempfile.TemporaryDirectory() as folder:
        return [sentence(text) for text in model_quality(DenseStates(original, Path(folder)), artifact, texts)]


def checked_dataset(dataset: str | None, path: Path | None, field: str | None = None) -> str | None:
    """The data set to read: ``text`` if only a path is given.

    Raises:
        RecipeError: it is not known, or ``path`` or ``field`` is missing or not allowed.
    """
    if field is not None and (path is None or path.suffix != ".jsonl"):
        raise RecipeError(f"--field {field}: is the key of the text in a .jsonl file; give one with --path")
    if dataset is None:
        return "text" if path is not None else None
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"--dataset {dataset}: not known; allowed: {', '.join(DATASETS)}{hint}")
    if (dataset == "text") != (path is not None):
        raise RecipeError(
            "--dataset text: give the file with --path, a .txt or .jsonl file"
            if path is None
            else f"--path {path}: is not used with --dataset {dataset}; leave one of the two out"
        )
    return dataset


def _of_export(
    root: Path, texts_of: Callable[[Recipe | None, Any, int], list[EvaluationText]], check: bool
) -> list[str]:
    """Compare an export with the dense model, or with its artifact; without either, only perplexity.

    Raises:
        ArtifactError: a file is damaged.
    """
    item, _ = reopened(root, check=check)
    described = description_of(root, check=False)
    artifact = artifact_of(root, described, check=check)
    recipe = _recipe(artifact.manifest["recipe"] if artifact else described.recipe, root / DESCRIPTION)
    source = _original(recipe)
    reference: Weights | None = source or artifact
    if source is None and recipe is not None and self_tokens(recipe.calibration, recipe.evaluation):
        log.warning("the dense model generated texts of the run and cannot be opened; python-docs is used instead")
        recipe = None
    texts = texts_of(recipe, tokenizer_of(root), described.vocab)
    if reference is None:
        return [perplexity_line(name, value) for name, value in export_perplexity(item, root, texts).items()]
    compared = "" if source is not None else " (compared with the artifact: the dense model cannot be opened)"
    with tempfile.TemporaryDirectory() as folder:
        found = export_quality(DenseStates(reference, Path(folder)), item, root, texts)
    if not found:
        raise ExportError(
            f"{root}: no runtime for the format {item.format!r} is available; evaluate the artifact instead: "
            f"{(root / described.artifact).resolve()}"
        )
    return [sentence(text) + compared for text in found]


def _recipe(text: str, where: Path) -> Recipe | None:
    return Recipe.parse(text, f"{where}") if text else None


def _alone(weights: Weights, texts: Sequence[EvaluationText]) -> list[str]:
    return [perplexity_line(text.name, perplexity(weights, text.tokens).value) for text in texts]


def perplexity_line(text: str, value: float) -> str:
    """A line about a model that is compared with no other."""
    return f"{text}: perplexity {value:.4f}"


def _original(recipe: Recipe | None) -> Source | None:
    """The dense model of a recipe; None, with a warning, if it cannot be opened."""
    if recipe is None:
        return None
    try:
        return open_source(recipe)
    except FlatqError as error:
        log.warning("the dense model cannot be opened, so there is no comparison with it: %s", error)
        return None


def _texts(
    recipe: Recipe | None,
    tokenizer: Any,
    vocab: int,
    *,
    dataset: str | None,
    path: Path | None,
    field: str | None,
    tokens: int,
    seq_len: int | None,
) -> list[EvaluationText]:
    """The requested text, or the texts of the run."""
    if dataset is not None or recipe is None:
        return [_one_text(tokenizer, dataset or "python-docs", path, field, tokens, seq_len)]
    if seq_len is not None:
        raise RecipeError("--seq-len: is not used for the texts of the run; give a text with --dataset or --path")
    texts = tokens_of(recipe, tokenizer, vocab).evaluation
    return [EvaluationText(text.name, first_rows(text.tokens, tokens), text.calibrated) for text in texts]


def _one_text(
    tokenizer: Any, dataset: str, path: Path | None, field: str | None, tokens: int, seq_len: int | None
) -> EvaluationText:
    place = {"path": str(path) if path else None, "field": field}
    seen = {"dataset": dataset, **place, "samples": 1, "seq_len": 16}
    spec = EvaluationSpec(dataset="held-out", tokens=tokens, seq_len=min(seq_len or SEQ_LEN, tokens))
    text = token_batches(CalibrationSpec.model_validate(seen), [spec], tokenizer).evaluation[0]
    return EvaluationText(Path(path).stem if path else dataset, text.tokens, calibrated=False)
