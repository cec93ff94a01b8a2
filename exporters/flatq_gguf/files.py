"""Files of an export folder: the model and the importance matrix."""

from __future__ import annotations

from pathlib import Path


def model_files(root: Path) -> list[Path]:
    """The ``.gguf`` files of the model, in the order of its parts."""
    return sorted(path for path in root.glob("*.gguf") if not path.stem.endswith("-IMATRIX"))
