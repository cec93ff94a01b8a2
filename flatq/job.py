"""One run as a value: what is asked for, of which model, with which text, where, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from flatq.calibration.states import Execution
from flatq.calibration.tokens import Tokens
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source


@dataclass(frozen=True, slots=True)
class Job:
    """What every step of a run needs to know.

    Attributes:
        recipe: what to do.
        source: the pretrained model, read lazily.
        tokens: calibration and held-out text.
        folder: where phases, hidden states and results are kept.
        execution: device, precision and memory of the passes through the model.
    """

    recipe: Recipe
    source: Source
    tokens: Tokens
    folder: RunFolder
    execution: Execution

    @property
    def itemsize(self) -> int:
        """Bytes of a number that is not quantized."""
        return self.source.dtype.itemsize
