"""Phases: named computations with a JSON result, each done once in a run folder.

    DIR/work/inputs.json       digests of what the run reads
    DIR/work/phases/NAME.json  a finished phase: result, what it depends on, time and memory
    DIR/work/walk.json         what the unfinished or finished artifact depends on

The result is written when the phase ends, so an interrupted run repeats no finished phase. A phase is outdated if what
it depends on (``flatq.needs``) was changed in the recipe; it is then computed again.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from flatq.errors import ArtifactError, NumericsError, RecipeError
from flatq.files import as_json, as_noted, first_fault, note_digest, read_json, write_checksummed
from flatq.machine import distributed
from flatq.machine.memory import forget_peak, give_back, peak_device_bytes, peak_rss_bytes
from flatq.needs import DRAWN, digest_of, facts, needs
from flatq.recipe.grammar import Recipe

log = logging.getLogger(__name__)
T = TypeVar("T")
FRESH = "start over with --fresh"
ARTIFACT, EXPORTS, WALKED = "artifact", "exports", "walked"


class Phase(BaseModel):
    """A finished phase: its result, what that depends on (a digest), time and memory."""

    model_config = ConfigDict(extra="forbid")

    result: Any
    needs: str
    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int


class Phases:
    """The phases of one recipe in a run folder, and the walk that makes its artifact.

    Attributes:
        inputs: what the run depends on besides its recipe, see ``depend_on``; JSON-ready.
        walked: what the walk makes: the artifact, or with a stage ``recover`` what that stage starts from.
    """

    def __init__(self, root: Path, recipe: Recipe, inputs: Mapping[str, Any] | None = None) -> None:
        self.root, self.recipe = root, recipe
        self.inputs = dict(inputs or {})
        self.work = root / "work"
        self.artifact = root / ARTIFACT
        self.walked = self.artifact if recipe.recover is None else self.work / WALKED
        self.partial = root / f"{ARTIFACT}.partial"
        self.exports = root / EXPORTS
        self._asked: set[str] = set()  # names of the phases of this recipe
        self._highest = 0  # bytes, before the current phase

    def depend_on(self, inputs: Mapping[str, Any]) -> None:
        """Record the inputs of the run; a resumed run must have the same inputs, other tokens only by another recipe.

        Phases of a former recipe that depend on what was changed in it are removed, which is logged.

        Raises:
            RecipeError: lists the inputs that changed since the run was started.
            ArtifactError: ``inputs.json`` is damaged.
        """
        path, found = self.work / "inputs.json", as_json(inputs)
        drawn = digest_of(facts(self.recipe), DRAWN)
        if path.exists():
            noted = read_json(path, dict[str, Any], FRESH, checksummed=True)
            if noted.get("drawn") != drawn:
                noted["tokens"] = found.get("tokens")
            changed = [key for key in found if noted.get(key) != found[key]]
            if changed:
                raise RecipeError(
                    f"{self.root}: {', '.join(changed)} changed since this run was started, so it cannot be resumed; "
                    "restore the former inputs, or start over with --fresh"
                )
        write_checksummed(path, {**found, "drawn": drawn})
        self.inputs = found
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        """Remove the phases that depend on what was changed in the recipe, and exports that it no longer asks for."""
        files = sorted((self.work / "phases").glob("*.json"), key=lambda path: path.stem)
        kept = [path.stem for path in files if self._known(path) is not None]
        again = [path.stem for path in files if path.stem not in kept]
        if again:
            log.warning("kept: %s; computed again: %s", ", ".join(kept) or "nothing", ", ".join(again))
        asked = {f"export-{export.name}" for export in self.recipe.exports}
        for name in again:
            if name.startswith("export-") and name not in asked:
                shutil.rmtree(self.exports / name.removeprefix("export-"), ignore_errors=True)

    def needs(self, phase: str) -> str:
        """Digest of what a phase of this run depends on, see ``flatq.phases``."""
        return needs(phase, facts(self.recipe, self.inputs))

    def has_artifact(self) -> bool:
        """Whether the walk of this recipe is finished; what the walk of another one left is removed first.

        All processes call it together.
        """
        if distributed.first():
            self._remove_other_walk()
        return distributed.broadcast(self.artifact.exists() or self.walked.exists())

    def _remove_other_walk(self) -> None:
        note, mine = self.work / "walk.json", {"needs": self.needs("compress")}
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            if note.exists() and read_json(note, dict[str, str], "the walk starts over", checksummed=True) == mine:
                return
        except ArtifactError as damaged:
            log.warning("%s", damaged)
        for place in (self.artifact, self.partial, self.work / WALKED, self.work / "blocks"):
            shutil.rmtree(place, ignore_errors=True)
        for pattern in ("state.json", "states-?", "dense-?", "recover*"):
            for path in self.work.glob(pattern):
                path.unlink()
        write_checksummed(note, mine)

    def phase(self, name: str, compute: Callable[[], T], kind: type[T], *, file: Path | None = None) -> T:
        """Result of a phase: computed, or read from the file of an earlier run.

        Args:
            name: name of the phase and of its file.
            compute: computes the result.
            kind: type of the result; anything that pydantic can convert to JSON and back: numbers, lists, dicts,
                dataclasses, models. The result is always converted to JSON and back, also when it was just computed.
            file: that ``compute`` writes besides; the phase is computed again if it was changed or lost since.

        Raises:
            ArtifactError: the file of a finished phase holds another type.
        """
        adapter = TypeAdapter(kind)
        path = self.work / "phases" / f"{name}.json"
        if file is not None and name not in self._asked and distributed.first() and not as_noted(file):
            self.forget(name)
        self._asked.add(name)
        known = distributed.broadcast(self._known(path) if distributed.first() else None)
        if known is not None:
            log.info("%s: already done", name)
            return result_as(kind, known, path)
        self._highest = max(self._highest, peak_rss_bytes())
        give_back()
        forget_peak()
        started = time.monotonic()
        written = distributed.broadcast(adapter.dump_python(compute(), mode="json"))
        must_be_finite(written, name)
        result = adapter.validate_python(written)
        if not distributed.first():
            return result
        if file is not None:
            note_digest(file)
        path.parent.mkdir(exist_ok=True)
        seconds = time.monotonic() - started
        peaks = {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": peak_device_bytes()}
        write_checksummed(path, {"result": written, "needs": self.needs(name), "seconds": seconds, **peaks})
        log.info("%s: %.1f s, peak memory %.2f GB", name, seconds, peaks["peak_rss_bytes"] / 1e9)
        return result

    def _known(self, path: Path) -> Phase | None:
        """A finished phase's file; None if there is none, or it is outdated or damaged and was removed."""
        if not path.exists():
            return None
        try:
            found = read_json(path, Phase, "this phase is computed again", checksummed=True)
            if found.needs == self.needs(path.stem):
                return found
            path.unlink()
            return None
        except ArtifactError as damaged:
            log.warning("%s", damaged)
            path.unlink()
            if not self.artifact.exists():  # finished blocks were built from the plan that was lost
                (self.work / "state.json").unlink(missing_ok=True)
            return None

    def known(self, name: str, kind: type[T]) -> T | None:
        """Result of a phase that an earlier call of ``phase`` finished; None if it was never run."""
        found = self._known(self.work / "phases" / f"{name}.json")
        return None if found is None else result_as(kind, found, self.work / "phases" / f"{name}.json")

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
        asked = [path for path in files if path.stem in self._asked]
        return {path.stem: phase for path in asked if (phase := self._known(path)) is not None}

    def peak_rss_bytes(self) -> int:
        """Peak resident memory over all phases, including those of earlier processes of a resumed run."""
        return max([peak_rss_bytes(), self._highest, *self.memory().values()])


def result_as(kind: type[T], phase: Phase, path: Path) -> T:
    """A phase's result as a type.

    Raises:
        ArtifactError: it is of another one.
    """
    try:
        return TypeAdapter(kind).validate_python(phase.result)
    except ValidationError as wrong:
        raise ArtifactError(f"{path}: no valid result of {path.stem!r} ({first_fault(wrong)}); {FRESH}") from wrong


def must_be_finite(value: Any, where: str) -> None:
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
        must_be_finite(part, f"{where}.{key}")
