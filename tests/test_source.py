"""Opening a model: the same weights come out of a folder, a GGUF file and a package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackagePath
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from flatq.errors import ArtifactError, RecipeError, UnsupportedModel
from flatq.model.decoder import DecoderConfig, Rope
from flatq.model.families import FAMILIES
from flatq.model.weights import load_decoder, tensor_shapes
from flatq.sources.gguf_file import halves_from_pairs, pairs_from_halves
from flatq.sources.source import Source, open_model
from tests.models import RandomWeights, tiny_config

LLAMA3 = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)


def family_config(family: str, **more: Any) -> DecoderConfig:
    switches: dict[str, Any] = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(family, {})
    return replace(tiny_config(**{**switches, **more}), family=family)


def write_folder(root: Path, weights: RandomWeights, **more: Any) -> Path:
    """A Hugging Face folder as a publisher would upload it."""
    config, dims = weights.config, weights.config.layers[0]
    root.mkdir(exist_ok=True)
    described = {
        "model_type": config.family,
        "hidden_size": config.d_model,
        "intermediate_size": dims.d_ff,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.d_qk,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "torch_dtype": "bfloat16",
    }
    (root / "config.json").write_text(json.dumps(described | more))
    names = FAMILIES[config.family].names
    save_file({names.to_hf(name): tensor for name, tensor in weights.tensors.items()}, root / "model.safetensors")
    return root


def write_gguf(
    file: Path, weights: RandomWeights, *, kind: str = "F32", extra: Mapping[str, Tensor] | None = None, **keys: Any
) -> Path:
    """A GGUF file as llama.cpp's converter writes it."""
    config, dims = weights.config, weights.config.layers[0]
    family = FAMILIES[config.family]
    writer = gguf.GGUFWriter(file, family.gguf)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(dims.d_ff)
    writer.add_block_count(len(config.layers))
    writer.add_head_count(dims.heads)
    writer.add_head_count_kv(dims.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_context_length(config.max_positions)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(dims.d_qk)
    if dims.heads * dims.d_qk != config.d_model:
        writer.add_key_length(dims.d_qk)
    writer.add_license("mit")
    writer.add_bos_token_id(1)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, tensor in weights.tensors.items():
        linear = name.split(".")[-2]
        if family.gguf_permuted and linear in ("q", "k"):
            tensor = pairs_from_halves(tensor, dims.heads if linear == "q" else dims.kv_heads)
        values = tensor.contiguous().numpy()
        if tensor.dim() == 2 and kind != "F32":
            writer.add_tensor(family.names.to_gguf(name), gguf.quants.quantize(values, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(family.names.to_gguf(name), values)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def same(source: Source, weights: RandomWeights) -> bool:
    source.validate()
    assert source.names() == weights.names()
    return all(torch.equal(source.tensor(name), weights.tensor(name)) for name in weights.names())


@pytest.mark.parametrize("family", ["llama", "mistral", "ministral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_gives_back_its_weights(tmp_path: Path, family: str, tied: bool) -> None:
    weights = RandomWeights(family_config(family, tied_head=tied))
    source = open_model(str(write_folder(tmp_path, weights)))
    assert same(source, weights)
    assert replace(source.config, norm_eps=1e-5) == weights.config


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_gives_back_its_weights(tmp_path: Path, family: str, tied: bool) -> None:
    weights = RandomWeights(family_config(family, tied_head=tied))
    source = open_model(str(write_gguf(tmp_path / "m.gguf", weights)))
    assert same(source, weights)
    assert source.config == weights.config
    assert (source.license, source.settings(), source.dtype) == ("mit", {"bos_token_id": 1}, torch.float32)


def test_gguf_biases_of_q_and_k_are_reordered_too(tmp_path: Path) -> None:
    weights = RandomWeights(family_config("llama", qkv_bias=True, o_bias=True, mlp_bias=True))
    assert same(open_model(str(write_gguf(tmp_path / "m.gguf", weights))), weights)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32)])
def test_gguf_blocks_are_decoded_to_what_they_mean(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    weights = RandomWeights(family_config("qwen2"))
    source = open_model(str(write_gguf(tmp_path / "m.gguf", weights, kind=kind)))
    stored = weights.tensor("layers.1.up.weight").numpy()
    quantized = gguf.GGMLQuantizationType[kind]
    meant = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(stored, quantized), quantized))
    assert source.dtype == dtype
    assert torch.equal(source.tensor("layers.1.up.weight").float(), meant)


def test_gguf_divisors_of_llama3_become_the_rule(tmp_path: Path) -> None:
    weights = RandomWeights(family_config("llama", rope=replace(LLAMA3), d_qk=32, d_v=(32, 32)))
    divisors = Rope(5e5).inverse_frequencies(32) / LLAMA3.inverse_frequencies(32)
    source = open_model(str(write_gguf(tmp_path / "m.gguf", weights, extra={"rope_freqs.weight": divisors})))
    source.validate()
    assert source.config.rope.scaling == "llama3"
    torch.testing.assert_close(source.config.rope.inverse_frequencies(32), LLAMA3.inverse_frequencies(32))


def test_gguf_divisors_of_no_known_rule_are_kept(tmp_path: Path) -> None:
    config = family_config("llama")
    divisors, plain = torch.arange(1.0, 9.0), config.rope.inverse_frequencies(16)
    file = write_gguf(tmp_path / "m.gguf", RandomWeights(config), extra={"rope_freqs.weight": divisors})
    torch.testing.assert_close(open_model(str(file)).config.rope.inverse_frequencies(16), plain / divisors)


@pytest.mark.parametrize("divisors", [torch.ones(4), torch.zeros(8)], ids=["shape", "zero"])
def test_gguf_divisors_that_fit_no_head_are_refused(divisors: Tensor, tmp_path: Path) -> None:
    weights = RandomWeights(family_config("llama"))
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        open_model(str(write_gguf(tmp_path / "m.gguf", weights, extra={"rope_freqs.weight": divisors})))


def test_gguf_linear_scaling_is_read(tmp_path: Path) -> None:
    weights = RandomWeights(family_config("llama"))
    keys = {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": 4.0}
    rope = open_model(str(write_gguf(tmp_path / "m.gguf", weights, **keys))).config.rope
    assert (rope.scaling, rope.factor) == ("linear", 4.0)


@pytest.mark.parametrize("alpha", [None, 1000.0])
def test_gguf_alpha_of_hunyuan_raises_the_base(tmp_path: Path, alpha: float | None) -> None:
    switches = {"qk_norm": True, "norm_after_rope": True}
    weights = RandomWeights(replace(tiny_config(**switches), family="hunyuan_v1_dense"))
    keys = {} if alpha is None else {"rope_scaling_alpha": alpha}
    with pytest.MonkeyPatch.context() as patch:  # this version of gguf has the key, but no method for it
        write = lambda self, value: self.add_float32("hunyuan-dense.rope.scaling.alpha", value)  # noqa: E731
        patch.setattr(gguf.GGUFWriter, "add_rope_scaling_alpha", write, raising=False)
        source = open_model(str(write_gguf(tmp_path / "m.gguf", weights, **keys)))
    assert same(source, weights)
    assert source.config.rope.theta == pytest.approx(1e4 * (alpha or 1) ** (16 / 14))
    assert source.config.rope.scaling is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling_type": gguf.RopeScalingType.YARN, "rope_scaling_factor": 4.0}, "is 'yarn'"),
        ({"value_length": 8}, "value_length is 8"),
        ({"expert_count": 4}, "mixtures of experts"),
        ({"sliding_window": 32}, "sliding_window 32"),
        ({"rope_dimension_count": 8}, "rope.dimension_count is 8"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicated key name")
def test_gguf_metadata_that_cannot_be_expressed_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    if "rope_dimension_count" in keys:
        weights = RandomWeights(family_config("llama"))
        file = write_gguf(tmp_path / "m.gguf", weights, key_length=16)
        reader = gguf.GGUFReader(file, "r+")
        reader.fields["llama.rope.dimension_count"].parts[-1][0] = keys["rope_dimension_count"]
        reader.data.flush()
    else:
        file = write_gguf(tmp_path / "m.gguf", RandomWeights(family_config("llama")), **keys)
    with pytest.raises(UnsupportedModel, match=message):
        open_model(str(file))


@given(heads=st.integers(1, 5), pairs=st.integers(1, 8), columns=st.integers(1, 4))
def test_rotary_row_orders_are_inverse(heads: int, pairs: int, columns: int) -> None:
    rows = torch.arange(heads * pairs * 2 * columns).view(-1, columns)
    assert torch.equal(halves_from_pairs(pairs_from_halves(rows, heads), heads), rows)
    assert pairs_from_halves(rows, heads)[:2, 0].tolist() == [0, pairs * columns]


def test_a_dtype_can_be_asked_for(tmp_path: Path) -> None:
    source = open_model(str(write_folder(tmp_path, RandomWeights(tiny_config()))), dtype="bfloat16")
    assert source.dtype == source.tensor("norm.weight").dtype == torch.bfloat16


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"dtype: 'int8'.*bfloat16"):
        open_model("anywhere", dtype="int8")


def test_a_lone_config_is_enough_for_a_plan(tmp_path: Path) -> None:
    write_folder(tmp_path, RandomWeights(tiny_config()))
    (tmp_path / "model.safetensors").unlink()
    source = open_model(str(tmp_path), need_weights=False)
    assert not source.has_weights
    assert source.dtype == torch.bfloat16
    assert source.config.parameters() == tiny_config().parameters()
    with pytest.raises(RecipeError, match="holds no weights"):
        open_model(str(tmp_path))


def test_digests_and_settings_describe_the_files(tmp_path: Path) -> None:
    source = open_model(str(write_folder(tmp_path, RandomWeights(tiny_config()))))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9, "pad_token_id": 7}')
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert source.digests()["model.safetensors"] == digest
    assert set(source.digests()) == {"config.json", "model.safetensors"}
    assert source.settings() == {"bos_token_id": 1, "eos_token_id": 9, "pad_token_id": 7}
    assert source.origin == str(tmp_path)


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model", "apache-2.0"),
        ("---\ntags: []\n---\n", None),
        ("# Model", None),
        ("---\n: [\n---\n", None),
        (None, None),
    ],
)
def test_the_license_stands_on_the_model_card(tmp_path: Path, card: str | None, license: str | None) -> None:
    write_folder(tmp_path, RandomWeights(tiny_config()))
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert open_model(str(tmp_path)).license == license


def test_a_tied_head_may_be_stored_again(tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config())
    weights.tensors["head.weight"] = weights.tensors["embed.weight"].clone()
    weights.tensors["layers.0.q.weight"] = weights.tensors["layers.0.q.weight"].clone()
    source = open_model(str(write_folder(tmp_path, weights)))
    source.validate()
    assert load_decoder(source).head is None


def test_the_tokenizer_comes_from_the_folder_and_is_made_once(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    write_folder(tmp_path, RandomWeights(tiny_config()))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    source = open_model(str(tmp_path))
    assert source.tokenizer()("world hello")["input_ids"] == [2, 1]
    assert source.tokenizer() is source.tokenizer()


class FakeDistribution:
    def __init__(self, root: Path, *names: str, requires: Sequence[str] = ()) -> None:
        self.files, self.requires = [PackagePath(f"pkg/{name}") for name in names or ("m.gguf",)], list(requires)
        for file in self.files:
            file.dist = SimpleNamespace(locate_file=lambda path: root / path.name)  # type: ignore[assignment]


@pytest.mark.parametrize("spelling", ["m.gguf", "pkg/m.gguf"])
def test_a_package_may_ship_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    weights = RandomWeights(family_config("llama"))
    write_gguf(tmp_path / "m.gguf", weights)
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: FakeDistribution(tmp_path))
    source = open_model(f"package:some-dist/{spelling}")
    assert same(source, weights)
    assert source.origin == f"package:some-dist/{spelling}"


def test_a_file_that_the_package_lacks_is_named_with_those_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: FakeDistribution(tmp_path))
    with pytest.raises(RecipeError, match=r"'other.gguf'.*pkg/m.gguf"):
        open_model("package:some-dist/other.gguf")


def parts_of_a_model(root: Path, monkeypatch: pytest.MonkeyPatch, *, first: int, parts: int = 3) -> RandomWeights:
    """A model's file in parts, one in each of the packages that a package without files requires."""
    weights = RandomWeights(family_config("llama"))
    whole = write_gguf(root / "whole.gguf", weights).read_bytes()
    size = len(whole) // parts + 1
    packages = {"some-dist": FakeDistribution(root, "readme", requires=["p2", "p0", 'extra; extra == "x"', "p1"])}
    for number in range(parts):
        name = f"m.gguf.part{first + number:02d}"
        (root / name).write_bytes(whole[number * size : (number + 1) * size])
        packages[f"p{number}"] = FakeDistribution(root, name)
    monkeypatch.setattr("importlib.metadata.distribution", packages.__getitem__)
    monkeypatch.setenv("FLATQ_CACHE", str(root / "cache"))
    return weights


@pytest.mark.parametrize("first", [0, 1])
def test_a_model_in_parts_is_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    weights = parts_of_a_model(tmp_path, monkeypatch, first=first)
    source = open_model("package:some-dist/m.gguf")
    assert same(source, weights)
    assert source.origin == "package:some-dist/m.gguf"
    made = source.files[0].stat().st_mtime_ns
    assert open_model("package:some-dist/m.gguf").files[0].stat().st_mtime_ns == made
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 1


def test_a_model_that_lacks_a_part_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts_of_a_model(tmp_path, monkeypatch, first=2)
    with pytest.raises(RecipeError, match=r"has parts \[2, 3, 4\] of 'm.gguf', some are missing"):
        open_model("package:some-dist/m.gguf")


def test_a_hub_id_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    commit = write_folder(tmp_path / "abc123", RandomWeights(tiny_config()))

    def snapshot(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert open_model("owner/model", revision="main").origin == "owner/model@abc123"
    assert (asked["name"], asked["revision"]) == ("owner/model", "main")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])
    open_model("owner/model", need_weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="only for hub ids"):
        open_model(str(tmp_path), revision="main")


def test_an_index_decides_where_a_tensor_is_read(tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config())
    write_folder(tmp_path, weights)
    names = FAMILIES["llama"].names
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "two.safetensors")
    weight_map = {names.to_hf(name): "one.safetensors" for name in tensor_shapes(weights.config)}
    weight_map["model.norm.weight"] = "two.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_model(str(tmp_path))
    source.validate()
    assert not source.tensor("norm.weight").any()
    assert np.array_equal(source.tensor("layers.0.q.weight"), weights.tensor("layers.0.q.weight"))


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, RandomWeights(tiny_config()))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ArtifactError, match="download the index"):
        open_model(str(tmp_path))
