"""``flatq verify``: compare every file of an artifact, an export or a run with its digest.

Commands that use a model also compare its files, but skip files that were verified before; ``verified`` reads every
file. For a run, these are its own files, its artifact and its exports.
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
from flatq.phases import ARTIFACT, EXPORTS, FRESH
from flatq.run_folder import OWN, REPORT, RUN, Begun, Outcomes


@dataclass(frozen=True, slots=True)
class Part:
    """A folder and its findings; if its list of files cannot be read, ``found`` is None and ``reason`` says why."""

    root: Path
    found: Findings | None
    reason: str = ""

    @property
    def fault(self) -> str:
        """Damaged and missing files as text; empty if there are none."""
        if self.found is None:
            return self.reason
        return f"{self.root}: {self.found.wrong}" if self.found.wrong else ""

    @property
    def unexpected(self) -> str:
        """Unexpected files as text; empty if there are none."""
        names = self.found.unexpected if self.found else ()
        return f"{self.root}: unexpected files: {', '.join(names)}" if names else ""


def verified(path: Path) -> list[str]:
    """Read every file that has a digest; returns one line for each folder.

    Raises:
        ArtifactError: lists every file that is damaged, missing or unexpected; or the folder was not written by flatq.
    """
    parts = examined(path, remembered=False)
    faults = [words for part in parts for words in (part.fault, part.unexpected) if words]
    if faults:
        raise ArtifactError("\n".join(faults))
    return [f"{p.root}: OK, {p.found.files} files, {p.found.bytes:,} bytes" for p in parts if p.found]


def refuse_damage(run: Path) -> None:
    """Compare the files of a finished run with their digests; files verified before and unchanged are skipped.

    Raises:
        ArtifactError: lists every file that is damaged or missing.
    """
    faults = [part.fault for part in examined(run, remembered=True) if part.fault]
    if faults:
        raise ArtifactError("\n".join([*faults, f"{run}: {FRESH}, or skip the comparison with --no-digests"]))


def refuse_damaged_report(run: Path) -> None:
    """Compare the report of a finished run with its digest, where ``run.json`` is there and has it.

    Raises:
        ArtifactError: names every file of the run itself that is damaged or missing.
    """
    if (run / RUN).is_file() and (fault := _part(run, partial(_own_files, run, True)).fault):
        raise ArtifactError(f"{fault}; {FRESH}")


def examined(path: Path, *, remembered: bool) -> list[Part]:
    """All folders of a run, or the folder of an artifact or export, with their findings.

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
    """The run's own files, its artifact and its exports; for an unfinished run only those that exist."""
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
