"""Checkpoints as people have them: prefixes, one matrix under its other name, several types, files that contradict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flatq.artifact import Artifact
from flatq.errors import ArtifactError, UnsupportedModel
from flatq.sources.source import open_model
from tests.conftest import GPTQ, MakeRecipe, flatq
from tests.models import RandomWeights, tiny_config
from tests.test_source import family_config, same, write_folder

INDEX = "model.safetensors.index.json"


def renamed(root: Path, change: dict[str, str]) -> None:
    """Rewrite the weights, prefixes replaced, the first that fits."""
    file = root / "model.safetensors"
    found = {}
    for name, tensor in load_file(file).items():
        old = next((old for old in change if name.startswith(old)), "")
        found[change.get(old, "") + name.removeprefix(old)] = tensor
    save_file(found, file)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"model.": ""},
        {"": "_orig_mod."},
        {"": "base_model.model."},
        {"": "language_model."},
        {"model.": "model.language_model."},
        {"model.": "language_model.", "lm_head": "lm_head"},
    ],
    ids=lambda change: " ".join(change.values()) or "none",
)
def test_a_decoder_is_found_behind_any_prefix(tmp_path: Path, change: dict[str, str], tied: bool) -> None:
    weights = RandomWeights(family_config("llama", tied_head=tied))
    renamed(write_folder(tmp_path, weights), change)
    assert same(open_model(str(tmp_path)), weights)


def test_a_tensor_beside_the_decoder_is_still_refused(tmp_path: Path) -> None:
    renamed(write_folder(tmp_path, RandomWeights(tiny_config())), {"model.": "model.language_model."})
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.vision_tower.patch.weight": torch.zeros(2)}, file)
    with pytest.raises(UnsupportedModel, match=r"model\.vision_tower\.patch\.weight"):
        open_model(str(tmp_path)).validate()


def test_a_tied_model_may_be_saved_with_its_head_alone(tmp_path: Path) -> None:
    weights = RandomWeights(family_config("llama", tied_head=True))
    renamed(write_folder(tmp_path, weights), {"model.embed_tokens": "lm_head"})
    assert same(open_model(str(tmp_path)), weights)


def test_a_model_that_is_not_tied_needs_both(tmp_path: Path) -> None:
    renamed(write_folder(tmp_path, RandomWeights(tiny_config(tied_head=False))), {"model.embed_tokens": "extra"})
    with pytest.raises(ArtifactError, match=r"embed\.weight is missing"):
        open_model(str(tmp_path)).validate()


def test_two_sets_of_weights_are_refused_by_name(tmp_path: Path) -> None:
    root = write_folder(tmp_path, RandomWeights(tiny_config()))
    tensors = load_file(root / "model.safetensors")
    save_file(tensors, root / "model-00001-of-00001.safetensors")
    (root / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    with pytest.raises(ArtifactError, match=r"model\.safetensors and .*index\.json, .* remove the one"):
        open_model(str(root))
    (root / "model.safetensors").unlink()
    open_model(str(root)).validate()


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path, RandomWeights(tiny_config()))
    (root / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="merge it first"):
        open_model(str(root))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_every_tensor_keeps_its_type(
    model_copy: Path, make_recipe: MakeRecipe, tmp_path: Path, narrow: torch.dtype
) -> None:
    file = model_copy / "model.safetensors"
    before = {name: tensor if tensor.dim() == 1 else tensor.to(narrow) for name, tensor in load_file(file).items()}
    before = {name: tensor + 1e-5 if tensor.dim() == 1 else tensor for name, tensor in before.items()}
    save_file(before, file)
    out = tmp_path / "out"
    recipe = make_recipe(model=str(model_copy), stages=[GPTQ], exports=[{"safetensors": {}}])
    shown = flatq("run", recipe, "--out", out)
    assert shown.exit_code == 0, shown.stderr
    artifact = Artifact.open(out)
    norms = {f"layers.{n}.{k}_norm.weight": f"model.layers.{n}.{v}.weight" for n in range(3) for k, v in NORMS.items()}
    for name, theirs in (norms | {"norm.weight": "model.norm.weight"}).items():
        assert torch.equal(artifact.tensor(name), before[theirs]), name
    exported = load_file(out / "exports" / "safetensors" / "model.safetensors")
    for theirs in (*norms.values(), "model.norm.weight"):
        assert torch.equal(exported[theirs], before[theirs]), theirs


NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
