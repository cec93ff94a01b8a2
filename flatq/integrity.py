"""``flatq verify``: whether every file of an artifact, an export or a run is the one that was written.

Commands that use a model compare its files, too, but do not read again what they found right before; ``verified``
reads everything. A run is its own files, its artifact and its exports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flatq.artifact import MANIFEST, artifact_in, compared_artifact
from flatq.digests import Findings, compared
from flatq.errors import ArtifactError
from flatq.export.folder import DESCRIPTION, compared_export
from flatq.files import read_json
from flatq.run_folder import ARTIFACT, EXPORTS, FRESH, OWN, REPORT, RUN, Begun, Outcomes


@dataclass(frozen=True, slots=True)
class Part:
    """A folder and what was found in it; without findings the reason why its list of files cannot be read."""

    root: Path
    found: Findings | None
    reason: str = ""

    @property
    def fault(self) -> str:
        """Damaged and missing files in words; empty if there are none."""
        if self.found is None:
            return self.reason
        return f"{self.root}: {self.found.wrong}" if self.found.wrong else ""

    @property
    def strange(self) -> str:
        """Unexpected files in words; empty if there are none."""
        names = self.found.unexpected if self.found else ()
        return f"{self.root}: unexpected files: {', '.join(names)}" if names else ""


def verified(path: Path) -> list[str]:
    """Read every file that has a digest; a line for each folder.

    Raises:
        ArtifactError: names every file that is damaged, missing or unexpected; or nothing there is flatq's.
    """
    parts = examined(path, remembered=False)
    faults = [words for part in parts for words in (part.fault, part.strange) if words]
    if faults:
        raise ArtifactError("\n".join(faults))
    return [f"{p.root}: OK, {p.found.files} files, {p.found.bytes:,} bytes" for p in parts if p.found]


def refuse_damage(run: Path) -> None:
    """Compare the files of a finished run; what was right before and has not been written since is not read again.

    Raises:
        ArtifactError: names every file that is damaged or missing.
    """
    faults = [part.fault for part in examined(run, remembered=True) if part.fault]
    if faults:
        raise ArtifactError("\n".join([*faults, f"{run}: {FRESH}, or go on without the comparison by --no-digests"]))


def examined(path: Path, *, remembered: bool) -> list[Part]:
    """Every folder of flatq at a place.

    Args:
        path: a run folder, an artifact or an export.
        remembered: see ``flatq.digests.compared``.

    Raises:
        ArtifactError: it is none of them.
    """
    if (path / RUN).is_file():
        return _of_run(path, remembered)
    if (path / DESCRIPTION).is_file():
        return [_part(path, lambda: compared_export(path, remembered=remembered))]
    root = artifact_in(path)
    if root is None:
        raise ArtifactError(
            f"{path}: holds none of {RUN}, {MANIFEST} and {DESCRIPTION}; give a run, artifact or export folder of flatq"
        )
    return [_part(root, lambda: compared_artifact(root, remembered=remembered))]


def _part(root: Path, find: Callable[[], Findings]) -> Part:
    try:
        return Part(root, find())
    except ArtifactError as unreadable:
        return Part(root, None, str(unreadable))


def _of_run(run: Path, remembered: bool) -> list[Part]:
    """The run's own files, its artifact, its exports; of a run that is not finished those that are there."""
    parts = [_part(run, lambda: _own_files(run, remembered))]
    artifact, finished = run / ARTIFACT, (run / REPORT).is_file()
    if finished or artifact.is_dir():
        parts.append(_part(artifact, lambda: compared_artifact(artifact, remembered=remembered)))
    exports = {path.name for path in (run / EXPORTS).iterdir() if path.is_dir()} if (run / EXPORTS).is_dir() else set()
    if finished and not parts[0].fault:
        named = read_json(run / REPORT, Outcomes, FRESH).exports
        exports |= {export.name for export in named if not export.error}
    for name in sorted(exports):
        root = run / EXPORTS / name
        parts.append(_part(root, partial(compared_export, root, remembered=remembered)))
    return parts


def _own_files(run: Path, remembered: bool) -> Findings:
    digests = read_json(run / RUN, Begun, FRESH, checksummed=True).files
    return compared(run, digests, beside=OWN, remembered=remembered)
