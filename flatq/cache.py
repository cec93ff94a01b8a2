"""The user's cache directory: small JSON files with what can be computed again."""

from __future__ import annotations

import hashlib
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


def recall(what: str, about: str, kind: type[T]) -> T | None:
    """What was remembered; None if there is nothing, or nothing that can be read.

    Args:
        what: kind of content, a folder of the cache.
        about: everything that the content depends on.
        kind: type of the content.
    """
    try:
        place = _place(what, about)
        return read_json(place, kind, "delete it") if place.exists() else None
    except (ArtifactError, RuntimeError, OSError) as unusable:
        log.debug("the cache cannot be used: %s", unusable)
        return None


def remember(what: str, about: str, value: Any) -> None:
    """Write a JSON-ready value, see ``recall``; a cache that cannot be written only costs time later."""
    try:
        place = _place(what, about)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, value)
    except (RuntimeError, OSError) as failed:
        log.debug("the cache cannot be written: %s", failed)


def _place(what: str, about: str) -> Path:
    return cache_folder() / what / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"
