"""The stage ``recover`` of a recipe: a short training after the walk."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from flatq.recipe.blocks import Spec


class RecoverSpec(Spec):
    """A short training after the walk (distillation): norm gains and scales follow the dense model's predictions."""

    kind: ClassVar[Literal["recover"]] = "recover"
    steps: Annotated[int, Field(ge=0, le=100_000)] = 60
    """Number of steps; 0 trains nothing."""
    samples: Annotated[int, Field(ge=2, le=100_000)] = 128
    """Sequences of the calibration text, of calibration.seq_len tokens and none of those of the walk, that are trained
    on; a tenth of them is held out."""
    tokens: Annotated[int, Field(ge=1, le=2**20)] = 512
    """Tokens of a step, at least one sequence."""
    learning_rate: Annotated[float, Field(gt=0, le=0.1)] = 0.003
    """Largest change of the logarithm of a factor in one step, of a norm gain twice that; falls to 0 along a cosine."""
