"""Results that several runs share: measurements of the dense model, under a digest of everything that they depend on.

A run folder belongs to one recipe, and its work folder is removed at the end. A folder for several runs, as a sweep has
it, keeps what does not depend on the widths and bits of one of them: perplexities and hidden states of the dense model,
Fisher information, error curves, errors of each bit width, generated text, the dense model's speed. Each result is a
JSON file; one that also has a large file is linked to it, not copied, where the file system can do that.

The JSON file is written last, so a killed process leaves no half result.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from flatq.errors import ArtifactError
from flatq.files import as_json, as_noted, first_fault, link_or_copy, note_digest, read_json, write_checksummed
from flatq.machine import distributed

log = logging.getLogger(__name__)
T = TypeVar("T")
AGAIN = "it is measured again"


class Result(BaseModel):
    """The content of a file."""

    result: Any


def key_of(about: Mapping[str, Any]) -> str:
    """A digest of what a result depends on."""
    return hashlib.sha256(json.dumps(as_json(about), sort_keys=True).encode()).hexdigest()[:16]


def entry_of(root: Path, name: str, about: Mapping[str, Any]) -> Path:
    """File of a result."""
    return root / f"{name}-{key_of(about)}.json"


def kept(
    root: Path | None,
    name: str,
    about: Mapping[str, Any],
    compute: Callable[[], T],
    kind: type[T],
    file: Path | None = None,
) -> T:
    """A result from the folder of several runs, or computed and kept there.

    Args:
        root: the folder; None computes and keeps nothing.
        name: of the measurement.
        about: everything that the result depends on; JSON-ready.
        compute: computes the result and writes ``file``.
        kind: type of the result, see ``RunFolder.phase``.
        file: of this run, that belongs to the result.
    """
    entry = None if root is None else entry_of(root, name, about)
    found = distributed.broadcast(_taken(entry, kind, file) if entry is not None and distributed.first() else None)
    if found is not None:
        log.info("%s: measured by an earlier run", name)
        return found[0]
    if file is not None and distributed.first():
        file.unlink(missing_ok=True)  # it may be a link to a kept file, into which nothing may be written
    distributed.barrier()
    result = compute()
    if entry is not None and distributed.first():
        keep(entry, result, kind, file)
    return result


def read(entry: Path, kind: type[T]) -> tuple[T] | None:
    """A kept result; None if there is none, or it is damaged."""
    if not entry.is_file():
        return None
    try:
        return (TypeAdapter(kind).validate_python(read_json(entry, Result, AGAIN, checksummed=True).result),)
    except ArtifactError as damaged:
        log.warning("%s", damaged)
    except ValidationError as wrong:
        log.warning("%s: no valid result (%s); %s", entry, first_fault(wrong), AGAIN)
    return None


def _taken(entry: Path, kind: type[T], file: Path | None) -> tuple[T] | None:
    """A kept result whose file, if it has one, was linked into the run; None if either is missing or damaged."""
    found, data = read(entry, kind), entry.with_suffix(".data")
    if found is None or file is None:
        return found
    if not as_noted(data):
        return None
    link_or_copy(data, file)
    return found


def keep(entry: Path, result: T, kind: type[T], file: Path | None = None) -> None:
    """Write a result, and link its file."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    entry.unlink(missing_ok=True)
    if file is not None:
        link_or_copy(file, entry.with_suffix(".data"))
        note_digest(entry.with_suffix(".data"))
    write_checksummed(entry, {"result": TypeAdapter(kind).dump_python(result, mode="json")})
