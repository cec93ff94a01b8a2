"""Perplexity half a layer at a time is the perplexity of the whole model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from flatq.calibration import perplexity as evaluate
from flatq.calibration.perplexity import final_hidden, perplexity
from flatq.errors import NumericsError, RecipeError
from flatq.model.grid import Grid
from flatq.model.weights import Weights, load_decoder
from tests.models import RandomWeights, tiny_artifact, tiny_config


def tokens(rows: int = 5, length: int = 20, vocab: int = 128) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(7))


def naive(weights: Weights, text: torch.Tensor) -> float:
    logits = load_decoder(weights)(text)[:, :-1].double()
    return math.exp(F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item())


@pytest.mark.parametrize("batch", [1, 2, 5, 99])
def test_it_equals_the_whole_decoder_for_any_batch(batch: int) -> None:
    weights = RandomWeights(tiny_config(d_v=(16, 5), d_ff=(96, 31)))
    found = perplexity(weights, tokens(), batch=batch)
    assert found.value == pytest.approx(naive(weights, tokens()), rel=1e-5)
    assert found.tokens == 5 * 19
    assert found.value == pytest.approx(math.exp(found.nll_sum / found.tokens))


@pytest.mark.parametrize(
    "switches",
    [{"tied_head": False}, {"qkv_bias": True}, {"qk_norm": True}, {"sliding_window": 6}, {"kv_heads": 4}],
    ids=lambda switches: next(iter(switches)),
)
def test_it_equals_the_whole_decoder_for_every_switch(switches: dict[str, object]) -> None:
    weights = RandomWeights(tiny_config(**switches))  # type: ignore[arg-type]
    assert perplexity(weights, tokens(), batch=2).value == pytest.approx(naive(weights, tokens()), rel=1e-5)


def test_it_reads_quantized_weights(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", tiny_config(), grid=Grid(4, 32), embed_grid=Grid(8, 32))
    found = perplexity(artifact, tokens())
    assert found.value == pytest.approx(naive(artifact, tokens()), rel=1e-5)
    assert found.value != pytest.approx(perplexity(RandomWeights(artifact.config), tokens()).value, rel=1e-3)


@pytest.mark.parametrize("at_once", [1, 128 * 3, 1 << 24])
def test_the_logits_chunk_does_not_matter(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = RandomWeights(tiny_config())
    whole = perplexity(weights, tokens())
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", at_once)
    assert perplexity(weights, tokens()).value == pytest.approx(whole.value, rel=1e-6)


def test_it_equals_the_loss_of_transformers() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ours = RandomWeights(tiny_config(tied_head=False))
    theirs = model.state_dict()
    places = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    places |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    places |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    for name in ours.names():
        ends = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        ends["head.weight"] = "lm_head.weight"
        if name not in ends:
            _, index, part, _ = name.split(".")
            ends[name] = f"model.layers.{index}.{places[part]}.weight"
        ours.tensors[name] = theirs[ends[name]]
    with torch.inference_mode():
        loss = model(tokens(), labels=tokens()).loss.item()
    assert math.log(perplexity(ours, tokens()).value) == pytest.approx(loss, rel=1e-5)


def test_each_half_layer_is_announced() -> None:
    calls: list[None] = []
    perplexity(RandomWeights(tiny_config()), tokens(), on_half=lambda: calls.append(None))
    assert len(calls) == 4


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (3, 1), (8,)])
def test_nothing_to_predict_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match="at least one row of two positions"):
        perplexity(RandomWeights(tiny_config()), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("token", [-1, 128])
def test_a_token_outside_the_vocabulary_is_an_error(token: int) -> None:
    with pytest.raises(RecipeError, match="the model's vocabulary is 0 to 127"):
        final_hidden(RandomWeights(tiny_config()), torch.tensor([[0, token]]))


def test_damaged_weights_are_no_perplexity() -> None:
    weights = RandomWeights(tiny_config())
    weights.tensors["layers.1.down.weight"][3, 5] = math.nan
    with pytest.raises(NumericsError, match="is nan"):
        perplexity(weights, tokens())
