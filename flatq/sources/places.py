"""Where a model is: a folder, a file, a file of an installed Python package, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from flatq.cache import cache_folder
from flatq.errors import RecipeError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "tokenizer.model", "merges.txt", "*.jinja", "README.md"]
OTHER_FOLDERS = ["[!a]*/*", "a[!d]*/*"]  # than additional_chat_templates


def locate(path: str, revision: str | None, *, need_weights: bool) -> tuple[Path, str]:
    """Folder or file of a model, and its name for messages; a hub id is downloaded.

    Raises:
        RecipeError: it does not exist, or cannot be downloaded.
    """
    place = Path(path).expanduser()
    if path.startswith("package:"):
        found = _packaged(path.removeprefix("package:"))
    elif place.exists():
        found = place
    elif place.suffix != ".gguf" and HUB_ID.fullmatch(path):
        return _downloaded(path, revision, need_weights)
    else:
        raise RecipeError(
            f"model: {path} does not exist; allowed: a Hugging Face folder, a .gguf file, a hub id owner/name, "
            "or package:DIST/FILE"
        )
    if revision is not None:
        raise RecipeError(f"revision: {revision!r} is only for hub ids; {path} is a local file or folder")
    if found.is_file() and found.suffix != ".gguf":
        raise RecipeError(f"model: {path} is neither a folder nor a .gguf file")
    return found, path


def _packaged(spec: str) -> Path:
    distribution, _, wanted = spec.partition("/")
    files = _files_of(distribution)
    for file in files:
        if wanted and (str(file) == wanted or file.name == wanted):
            place = Path(str(file.locate()))
            if place.is_file():
                return place
    parts = _parts_of(distribution, files, wanted)
    if parts:
        return _joined(parts, wanted)
    shipped = [str(file) for file in files if file.suffix == ".gguf"]
    raise RecipeError(
        f"model: package {distribution!r} ships no file {wanted!r}; its .gguf files: {', '.join(shipped) or 'none'}"
    )


def _files_of(distribution: str) -> list[metadata.PackagePath]:
    try:
        return metadata.distribution(distribution).files or []
    except (metadata.PackageNotFoundError, ValueError) as missing:
        raise RecipeError(
            f"model: package {distribution!r} is not installed; run: pip install {distribution}"
        ) from missing


def _parts_of(distribution: str, files: Sequence[metadata.PackagePath], wanted: str) -> list[Path]:
    """Files ``wanted.part00``, ``.part01`` and so on, in the package or in packages that it requires, in order."""
    needed = [Requirement(line) for line in metadata.distribution(distribution).requires or []]
    required = [one.name for one in needed if one.marker is None]
    everything = [*files, *(file for name in required for file in _files_of(name))]
    numbered = {
        int(file.name.removeprefix(f"{wanted}.part")): Path(str(file.locate()))
        for file in everything
        if wanted and re.fullmatch(re.escape(wanted) + r"\.part\d+", file.name)
    }
    first = min(numbered, default=0)
    if sorted(numbered) != list(range(first, first + len(numbered))) or first > 1:
        raise RecipeError(
            f"model: package {distribution!r} has parts {sorted(numbered)} of {wanted!r}, some are missing; install "
            "it again with all that it requires"
        )
    return [numbered[number] for number in sorted(numbered)]


def _joined(parts: Sequence[Path], name: str) -> Path:
    """The parts as one file in the user's cache; made again if a part has changed."""
    stamps = [f"{part}:{part.stat().st_size}:{part.stat().st_mtime_ns}" for part in parts]
    key = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]
    target = cache_folder() / "joined" / key / name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        growing = target.with_suffix(f".{os.getpid()}")
        with growing.open("wb") as whole:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, whole)
        growing.replace(target)
    return target


def _downloaded(hub_id: str, revision: str | None, need_weights: bool) -> tuple[Path, str]:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # httpx or httpx2

    patterns = HUB_FILES + (["*.safetensors"] if need_weights else [])
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*", *OTHER_FOLDERS]
        )
    except (OSError, HTTPError, HFValidationError) as failed:
        reason = str(failed).strip().splitlines()[0] if str(failed).strip() else type(failed).__name__
        raise RecipeError(
            f"model: {hub_id} is no local folder, and the download failed ({type(failed).__name__}: {reason}). "
            "Check the name and your access (`hf auth login` for gated models); offline, give a local folder, "
            "a .gguf file or package:DIST/FILE"
        ) from failed
    place = Path(folder)
    return place, f"{hub_id}@{place.name}"
