"""What goes wrong in a run: one paragraph on stderr, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import flatq.pipeline.build as flatq_build
from tests.conftest import FLAT, GPTQ, ONNX, MakeRecipe, digests, flatq

resource = pytest.importorskip("resource", reason="file size limits are POSIX")
WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "out"


def fault(recipe: Path, out: Path, code: int, *options: str) -> str:
    """The paragraph that a run ends with; the disk must be as it was before."""
    before = sorted(out.parents[1].rglob("*"))
    shown = flatq("run", recipe, "--out", out, *options)
    assert shown.exit_code == code, shown.stderr or shown.exception
    assert shown.stdout == ""
    assert "Traceback" not in shown.stderr
    assert sorted(out.parents[1].rglob("*")) == before, "nothing is left behind"
    assert shown.stderr.strip()
    assert "\n\n" not in shown.stderr.strip(), "one paragraph"
    return shown.stderr


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"flat": {"keep_ratoi": 0.8}}, "unknown key; did you mean 'keep_ratio'?"),
        ({"flat": {"keep_ratio": 70}}, "keep_ratio: 70 is not allowed; a number in (0, 1] or null; did you mean 0.7"),
        ({"flat": {"keep_ratio": 0.05}}, "keep_ratio: 0.05 cannot be reached"),
        ({"gptq": {"group_size": 128}}, "group_size: 128 is wider than"),
        ({"gptq": {"group_size": 48}}, "group_size: 48 is not allowed"),
    ],
)
def test_a_recipe_that_cannot_be_used(stage: dict[str, Any], words: str, make_recipe: MakeRecipe, out: Path) -> None:
    assert words in fault(make_recipe(stages=[stage]), out, 2)


def test_a_group_that_fits_no_layer_is_refused_before_any_weight_is_read(
    make_recipe: MakeRecipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatq.pipeline.texts.token_batches", None)
    assert "choose at most 64" in fault(make_recipe(stages=[FLAT, {"gptq": {"group_size": 1024}}]), out, 2)


def test_a_budget_that_no_plan_can_meet_is_refused_before_any_weight_is_read(
    make_recipe: MakeRecipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatq.pipeline.texts.token_batches", None)
    assert "cannot be reached" in fault(make_recipe(stages=[{"flat": {"keep_ratio": 0.05}}]), out, 2)


def test_a_group_that_only_the_narrowed_layers_are_too_narrow_for(make_recipe: MakeRecipe, out: Path) -> None:
    flat = {"flat": {"keep_ratio": 0.5, "allocation": "uniform", "rank_multiple": 1, "width_multiple": 1}}
    assert "wider than o (" in fault(make_recipe(stages=[flat, {"gptq": {"group_size": 64}}]), out, 2)


def test_a_model_that_is_not_there(make_recipe: MakeRecipe, out: Path, tmp_path: Path) -> None:
    assert f"{tmp_path}/none does not exist" in fault(make_recipe(model=f"{tmp_path}/none"), out, 2)


def test_an_unknown_model_type(make_recipe: MakeRecipe, out: Path, model_copy: Path) -> None:
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert "'mamba'" in fault(make_recipe(model=str(model_copy)), out, 2)


def test_a_truncated_shard(make_recipe: MakeRecipe, out: Path, model_copy: Path) -> None:
    whole = (model_copy / WEIGHTS).read_bytes()
    (model_copy / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in fault(make_recipe(model=str(model_copy)), out, 3)


def test_a_missing_tensor(make_recipe: MakeRecipe, out: Path, model_copy: Path) -> None:
    tensors = load_file(model_copy / WEIGHTS)
    del tensors[DOWN]
    save_file(tensors, model_copy / WEIGHTS)
    assert "layers.1.down.weight is missing" in fault(make_recipe(model=str(model_copy)), out, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(value: float, make_recipe: MakeRecipe, out: Path, model_copy: Path) -> None:
    tensors = load_file(model_copy / WEIGHTS)
    tensors[DOWN][3, 5] = value
    save_file(tensors, model_copy / WEIGHTS)
    assert "layers.1.down.weight holds 1 values" in fault(make_recipe(model=str(model_copy)), out, 3)


def test_activations_that_overflow(make_recipe: MakeRecipe, out: Path, model_copy: Path) -> None:
    tensors = load_file(model_copy / WEIGHTS)
    tensors[DOWN] = torch.full_like(tensors[DOWN], 3e38)
    save_file(tensors, model_copy / WEIGHTS)
    assert "overflow" in fault(make_recipe(model=str(model_copy)), out, 3)


def test_a_model_without_a_tokenizer(make_recipe: MakeRecipe, out: Path, model_copy: Path) -> None:
    for file in model_copy.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer; add tokenizer.json" in fault(make_recipe(model=str(model_copy)), out, 2)


def test_a_text_that_is_too_short(make_recipe: MakeRecipe, out: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    calibration = {"dataset": "text", "path": str(tmp_path / "short.txt"), "samples": 8, "seq_len": 64}
    assert "lower evaluation.tokens" in fault(make_recipe(calibration=calibration), out, 2)


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_an_output_folder_below_a_file(below: str, make_recipe: MakeRecipe, out: Path) -> None:
    out.parent.mkdir()
    out.write_text("mine")
    assert "choose another place" in fault(make_recipe(), out / below if below else out, 2)
    assert out.read_text() == "mine"


def test_an_output_folder_that_cannot_be_written(
    make_recipe: MakeRecipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatq.run_folder.os.access", lambda _, mode: mode != os.W_OK)  # root may write
    assert "is not writable" in fault(make_recipe(), out, 2)


def test_an_output_folder_that_holds_something_else(make_recipe: MakeRecipe, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    for options in ([], ["--fresh"]):
        assert "is no run folder of flatq" in fault(make_recipe(), out, 2, *options)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_an_empty_output_folder_stays_empty(make_recipe: MakeRecipe, out: Path, model_copy: Path) -> None:
    (model_copy / "tokenizer.json").unlink()
    out.mkdir(parents=True)
    fault(make_recipe(model=str(model_copy)), out, 2)


def test_another_recipe_s_run_folder(make_recipe: MakeRecipe, exported_run: tuple[Path, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported_run[1], tmp_path / "runs" / "out"))
    before = digests(out)
    assert "holds the run of another recipe" in fault(make_recipe(stages=[GPTQ]), out, 2)
    assert digests(out) == before


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """As on a full disk: no file of this process may grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("samples", "limit", "words"),
    [(8, 100_000, "the disk is full (File too large)"), (1, 76_000, "embedding.safetensors: cannot be written")],
    ids=["hidden states", "shard"],
)
def test_a_disk_that_is_full(
    samples: int, limit: int, words: str, make_recipe: MakeRecipe, out: Path, text_file: Path
) -> None:
    # Hidden states take 16,384 bytes a sample, those of the dense model 68,000, the embedding's shard 82,000.
    calibration = {"dataset": "text", "path": str(text_file), "samples": samples, "seq_len": 64}
    recipe = make_recipe(
        calibration=calibration, stages=[{"flat": {"keep_ratio": 0.8, "method": "paper", "shrinkage": 0.1}}]
    )
    with files_up_to(limit):
        assert words in fault(recipe, out, 3)


def test_a_disk_that_fills_up_during_the_walk_keeps_the_finished_blocks(
    make_recipe: MakeRecipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, save = make_recipe(), flatq_build.save_shard

    def save_until_full(path: Path, tensors: Any) -> None:
        with files_up_to(10 if path.name == "layer-00001-mlp.safetensors" else 10_000_000):
            save(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(flatq_build, "save_shard", save_until_full)
        shown = flatq("run", recipe, "--out", out)
    assert shown.exit_code == 3
    assert "layer-00001-mlp.safetensors: cannot be written" in shown.stderr
    assert not list((out / "artifact.partial").glob("*.partial"))
    assert json.loads((out / "work" / "state.json").read_text())["blocks_done"] == 3
    assert flatq("run", recipe, "--out", out).exit_code == 0


def test_a_model_that_changed_while_the_run_was_broken_off(
    make_recipe: MakeRecipe, out: Path, model_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(model=str(model_copy), stages=[GPTQ])
    with monkeypatch.context() as patch:
        patch.setattr("flatq.pipeline.build.finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert flatq("run", recipe, "--out", out).exit_code == 130
    tensors = load_file(model_copy / WEIGHTS)
    tensors[DOWN] /= 2
    save_file(tensors, model_copy / WEIGHTS)
    before = digests(out)
    assert "source changed since this run was started" in fault(recipe, out, 2)
    assert digests(out) == before
    assert flatq("run", recipe, "--out", out, "--fresh").exit_code == 0


def test_a_disk_that_will_not_do_is_noticed_before_the_work(
    make_recipe: MakeRecipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatq.run_folder.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "0.00 GB are free" in fault(make_recipe(), out, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there(make_recipe: MakeRecipe, out: Path) -> None:
    assert "--device cuda: not on this machine; it has cpu" in fault(make_recipe(), out, 2, "--device", "cuda")


def test_an_exporter_that_is_not_installed(make_recipe: MakeRecipe, out: Path) -> None:
    assert "no exporter is named 'onxx'" in fault(make_recipe(exports=[{"onxx": {}}]), out, 2)


def test_an_export_that_cannot_carry_the_model(make_recipe: MakeRecipe, out: Path) -> None:
    assert "add a gptq stage" in fault(make_recipe(stages=[FLAT], exports=ONNX[:1]), out, 2)


def test_an_export_that_cannot_carry_the_codes_is_refused_before_anything_is_computed(
    make_recipe: MakeRecipe, out: Path
) -> None:
    stages = [{"gptq": {"group_size": 16, "symmetric": False}}]
    said = fault(make_recipe(stages=stages, exports=[{"safetensors": {"format": "gptq"}}]), out, 2)
    assert "write format gptq_v2" in said
    assert "baseline" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_bench_on_a_device_that_is_not_there_is_refused_before_anything_is_computed(
    make_recipe: MakeRecipe, out: Path
) -> None:
    bench = {"provider": "cuda", "prompt": 4, "new_tokens": 2, "repeats": 1, "baseline": False}
    assert "cuda" in fault(make_recipe(exports=ONNX[:1], bench=bench), out, 2)
    assert not (out / "artifact").exists()


def test_a_folder_without_weights(make_recipe: MakeRecipe, model_copy: Path, out: Path) -> None:
    (model_copy / WEIGHTS).unlink()
    assert "holds no weights" in fault(make_recipe(model=str(model_copy)), out, 2)
