"""An export folder, wherever it lies now: which exporter wrote it, from what, and the digest of every file.

``export.json`` holds all that ``flatq bench`` and ``flatq generate`` need besides the exporter's own files, so a
folder that was copied elsewhere can be opened without the run that it came from. Only the tokenizer is the artifact's,
where the format does not carry one.
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

log = logging.getLogger(__name__)
DESCRIPTION = "export.json"
AGAIN = "give a folder that `flatq run` or `flatq export` wrote, or export the model again"


class Description(BaseModel):
    """``export.json``.

    Attributes:
        format: name of the exporter.
        options: its options, JSON-ready.
        artifact: where the artifact was, relative to the folder.
        vocab: rows of the embedding.
        token_ids: ``bos_token_id`` and so on, as far as the artifact states them.
        files: SHA-256 by path in the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    options: dict[str, Any]
    artifact: str
    vocab: int
    token_ids: dict[str, int | list[int] | None]
    files: dict[str, str]


def describe(root: Path, artifact: Artifact, format: str, options: BaseModel, origin: str) -> Description:
    """Write ``export.json`` beside the files that an exporter wrote."""
    ids = {key: value for key, value in artifact.settings.items() if key.endswith("_token_id")}
    described = Description(
        format=format,
        options=options.model_dump(mode="json"),
        artifact=origin,
        vocab=artifact.config.vocab,
        token_ids=ids,
        files=digests_of(root, but=[DESCRIPTION]),
    )
    write_checksummed(root / DESCRIPTION, described.model_dump())
    return described


def description_of(root: Path, *, check: bool = True) -> Description:
    """What an export folder says of itself.

    Args:
        root: the folder.
        check: compare every file with its digest first; files that were right before and have not been written since
            are not read again.

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
    """What an export folder holds beside what ``export.json`` lists, see ``flatq.digests``.

    Raises:
        ArtifactError: ``export.json`` itself is missing or damaged.
    """
    return compared(root, description_of(root, check=False).files, beside=[DESCRIPTION], remembered=remembered)


def artifact_of(root: Path, described: Description, *, check: bool = True) -> Artifact:
    """The artifact that an export was made from.

    Raises:
        ArtifactError: it is not where it was, or damaged.
    """
    place = (root / described.artifact).resolve()
    if not place.is_dir():
        raise ArtifactError(
            f"{root}: the artifact that it was made from is not at {place} any more; put the run folder back where the "
            "export finds it, or export the artifact again"
        )
    return Artifact.open(place, check=check)


def tokenizer_of(root: Path, described: Description, *, check: bool = True) -> Any:
    """The artifact's tokenizer; the export's own where the artifact is gone.

    Raises:
        ArtifactError: neither has one.
    """
    if (root / described.artifact).is_dir():
        return tokenizer_in(artifact_of(root, described, check=check).root)
    if (root / "tokenizer.json").is_file():
        return tokenizer_in(root)
    raise ArtifactError(
        f"{root}: holds no tokenizer, and the artifact that it was made from is not at "
        f"{(root / described.artifact).resolve()} any more; put tokenizer.json and tokenizer_config.json into a folder "
        "with the artifact's other files, or export the artifact again"
    )
