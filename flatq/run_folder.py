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

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from flatq.errors import ArtifactError, FlatqError, RecipeError
from flatq.files import write_atomically, write_json
from flatq.machine import distributed
from flatq.machine.memory import forget_peak, give_back, peak_device_bytes, peak_rss_bytes
from flatq.recipe.grammar import Recipe

log = logging.getLogger(__name__)
T = TypeVar("T")


class RunFolder:
    """One run of one recipe on disk."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.root, self.recipe = root, recipe
        self.work = root / "work"
        self.artifact = root / "artifact"
        self.partial = root / "artifact.partial"
        self.exports = root / "exports"
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
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
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
        return (self.root / "run.json").is_file()

    def digest(self) -> str:
        """Digest of the folder's recipe."""
        return str(json.loads((self.root / "run.json").read_text())["digest"])

    @property
    def finished(self) -> bool:
        """Whether an earlier run wrote its report and every export succeeded."""
        path = self.root / "report.json"
        return path.is_file() and not any(
            export.get("error") for export in json.loads(path.read_text()).get("exports", [])
        )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Create the folder for the enclosed work; an error before the first saved state removes it again."""
        if not distributed.first():
            distributed.barrier()
            yield
            return
        new = [place for place in (self.root, *self.root.absolute().parents) if not place.exists()]
        blank = bool(new) or not any(self.root.iterdir())
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            write_json(self.root / "run.json", {"digest": self.recipe.digest()})
            write_atomically(self.root / "recipe.yaml", self.recipe.text.encode())
            distributed.barrier()
            yield
        except BaseException as error:
            if isinstance(error, Exception) and blank and not (self.work / "state.json").exists():
                self._vanish(new)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ArtifactError(
                    f"{self.root}: the disk is full ({error.strerror}); free some space and run again, "
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
        """
        path, found = self.work / "inputs.json", json.loads(json.dumps(inputs))
        if not path.exists():
            write_json(path, found)
        noted = json.loads(path.read_text())
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
        known = distributed.broadcast(json.loads(path.read_text()) if distributed.first() and path.exists() else None)
        if known is not None:
            log.info("%s: already done", name)
            try:
                return adapter.validate_python(known["result"])
            except ValidationError as wrong:
                raise ArtifactError(
                    f"{path}: not a valid result of {name!r} ({wrong}); start over with --fresh"
                ) from wrong
        self._highest = max(self._highest, peak_rss_bytes())
        give_back()
        forget_peak()
        started = time.monotonic()
        written = distributed.broadcast(adapter.dump_python(compute(), mode="json"))
        result = adapter.validate_python(written)
        if not distributed.first():
            return result
        path.parent.mkdir(exist_ok=True)
        seconds = time.monotonic() - started
        peaks = {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": peak_device_bytes()}
        write_json(path, {"result": written, "seconds": seconds, **peaks})
        log.info("%s: %.1f s, peak memory %.2f GB", name, seconds, peaks["peak_rss_bytes"] / 1e9)
        return result

    def timing(self) -> dict[str, float]:
        """Seconds per finished phase, in the order in which they finished."""
        return {name: round(phase["seconds"], 2) for name, phase in self._phases().items()}

    def memory(self) -> dict[str, int]:
        """Peak resident memory during each finished phase (on Linux; elsewhere: since the start of the process)."""
        return {name: int(phase["peak_rss_bytes"]) for name, phase in self._phases().items()}

    def device_memory(self) -> dict[str, int]:
        """Peak GPU memory of each finished phase that used a GPU."""
        held = {name: int(phase["peak_device_bytes"]) for name, phase in self._phases().items()}
        return {name: peak for name, peak in held.items() if peak}

    def _phases(self) -> dict[str, Any]:
        files = sorted((self.work / "phases").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return {path.stem: json.loads(path.read_text()) for path in files}

    def peak_rss_bytes(self) -> int:
        """Peak resident memory over all phases, including those of earlier processes of a resumed run."""
        return max([peak_rss_bytes(), self._highest, *self.memory().values()])


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
