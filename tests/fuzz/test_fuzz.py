"""A few inputs for every reader, and all that were ever found; ``make fuzz`` takes 100,000 for each."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from flatq.errors import FlatqError
from tests.fuzz.__main__ import fuzzed
from tests.fuzz.targets import TARGETS, Target, material

CORPUS = Path(__file__).parent / "corpus"
FOUND = sorted(path for path in CORPUS.rglob("*") if path.is_file())
SLOW = ("gguf", "chat_template", "work/phases")  # tenths of a second for an input
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each reader runs in a forked process")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders whose files are changed."""
    root = tmp_path_factory.mktemp("fuzz")
    material(root)
    return root


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(name: str, given: Path) -> None:
    place = given / f"place-{TARGETS[name].slug}"
    place.mkdir()
    result = fuzzed(TARGETS[name], place, first=0, inputs=3 if name in SLOW else 12, until=time.monotonic() + 300)
    assert not result.failed, result.faults
    assert result.inputs >= 3


@pytest.mark.parametrize("path", FOUND, ids=[f"{path.parent.name}/{path.name}" for path in FOUND])
def test_what_was_found_once_is_refused_in_words(path: Path, given: Path, tmp_path: Path) -> None:
    target = next(target for target in TARGETS.values() if target.slug == path.parent.name)
    folder = Path(shutil.copytree(given / target.folder, tmp_path / "folder"))
    (folder / target.file).write_bytes(path.read_bytes())
    with suppress(FlatqError):
        target.read(folder)


def fails(folder: Path) -> None:
    raise KeyError(folder)


def hangs(_: Path) -> None:
    while True:
        pass


def writes(_: Path) -> None:
    Path("/tmp/flatq-fuzz-outside").write_text("")


def starts(_: Path) -> None:
    os.system("true")


@pytest.mark.parametrize(
    ("read", "kind"), [(fails, "tracebacks"), (hangs, "hangs"), (writes, "outside"), (starts, "outside")]
)
def test_the_driver_notices(
    read: Callable[[Path], object], kind: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.__main__.SECONDS", 0.3)
    place = given / f"place-{read.__name__}"
    place.mkdir()
    result = fuzzed(Target("x", "model", "config.json", read), place, first=0, inputs=1, until=time.monotonic() + 60)
    assert getattr(result, kind) == 1
    assert result.failed
