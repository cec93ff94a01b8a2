"""A tiny pretrained model on disk, a text to calibrate on, and recipes and finished runs made of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from flatq.cli import app
from tests.structured import Runs, structured_model

# The same examples on every machine, so that a change is judged by what it changed;
# `HYPOTHESIS_PROFILE=search make test` draws new ones. Time is never what is tested.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

LAYERS = 3
FLAT = {"flat": {"keep_ratio": 0.8, "rank_multiple": 4, "width_multiple": 16}}
GPTQ = {"gptq": {"bits": 4, "group_size": 16, "embedding": {"bits": 8, "group_size": 32}}}
ONNX = [
    {"onnx": {"name": "reduced", "attention": "reduced", "precision": "int4"}},
    {"onnx": {"name": "gqa", "attention": "gqa", "precision": "int4"}},
    {"onnx": {"name": "fp32", "attention": "reduced", "precision": "fp32"}},
]
MakeRecipe = Callable[..., Path]


def flatq(*arguments: str | Path) -> Result:
    """What the command line answers."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by path."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests verified is not remembered in the user's cache, nor left behind by tests that are killed."""
    os.environ["FLATQ_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The command line sets levels and handlers; the next test must not inherit them."""
    root, ours = logging.getLogger(), logging.getLogger("flatq")
    handlers, level, our_level = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(our_level)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up English, about 6,000 tokens."""
    return write_text(tmp_path_factory.mktemp("text") / "corpus.txt")


def write_text(file: Path) -> Path:
    """The text of ``text_file``."""
    rng = random.Random(0)
    words = ["stone", "river", "walks", "over", "the", "a", "bright", "slow", "under", "bird", "sings", "of", "light"]
    sentences = (" ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + "." for _ in range(700))
    file.write_text(" ".join(sentences))
    return file


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A random Llama of transformers with grouped queries, saved with a tokenizer; never written to by tests."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny", text_file)


def write_model(root: Path, text_file: Path, layers: int = LAYERS) -> Path:
    """The model of ``tiny_model``, with a tokenizer trained on a text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(root)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text_file)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of recipes on a small model with structure, each made once."""
    given = structured_model(tmp_path_factory.mktemp("structured"))
    return Runs(given, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def make_recipe(tiny_model: Path, text_file: Path, tmp_path: Path) -> MakeRecipe:
    """Write a recipe: the usual one with some keys replaced (None removes a key)."""

    def make(name: str = "tiny", **changed: Any) -> Path:
        recipe = usual_recipe(tiny_model, text_file) | changed
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
        return file

    return make


def usual_recipe(model: Path, text: Path) -> dict[str, Any]:
    """Both stages, no exports, a few hundred tokens."""
    return {
        "version": 1,
        "model": str(model),
        "calibration": {
            "dataset": "text",
            "path": str(text),
            "samples": 8,
            "seq_len": 64,
            "precision": "float32",
        },
        "evaluation": {"tokens": 256, "seq_len": 64},
        "stages": [FLAT, GPTQ],
    }


@pytest.fixture(scope="session")
def exported_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> tuple[Path, Path]:
    """The recipe with three ONNX exports, and the folder of its finished run; never written to by tests."""
    root = tmp_path_factory.mktemp("run")
    recipe = usual_recipe(tiny_model, text_file) | {"exports": ONNX}
    (root / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    shown = flatq("run", root / "tiny.yaml", "--out", root / "out")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.strip() == str(root / "out")
    return root / "tiny.yaml", root / "out"


def manifest_of(run: Path) -> Mapping[str, Any]:
    """The manifest of a finished run."""
    found: Mapping[str, Any] = json.loads((run / "artifact" / "manifest.json").read_text())
    return found
