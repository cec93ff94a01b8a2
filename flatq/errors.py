"""All exceptions of flatq, grouped by who can fix the cause.

Every message names the place, the value, what is allowed and how to fix it. The command line prints it as one
paragraph; the exit code tells whether the recipe (2) or a stage of the run (3) failed.
"""

from __future__ import annotations

from collections.abc import Sequence


class FlatqError(Exception):
    """Base class of all errors that flatq raises on purpose."""

    exit_code = 3


class RecipeError(FlatqError):
    """The recipe, or something that it refers to, cannot be used; holds all problems found, not only the first."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class UnsupportedModel(FlatqError):
    """The model's family, a setting of its configuration, or its file format is not supported."""

    exit_code = 2


class NumericsError(FlatqError):
    """A tensor contains NaN or infinity, or a result is too bad to be used."""


class ArtifactError(FlatqError):
    """Files on disk are missing, damaged, or belong to another run."""


class LostProcess(FlatqError):
    """One of several processes of a run died or did not answer in time."""


class ExportError(FlatqError):
    """An exporter cannot write the model, or its runtime gives results that differ from the artifact's."""
