"""Whole runs on a tiny random model, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import flatq as package
from flatq.artifact import Artifact
from flatq.export.baseline import BASELINE
from flatq.model.decoder import LINEARS
from flatq.model.grid import QuantizedWeight
from flatq.model.weights import load_decoder
from flatq.pipeline import run as pipeline
from flatq.report.render import read_report
from flatq.sources.source import open_model
from tests.conftest import FLAT, GPTQ, LAYERS, ONNX, MakeRecipe, digests, flatq, manifest_of, usual_recipe

BLOCKS = 2 * LAYERS
REPORT = {
    "schema_version", "model", "recipe", "environment", "baseline", "result", "layers", "exports", "bench", "timing",
    "peak_rss_bytes",
}  # fmt: skip


def test_a_run_leaves_what_it_promises_and_nothing_else(exported_run: tuple[Path, Path]) -> None:
    _, out = exported_run
    assert {path.name for path in out.iterdir()} == {
        "artifact", "exports", "recipe.yaml", "report.html", "report.json", "report.md", "run.json",
    }  # fmt: skip
    assert {path.name for path in (out / "exports").iterdir()} == {"reduced", "gqa", "fp32"}
    assert not list(out.rglob("*.partial"))


def test_the_report_holds_what_others_build_on(exported_run: tuple[Path, Path]) -> None:
    _, out = exported_run
    report = json.loads((out / "report.json").read_text())
    assert set(report) >= REPORT
    for measure in (report["baseline"], report["result"]):
        assert {"parameters", "decoder_parameters", "bytes", "perplexity"} <= set(measure)
    assert report["result"]["decoder_parameters"] < report["baseline"]["decoder_parameters"]
    assert report["result"]["bytes"] < report["baseline"]["bytes"] / 4, "4 bits and narrower, from float32"
    assert len(report["layers"]) == LAYERS
    errors = {name: error for layer in report["layers"] for name, error in layer["errors"].items()}
    assert {"value", "mlp", "q", "k", "v", "o", "gate", "up", "down"} <= set(errors)
    assert all(0 <= error < 1 for error in errors.values())
    assert [export["name"] for export in report["exports"]] == ["reduced", "gqa", "fp32"]
    for export in report["exports"]:
        assert export["sha256"] == {
            file: digest for file, digest in digests(out / "exports" / export["name"]).items() if file != "export.json"
        }
        assert export["verify"] is not None
    assert {"baseline", "sensitivity", "curves", "compress", "evaluate", "export-gqa"} <= set(report["timing"])
    assert read_report(out / "report.json").model_dump(mode="json") == report


def test_a_bench_measures_the_dense_model_beside_the_result(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    bench = {"provider": "cpu", "prompt": 4, "new_tokens": 3, "repeats": 1, "threads": 1}
    assert flatq("run", make_recipe(exports=ONNX[:1], bench=bench), "--out", tmp_path / "out").exit_code == 0
    measured = read_report(tmp_path / "out" / "report.json").bench
    assert [entry.name for entry in measured] == [BASELINE, "reduced"]
    assert {entry.provider for entry in measured} == {"CPUExecutionProvider"}
    assert all(entry.decode_tokens_per_second.median > 0 for entry in measured)


def test_the_artifact_states_the_widths_that_it_has(exported_run: tuple[Path, Path]) -> None:
    artifact = Artifact.open(exported_run[1])
    artifact.verify()
    for index, dims in enumerate(artifact.config.layers):
        for linear in ("q", "k", "v", "o", "gate", "up", "down"):
            assert tuple(artifact.tensor(f"layers.{index}.{linear}.weight").shape) == dims.shape(linear, 64)
    assert isinstance(artifact.tensor("embed.weight"), QuantizedWeight)
    assert artifact.config.layers != open_model(artifact.manifest["source"]["origin"]).config.layers


def test_a_second_call_does_nothing_and_says_so(
    exported_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    recipe, out = exported_run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert flatq("run", recipe, "--out", out).exit_code == 0
    assert "already finished, nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_two_runs_give_the_same_bytes(exported_run: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, out = exported_run
    assert flatq("run", recipe, "--out", tmp_path / "out").exit_code == 0
    for part in ("artifact", "exports"):
        assert digests(tmp_path / "out" / part) == digests(out / part)


def test_an_export_that_was_damaged_before_the_run_was_finished_is_written_again(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, out = make_recipe(exports=ONNX[2:], stages=[GPTQ]), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("flatq.pipeline.run.summarize", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert flatq("run", recipe, "--out", out).exit_code == 130
    before = digests(out / "exports")
    model = out / "exports" / "fp32" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert flatq("run", recipe, "--out", out).exit_code == 0
    assert "damaged files: model.onnx" in caplog.text
    assert "it is written again" in caplog.text
    assert digests(out / "exports") == before


def test_fresh_starts_over(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, out = make_recipe(), tmp_path / "out"
    assert flatq("run", recipe, "--out", out).exit_code == 0
    first = digests(out / "artifact")
    shutil.rmtree(out / "artifact")
    assert flatq("run", recipe, "--out", out, "--fresh").exit_code == 0
    assert digests(out / "artifact") == first


def test_fresh_lets_another_recipe_take_the_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert flatq("run", make_recipe(stages=[GPTQ]), "--out", out).exit_code == 0
    assert flatq("run", make_recipe("other", stages=[FLAT]), "--out", out, "--fresh").exit_code == 0
    assert manifest_of(out)["recipe"] == (tmp_path / "other.yaml").read_text()


def test_without_out_the_folder_is_named_after_the_recipe(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("mine")
    monkeypatch.chdir(tmp_path)
    shown = flatq("run", recipe)
    assert shown.exit_code == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("mine-")
    assert shown.stdout.strip() == f"runs/{made.name}"


CORRECTED = [{"flat": {**FLAT["flat"], "correction": 0}}, {"gptq": {**GPTQ["gptq"], "correction": 0.5}}]


@pytest.mark.parametrize(
    "stages", [[FLAT], [GPTQ], [FLAT, GPTQ], CORRECTED], ids=["flat", "gptq", "both", "gptq corrects"]
)
def test_each_stage_works_alone_and_both_together(
    stages: list[dict[str, Any]], make_recipe: MakeRecipe, tmp_path: Path, tiny_model: Path
) -> None:
    assert flatq("run", make_recipe(stages=stages), "--out", tmp_path / "out").exit_code == 0
    artifact, dense = Artifact.open(tmp_path / "out"), open_model(str(tiny_model)).config
    kept = artifact.config.decoder_parameters() / dense.decoder_parameters()
    assert kept == (pytest.approx(0.8, abs=0.02) if "flat" in stages[0] else 1)
    assert bool(artifact.grids) == ("gptq" in stages[-1])
    energies = artifact.energies()
    for index, dims in enumerate(artifact.config.layers):
        for linear in LINEARS:
            energy = energies.pop(f"layers.{index}.{linear}")
            assert energy.shape == dims.shape(linear, dense.d_model)[1:]
            assert bool((energy > 0).any())
    assert not energies


@pytest.mark.parametrize("method", ["default", "paper"])
def test_whole_values_and_uniform_widths_reach_the_artifact(
    method: str, make_recipe: MakeRecipe, tmp_path: Path, tiny_model: Path
) -> None:
    flat = {**FLAT["flat"], "method": method, "values": "whole", "uniform": True}
    assert flatq("run", make_recipe(stages=[{"flat": flat}]), "--out", tmp_path / "out").exit_code == 0
    made, dense = Artifact.open(tmp_path / "out").config.layers, open_model(str(tiny_model)).config.layers
    assert len(set(made)) == 1
    assert made[0].d_v == dense[0].d_v
    assert made[0].d_ff < dense[0].d_ff


def test_a_recipe_that_keeps_everything_changes_no_logit(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_model: Path
) -> None:
    recipe = make_recipe(stages=[{"flat": {"keep_ratio": 1.0}}])
    assert flatq("run", recipe, "--out", tmp_path / "out").exit_code == 0
    tokens = torch.arange(96).view(2, 48)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_model)(tokens).logits
    torch.testing.assert_close(load_decoder(Artifact.open(tmp_path / "out"))(tokens), expected, rtol=1e-4, atol=1e-4)


def test_transformers_loads_the_artifact_and_generates(exported_run: tuple[Path, Path]) -> None:
    root = exported_run[1] / "artifact"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(root), AutoTokenizer.from_pretrained(root)
    tokens = torch.tensor([tokenizer("The river").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, load_decoder(Artifact.open(root))(tokens))
    written = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert written.shape[1] > tokens.shape[1]
    assert package.load(root) is not None


def test_an_export_goes_on_with_a_prompt_as_the_artifact_does(
    exported_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    out = exported_run[1]
    asked = ("--prompt", "The river", "--new-tokens", "12")
    written = [flatq("generate", place, *asked) for place in (out, out / "exports" / "fp32")]
    assert [shown.exit_code for shown in written] == [0, 0]
    assert written[0].stdout.strip()
    assert written[0].stdout == written[1].stdout
    assert caplog.text.count("tokens/s") == 2
    drawn = [flatq("generate", out, *asked, "--temperature", "2", "--seed", str(seed)).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    refused = flatq("generate", out, *asked, "--chat")
    assert refused.exit_code == 2
    assert "no chat template" in refused.stderr


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    """``flatq run`` as a process of its own, with the number of threads that this one has."""
    threads = str(torch.get_num_threads())
    return subprocess.Popen(
        [sys.executable, "-m", "flatq", "run", str(recipe), "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_after(blocks: int, recipe: Path, out: Path) -> int:
    """Run until ``blocks`` blocks are finished, then kill -9; returns how many were (all, if it was too quick)."""
    state = out / "work" / "state.json"
    process = start(recipe, out)
    try:
        while process.poll() is None:
            if state.exists() and json.loads(state.read_text())["blocks_done"] >= blocks:
                break
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return int(json.loads(state.read_text())["blocks_done"]) if state.exists() else BLOCKS


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_run_goes_on_at_its_block_and_ends_with_the_same_bytes(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(stages=[FLAT, {"gptq": {**GPTQ["gptq"], "block_size": 1}}])
    whole = tmp_path / "whole"
    for attempt in range(3):
        killed = tmp_path / f"killed-{attempt}"
        if (done := kill_after(2, recipe, killed)) < BLOCKS:
            break
    assert 2 <= done < BLOCKS, "the kill came in the middle"
    shards = sorted((killed / "artifact.partial").glob("layer-*.safetensors"))[:done]
    before = [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in shards]
    held = [path.open("rb") for path in shards]  # an open file keeps its inode number from being used again

    assert flatq("run", recipe, "--out", killed).exit_code == 0
    assert "baseline: already done" in caplog.text
    after = [(killed / "artifact" / path.name).stat() for path in shards]
    assert [(path.name, s.st_ino, s.st_mtime_ns) for path, s in zip(shards, after, strict=True)] == before
    for file in held:
        file.close()

    assert flatq("run", recipe, "--out", whole).exit_code == 0
    assert digests(killed / "artifact") == digests(whole / "artifact")


def test_a_run_that_ends_beside_its_finished_artifact_goes_on_from_there(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off before the artifact is put in its place, then right after it; what is done is not done again."""
    recipe, out, build = make_recipe(stages=[GPTQ]), tmp_path / "out", pipeline.build

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flatq.pipeline.build.finish", stopped)
        assert flatq("run", recipe, "--out", out).exit_code == 130
    (out / "artifact.partial" / "layer-00000-mlp.safetensors.partial").write_text("of a killed write")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "build", lambda *given: stopped(build(*given)))
        patch.setattr("flatq.quantize.stage.GptqStage.apply", None)
        assert flatq("run", recipe, "--out", out).exit_code == 130
    assert not list((out / "artifact").glob("*.partial"))
    monkeypatch.setattr(pipeline, "build", None)
    assert flatq("run", recipe, "--out", out).exit_code == 0


@pytest.fixture(scope="module")
def broken_off(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path
) -> tuple[Path, Path, dict[str, str]]:
    """A recipe, the folder of its run that was broken off after the last block, and what the artifact should be."""
    root = tmp_path_factory.mktemp("broken")
    recipe = root / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(usual_recipe(tiny_model, text_file) | {"stages": [GPTQ]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flatq.pipeline.build.finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert flatq("run", recipe, "--out", root / "out").exit_code == 130
    whole = Path(shutil.copytree(root / "out", root / "whole"))
    assert flatq("run", recipe, "--out", whole).exit_code == 0
    return recipe, root / "out", digests(whole / "artifact")


@pytest.mark.parametrize(
    "file",
    ["artifact.partial/layer-00001-mlp.safetensors", "work/blocks/00001-0.json", "work/blocks/00001-1.safetensors",
     "work/state.json", "work/phases/baseline.json", "work/states-0"],
)  # fmt: skip
def test_what_a_killed_run_left_damaged_is_made_again_with_the_same_bytes(
    file: str, broken_off: tuple[Path, Path, dict[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, left, expected = broken_off
    out = Path(shutil.copytree(left, tmp_path / "out"))
    content = bytearray((out / file).read_bytes())
    content[len(content) // 2] ^= 1
    (out / file).write_bytes(content)
    assert flatq("run", recipe, "--out", out).exit_code == 0
    assert f"{Path(file).name}: is " in caplog.text
    assert "damaged" in caplog.text
    assert digests(out / "artifact") == expected


def test_damaged_fisher_information_is_measured_again(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, out = make_recipe(stages=[FLAT], exports=[]), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compressed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert flatq("run", recipe, "--out", out).exit_code == 130
    file = out / "work" / "sensitivity.f32"
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 64]) + whole[101:])
    assert flatq("run", recipe, "--out", out).exit_code == 0
    assert f"{file}: is damaged; it is made again" in caplog.text
    assert flatq("run", recipe, "--out", tmp_path / "other").exit_code == 0
    assert digests(out / "artifact") == digests(tmp_path / "other" / "artifact")


def test_a_run_whose_export_failed_goes_on_with_the_export(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, out = make_recipe(exports=ONNX[:1]), tmp_path / "out"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flatq_onnx.writing.ir.save", full)
        shown = flatq("run", recipe, "--out", out)
    assert shown.exit_code == 3
    assert "No space left on device" in shown.stderr
    assert not list(out.rglob("*.partial"))
    assert flatq("run", recipe, "--out", out).exit_code == 0
    assert "compress: already done" in caplog.text
