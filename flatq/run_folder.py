"""The run folder: results of finished phases, with their time and memory.

    DIR/recipe.yaml          the text of the recipe
    DIR/work/                cached phases, hidden states, resume state; removed when the run is finished
    DIR/artifact/            the compressed model (artifact.partial/ until it is complete)
    DIR/exports/NAME/        one folder per export
    DIR/report.{json,md,html}

An unfinished run is continued: finished phases are not repeated, except those that depend on what was changed in the
recipe (``flatq.phases``).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from flatq.errors import ArtifactError, FlatqError, RecipeError
from flatq.files import disk_full, file_digest, read_json, write_atomically, write_checksummed
from flatq.machine import distributed
from flatq.needs import changes, facts
from flatq.phases import ARTIFACT, EXPORTS, FRESH, Phases
from flatq.recipe.grammar import Recipe

log = logging.getLogger(__name__)
RUN, REPORT = "run.json", "report.json"
SEALED = ("recipe.yaml", "report.md", "report.html", REPORT)  # their digests are in run.json once the run is finished
OWN = {RUN, *SEALED, ARTIFACT, f"{ARTIFACT}.partial", EXPORTS, "work", "tasks"}


class Begun(BaseModel):
    """``run.json``: digest of the recipe; of a finished run also the digests of ``SEALED``."""

    model_config = ConfigDict(extra="forbid")

    digest: str
    files: dict[str, str] = {}


class Outcome(BaseModel):
    """Of an export in ``report.json``, whether it is there."""

    name: str
    error: str | None = None


class Outcomes(BaseModel):
    """Of ``report.json``, what became of the exports; a report of another version has these, too."""

    exports: list[Outcome] = []


class RunFolder(Phases):
    """One run of one recipe on disk."""

    @classmethod
    def open(cls, out: Path | None, recipe: Recipe, *, fresh: bool = False) -> RunFolder:
        """The folder of a recipe; it is checked here and created by ``working``.

        Raises:
            RecipeError: the folder belongs to another model or holds the finished run of another recipe, was not
                created by flatq, or cannot be written.
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
                log.warning("%s: the recipe was changed since this run was started: %s", root, folder.changed())
        elif out is None:
            folder.name_unfinished()
        parent = next(parent for parent in (root, *root.absolute().parents) if parent.exists())
        if not parent.is_dir():
            raise RecipeError(f"--out {root}: {parent} is a file, no folder can be made below it; choose another place")
        if not os.access(parent, os.W_OK):
            raise RecipeError(f"--out {root}: {parent} is not writable; choose another place")
        return folder

    def changed(self) -> str:
        """What was changed in the recipe since the run was started, in words.

        Raises:
            RecipeError: the run is finished, its recipe cannot be read, or the model is another one: no phase would be
                kept.
        """
        other = f"--out {self.root}: holds the run of another recipe"
        way_out = "choose another place, or --fresh to replace it"
        if self.finished:
            raise RecipeError(f"{other}, which is finished; {way_out}")
        try:
            former = Recipe.load(self.root / "recipe.yaml")
        except RecipeError as unreadable:
            raise RecipeError(f"{other}; {way_out}") from unreadable
        found = changes(facts(former), facts(self.recipe))
        if former.model != self.recipe.model:
            raise RecipeError(f"{other} ({'; '.join(found)}); every phase depends on the model: {way_out}")
        return "; ".join(found)

    def name_unfinished(self) -> None:
        """Name the folders in which a former version of this recipe could be continued."""
        for root in sorted(self.root.parent.glob(f"{self.recipe.name}-????????")):
            try:
                found = RunFolder(root, self.recipe).changed()
            except FlatqError:
                continue  # finished, damaged or of another model: nothing there can be used
            log.warning("--out %s continues an unfinished run of this recipe, before changes: %s", root, found)

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
