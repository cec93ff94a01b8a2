"""Atomic writes, digests of files, and reading of JSON files."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from flatq.errors import ArtifactError, FlatqError

log = logging.getLogger(__name__)
T = TypeVar("T")
CHECKSUM = "sha256"  # key of the digest of the other keys
BLANK = "0" * 64

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note_digest(path: Path) -> None:
    """Write the SHA-256 of a finished file beside it, as ``NAME.sha256``."""
    write_atomically(_note_of(path), file_digest(path).encode())


def as_noted(path: Path) -> bool:
    """Whether a file is there and has the digest that ``note_digest`` wrote; another digest is logged."""
    note = _note_of(path)
    if not path.exists() or not note.exists():
        return False
    same = note.read_bytes() == file_digest(path).encode()
    if not same:
        log.warning("%s: is damaged; it is made again", path)
    return same


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def link_or_copy(source: Path, target: Path) -> None:
    """Make a second name of a file, in place of an older file; a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        partial = target.with_name(target.name + ".partial")
        shutil.copyfile(source, partial)
        partial.replace(target)


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


def disk_full(error: OSError) -> bool:
    """Whether a write failed for lack of space (or of a quota); numpy's ``tofile`` says so only in words."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or (
        error.errno is None and "requested and" in str(error)
    )


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, atomically; NaN raises ``ValueError``."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_checksummed(path: Path, value: Mapping[str, Any]) -> None:
    """``write_json`` of an object with a last key ``sha256``: the digest of the file with zeros in its place."""
    blank = json.dumps({**value, CHECKSUM: BLANK}, indent=2, allow_nan=False) + "\n"
    head, _, tail = blank.rpartition(BLANK)
    write_atomically(path, f"{head}{hashlib.sha256(blank.encode()).hexdigest()}{tail}".encode())


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file: tuples are lists, keys are strings."""
    return json.loads(json.dumps(value))


def from_json(text: str) -> Any:
    """The value of JSON text that is not in a separate file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(text)
    except RecursionError as deep:
        raise ValueError("it is nested too deeply") from deep


def read_json(
    path: Path,
    kind: type[T],
    way_out: str,
    *,
    error: type[FlatqError] = ArtifactError,
    checksummed: bool = False,
) -> T:
    """The content of a JSON file as a type; every JSON file that flatq reads is read here.

    Args:
        path: the file.
        kind: anything that pydantic validates: ``dict[str, Any]``, a dataclass, a model.
        way_out: what the reader of the message can do.
        error: to raise.
        checksummed: written by ``write_checksummed``; the key ``sha256`` is not part of the value.

    Raises:
        error: missing, unreadable, no UTF-8, no JSON, another digest or another type; one line with the file's name.
    """
    try:
        text = path.read_bytes().decode()
        if not text.strip():
            raise ValueError("it is empty")
        if text.startswith(LFS_POINTER.decode()):
            raise ValueError("it is a Git LFS pointer, not the file itself; `git lfs pull` fetches that")
        value = from_json(text)
        if "\\ud" in text.lower():  # may be half of a character, which no file name and no other text can hold
            json.dumps(value, ensure_ascii=False).encode()
        if checksummed:
            value = _checked(text, value)
        return TypeAdapter(kind).validate_python(value)
    except FileNotFoundError as missing:
        raise error(f"{path}: is missing; {way_out}") from missing
    except OSError as failed:
        raise error(f"{path}: cannot be read ({failed.strerror}); {way_out}") from failed
    except ValidationError as wrong:
        raise error(f"{path}: is damaged ({first_fault(wrong)}); {way_out}") from wrong
    except ValueError as damaged:  # not UTF-8, not JSON, or a digest that differs
        raise error(f"{path}: is damaged ({damaged}); {way_out}") from damaged


def _checked(text: str, value: Any) -> dict[str, Any]:
    """An object without its digest, which is compared with the text."""
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, found {type(value).__name__}")
    stated = value.pop(CHECKSUM, None)
    if not isinstance(stated, str) or not stated:
        raise ValueError(f"it lacks the key {CHECKSUM!r}, the digest of its content")
    head, _, tail = text.rpartition(stated)
    if hashlib.sha256(f"{head}{BLANK}{tail}".encode()).hexdigest() != stated:
        raise ValueError(f"its content does not have the digest under {CHECKSUM!r}")
    return value


def first_fault(wrong: ValidationError) -> str:
    """The first thing that pydantic found, in one line, and how many more there are."""
    found = wrong.errors(include_url=False)
    place = ".".join(map(str, found[0]["loc"]))
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    words = " ".join(found[0]["msg"].split())
    return f"{place}: {words}{more}" if place else f"{words}{more}"


def lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves in place of a large one that ``git lfs pull`` has not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
