"""Names of the files in an export folder: which are the model, which the importance matrix."""

from __future__ import annotations

from pathlib import Path


def model_files(root: Path) -> list[Path]:
    """The ``.gguf`` files of a folder that are a model or its parts, in order."""
    return sorted(path for path in root.glob("*.gguf") if not path.stem.endswith("-IMATRIX"))
