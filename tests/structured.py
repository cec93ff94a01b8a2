"""A small model with structure: trained for a few seconds, with channels and heads of very different strength.

Random weights treat every direction alike, so a compression that chooses at random does as well there as one that
chooses with care. Here a choice matters: the MLP channels and heads start at strengths that differ by an order of
magnitude, and training on a made-up language makes them depend on each other.

The training is seeded and runs on one thread. ``FLATQ_STRUCTURED`` names a folder that keeps the model between
processes; a script that starts many test processes sets it, so that it is trained once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import yaml
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flatq.artifact import Artifact
from flatq.calibration.tokens import Tokens, token_batches
from flatq.model.dims import LayerDims
from flatq.model.grid import QuantizedWeight
from flatq.model.weights import dense
from flatq.pipeline.run import run
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source, open_model

LAYERS, STEPS, ROWS, LENGTH = 3, 120, 16, 48
KEPT = "FLATQ_STRUCTURED"


def corpus(seed: int = 0, sentences: int = 3000) -> str:
    """A language of 96 words: each is followed by one of a few, and a sentence keeps to its own half of them."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeio"]
    fixed = random.Random(7)
    words = [fixed.choice(syllables) + fixed.choice(syllables) for _ in range(96)]
    follow = [[fixed.randrange(48) for _ in range(3)] for _ in range(96)]
    lines = []
    for _ in range(sentences):
        half, word = rng.randrange(2), rng.randrange(48)
        line = []
        for _ in range(rng.randint(4, 10)):
            line.append(words[48 * half + word])
            word = follow[48 * half + word][min(rng.randrange(6), 2)]
        lines.append(" ".join(line).capitalize() + ".")
    return " ".join(lines)


def structured_model(root: Path) -> Path:
    """``root/model`` (weights and tokenizer) and ``root/corpus.txt``, made unless ``FLATQ_STRUCTURED`` keeps them."""
    kept = os.environ.get(KEPT)
    if kept and (Path(kept) / "corpus.txt").exists():
        shutil.copytree(kept, root, dirs_exist_ok=True)
        return root
    text = corpus()
    tokenizer = _tokenizer(text)
    tokenizer.save_pretrained(root / "model")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _trained(_uneven(_fresh(len(tokenizer))), ids)
    model.save_pretrained(root / "model")
    (root / "corpus.txt").write_text(text)  # last: what is kept is whole
    if kept:
        shutil.copytree(root, kept, dirs_exist_ok=True)
    return root


def _tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    chat = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=chat)


def _fresh(vocab: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.08,
        )
    )


@torch.no_grad()
def _uneven(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Strengths of channels and value heads spread over an order of magnitude, norms with a few strong features."""
    for layer in model.model.layers:
        layer.mlp.up_proj.weight *= torch.exp(0.7 * torch.randn(128, 1))
        layer.mlp.down_proj.weight *= torch.exp(0.5 * torch.randn(1, 128))
        layer.self_attn.v_proj.weight *= torch.exp(0.6 * torch.randn(32, 1))
        layer.mlp.up_proj.weight[64:] += 0.7 * layer.mlp.up_proj.weight[:64]  # channels that know of each other
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight *= torch.exp(0.5 * torch.randn(64))
    return model


def _trained(model: LlamaForCausalLM, ids: torch.Tensor) -> LlamaForCausalLM:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chooser = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 10) * (1 - step / STEPS) + 1e-5
            starts = torch.randint(len(ids) - LENGTH, (ROWS,), generator=chooser)
            rows = ids[starts[:, None] + torch.arange(LENGTH)]
            loss = model(rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval()


@dataclass(frozen=True)
class Made:
    """What a run left."""

    root: Path
    report: dict[str, Any]
    artifact: Artifact

    @property
    def perplexity(self) -> float:
        return float(self.report["result"]["perplexity"])

    @property
    def dims(self) -> tuple[LayerDims, ...]:
        return self.artifact.config.layers

    def weight(self, name: str) -> Tensor:
        """One tensor as it runs, codes decoded."""
        return dense(self.artifact.tensor(f"{name}.weight"))

    def codes(self, name: str) -> QuantizedWeight:
        found = self.artifact.tensor(f"{name}.weight")
        assert isinstance(found, QuantizedWeight)
        return found

    def errors(self, layer: int) -> dict[str, float]:
        """Relative errors of one layer's linears, as reported."""
        return dict(self.report["layers"][layer]["errors"])


class Runs:
    """Runs of recipes on the structured model, each recipe once; reports without figures, files without fsync."""

    def __init__(self, given: Path, out: Path) -> None:
        self.model, self.text, self.out = given / "model", given / "corpus.txt", out
        self._made: dict[str, Made] = {}
        self._number = count()  # also of runs that end with an error, and leave their folder

    def recipe(self, **changed: Any) -> str:
        """The usual recipe with some blocks changed; those of ``calibration`` and ``evaluation`` key by key."""
        usual: dict[str, Any] = {
            "version": 1,
            "model": str(self.model),
            "calibration": {
                "dataset": "text",
                "path": str(self.text),
                "samples": 24,
                "seq_len": 64,
                "precision": "float32",
            },
            "evaluation": {"dataset": "held-out", "tokens": 2048, "seq_len": 64},
        }
        for block, value in changed.items():
            usual[block] = {**usual[block], **value} if block in ("calibration", "evaluation") else value
            if isinstance(usual[block], dict):
                usual[block] = {key: each for key, each in usual[block].items() if each is not None}
        return yaml.safe_dump(usual, sort_keys=False)

    def source(self) -> Source:
        """The dense model."""
        return open_model(str(self.model))

    def tokens(self) -> Tokens:
        """The texts of the usual recipe."""
        usual = Recipe.parse(self.recipe(stages=[{"gptq": {}}]))
        return token_batches(usual.calibration, usual.evaluation, self.source().tokenizer())

    def __call__(self, **changed: Any) -> Made:
        text = self.recipe(**changed)
        if text not in self._made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("flatq.report.render.render", lambda *_, **__: "")
                patch.setattr(os, "fsync", lambda _: None)
                root = run(Recipe.parse(text), self.out / f"run-{next(self._number)}", device="cpu")
            assert root is not None
            report = json.loads((root / "report.json").read_text())
            self._made[text] = Made(root, report, Artifact.open(root))
        return self._made[text]
