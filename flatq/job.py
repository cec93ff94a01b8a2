"""One run as a value: recipe, model, text, folder and execution settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flatq.calibration.states import Execution
from flatq.calibration.tokens import Tokens
from flatq.kept import kept, key_of
from flatq.needs import MODEL, digest_of, facts
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """The inputs and settings that the steps of a run share.

    Attributes:
        recipe: of the run.
        source: the pretrained model, read lazily.
        tokens: calibration and evaluation text.
        folder: run folder for phases, hidden states and results.
        execution: device, precision and memory of the forward passes.
        measurements: folder that keeps measurements for other runs; None keeps none.
    """

    recipe: Recipe
    source: Source
    tokens: Tokens
    folder: RunFolder
    execution: Execution
    measurements: Path | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of an unquantized number."""
        return self.source.dtype.itemsize

    def about(self, needs: str) -> dict[str, Any]:
        """What a measurement depends on: a digest of ``flatq.needs``, and how forward passes are computed."""
        return {"needs": needs, "execution": asdict(self.execution)}

    @property
    def dense(self) -> dict[str, Any]:
        """What every measurement of the dense model depends on."""
        return self.about(digest_of(facts(self.recipe, self.folder.inputs), MODEL))

    @property
    def dense_states(self) -> Path:
        """Folder of the dense model's final hidden states, which are found there by their tokens."""
        if self.measurements is None:
            return self.folder.work / "dense-states"
        return self.measurements / f"dense-states-{key_of(self.dense)}"

    def measured(self, name: str, compute: Callable[[], T], kind: type[T], *, file: str | None = None) -> T:
        """A phase of the run folder that measures the dense model; also kept for other runs, see ``flatq.kept``.

        Args:
            name, compute, kind: see ``RunFolder.phase``.
            file: name of a file of the work folder that belongs to the result.
        """
        place = None if file is None else self.folder.work / file
        work = partial(kept, self.measurements, name, self.about(self.folder.needs(name)), compute, kind, place)
        return self.folder.phase(name, work, kind, file=place)
