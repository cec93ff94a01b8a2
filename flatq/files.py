"""Atomic writes, and digests of files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically (temporary file, fsync, rename)."""
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
    """Write indented JSON with a final newline, atomically; NaN raises ``ValueError``."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
