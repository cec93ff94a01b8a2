"""Damaged, foreign and missing models: one paragraph that names the place, and the right exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flatq.errors import ArtifactError, FlatqError, NumericsError, RecipeError, UnsupportedModel
from flatq.sources.source import open_model
from tests.models import RandomWeights, tiny_config
from tests.test_source import family_config, write_folder, write_gguf

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path, RandomWeights(tiny_config()))


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Rewrite the weights with some tensors replaced, added or (None) left out."""
    file = folder / "model.safetensors"
    changed: dict[str, Any] = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file)


def use(path: str, read: bool) -> None:
    """Open and validate; read every tensor if asked to."""
    source = open_model(path)
    source.validate()
    for name in source.names() if read else []:
        source.tensor(name)


def fault(path: Path | str, error: type[FlatqError], *, exit_code: int, read: bool = False) -> str:
    """What opening and validating the model says."""
    with pytest.raises(error) as raised:
        use(str(path), read)
    assert type(raised.value) is error
    assert raised.value.exit_code == exit_code
    return str(raised.value)


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "./nowhere", "nowhere", "some/model.gguf", "package:no-such-dist/m.gguf"]
)
def test_a_model_that_is_not_there(path: str) -> None:
    assert path.split(":")[-1].split("/m.gguf")[0] in fault(path, RecipeError, exit_code=2)


def test_a_package_that_is_not_installed_says_how_to_install_it() -> None:
    assert "pip install no-such-dist" in fault("package:no-such-dist/m.gguf", RecipeError, exit_code=2)


def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    message = fault("owner/model", RecipeError, exit_code=2)
    assert "Name or service not known" in message
    assert "local folder" in message


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    assert "no config.json" in fault(tmp_path, RecipeError, exit_code=2)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "neither a folder nor a .gguf" in fault(tmp_path / "model.bin", RecipeError, exit_code=2)


def test_an_unknown_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mistrall"}))
    message = fault(folder, UnsupportedModel, exit_code=2)
    assert "'mistrall'" in message
    assert "supported: llama, mistral" in message


def test_a_model_that_flatq_has_compressed_already(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "flatq"}')
    assert "already compressed" in fault(folder, UnsupportedModel, exit_code=2)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_damaged_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "config.json" in fault(folder, ArtifactError, exit_code=3)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ids", ["</s>", 1.5, True, [1, "2"], {"id": 1}])
def test_a_token_id_that_is_no_number(folder: Path, file: str, ids: object) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "eos_token_id": ids}))
    message = fault(folder, ArtifactError, exit_code=3)
    assert f"eos_token_id is {ids!r} in generation_config.json or config.json" in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_found_before_any_weight_is_read(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = fault(folder, ArtifactError, exit_code=3)
    assert "model.safetensors: truncated or damaged" in message


def test_weights_that_git_lfs_has_not_fetched(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")
    assert "model.safetensors: a Git LFS pointer" in fault(folder, ArtifactError, exit_code=3)


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 2000, -64])
def test_a_truncated_gguf_file(tmp_path: Path, keep: int) -> None:
    file = write_gguf(tmp_path / "m.gguf", RandomWeights(family_config("llama")))
    file.write_bytes(file.read_bytes()[:keep])
    assert "m.gguf: truncated or damaged" in fault(file, ArtifactError, exit_code=3)


def test_a_missing_tensor(folder: Path) -> None:
    change(folder, **{UP: None})
    assert "tensor layers.1.up.weight is missing" in fault(folder, ArtifactError, exit_code=3)


def test_a_misshapen_tensor(folder: Path) -> None:
    change(folder, **{UP: torch.zeros(95, 64)})
    message = fault(folder, ArtifactError, exit_code=3)
    assert "layers.1.up.weight has shape [95, 64]" in message
    assert "(96, 64)" in message


def test_all_problems_are_told_at_once(folder: Path) -> None:
    change(folder, **{UP: torch.zeros(1, 64), "model.norm.weight": None})
    message = fault(folder, ArtifactError, exit_code=3)
    assert "layers.1.up.weight" in message
    assert "norm.weight is missing" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number(folder: Path, value: float) -> None:
    tensor = torch.zeros(96, 64)
    tensor[3, 4] = value
    change(folder, **{UP: tensor})
    message = fault(folder, NumericsError, exit_code=3, read=True)
    assert "model.safetensors: tensor layers.1.up.weight holds 1 values" in message


def test_a_weight_too_large_for_the_dtype_asked_for(folder: Path) -> None:
    change(folder, **{UP: torch.full((96, 64), 1e5)})
    with pytest.raises(NumericsError, match=r"as torch\.float16"):
        open_model(str(folder), dtype="float16").tensor("layers.1.up.weight")


def test_a_tensor_without_a_place(folder: Path) -> None:
    change(folder, **{"model.layers.0.self_attn.sinks": torch.zeros(4)})
    assert "self_attn.sinks is not part of a llama decoder" in fault(folder, UnsupportedModel, exit_code=2)


def test_a_bias_that_the_config_denies(folder: Path) -> None:
    change(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    assert "layers.0.q.bias is not part of" in fault(folder, UnsupportedModel, exit_code=2)


def test_rotary_tables_of_old_checkpoints_do_no_harm(folder: Path) -> None:
    change(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    open_model(str(folder)).validate()


def test_weights_that_are_no_floats(folder: Path) -> None:
    change(folder, **{UP: torch.zeros(96, 64, dtype=torch.int8)})
    assert "I8; supported: F32, F16, BF16" in fault(folder, UnsupportedModel, exit_code=2)


def test_a_head_that_is_said_to_be_tied_but_differs(folder: Path) -> None:
    change(folder, **{"lm_head.weight": torch.zeros(128, 64)})
    assert "lm_head.weight differs" in fault(folder, UnsupportedModel, exit_code=2)


def test_a_missing_tokenizer(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"add tokenizer\.json"):
        open_model(str(folder)).tokenizer()


def test_a_gguf_file_without_a_tokenizer(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", RandomWeights(family_config("llama")))
    with pytest.raises(RecipeError, match="holds no tokenizer"):
        open_model(str(file)).tokenizer()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_folder_with_only_pickles(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    message = fault(folder, UnsupportedModel, exit_code=2)
    assert name in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "..", "w.bin"]
)
def test_an_index_that_points_out_of_the_folder(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").unlink()  # beside an index it would be a second set of weights
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: shard}}))
    assert "not a plain .safetensors file name" in fault(folder, ArtifactError, exit_code=3)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {UP: 3}}])
def test_a_damaged_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no weight_map" in fault(folder, ArtifactError, exit_code=3)


def test_a_shard_that_the_index_names_but_is_not_there(folder: Path) -> None:
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model-2.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model-2.safetensors: missing, though" in fault(folder, ArtifactError, exit_code=3)


def test_a_gguf_file_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = fault(tmp_path / "m.gguf", UnsupportedModel, exit_code=2)
    assert "'bert'" in message
    assert "llama, qwen2, qwen3" in message
