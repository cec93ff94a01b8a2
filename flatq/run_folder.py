"""The run folder: results of finished phases, with their time and memory.

    DIR/recipe.yaml          the text of the recipe
    DIR/work/                cached phases, hidden states, resume state; removed when the run is finished
    DIR/artifact/            the compressed model (artifact.partial/ until it is complete)
    DIR/exports/NAME/        one folder per export
    DIR/report.{json,md,html}

A phase is a named computation with a JSON result. The result is written when the phase ends, so an interrupted run
repeats no finished phase.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from flatq.errors import ArtifactError, FlatqError, NumericsError, RecipeError
from flatq.files import as_json, disk_full, file_digest, first_fault, read_json, write_atomically, write_checksummed
from flatq.machine import distributed
from flatq.machine.memory import forget_peak, give_back, peak_device_bytes, peak_rss_bytes
from flatq.recipe.grammar import Recipe

log = logging.getLogger(__name__)
T = TypeVar("T")
RUN, REPORT = "run.json", "report.json"
ARTIFACT, EXPORTS = "artifact", "exports"
SEALED = ("recipe.yaml", "report.md", "report.html", REPORT)  # their digests are in run.json once the run is finished
OWN = {RUN, *SEALED, ARTIFACT, f"{ARTIFACT}.partial", EXPORTS, "work", "tasks"}
FRESH = "start over with --fresh"


class Begun(BaseModel):
    """``run.json``: digest of the recipe; of a finished run also the digests of ``SEALED``."""

    model_config = ConfigDict(extra="forbid")

    digest: str
    files: dict[str, str] = {}


class Phase(BaseModel):
    """A finished phase: its result, time and memory."""

    model_config = ConfigDict(extra="forbid")

    result: Any
    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int


class Outcome(BaseModel):
    """Of an export in ``report.json``, whether it is there."""

    name: str
    error: str | None = None


class Outcomes(BaseModel):
    """Of ``report.json``, what became of the exports; a report of another version has these, too."""

    exports: list[Outcome] = []


class RunFolder:
    """One run of one recipe on disk."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.root, self.recipe = root, recipe
        self.work = root / "work"
        self.artifact = root / ARTIFACT
        self.partial = root / f"{ARTIFACT}.partial"
        self.exports = root / EXPORTS
        self._highest = 0  # bytes, before the current phase

    @classmethod
    def open(cls, out: Path | None, recipe: Recipe, *, fresh: bool = False) -> RunFolder:
        """The folder of a recipe; it is checked here and created by ``working``.

        Raises:
            RecipeError: the folder belongs to another recipe, was not created by flatq, or cannot be written.
        """
        folder = cls(out or Path("runs") / f"{recipe.name}-{recipe.digest()[:8]}", recipe)
        root = folder.root
        if not distributed.first():
            return folder  # only rank 0 checks, creates and writes it
        if fresh and folder.owned:
            shutil.rmtree(root)
        if root.exists() and (not root.is_dir() or any(root.iterdir())) and not folder.barely_begun:
            if not folder.owned:
                raise RecipeError(f"--out {root}: exists and is no run folder of flatq; choose another place")
            if folder.digest() != recipe.digest():
                raise RecipeError(
                    f"--out {root}: holds the run of another recipe; choose another place, or --fresh to replace it"
                )
        parent = next(parent for parent in (root, *root.absolute().parents) if parent.exists())
        if not parent.is_dir():
            raise RecipeError(f"--out {root}: {parent} is a file, no folder can be made below it; choose another place")
        if not os.access(parent, os.W_OK):
            raise RecipeError(f"--out {root}: {parent} is not writable; choose another place")
        return folder

    @property
    def owned(self) -> bool:
        """Whether flatq created the folder."""
        return (self.root / RUN).is_file()

    @property
    def barely_begun(self) -> bool:
        """Whether the folder is empty, or was left by a run that ended before ``run.json`` was written."""
        if not self.root.is_dir() or self.owned:
            return False
        inside = {path.name for path in self.root.iterdir()}
        return inside <= {"work", f"{RUN}.partial"} and not (self.work.is_dir() and any(self.work.iterdir()))

    def begun(self) -> Begun:
        """The content of ``run.json``.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        return read_json(self.root / RUN, Begun, FRESH, checksummed=True)

    def digest(self) -> str:
        """Digest of the folder's recipe."""
        return self.begun().digest

    @property
    def finished(self) -> bool:
        """Whether an earlier run ended: it wrote its report, every export succeeded, and its files are sealed."""
        if not (self.root / REPORT).is_file() or any(export.error for export in self.outcomes()):
            return False
        return not self.work.exists() or bool(self.begun().files)

    def tidy(self) -> None:
        """Remove what a run leaves that was killed after its end, while it removed its work folder."""
        if distributed.first():
            shutil.rmtree(self.work, ignore_errors=True)

    def outcomes(self) -> list[Outcome]:
        """The exports listed in the report.

        Raises:
            ArtifactError: the report is damaged.
        """
        return read_json(self.root / REPORT, Outcomes, FRESH).exports

    def seal(self) -> None:
        """Write the digests of a finished run's files to ``run.json``."""
        files = {name: file_digest(self.root / name) for name in SEALED if (self.root / name).is_file()}
        write_checksummed(self.root / RUN, Begun(digest=self.recipe.digest(), files=files).model_dump())

    @contextmanager
    def working(self) -> Iterator[None]:
        """Create the folder for the enclosed work; an error before the first saved state removes it again."""
        if not distributed.first():
            distributed.barrier()
            yield
            return
        new = [place for place in (self.root, *self.root.absolute().parents) if not place.exists()]
        blank = bool(new) or self.barely_begun
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            write_checksummed(self.root / RUN, Begun(digest=self.recipe.digest()).model_dump())
            write_atomically(self.root / "recipe.yaml", self.recipe.text.encode())
            distributed.barrier()
            yield
        except BaseException as error:
            if isinstance(error, Exception) and blank and not (self.work / "state.json").exists():
                self._vanish(new)
            if isinstance(error, OSError) and disk_full(error):
                raise ArtifactError(
                    f"{self.root}: the disk is full ({error.strerror or error}); free some space and run again, "
                    "finished blocks are kept"
                ) from error
            raise
        shutil.rmtree(self.work)

    def _vanish(self, new: list[Path]) -> None:
        """Remove the folder; ``new`` lists the folder and parents that were created by this run."""
        shutil.rmtree(self.root, ignore_errors=True)
        if not new:
            self.root.mkdir(exist_ok=True)
        for parent in new[1:]:
            if any(parent.iterdir()):
                break
            parent.rmdir()

    def depend_on(self, inputs: Mapping[str, Any]) -> None:
        """Record the inputs of the run; a resumed run must have the same inputs.

        Raises:
            RecipeError: lists the inputs that changed since the run was started.
            ArtifactError: ``inputs.json`` is damaged.
        """
        path, found = self.work / "inputs.json", as_json(inputs)
        if not path.exists():
            write_checksummed(path, found)
        noted = read_json(path, dict[str, Any], FRESH, checksummed=True)
        changed = [key for key in found if noted.get(key) != found[key]]
        if changed:
            raise RecipeError(
                f"{self.root}: {', '.join(changed)} changed since this run was started, so it cannot be resumed; "
                "restore the former inputs, or start over with --fresh"
            )

    def phase(self, name: str, compute: Callable[[], T], kind: type[T]) -> T:
        """Result of a phase: computed, or read from the file of an earlier run.

        Args:
            name: name of the phase and of its file.
            compute: computes the result.
            kind: type of the result; anything that pydantic can convert to JSON and back: numbers, lists, dicts,
                dataclasses, models. The result is always converted to JSON and back, also when it was just computed.

        Raises:
            ArtifactError: the file of a finished phase holds another type.
        """
        adapter = TypeAdapter(kind)
        path = self.work / "phases" / f"{name}.json"
        known = distributed.broadcast(self._known(path) if distributed.first() else None)
        if known is not None:
            log.info("%s: already done", name)
            return _as(kind, known, path)
        self._highest = max(self._highest, peak_rss_bytes())
        give_back()
        forget_peak()
        started = time.monotonic()
        written = distributed.broadcast(adapter.dump_python(compute(), mode="json"))
        _must_be_finite(written, name)
        result = adapter.validate_python(written)
        if not distributed.first():
            return result
        path.parent.mkdir(exist_ok=True)
        seconds = time.monotonic() - started
        peaks = {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": peak_device_bytes()}
        write_checksummed(path, {"result": written, "seconds": seconds, **peaks})
        log.info("%s: %.1f s, peak memory %.2f GB", name, seconds, peaks["peak_rss_bytes"] / 1e9)
        return result

    def _known(self, path: Path) -> Phase | None:
        """A finished phase's file; None if there is none, or it is damaged and was removed."""
        if not path.exists():
            return None
        try:
            return read_json(path, Phase, "this phase is computed again", checksummed=True)
        except ArtifactError as damaged:
            log.warning("%s", damaged)
            path.unlink()
            if not self.artifact.exists():  # finished blocks were built from the plan that was lost
                (self.work / "state.json").unlink(missing_ok=True)
            return None

    def known(self, name: str, kind: type[T]) -> T | None:
        """Result of a phase that an earlier call of ``phase`` finished; None if it was never run."""
        found = self._known(self.work / "phases" / f"{name}.json")
        return None if found is None else _as(kind, found, self.work / "phases" / f"{name}.json")

    def forget(self, *names: str) -> None:
        """Delete the results of phases, so that they are computed again."""
        for name in names:
            (self.work / "phases" / f"{name}.json").unlink(missing_ok=True)

    def timing(self) -> dict[str, float]:
        """Seconds per finished phase, in the order in which they finished."""
        return {name: round(phase.seconds, 2) for name, phase in self._phases().items()}

    def memory(self) -> dict[str, int]:
        """Peak resident memory during each finished phase (on Linux; elsewhere: since the start of the process)."""
        return {name: phase.peak_rss_bytes for name, phase in self._phases().items()}

    def device_memory(self) -> dict[str, int]:
        """Peak GPU memory of each finished phase that used a GPU."""
        return {name: phase.peak_device_bytes for name, phase in self._phases().items() if phase.peak_device_bytes}

    def _phases(self) -> dict[str, Phase]:
        files = sorted((self.work / "phases").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return {path.stem: phase for path in files if (phase := self._known(path)) is not None}

    def peak_rss_bytes(self) -> int:
        """Peak resident memory over all phases, including those of earlier processes of a resumed run."""
        return max([peak_rss_bytes(), self._highest, *self.memory().values()])


def _as(kind: type[T], phase: Phase, path: Path) -> T:
    """A phase's result as a type.

    Raises:
        ArtifactError: it is of another one.
    """
    try:
        return TypeAdapter(kind).validate_python(phase.result)
    except ValidationError as wrong:
        raise ArtifactError(f"{path}: no valid result of {path.stem!r} ({first_fault(wrong)}); {FRESH}") from wrong


def _must_be_finite(value: Any, where: str) -> None:
    """Refuse a JSON value with a number that JSON cannot hold, naming its place.

    Raises:
        NumericsError: there is one.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise NumericsError(
            f"{where}: the result is {value}, so the weights are damaged or overflow float32: check the source "
            "checkpoint"
        )
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        _must_be_finite(part, f"{where}.{key}")


def require_space(root: Path, wanted: int, what: str) -> None:
    """Fail early if there is not enough disk space.

    Raises:
        FlatqError: with the folder, the space needed and the free space.
    """
    existing = next(parent for parent in (root, *root.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < wanted:
        raise FlatqError(
            f"{existing}: {what} needs about {wanted / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "free some space or choose another place with --out"
        )
