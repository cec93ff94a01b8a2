"""The user's cache directory: small JSON files with what can be computed again."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, TypeVar

from flatq.errors import ArtifactError
from flatq.files import read_json, write_json

log = logging.getLogger(__name__)
T = TypeVar("T")


def cache_folder() -> Path:
    """``FLATQ_CACHE``, else ``flatq`` in the user's cache directory; it may not exist yet.

    Raises:
        RuntimeError: this user has no home folder.
    """
    given = os.environ.get("FLATQ_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatq"


def recall(name: str, kind: type[T]) -> T | None:
    """What was remembered under a name; None if there is nothing, or nothing that can be read."""
    try:
        place = cache_folder() / f"{name}.json"
        return read_json(place, kind, "delete it") if place.exists() else None
    except (ArtifactError, RuntimeError, OSError) as unusable:
        log.debug("the cache cannot be used: %s", unusable)
        return None


def remember(name: str, value: Any) -> None:
    """Write a JSON-ready value under a name; a cache that cannot be written only costs time later."""
    try:
        place = cache_folder() / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, value)
    except (RuntimeError, OSError) as failed:
        log.debug("the cache cannot be written: %s", failed)
