"""Comparison of files with their SHA-256 digests, with a cache of verified files.

Computing the digest of a model takes as long as reading it. So a verified file is recorded with its size, times and
inode, and not read again while these are unchanged. The cache is one small file per folder in the user's cache
directory, because the folder itself may be read-only. Corruption of the disk does not change size, times and inode:
``remembered=False``, as in ``flatq verify``, reads every file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flatq.cache import recall, remember
from flatq.files import file_digest

log = logging.getLogger(__name__)
SETTLED_NS = 2_000_000_000  # a file changed less than this ago could change again without a change of its times
Stamp = list[int]  # size, times of content and of metadata in nanoseconds, inode
Memory = dict[str, tuple[str, Stamp]]


@dataclass(frozen=True, slots=True)
class Findings:
    """Result of comparing a folder with its list of digests.

    Attributes:
        files: number of compared files.
        bytes: their total size.
        damaged: files with another digest, or that cannot be read.
        missing: files that are listed and do not exist.
        unexpected: files that exist and are not listed, except hidden ones.
    """

    files: int
    bytes: int
    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def wrong(self) -> str:
        """Damaged and missing files as text; empty if there are none."""
        kinds = {"damaged": self.damaged, "missing": self.missing}
        return "; ".join(f"{kind} files: {', '.join(names)}" for kind, names in kinds.items() if names)


def compared(
    root: Path, digests: Mapping[str, str], *, beside: Collection[str] = (), remembered: bool = True
) -> Findings:
    """Compare every listed file of a folder.

    Args:
        root: the folder.
        digests: SHA-256 by path in the folder, with forward slashes.
        beside: expected files without a digest in the list, and folders that are skipped.
        remembered: skip files that were verified before and are unchanged since.
    """
    known = (recall("digests", str(root.resolve()), Memory) or {}) if remembered else {}
    outside = [name for name in digests if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    inside = [name for name in digests if name not in outside]
    missing = [name for name in inside if not (root / name).is_file()]
    there = [name for name in inside if name not in missing]
    stamps = {name: _stamp(root / name) for name in there}
    unread = [name for name in there if known.get(name) != (digests[name], stamps[name])]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = dict(zip(unread, pool.map(_digest_of, [root / name for name in unread]), strict=True))
    damaged = [name for name in unread if found[name] != digests[name]]
    right = [name for name in there if name not in damaged]
    if unread:
        _remember(root, {name: (digests[name], stamps[name]) for name in right})
    listed = {*digests, *beside}
    return Findings(
        files=len(there),
        bytes=sum(stamp[0] for stamp in stamps.values()),
        damaged=(*damaged, *outside),
        missing=tuple(missing),
        unexpected=tuple(sorted(_unlisted(root, listed))),
    )


def combined_digest(files: Mapping[str, str]) -> str:
    """One SHA-256 for a list of digests by name; it identifies a model."""
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def digests_of(root: Path, *, but: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file of a folder except ``but``, by path relative to it."""
    return {name: file_digest(root / name) for name in _files_in(root) if name not in but}


def _files_in(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def _unlisted(root: Path, listed: Collection[str], below: str = "") -> Iterator[str]:
    """Files that are not listed; listed folders are skipped."""
    for path in (root / below).iterdir():
        name = f"{below}{path.name}"
        if name in listed or _hidden(path.name):
            continue
        if path.is_dir():
            yield from _unlisted(root, listed, f"{name}/")
        else:
            yield name


def _hidden(name: str) -> bool:
    """Whether a file is created by desktops or Python and can be ignored."""
    return name.startswith(".") or name == "__pycache__"


def _digest_of(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as failed:
        log.warning("%s: cannot be read (%s)", path, failed.strerror)
        return ""


def _stamp(path: Path) -> Stamp:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _remember(root: Path, right: Memory) -> None:
    """Record verified files, except recently written ones, for which another write might not change the times."""
    settled = time.time_ns() - SETTLED_NS
    kept = {name: entry for name, entry in right.items() if max(entry[1][1:3]) < settled}
    remember("digests", str(root.resolve()), kept)
