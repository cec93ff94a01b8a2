"""One run as a value: recipe, model, text, folder and execution settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flatq.calibration.states import Execution
from flatq.calibration.tokens import Tokens
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source


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
