"""Write exports and verify them in their runtimes; open export folders.

Every export folder also contains ``export.json``, see ``flatq.export.folder``.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flatq.artifact import Artifact
from flatq.errors import ArtifactError, ExportError
from flatq.export.baseline import BASELINE, dense_artifact
from flatq.export.bench import BenchResult, Load, bench_side_by_side
from flatq.export.companions import add_companions
from flatq.export.folder import AGAIN, DESCRIPTION, describe, description_of
from flatq.export.planned import PlannedExport, absent_packages_of, has_runtime
from flatq.export.protocols import Exported, Runner, exporter_named
from flatq.export.verify import EXACT, Limits, verify
from flatq.machine.progress import progress
from flatq.recipe.blocks import BenchSpec
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source

log = logging.getLogger(__name__)


def deliver(item: PlannedExport, artifact: Artifact, out: Path, heldout: Tensor | None) -> dict[str, Any]:
    """Write an export, open it in its runtime and compare it with the artifact; ``out`` is created only on success.

    If ``item.verify`` is false, it is not opened, and the report states that it was not verified.

    Args:
        out: folder to create, with its parents.
        heldout: text for the comparison, int64 [n, s]; None uses random tokens.

    Returns:
        JSON-ready ``ExportReport``.

    Raises:
        ExportError: it cannot be written, its logits differ from the artifact's, or a package is not installed.
    """
    if absent := absent_packages_of([item]):
        raise ExportError("\n".join(absent))
    growing = out.with_name(out.name + ".partial")
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)
    try:
        exported = item.exporter.write(artifact, growing, item.options)
        changes = add_companions(growing, artifact, item)
        origin = os.path.relpath(artifact.root, out)
        size = exported.bytes  # without the tokenizer, if the format does not need one
        described = describe(growing, artifact, item.format, item.options, origin)
        verification, unverified = _verification(item, artifact, exported, heldout)
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    growing.rename(out)
    if unverified:
        log.warning("exports.%s: not verified: %s", item.name, unverified)
    return {
        "name": item.name,
        "files": sorted(described.files),
        "bytes": size,
        "sha256": described.files,
        "verify": verification,
        "unverified": unverified,
        "notes": [*exported.notes, *changes],
    }


def _verification(
    item: PlannedExport, artifact: Artifact, exported: Exported, heldout: Tensor | None
) -> tuple[dict[str, Any] | None, str]:
    """The verification, or the reason why there is none."""
    if not item.verify:
        return None, "verification was disabled"
    verification = _verified(item, artifact, exported, heldout)
    return verification, "" if verification else "the format has no runtime that flatq can open"


def _verified(
    item: PlannedExport, artifact: Artifact, exported: Exported, heldout: Tensor | None
) -> dict[str, Any] | None:
    limits = Limits(None, exported.rounding_kl) if exported.rounding_kl else EXACT
    opener = partial(item.exporter.open, exported.root, item.options)  # with the default provider of this machine
    exact = partial(opener, provider="cpu", exact=True)
    at = partial(item.exporter.open_at, exported.root, item.options)
    levels = {
        level: (partial(at, level), partial(at, level, provider="cpu", exact=True))
        for level in item.exporter.levels(item.options)
    }
    found = verify(artifact, opener, open_exact=exact, levels=levels, tokens=heldout, name=item.name, limits=limits)
    return None if found is None else asdict(found)


def measured(
    recipe: Recipe,
    source: Source,
    folder: RunFolder,
    exports: list[PlannedExport],
    baselines: Mapping[str, Artifact] | None = None,
) -> list[dict[str, Any]]:
    """Speed and memory of every export that has a runtime, of the dense model and of the baselines; JSON-ready.

    Args:
        recipe: its bench block defines what is measured.
        source: the dense model.
        folder: the run's.
        exports: the finished exports.
        baselines: models quantized without narrowing, by name; written by the first exporter that has a runtime.
    """
    spec = recipe.bench
    if spec is None:
        return []
    runnable = [item for item in exports if has_runtime(item)]
    for item in exports:
        if item not in runnable:
            log.warning("bench: no runtime for %s is installed, so it is left out", item.name)
    entries = {item.name: (item, folder.exports / item.name) for item in runnable}
    if spec.baseline:
        dense = next((d for item in runnable if (d := _dense_export(item, source, folder.work)) is not None), None)
        if dense is not None:
            entries = {BASELINE: dense, **entries}
    for name, artifact in (baselines or {}).items() if runnable else ():
        if (written := _baseline_export(name, artifact, runnable[0], folder.work)) is not None:
            entries[name] = written
    return [asdict(result) for result in side_by_side(entries, spec, source.config.vocab)]


def side_by_side(entries: Mapping[str, tuple[PlannedExport, Path]], spec: BenchSpec, vocab: int) -> list[BenchResult]:
    """Measure export folders in turn, each in a separate process."""
    openers = {
        name: partial(item.exporter.open, root, item.options, provider=spec.provider, threads=spec.threads)
        for name, (item, root) in entries.items()
    }
    if not openers:
        return []
    with progress("bench", (spec.repeats + 1) * len(openers)) as advance:
        return bench_side_by_side(
            openers,
            Load(spec.prompt, spec.new_tokens, spec.batch, vocab),
            repeats=spec.repeats,
            threads=spec.threads,
            on_repeat=advance,
        )


def _dense_export(item: PlannedExport, source: Source, work: Path) -> tuple[PlannedExport, Path] | None:
    """The dense model, written by the same exporter; None if the exporter does not support that."""
    options = item.exporter.dense(item.options)
    if options is None:
        return None
    root = work / BASELINE
    shutil.rmtree(root, ignore_errors=True)
    (root / "export").mkdir(parents=True)
    exported_dense = PlannedExport(BASELINE, item.format, item.exporter, options)
    item.exporter.write(dense_artifact(source, root / "artifact"), root / "export", options)
    return exported_dense, root / "export"


def _baseline_export(
    name: str, artifact: Artifact, like: PlannedExport, work: Path
) -> tuple[PlannedExport, Path] | None:
    """A quantized baseline in the format of an export; None, with a warning, if the format cannot store it."""
    if problems := like.exporter.check(artifact.config, artifact.grids, like.options):
        log.warning("bench: %s is left out: %s", name, "; ".join(problems))
        return None
    root = work / "bench" / name
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    like.exporter.write(artifact, root, like.options)
    return PlannedExport(name, like.format, like.exporter, like.options), root


def reopened(root: Path, *, check: bool = True) -> tuple[PlannedExport, Path]:
    """An export folder written by ``deliver``, and the folder of its artifact.

    Args:
        root: the folder.
        check: compare every file with its digest first, see ``flatq.digests``.

    Raises:
        ArtifactError: it is no export folder, or a file is missing or damaged.
    """
    described = description_of(root, check=check)
    exporter = exporter_named(described.format)
    try:
        options = exporter.Options(**described.options)
    except ValueError as wrong:  # of another version of the exporter
        raise ArtifactError(f"{root / DESCRIPTION}: its options are not known here ({wrong}); {AGAIN}") from wrong
    try:
        artifact = (root / described.artifact).resolve()
    except ValueError as wrong:  # such as a null byte
        raise ArtifactError(f"{root / DESCRIPTION}: artifact is no path ({wrong}); {AGAIN}") from wrong
    return PlannedExport(root.name, described.format, exporter, options), artifact


def foreign(root: Path) -> PlannedExport:
    """A folder with an ONNX decoder of another program, to be measured together with flatq's exports.

    Raises:
        ArtifactError: it contains no ONNX file.
    """
    if not list(root.glob("*.onnx")):
        raise ArtifactError(f"{root}: holds no .onnx file; give a folder that onnxruntime-genai or optimum wrote")
    exporter = exporter_named("onnx")
    return PlannedExport(str(root), "onnx", exporter, exporter.Options())


def opened(root: Path, provider: str, *, check: bool = True) -> Runner:
    """A runner of an export folder.

    Args:
        root: the folder.
        provider: where its runtime computes.
        check: see ``reopened``.

    Raises:
        ArtifactError: a file is missing or damaged.
        ExportError: the format has no runtime here.
    """
    item, _ = reopened(root, check=check)
    runner = item.exporter.open(root, item.options, provider=provider)
    if runner is None:
        raise ExportError(f"{root}: no runtime for the format {item.format!r} is available; open it in another program")
    return runner
