"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Make ``path`` appear whole or not at all, also if the machine loses power."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline, atomically; refuses NaN, which is no JSON."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves in place of a large one that ``git lfs pull`` has not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
