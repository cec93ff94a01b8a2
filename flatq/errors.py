"""What can go wrong, by whom it can be mended.

Every message names the place, the value found, what is allowed and the way out. The command line prints it
as one paragraph; the exit code says whether the recipe (2) or a stage of the run (3) is to blame.
"""

from __future__ import annotations

from collections.abc import Sequence


class FlatqError(Exception):
    """Base of every error that flatq raises on purpose."""

    exit_code = 3


class RecipeError(FlatqError):
    """The recipe, or something that it names, cannot be used; holds every problem found, not the first."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class UnsupportedModel(FlatqError):
    """The model's family, a switch of its configuration, or its files are not understood."""

    exit_code = 2


class NumericsError(FlatqError):
    """A tensor holds a value that no result could be trusted after (NaN, infinity)."""


class ArtifactError(FlatqError):
    """Files on disk are missing, damaged, or belong to another run."""


class LostProcess(FlatqError):
    """One of several processes of a run died or fell silent."""


class ExportError(FlatqError):
    """An exporter cannot write the model, or its runtime disagrees with the artifact."""
