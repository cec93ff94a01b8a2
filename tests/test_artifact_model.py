import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from flatq.artifact import INDEX, MANIFEST, Artifact
from flatq.digests import digests_of
from flatq.errors import ArtifactError
from flatq.files import write_checksummed
from flatq.hf import artifact_model as hf
from flatq.hf.autoload import register_with_transformers
from flatq.model.decoder import DecoderConfig, GrowingCache, Rope
from flatq.model.grid import Grid
from flatq.model.weights import load_decoder
from tests.models import SWITCHES, tiny_artifact, tiny_config

FOUR_BITS = Grid(4, 32)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "quantized": {"grid": FOUR_BITS},
    "all quantized": {"grid": FOUR_BITS, "embed_grid": Grid(8, -1, symmetric=False)},
    "mixed": {"overrides": {"layers.0.down": Grid(8, 16), "layers.1.q": Grid(3, -1, symmetric=False)}},
}


def narrowed(**switches: object) -> DecoderConfig:
    return tiny_config(**{"d_v": (8, 16), "d_ff": (96, 64), **switches})  # type: ignore[arg-type]


def some_tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return tiny_artifact(tmp_path / "artifact", narrowed(), **KINDS["all quantized"])


def greedy(artifact: Artifact, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """flatq's own greedy decoding with its own cache."""
    decoder, cache = load_decoder(artifact), GrowingCache()
    new, made = tokens, []
    for _ in range(steps):
        new = decoder(new, cache=cache, past=cache.length())[:, -1:].argmax(-1)
        made.append(new)
    return torch.cat([tokens, *made], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied_head", [True, False])
def test_auto_class_loads_an_artifact_with_the_decoders_logits(tmp_path: Path, kind: str, tied_head: bool) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", narrowed(tied_head=tied_head), **KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(artifact.root)
    with torch.no_grad():
        torch.testing.assert_close(model(some_tokens()).logits, load_decoder(artifact)(some_tokens()))


@pytest.mark.parametrize(
    "switches",
    [
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        {"qk_norm": True},
        {"sliding_window": 4},
        {"experts": 4, "experts_per_token": 2},
        {"rope": Rope(scaling="llama3", factor=8.0, original_max_positions=16)},
        *({"d_v": (8, 16, 4, 8), "d_ff": (96, 64, 32, 64), **switches} for switches in SWITCHES.values()),
    ],
    ids=lambda switches: list(switches)[-1],
)
def test_every_switch_of_the_decoder_survives_the_wrapping(tmp_path: Path, switches: dict[str, Any]) -> None:
    artifact = tiny_artifact(tmp_path / "artifact", narrowed(**switches), grid=FOUR_BITS)
    model = hf.load(artifact.root)
    made = model.generate(some_tokens(), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made, greedy(artifact, some_tokens(), 6))


def test_generate_is_greedy_decoding_with_a_cache_of_its_own_value_width_per_layer(artifact: Artifact) -> None:
    model, cache = hf.load(artifact.root), DynamicCache()
    tokens = some_tokens()
    mask = torch.ones_like(tokens)
    made = model.generate(
        tokens,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(made, greedy(artifact, tokens, 8))
    assert [layer.values.shape[-1] for layer in cache.layers] == [8, 16]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_has_the_logits_of_the_row_alone(artifact: Artifact, side: str) -> None:
    model, row = hf.load(artifact.root), some_tokens(1, 5)
    padding = torch.zeros(1, 3, dtype=torch.long)
    parts = [padding, row] if side == "left" else [row, padding]
    padded = torch.cat([torch.cat(parts, 1), some_tokens(1, 8)])
    mask = torch.cat([torch.cat([torch.ones_like(p) if p is row else p for p in parts], 1), torch.ones(1, 8)]).long()
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits[0][mask[0].bool()]
        torch.testing.assert_close(logits, model(row).logits[0], atol=1e-5, rtol=1e-5)


def test_a_left_padded_batch_generates_what_each_row_generates_alone(artifact: Artifact) -> None:
    model, short, long = hf.load(artifact.root), some_tokens(1, 4), some_tokens(1, 7)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = torch.cat([torch.nn.functional.pad(short, (3, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    together = model.generate(batch, attention_mask=mask, **options)
    for row, alone in zip(together, (short, long), strict=True):
        assert torch.equal(row[7:], model.generate(alone, **options)[0, alone.shape[1] :])


def test_saved_and_loaded_again_the_model_keeps_every_stored_byte(artifact: Artifact, tmp_path: Path) -> None:
    hf.load(artifact.root, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    saved = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    for stem in artifact.grids:
        for part, there in vars_of(artifact, stem).items():
            assert saved[f"{stem}.{part}"].dtype == there.dtype
            assert torch.equal(saved[f"{stem}.{part}"], there)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), hf.FlatqForCausalLM)


def vars_of(artifact: Artifact, stem: str) -> dict[str, torch.Tensor]:
    weight = artifact.tensor(f"{stem}.weight")
    return {part: getattr(weight, part) for part in ("codes", "scale", "zero")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_decides_what_is_computed_in_and_leaves_codes_and_scales_alone(
    artifact: Artifact, dtype: torch.dtype
) -> None:
    model = hf.load(artifact.root, dtype=dtype)
    assert model.dtype == model(some_tokens()).logits.dtype == dtype
    assert model.layers[0].q.weight.dtype == dtype
    assert (model.layers[0].q.codes.dtype, model.layers[0].q.scale.dtype) == (torch.uint8, torch.float16)


def test_a_cast_there_and_back_does_not_move_a_decoded_weight(artifact: Artifact) -> None:
    linear = hf.load(artifact.root).layers[0].q
    before = linear.weight.clone()
    assert linear.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert torch.equal(linear.float().weight, before)


def test_loss_is_the_cross_entropy_of_the_next_token(artifact: Artifact) -> None:
    model, tokens = hf.load(artifact.root), some_tokens()
    output = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(("kept", "positions"), [(0, 9), (1, 1), (9, 9)])
def test_only_the_logits_asked_for_are_computed(artifact: Artifact, kept: int, positions: int) -> None:
    model = hf.load(artifact.root)
    logits = model(some_tokens(), logits_to_keep=kept).logits
    torch.testing.assert_close(logits, model(some_tokens()).logits[:, -positions:])


def change_shard(artifact: Artifact, name: str, tensor: torch.Tensor | None) -> None:
    """Replace or remove one stored tensor, as a faulty writer would: the digests fit."""
    index = json.loads((artifact.root / INDEX).read_text())
    file = index["weight_map"].get(name, "ends.safetensors")
    tensors = safetensors.torch.load_file(artifact.root / file)
    tensors.pop(name, None)
    index["weight_map"].pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
        index["weight_map"][name] = file
    safetensors.torch.save_file(tensors, artifact.root / file, metadata={"format": "pt"})
    (artifact.root / INDEX).write_text(json.dumps(index))
    files = digests_of(artifact.root, but=[MANIFEST])
    write_checksummed(artifact.root / MANIFEST, {**artifact.manifest, "files": files})


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("layers.1.q.codes", None, "layers.1.q.codes is missing"),
        ("layers.0.o.scale", None, "layers.0.o.scale is missing"),
        ("norm.weight", None, "norm.weight is missing"),
        ("layers.0.v.codes", torch.zeros(32, 64, dtype=torch.uint8), r"layers.0.v.codes has shape \(32, 64\) instead"),
        ("norm.weight", torch.ones(63), r"norm.weight has shape \(63,\) instead of \(64,\)"),
        ("layers.0.extra", torch.ones(3), "layers.0.extra is not part of the model"),
    ],
)
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(
    artifact: Artifact, name: str, tensor: torch.Tensor | None, complaint: str
) -> None:
    change_shard(artifact, name, tensor)
    with pytest.raises(ArtifactError, match=complaint):
        AutoModelForCausalLM.from_pretrained(artifact.root)


def test_a_truncated_shard_is_an_error_that_names_the_folder(artifact: Artifact) -> None:
    shard = artifact.root / "ends.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    for load in (hf.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ArtifactError, match=r"artifact: damaged files: ends\.safetensors"):
            load(artifact.root)
    with pytest.raises(ArtifactError, match=r"artifact: a file is missing or damaged"):
        hf.load(artifact.root, check=False)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no flatq artifact"):
        hf.load(tmp_path)


def test_a_run_folder_opens_by_the_artifact_inside(artifact: Artifact) -> None:
    assert isinstance(hf.load(artifact.root.parent), hf.FlatqForCausalLM)


def test_a_grid_for_a_module_that_does_not_exist_is_an_error() -> None:
    config = hf.FlatqConfig.of(narrowed(), {"layers.7.q": FOUR_BITS})
    with pytest.raises(ArtifactError, match=r"layers\.7\.q"):
        hf.FlatqForCausalLM(config)


def test_a_mask_that_forgets_the_past_is_an_error(artifact: Artifact) -> None:
    model = hf.load(artifact.root)
    cache = model(some_tokens()).past_key_values
    with pytest.raises(ValueError, match=r"expected \[batch, past \+ new\] = \(2, 10\)"):
        model(some_tokens(2, 1), attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_flatq_imported_before_transformers_is_light_and_registers_later(artifact: Artifact) -> None:
    script = f"""
import importlib.util, sys
from flatq.hf.autoload import register_with_transformers
register_with_transformers()
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert importlib.util.find_spec("transformers")  # asking for the package is not importing it
from transformers import GenerationMixin  # a way in that is half done while the model classes are imported
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(artifact.root)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "FlatqForCausalLM"


def test_registering_twice_or_after_transformers_is_harmless(artifact: Artifact) -> None:
    register_with_transformers()
    register_with_transformers()
    assert isinstance(AutoModelForCausalLM.from_pretrained(artifact.root), hf.FlatqForCausalLM)
