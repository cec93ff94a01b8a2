"""A damaged JSON file is one line that names the file and the way out, in every command that reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import flatq as package
from flatq.artifact import INDEX, MANIFEST, Artifact
from flatq.errors import ArtifactError, ExportError, FlatqError
from flatq.export.folder import DESCRIPTION, description_of
from flatq.files import CHECKSUM, read_json, write_checksummed
from flatq.report.render import read_report
from tests.conftest import flatq

GQA = "exports/gqa"
ARTIFACT = ("verify", "export", "eval", "generate", "run")
EXPORT = ("verify", "bench export", "eval export", "generate export", "run")
READERS: dict[str, tuple[str, ...]] = {
    f"artifact/{MANIFEST}": ARTIFACT,
    "artifact/config.json": ARTIFACT,
    f"artifact/{INDEX}": ARTIFACT,
    "artifact/tokenizer.json": ARTIFACT,
    "artifact/tokenizer_config.json": ARTIFACT,
    "artifact/generation_config.json": ARTIFACT,
    f"{GQA}/{DESCRIPTION}": EXPORT,
    f"{GQA}/flatq_onnx.json": EXPORT,
    "run.json": ("verify", "run", "compare"),
    "report.json": ("verify", "run", "compare"),
}


def changed(content: bytes, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    return json.dumps(change(json.loads(content))).encode()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "not UTF-8": lambda content: content.replace(b'"', b'"\xff', 1),
    "a list": lambda content: b"[]",
    "too deep": lambda content: b"[" * 100_000,
    "wrong types": lambda content: changed(content, lambda value: {key: [3.5] for key in value}),
    "a missing key": lambda content: changed(content, lambda value: dict(list(value.items())[1:])),
    "an unknown key": lambda content: changed(content, lambda value: {**value, "unheard": 1}),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, exported_run: tuple[Path, Path]) -> Path:
    """A copy of the run; every test puts back what it damages."""
    return Path(shutil.copytree(exported_run[1], tmp_path_factory.mktemp("damaged") / "run"))


@contextmanager
def damaged(file: Path, damage: str) -> Iterator[None]:
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    try:
        yield
    finally:
        file.write_bytes(whole)


def arguments(verb: str, run: Path, recipe: Path) -> tuple[str | Path, ...]:
    place = run / GQA if verb.endswith(" export") else run
    return {
        "verify": ("verify", place),
        "export": ("export", place, "--format", "onnx", "--out", run.with_name("new")),
        "eval": ("eval", place, "--tokens", "32"),
        "generate": ("generate", place, "-p", "The", "--new-tokens", "1"),
        "bench": ("bench", place, "--prompt", "2", "--new-tokens", "2", "--repeats", "1"),
        "compare": ("compare", place),
        "run": ("run", recipe, "--out", run),
    }[verb.removesuffix(" export") if verb != "export" else verb]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", READERS)
def test_every_command_refuses_it_in_a_line_with_its_name(
    file: str, damage: str, run: Path, exported_run: tuple[Path, Path]
) -> None:
    with damaged(run / file, damage):
        for verb in READERS[file]:
            shown = flatq(*arguments(verb, run, exported_run[0]))
            assert isinstance(shown.exception, SystemExit), (verb, shown.exception)
            assert shown.exit_code == 3, (verb, shown.stderr)
            named = [line for line in shown.stderr.splitlines() if Path(file).name in line]
            assert len(named) == 1, (verb, shown.stderr)
            assert shown.stdout == ""
    assert not run.with_name("new").exists()


DIRECT: dict[str, Callable[[Path], object]] = {
    f"artifact/{MANIFEST}": lambda run: Artifact.open(run, check=False),
    "artifact/config.json": lambda run: package.load(run, check=False),
    f"artifact/{INDEX}": lambda run: Artifact.open(run, check=False).tensor("norm.weight"),
    f"{GQA}/{DESCRIPTION}": lambda run: description_of(run / GQA, check=False),
    f"{GQA}/flatq_onnx.json": lambda run: _contract(run / GQA),
    "report.json": lambda run: read_report(run / "report.json"),
}
HARMLESS = {("artifact/config.json", "a missing key"), ("artifact/config.json", "an unknown key"),
            (f"artifact/{INDEX}", "a missing key"), (f"artifact/{INDEX}", "an unknown key"),
            (f"{GQA}/flatq_onnx.json", "a missing key"), ("report.json", "a missing key")}  # fmt: skip


def _contract(root: Path) -> object:
    from flatq_onnx.contract import Contract

    return Contract.load(root)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", DIRECT)
def test_without_digests_it_is_a_line_too_or_does_no_harm(file: str, damage: str, run: Path) -> None:
    with damaged(run / file, damage):
        if (file, damage) in HARMLESS:  # transformers' keys and those that have a default
            DIRECT[file](run)
            return
        with pytest.raises((ArtifactError, ExportError)) as raised:
            DIRECT[file](run)
    assert Path(file).name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["decoder", "grids"])
@pytest.mark.parametrize(
    "value", [None, 3, "x", [], {}, {"layers.0.q": 3}, {"layers": 1}, {"layers.0.q": {"bits": "x"}}]
)
def test_a_wrong_value_inside_the_configuration_is_a_line_too(key: str, value: object, run: Path) -> None:
    file = run / "artifact" / "config.json"
    whole = file.read_bytes()
    if key == "grids" and value == {}:
        return
    try:
        file.write_text(json.dumps(json.loads(whole) | {key: value}))
        with pytest.raises(ArtifactError, match=rf"config\.json: is damaged \({key}[^\n]*--fresh$"):
            Artifact.open(run, check=False)
    finally:
        file.write_bytes(whole)


def test_a_file_that_is_a_folder_or_is_missing_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, words in (("folder", "cannot be read"), ("none", "is missing")):
        with pytest.raises(ExportError, match=rf"{name}: {words}.*; do this"):
            read_json(tmp_path / name, dict[str, Any], "do this", error=ExportError)


def test_a_checksum_covers_every_bit_of_a_file(tmp_path: Path) -> None:
    file, value = tmp_path / "a.json", {"b": (1, 0.12345678901234568), "a": {"x": None, "sha256": "1"}, "3": "ü"}
    write_checksummed(file, value)
    read = read_json(file, dict[str, Any], "", checksummed=True)
    assert read == {"b": [1, 0.12345678901234568], "a": {"x": None, "sha256": "1"}, "3": "ü"}
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(FlatqError, match=r"a\.json: is damaged \(.*\); do this$"):
            read_json(file, dict[str, Any], "do this", checksummed=True)
    for other in (read, {**read, CHECKSUM: ""}, {**read, CHECKSUM: 3}, {**read, CHECKSUM: "0" * 64}):
        file.write_text(json.dumps(other))
        with pytest.raises(FlatqError, match=CHECKSUM):
            read_json(file, dict[str, Any], "", checksummed=True)
