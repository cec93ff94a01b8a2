"""The run folder: phases are done once, an error leaves the disk as it was, other people's files are safe."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import NoneType

import pytest

from flatq.compress.allocate import Curves
from flatq.errors import ArtifactError, FlatqError, NumericsError, RecipeError
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder, require_space

RECIPE = Recipe.parse("version: 1\nmodel: a/b\nstages: [{gptq: {}}]", "mine.yaml")
OTHER = Recipe.parse("version: 1\nmodel: a/b\nstages: [{gptq: {bits: 3}}]")


def worked(root: Path, *, finished: bool = False) -> RunFolder:
    """A folder in which one phase was done."""
    folder = RunFolder.open(root, RECIPE)
    with folder.working():
        folder.phase("first", lambda: [1, 2], list[int])
        if finished:
            (root / "report.json").write_text("{}")
    return folder


def fail(folder: RunFolder, error: BaseException, work: Callable[[], object] = lambda: None) -> None:
    """Work in the folder and end with an error."""
    with folder.working():
        work()
        raise error


def test_opening_creates_nothing(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "deep" / "run", RECIPE)
    assert not folder.finished
    assert not folder.owned
    assert list(tmp_path.iterdir()) == []


def test_the_name_tells_recipe_and_content() -> None:
    assert RunFolder.open(None, RECIPE).root == Path("runs") / f"mine-{RECIPE.digest()[:8]}"


def test_a_folder_holds_the_recipe_s_text_and_no_work_when_done(tmp_path: Path) -> None:
    folder = worked(tmp_path / "run", finished=True)
    assert (folder.root / "recipe.yaml").read_text() == RECIPE.text
    assert folder.finished
    assert not folder.work.exists()


def test_a_phase_is_computed_once(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, RECIPE)
    with folder.working():
        assert folder.phase("a", lambda: {"x": 1.5}, dict[str, float]) == {"x": 1.5}
        assert RunFolder.open(tmp_path, RECIPE).phase("a", lambda: pytest.fail("again"), dict[str, float]) == {"x": 1.5}
        folder.phase("b", lambda: None, NoneType)
        assert list(folder.timing()) == ["a", "b"]
        assert folder.peak_rss_bytes() > 10_000_000


def test_a_phase_that_fails_is_not_done(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, RECIPE)
    with folder.working():
        with pytest.raises(ZeroDivisionError):
            folder.phase("a", lambda: 1 // 0, int)
        assert folder.phase("a", lambda: 2, int) == 2


@pytest.mark.parametrize("place", ["run", "a/b/run"])
def test_an_error_before_anything_of_worth_leaves_the_disk_as_it_was(place: str, tmp_path: Path) -> None:
    with pytest.raises(NumericsError), RunFolder.open(tmp_path / place, RECIPE).working():
        raise NumericsError("no")
    assert list(tmp_path.iterdir()) == []


def test_an_error_does_not_remove_parents_that_were_there_or_are_in_use(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "a" / "b" / "run", RECIPE)
    with pytest.raises(NumericsError):
        fail(folder, NumericsError("no"), (tmp_path / "a" / "other").touch)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


def test_an_error_leaves_an_empty_folder_empty(tmp_path: Path) -> None:
    with pytest.raises(NumericsError), RunFolder.open(tmp_path, RECIPE).working():
        raise NumericsError("no")
    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_an_error_after_the_first_block_keeps_the_work(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", RECIPE)
    with pytest.raises(NumericsError):
        fail(folder, NumericsError("no"), lambda: (folder.work / "state.json").write_text('{"blocks_done": 1}'))
    assert (folder.work / "state.json").exists()


def test_an_error_on_resumption_keeps_what_the_killed_run_had(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", RECIPE)
    with pytest.raises(KeyboardInterrupt):
        fail(folder, KeyboardInterrupt(), lambda: folder.phase("first", lambda: 1, int))
    with pytest.raises(NumericsError):
        fail(folder, NumericsError("no"))
    assert folder.phase("first", lambda: pytest.fail("again"), int) == 1


def test_a_resumed_run_must_find_the_inputs_it_was_begun_with(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", RECIPE)
    with folder.working():
        folder.depend_on({"source": {"a": "1"}, "versions": ("x", 2)})
        folder.depend_on({"source": {"a": "1"}, "versions": ("x", 2)})
        with pytest.raises(RecipeError, match=r"source changed since this run was started.*--fresh"):
            folder.depend_on({"source": {"a": "2"}, "versions": ("x", 2)})


DAMAGES = [b"", b"{", b"\xff", b"[]", b'{"digest": 3}', b'{"result": 1}', b'{"result": [1, 2], "sha256": "0"}']


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("built", [False, True])
def test_a_phase_whose_file_is_damaged_is_computed_again_and_says_so(
    built: bool, damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder.open(tmp_path / "run", RECIPE)
    with folder.working():
        folder.phase("first", lambda: [1], list[int])
        folder.phase("second", lambda: 2, int)
        (folder.work / "state.json").touch()
        if built:
            folder.artifact.mkdir()
        (folder.work / "phases" / "first.json").write_bytes(damage)
        assert folder.phase("first", lambda: [5], list[int]) == [5]
        assert "first.json: is damaged" in caplog.text
        assert "this phase is computed again" in caplog.text
        assert folder.phase("second", lambda: pytest.fail("again"), int) == 2
        assert (folder.work / "state.json").exists() == built, "finished blocks were made by the plan that was lost"
        (folder.work / "phases" / "second.json").write_bytes(damage)
        assert list(folder.timing()) == ["first"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_notes_of_the_recipe_or_the_inputs_are_refused_by_name(damage: bytes, tmp_path: Path) -> None:
    folder = worked(tmp_path / "run")
    with folder.working():
        folder.depend_on({"a": 1})
        (folder.work / "inputs.json").write_bytes(damage)
        with pytest.raises(ArtifactError, match=r"inputs\.json: is damaged [^\n]*; start over with --fresh$"):
            folder.depend_on({"a": 1})
    (folder.root / "run.json").write_bytes(damage)
    with pytest.raises(ArtifactError, match=r"run\.json: is damaged [^\n]*; start over with --fresh$"):
        RunFolder.open(folder.root, RECIPE)
    assert not RunFolder.open(folder.root, RECIPE, fresh=True).root.exists()


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if not damage.startswith(b'{"')])
def test_a_damaged_report_is_no_finished_run_and_is_refused_by_name(damage: bytes, tmp_path: Path) -> None:
    folder = worked(tmp_path / "run", finished=True)
    (folder.root / "report.json").write_bytes(damage)
    with pytest.raises(ArtifactError, match=r"report\.json: is damaged [^\n]*; start over with --fresh$"):
        _ = folder.finished


@pytest.mark.parametrize("left", [(), ("work/",), ("work/", "run.json.partial"), ("run.json.partial",)])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_a_run_was_killed_in_while_it_was_made_is_taken_over(
    left: tuple[str, ...], fresh: bool, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    for name in left:
        (root / name).mkdir() if name.endswith("/") else (root / name).write_text('{"dig')
    folder = RunFolder.open(root, RECIPE, fresh=fresh)
    with folder.working():
        assert folder.digest() == RECIPE.digest()
        assert not (root / "run.json.partial").exists()


@pytest.mark.parametrize("other", ["work/precious", "precious"])
def test_a_folder_with_anything_else_is_not_taken_over(other: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "work").mkdir(parents=True)
    (tmp_path / "run" / "run.json.partial").touch()
    (tmp_path / "run" / other).touch()
    for fresh in (False, True):
        with pytest.raises(RecipeError, match="is no run folder of flatq"):
            RunFolder.open(tmp_path / "run", RECIPE, fresh=fresh)
    assert (tmp_path / "run" / other).exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_in_words(number: int, tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", RECIPE)
    with pytest.raises(ArtifactError, match=r"the disk is full .* finished blocks are kept"), folder.working():
        raise OSError(number, "full")


def test_other_system_errors_keep_their_type(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), RunFolder.open(tmp_path / "run", RECIPE).working():
        raise IsADirectoryError(errno.EISDIR, "is a folder")


def test_the_same_recipe_may_go_on_in_its_folder(tmp_path: Path) -> None:
    worked(tmp_path / "run")
    assert RunFolder.open(tmp_path / "run", RECIPE).owned


def test_another_recipe_may_not_if_the_run_is_finished(tmp_path: Path) -> None:
    worked(tmp_path / "run", finished=True)
    with pytest.raises(RecipeError, match="another recipe"):
        RunFolder.open(tmp_path / "run", OTHER)


def test_fresh_removes_only_what_flatq_made(tmp_path: Path) -> None:
    worked(tmp_path / "run", finished=True)
    assert not RunFolder.open(tmp_path / "run", OTHER, fresh=True).root.exists()
    (tmp_path / "precious").touch()
    with pytest.raises(RecipeError, match="no run folder"):
        RunFolder.open(tmp_path, RECIPE, fresh=True)
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize("below", [".", "run", "a/b"])
def test_a_place_below_a_file_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="choose another place"):
        RunFolder.open(tmp_path / "file" / below, RECIPE)


def test_space_is_asked_for_where_the_folder_will_be(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 0, "nothing")
    with pytest.raises(FlatqError, match=r"the model needs about 1000000000\.00 GB") as raised:
        require_space(tmp_path / "not" / "yet", 10**18, "the model")
    assert raised.value.exit_code == 3
    assert str(tmp_path) in str(raised.value)


def test_a_phase_gives_its_type_back_and_refuses_another(tmp_path: Path) -> None:
    curves = [Curves((0.0, 0.1 + 0.2), (0.0,))]
    with RunFolder.open(tmp_path, RECIPE).working():
        assert RunFolder.open(tmp_path, RECIPE).phase("curves", lambda: curves, list[Curves]) == curves
        assert RunFolder.open(tmp_path, RECIPE).phase("curves", lambda: pytest.fail("again"), list[Curves]) == curves
        with pytest.raises(ArtifactError, match=r"curves\.json: no valid result of 'curves'"):
            RunFolder.open(tmp_path, RECIPE).phase("curves", lambda: pytest.fail("again"), int)
