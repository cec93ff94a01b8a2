"""A flipped bit is found before it is used, whatever file it is in and whatever is done with the folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flatq as package
from flatq import digests
from flatq.artifact import MANIFEST, Artifact
from flatq.errors import ArtifactError
from flatq.export.deliver import deliver, reopened
from flatq.export.folder import DESCRIPTION
from flatq.export.planned import PlannedExport
from flatq.export.protocols import exporter_named
from flatq.model.grid import Grid
from tests.conftest import flatq
from tests.models import tiny_artifact, tiny_config

FEW = ("--prompt", "2", "--new-tokens", "2", "--repeats", "1", "--threads", "1")
SHARD = "layer-00001-mlp.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, exported_run: tuple[Path, Path]) -> Path:
    """A copy of the run whose files were found right, so that what follows is read from memory."""
    return Path(shutil.copytree(exported_run[1], tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip(file: Path, place: float = 0.5) -> None:
    """One bit of a file, at a share of its length."""
    content = bytearray(file.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1
    file.write_bytes(content)


def test_a_whole_run_is_told_with_count_and_bytes(whole: Path) -> None:
    shown = flatq("verify", whole)
    assert shown.exit_code == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        str(whole / part) for part in (".", "artifact", "exports/fp32", "exports/gqa", "exports/reduced")
    ]
    manifest = json.loads((whole / "artifact" / MANIFEST).read_text())
    size = sum((whole / "artifact" / file).stat().st_size for file in manifest["files"])
    assert lines[1] == f"{whole / 'artifact'}: OK, {len(manifest['files'])} files, {size:,} bytes"
    for part in ("artifact", "exports/gqa"):
        assert flatq("verify", whole / part).stdout.count("OK") == 1


@pytest.mark.parametrize(
    "file",
    ["report.json", "report.html", "recipe.yaml", "run.json", f"artifact/{SHARD}", "artifact/tokenizer.json",
     f"artifact/{MANIFEST}", "exports/gqa/model.onnx", "exports/gqa/flatq_onnx.json", f"exports/gqa/{DESCRIPTION}"],
)  # fmt: skip
def test_verify_names_a_damaged_file_and_so_does_a_finished_run(
    file: str, run: Path, exported_run: tuple[Path, Path]
) -> None:
    flip(run / file, 0.9)
    for shown in (flatq("verify", run), flatq("run", exported_run[0], "--out", run)):
        assert shown.exit_code == 3
        assert Path(file).name in shown.stderr
        assert shown.stdout == ""
        assert isinstance(shown.exception, SystemExit)


def test_verify_names_what_is_missing_and_what_is_unexpected(run: Path) -> None:
    (run / "artifact" / SHARD).unlink()
    (run / "artifact" / "added_tokens.json").write_text("{}")
    (run / "exports" / "gqa" / "stray.bin").touch()
    (run / "exports" / "gqa" / ".DS_Store").touch()
    shutil.rmtree(run / "exports" / "fp32")
    (run / "notes.txt").touch()
    shown = flatq("verify", run)
    assert shown.exit_code == 3
    assert f"{run / 'artifact'}: missing files: {SHARD}\n" in shown.stderr
    assert f"{run / 'artifact'}: unexpected files: added_tokens.json\n" in shown.stderr
    assert f"{run / 'exports' / 'gqa'}: unexpected files: stray.bin\n" in shown.stderr
    assert f"{run / 'exports' / 'fp32'}: is no export folder of flatq, export.json is missing" in shown.stderr
    assert f"{run}: unexpected files: notes.txt\n" in shown.stderr


def test_verify_of_another_folder_says_what_to_give(tmp_path: Path) -> None:
    shown = flatq("verify", tmp_path)
    assert shown.exit_code == 3
    assert "give a run, artifact or export folder" in shown.stderr


FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx": ("onnx", {"precision": "int4", "external_data_above": 0}),
    "optimum": ("onnx", {"target": "optimum", "attention": "gqa"}),
    "compressed-tensors": ("safetensors", {}),
    "shards": ("safetensors", {"format": "fp16", "max_shard_size": 50_000}),
    "gguf": ("gguf", {"precision": "f16"}),
}


def planned(case: str, *, opening: bool = True) -> PlannedExport:
    """An export of this format, not verified; the test is skipped where its packages are not installed."""
    form, options = FORMATS[case]
    exporter = exporter_named(form)
    item = PlannedExport("mine", form, exporter, exporter.Options(**options), verify=False)
    if absent := exporter.missing(item.options, opening=opening):
        pytest.skip(absent[0])
    return item


@pytest.mark.parametrize("case", FORMATS)
def test_a_bit_flipped_anywhere_in_any_file_of_an_export_is_found_by_the_file_s_name(
    case: str, run: Path, tmp_path: Path
) -> None:
    report = deliver(planned(case, opening=False), Artifact.open(run), tmp_path / "mine", None)
    files = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert len(files) == len(report["files"]) + 1
    for file in files:
        refuses_every_flip(file, lambda: reopened(tmp_path / "mine"))
    reopened(tmp_path / "mine")


def test_a_bit_flipped_anywhere_in_any_file_of_an_artifact_is_found_by_the_file_s_name(run: Path) -> None:
    files = [path for path in (run / "artifact").rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        refuses_every_flip(file, lambda: Artifact.open(run))
    Artifact.open(run)


def refuses_every_flip(file: Path, use: Callable[[], object]) -> None:
    whole = file.read_bytes()
    for place in (0.0, 0.02, 0.31, 0.5, 0.77, 0.999):
        flip(file, place)
        with pytest.raises(ArtifactError, match=re.escape(file.name)):
            use()
        file.write_bytes(whole)


USES: dict[str, Callable[[Path, Path], tuple[str | Path, ...]]] = {
    "export": lambda run, out: ("export", run, "--format", "onnx", "--out", out / "new", "-o", "precision=fp32"),
    "eval": lambda run, out: ("eval", run, "--tokens", "32"),
    "generate": lambda run, out: ("generate", run, "-p", "The", "--new-tokens", "1"),
    "bench export": lambda run, out: ("bench", run / "exports" / "gqa", *FEW),
    "eval export": lambda run, out: ("eval", run / "exports" / "gqa", "--tokens", "32"),
    "generate export": lambda run, out: ("generate", run / "exports" / "gqa", "-p", "The", "--new-tokens", "1"),
}


@pytest.mark.parametrize("use", USES)
def test_a_use_refuses_a_damaged_file_by_name_and_only_on_demand_does_not(use: str, run: Path, tmp_path: Path) -> None:
    file = run / ("exports/gqa/model.onnx" if use.endswith("export") and use != "export" else f"artifact/{SHARD}")
    whole = file.read_bytes()
    flip(file, 0.98)
    arguments = USES[use](run, tmp_path)
    shown = flatq(*arguments)
    assert shown.exit_code == 3
    assert f"damaged files: {file.name}" in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()
    unchecked = flatq(*arguments, "--no-digests")
    assert f"damaged files: {file.name}" not in unchecked.stderr
    file.write_bytes(whole)
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert flatq(*arguments).exit_code == 0


def test_loading_refuses_a_damaged_file_by_name(run: Path) -> None:
    flip(run / "artifact" / SHARD, 0.98)
    for load in (package.load, Artifact.open):
        with pytest.raises(ArtifactError, match=rf"damaged files: {SHARD}; run the recipe again with --fresh"):
            load(run)
        load(run, check=False)


def test_what_was_found_right_is_not_read_again_until_it_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: (read.append(path.name), digest(path))[1])
    Artifact.open(run)
    assert SHARD in read
    read.clear()
    Artifact.open(run)
    assert SHARD in read, "it was written a moment ago, and could be written again with the same times"
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    Artifact.open(run)
    read.clear()
    Artifact.open(run)
    assert read == []
    flip(run / "artifact" / SHARD)
    with pytest.raises(ArtifactError, match=SHARD):
        Artifact.open(run)
    assert read == [SHARD]
    read.clear()
    with pytest.raises(ArtifactError, match=SHARD):
        Artifact.open(run).verify()


def test_a_memory_that_is_damaged_or_cannot_be_written_only_costs_time(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    assert tmp_path.parent in Path(os.environ["FLATQ_CACHE"]).parents, "removed with the folders of the tests"
    monkeypatch.setenv("FLATQ_CACHE", str(tmp_path / "cache"))
    Artifact.open(run)
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    for content in (b"", b"[1]", b"\xff", b'{"a": 3}'):
        memory.write_bytes(content)
        Artifact.open(run)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLATQ_CACHE", str(tmp_path / "file"))
    Artifact.open(run)


def test_a_digest_for_a_file_outside_of_the_folder_is_a_fault(run: Path) -> None:
    found = digests.compared(run, {"../x": "0", "/etc/hostname": "0", "a/../../y": "0"})
    assert set(found.damaged) == {"../x", "/etc/hostname", "a/../../y"}


def test_an_unexpected_file_is_warned_of_and_used_all_the_same(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "artifact" / "added_tokens.json").write_text("{}")
    Artifact.open(run)
    assert "manifest.json does not list these files: added_tokens.json" in caplog.text


@pytest.mark.parametrize("case", ["optimum", "compressed-tensors"])
def test_an_export_that_was_copied_elsewhere_answers_as_before_and_is_checked(
    case: str, run: Path, tmp_path: Path
) -> None:
    deliver(planned(case), Artifact.open(run), run / "exports" / "mine", None)
    asked = [("generate", "-p", "The river", "--new-tokens", "6"), ("eval", "--tokens", "32")]
    before = [flatq(verb, run / "exports" / "mine", *words).stdout for verb, *words in asked]
    moved = Path(shutil.copytree(run / "exports" / "mine", tmp_path / "elsewhere" / "mine"))
    shutil.rmtree(run)
    assert all(before)
    assert [flatq(verb, moved, *words).stdout for verb, *words in asked] == before
    assert flatq("verify", moved).exit_code == 0
    file = max(moved.iterdir(), key=lambda path: path.stat().st_size)
    flip(file)
    for verb, *words in asked:
        shown = flatq(verb, moved, *words)
        assert shown.exit_code == 3
        assert f"damaged files: {file.name}" in shown.stderr


@pytest.mark.parametrize("case", ["onnx", "gguf"])
def test_an_export_needs_no_run(case: str, run: Path, tmp_path: Path) -> None:
    deliver(planned(case), Artifact.open(run), run / "exports" / "mine", None)
    whole = flatq("eval", run / "exports" / "mine", "--tokens", "32").stdout
    moved = Path(shutil.copytree(run / "exports" / "mine", tmp_path / "elsewhere" / "mine"))
    shutil.rmtree(run)
    assert whole
    assert flatq("bench", moved, *FEW).exit_code == 0
    assert flatq("eval", moved, "--tokens", "32").stdout == whole
    assert flatq("generate", moved, "-p", "The", "--new-tokens", "3").exit_code == 0


def test_a_prompt_needs_a_tokenizer(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", tiny_config(), grid=Grid(4, 32))
    deliver(planned("onnx"), artifact, tmp_path / "mine", None)
    shown = flatq("generate", tmp_path / "mine", "-p", "The")
    assert shown.exit_code == 3
    assert f"{tmp_path / 'mine'}: holds no tokenizer" in shown.stderr
