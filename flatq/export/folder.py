"""The export folder: ``export.json`` states which exporter wrote it, from which artifact, and the digest of every file.

It has everything that ``flatq bench`` and ``flatq generate`` need in addition to the exporter's files, so an export
folder can be moved and opened without its run. Only formats without a tokenizer need the artifact, for its tokenizer.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from flatq.artifact import Artifact, tokenizer_in
from flatq.digests import Findings, compared, digests_of
from flatq.errors import ArtifactError
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
        artifact: path of the artifact, relative to the folder.
        recipe: text of the recipe that made the artifact; empty if it was made without one.
        vocab: rows of the embedding.
        token_ids: ``bos_token_id`` and so on, if the artifact defines them.
        files: SHA-256 by path relative to the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    options: dict[str, Any]
    artifact: str
    recipe: str
    vocab: int
    token_ids: dict[str, int | list[int] | None]
    files: dict[str, str]


def describe(root: Path, artifact: Artifact, format: str, options: BaseModel, origin: str) -> Description:
    """Write ``export.json`` into a folder that an exporter wrote."""
    ids = {key: value for key, value in artifact.settings.items() if key.endswith("_token_id")}
    described = Description(
        format=format,
        options=options.model_dump(mode="json"),
        artifact=origin,
        recipe=artifact.manifest["recipe"],
        vocab=artifact.config.vocab,
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


def artifact_of(root: Path, described: Description, *, check: bool = True) -> Artifact:
    """The artifact of an export.

    Raises:
        ArtifactError: it was moved or removed, or is damaged.
    """
    place = (root / described.artifact).resolve()
    if not place.is_dir():
        raise ArtifactError(
            f"{root}: its artifact is no longer at {place}; move the run folder back, or export the artifact again"
        )
    return Artifact.open(place, check=check)


def tokenizer_of(root: Path, described: Description, *, check: bool = True) -> Any | None:
    """The artifact's tokenizer; if the artifact is gone the export's own; None if there is neither."""
    if (root / described.artifact).is_dir():
        return tokenizer_in(artifact_of(root, described, check=check).root)
    return tokenizer_in(root) if has_tokenizer(root) else None


def required_tokenizer_of(root: Path, described: Description, *, check: bool = True) -> Any:
    """See ``tokenizer_of``.

    Raises:
        ArtifactError: there is none.
    """
    found = tokenizer_of(root, described, check=check)
    if found is None:
        raise ArtifactError(
            f"{root}: holds no tokenizer that flatq reads, and the artifact that it was made from is not at "
            f"{(root / described.artifact).resolve()} any more; move the run folder back, or copy the model's "
            "tokenizer.json and tokenizer_config.json into the folder"
        )
    return found
