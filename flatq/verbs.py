"""The commands besides ``run``, ``check`` and ``plan``: export, bench, eval, compare, generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flatq.artifact import MANIFEST, RANGES, Artifact, tokenizer_in
from flatq.calibration.cache_ranges import note_cache_ranges
from flatq.errors import RecipeError
from flatq.evaluate.compare import comparison, entries_of
from flatq.evaluate.subjects import subjects_of
from flatq.evaluate.tasks import require_lm_eval, run_tasks, task_table, tasks_wanted
from flatq.export.bench import bench_table
from flatq.export.deliver import deliver, foreign, opened, reopened, side_by_side
from flatq.export.folder import DESCRIPTION, description_of, tokenizer_of
from flatq.export.generate import DecoderRunner, stream
from flatq.export.planned import PlannedExport, needs_cache_ranges
from flatq.export.protocols import Exporter, Runner, exporter_named
from flatq.pipeline.texts import tokens_of
from flatq.plan.objections import raise_absent_packages
from flatq.recipe.blocks import BenchSpec
from flatq.recipe.grammar import Recipe
from flatq.recipe.reader import Unreadable, read
from flatq.tokenizer import end_tokens


def recipe_of(artifact: Artifact) -> Recipe:
    """The recipe of an artifact.

    Raises:
        RecipeError: the artifact has no recipe.
    """
    text = artifact.manifest["recipe"]
    if not text:
        raise RecipeError(f"{artifact.root}: has no recipe, so its calibration text is unknown; run a recipe again")
    return Recipe.parse(text, str(artifact.root / MANIFEST))


def export(
    artifact: Path, out: Path, format: str, options: dict[str, Any], *, verify: bool = True, check: bool = True
) -> list[Path]:
    """Write one more format of a finished artifact and verify it if ``verify``; returns its files.

    Args:
        artifact: its folder, or the run folder.
        out: folder to write.
        format: name of the exporter.
        options: of the exporter.
        verify: open the export in its runtime and compare it with the artifact.
        check: compare the artifact's files with their digests first.

    Raises:
        ArtifactError: a file of the artifact is missing or damaged.
        RecipeError: unknown exporter or options, or ``out`` exists.
        ExportError: it cannot be written, or its logits differ from the artifact's.
    """
    if out.exists():
        raise RecipeError(f"--out {out}: exists; choose another place")
    model = Artifact.open(artifact, check=check)
    exporter = exporter_named(format)
    item = PlannedExport(out.name, format, exporter, checked_options(exporter, options), verify)
    problems = exporter.check(model.config, model.grids, item.options)
    if problems:
        raise RecipeError(problems)
    raise_absent_packages([item])
    if needs_cache_ranges([item]) and RANGES not in model.manifest["files"]:
        text = recipe_of(model)
        tokens = tokens_of(text, tokenizer_in(model.root), model.config.vocab)
        note_cache_ranges(model, tokens, precision=text.calibration.precision)
    return [out / file for file in deliver(item, model, out, None)["files"]]


def bench_exports(
    paths: list[Path], against: list[Path], loads: list[dict[str, int]], *, check: bool = True, **settings: Any
) -> str:
    """Measure export folders and ONNX decoders of other programs in turn; returns a table for each load.

    Args:
        paths: export folders of flatq.
        against: folders with an ONNX decoder of another program.
        loads: ``prompt``, ``new_tokens`` and ``batch`` of each table.
        check: compare the exports' files with their digests first.
        settings: the other keys of a recipe's ``bench``.
    """
    entries = {str(path): (reopened(path, check=check)[0], path) for path in paths}
    vocab = min(description_of(path, check=False).vocab for path in paths)
    entries |= {str(path): (foreign(path), path) for path in against}
    tables = []
    for load in loads:
        spec = BenchSpec.model_validate({**settings, **load})
        title = ", ".join(f"{name} {value}" for name, value in load.items())
        tables.append(f"{title}\n{bench_table(side_by_side(entries, spec, vocab))}")
    return "\n".join(tables)


def evaluate_tasks(
    model: str,
    names: list[str],
    *,
    suite: str | None,
    limit: int | None,
    folder: Path | None,
    out: Path | None,
    dense: bool,
    provider: str,
    check: bool = True,
) -> str:
    """Run tasks of lm-eval for a model and its dense model; returns a table.

    Raises:
        RecipeError: lm-eval is not installed, or a task is unknown.
    """
    wanted = tasks_wanted(names, suite)
    require_lm_eval()
    subjects, beside = subjects_of(model, provider=provider, dense=dense, check=check)
    return task_table(run_tasks(subjects, wanted, out or beside, limit=limit, folder=folder))


def compare(paths: list[Path], figure: Path | None) -> str:
    """A table of the existing measurements of some models; optionally a figure of quality against bytes.

    Raises:
        RecipeError: a path is no model, or the figure's name does not end in .svg or .png.
    """
    entries = [entry for path in paths for entry in entries_of(path)]
    if figure is not None:
        from flatq.evaluate.figure import draw  # imports matplotlib, which no other command needs

        draw(entries, figure)
    return comparison(entries)


def generate(
    path: Path,
    prompt: str,
    *,
    new_tokens: int,
    temperature: float,
    seed: int,
    chat: bool,
    provider: str,
    check: bool = True,
) -> Iterator[str]:
    """Text from an export in its runtime, or from an artifact in torch.

    Raises:
        ArtifactError: a file is missing or damaged; not looked for if ``check`` is false.
    """
    runner: Runner
    if (path / DESCRIPTION).exists():
        described = description_of(path, check=check)
        tokenizer, ends = tokenizer_of(path), end_tokens(described.token_ids)
        vocab = described.vocab
        runner = opened(path, provider, check=False)
    else:
        artifact = Artifact.open(path, check=check)
        tokenizer, ends = tokenizer_in(artifact.root), end_tokens(artifact.settings)
        runner, vocab = DecoderRunner(artifact), artifact.config.vocab
    sampling: dict[str, Any] = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed}
    return stream(runner, tokenizer, prompt, **sampling, eos=set(ends), chat=chat, vocab=vocab)


def checked_options(exporter: Exporter, options: dict[str, Any]) -> BaseModel:
    """An exporter's options from the command line.

    Raises:
        RecipeError: lists the invalid options.
    """
    try:
        return exporter.Options(**options)
    except ValidationError as error:
        raise RecipeError(
            [f"--option {'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        ) from error


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Parse ``["precision=int4", "opset=23"]`` to exporter options; values have the syntax of a recipe.

    Raises:
        RecipeError: an entry is not ``KEY=VALUE``, or a key is given twice.
    """
    options: dict[str, Any] = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        if not key or not equals or key in options:
            raise RecipeError(f"--option {entry}: {'given twice' if key in options else 'write it as KEY=VALUE'}")
        try:
            options[key] = read(value).value
        except Unreadable as error:
            raise RecipeError(f"--option {entry}: {error}") from error
    return options
