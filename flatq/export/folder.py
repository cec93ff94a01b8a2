"""The export folder: ``export.json`` states which exporter wrote it, from which artifact, and the digest of every file.

Every export folder also contains the model's tokenizer, chat templates and generation settings, and a README, so it
can be moved to another machine and opened there without its run: ``flatq generate``, ``bench``, ``eval`` and
``verify`` need nothing else.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from flatq.artifact import Artifact, tokenizer_in
from flatq.digests import Findings, combined_digest, compared, digests_of
from flatq.errors import ArtifactError
from flatq.export.planned import context_length
from flatq.files import read_json, write_checksummed
from flatq.tokenizer import has_tokenizer

log = logging.getLogger(__name__)
DESCRIPTION = "export.json"
AGAIN = "give a folder that `flatq run` or `flatq export` wrote, or export the model again"


class Description(BaseModel):
    """``export.json``.

    Attributes:
        format: name of the exporter.
        options: its options, JSON-ready.
        artifact: path of the artifact, relative to the folder; it need not exist any more.
        artifact_sha256: digest of the artifact's files, which identifies the artifact.
        recipe: text of the recipe that made the artifact; empty if it was made without one.
        vocab: rows of the embedding.
        context_length: maximum number of positions.
        token_ids: ``bos_token_id`` and so on, if the artifact defines them.
        files: SHA-256 by path relative to the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    options: dict[str, Any]
    artifact: str
    artifact_sha256: str
    recipe: str
    vocab: int
    context_length: int
    token_ids: dict[str, int | list[int] | None]
    files: dict[str, str]


def describe(root: Path, artifact: Artifact, format: str, options: BaseModel, origin: str) -> Description:
    """Write ``export.json`` into a folder that an exporter wrote."""
    ids = {key: value for key, value in artifact.settings.items() if key.endswith("_token_id")}
    described = Description(
        format=format,
        options=options.model_dump(mode="json"),
        artifact=origin,
        artifact_sha256=combined_digest(artifact.manifest["files"]),
        recipe=artifact.manifest["recipe"],
        vocab=artifact.config.vocab,
        context_length=context_length(options, artifact.config),
        token_ids=ids,
        files=digests_of(root, but=[DESCRIPTION]),
    )
    write_checksummed(root / DESCRIPTION, described.model_dump())
    return described


def description_of(root: Path, *, check: bool = True) -> Description:
    """Read ``export.json``.

    Args:
        root: the folder.
        check: compare every file with its digest first; files verified before and unchanged are skipped.

    Raises:
        ArtifactError: it is no export folder of flatq, or a file is missing or damaged.
    """
    if not (root / DESCRIPTION).is_file():
        raise ArtifactError(f"{root}: is no export folder of flatq, {DESCRIPTION} is missing; {AGAIN}")
    described = read_json(root / DESCRIPTION, Description, AGAIN, checksummed=True)
    if check:
        found = compared(root, described.files, beside=[DESCRIPTION])
        if found.wrong:
            raise ArtifactError(f"{root}: {found.wrong}; {AGAIN}")
        if found.unexpected:
            log.warning("%s: %s does not list these files: %s", root, DESCRIPTION, ", ".join(found.unexpected))
    return described


def compared_export(root: Path, *, remembered: bool) -> Findings:
    """Compare an export folder with the digests in ``export.json``, see ``flatq.digests``.

    Raises:
        ArtifactError: ``export.json`` itself is missing or damaged.
    """
    return compared(root, description_of(root, check=False).files, beside=[DESCRIPTION], remembered=remembered)


def artifact_of(root: Path, described: Description, *, check: bool = True) -> Artifact | None:
    """The artifact of an export; None if it was moved or removed.

    Raises:
        ArtifactError: it is damaged.
    """
    place = (root / described.artifact).resolve()
    return Artifact.open(place, check=check) if place.is_dir() else None


def tokenizer_of(root: Path) -> Any:
    """The tokenizer in an export folder.

    Raises:
        ArtifactError: there is none.
    """
    if not has_tokenizer(root):
        raise ArtifactError(
            f"{root}: holds no tokenizer, so it reads only token ids; copy the model's tokenizer.json and "
            "tokenizer_config.json into its artifact and export it again"
        )
    return tokenizer_in(root)
