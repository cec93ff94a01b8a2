"""Divergence from the dense model: laws that hold exactly, and agreement with a direct computation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from flatq.calibration import divergence as module
from flatq.calibration.divergence import DenseStates, Divergence, dense_perplexity, divergence, position_measures
from flatq.calibration.perplexity import final_hidden, perplexity
from flatq.errors import NumericsError, RecipeError
from flatq.model.weights import load_decoder
from tests.models import RandomWeights, tiny_config


def tokens(rows: int = 5, length: int = 20) -> torch.Tensor:
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(3))


def damaged(by: float) -> RandomWeights:
    model = RandomWeights(tiny_config())
    weight = model.tensors["layers.1.down.weight"]
    model.tensors["layers.1.down.weight"] = weight + by * torch.randn(
        weight.shape, generator=torch.Generator().manual_seed(1)
    )
    return model


@pytest.fixture
def dense(tmp_path: Path) -> DenseStates:
    return DenseStates(RandomWeights(tiny_config()), tmp_path / "states")


def test_a_model_against_itself_is_no_divergence(dense: DenseStates) -> None:
    found = divergence(dense, dense.weights, tokens())
    assert (found.kl, found.top1, found.damage) == (0.0, 1.0, 0.0)
    assert (found.kl_stderr, found.top1_stderr, found.damage_stderr) == (0.0, 0.0, 0.0)
    assert found.perplexity == found.baseline_perplexity
    assert found.perplexity == pytest.approx(perplexity(dense.weights, tokens()).value, rel=1e-6)
    assert (found.rows, found.tokens) == (5, 95)


def test_it_equals_a_direct_computation(dense: DenseStates) -> None:
    other, text = damaged(0.2), tokens()
    found = divergence(dense, other, text)
    with torch.inference_mode():
        p, q = (F.log_softmax(load_decoder(model)(text).double(), -1)[:, :-1] for model in (dense.weights, other))
    nll = [-x.gather(-1, text[:, 1:, None])[..., 0].mean(1) for x in (p, q)]
    each = (p.exp() * (p - q)).sum(-1)
    kl, along = each.mean(1), [part.mean().item() for part in each.mean(0).tensor_split(16)]
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    rows = math.sqrt(len(text))
    assert found.baseline_perplexity == pytest.approx(nll[0].mean().exp().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(nll[1].mean().exp().item(), rel=1e-5)
    assert found.kl_by_position == pytest.approx(along, rel=1e-3, abs=1e-7)
    assert found.damage == pytest.approx((nll[1] - nll[0]).mean().item(), abs=1e-5)
    assert found.damage_stderr == pytest.approx((nll[1] - nll[0]).std().item() / rows, rel=1e-3)
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_stderr == pytest.approx(kl.std().item() / rows, rel=1e-3)
    assert found.top1 == pytest.approx(top1.mean().item())
    assert found.top1_stderr == pytest.approx(top1.std().item() / rows)


def test_more_damage_is_more_divergence(dense: DenseStates) -> None:
    little, much = (divergence(dense, damaged(by), tokens()) for by in (0.02, 0.5))
    assert 0 < little.kl < much.kl
    assert little.top1 > much.top1


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 50.0])
def test_a_divergence_is_never_negative(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=generator)
    other = logits + scale * torch.randn(64, 1000, generator=generator)
    assert (position_measures(logits, other, torch.zeros(64, dtype=torch.int64))[:, 2] >= 0).all()


def test_a_shift_of_all_logits_changes_nothing() -> None:
    logits, targets = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    measured = position_measures(logits, logits + 3.0, targets)
    assert measured[:, 2].max() < 1e-6
    torch.testing.assert_close(measured[:, 0], measured[:, 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("at_once", [1, 128 * 3, 128 * 1000])
def test_the_chunk_does_not_matter(dense: DenseStates, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = divergence(dense, damaged(0.2), tokens())
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    assert divergence(dense, damaged(0.2), tokens()).kl == pytest.approx(whole.kl, rel=1e-6)


def test_one_row_has_no_standard_error(dense: DenseStates) -> None:
    found = divergence(dense, damaged(0.2), tokens(rows=1))
    assert (found.kl_stderr, found.top1_stderr, found.damage_stderr) == (None, None, None)


def test_dense_states_are_computed_once_and_rows_are_read_from_longer_ones(
    dense: DenseStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dense_perplexity(dense, tokens())
    assert found == pytest.approx(perplexity(dense.weights, tokens()).value, rel=1e-6)
    expected = final_hidden(dense.weights, tokens())

    def again(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "final_hidden", again)
    assert torch.equal(dense.hidden(tokens()), expected)
    assert torch.equal(dense.hidden(tokens()[:2]), expected[:2])
    with pytest.raises(AssertionError, match="computed again"):
        dense.hidden(tokens() + 1)


@pytest.mark.parametrize("lost", ["a bit", "the note"])
def test_damaged_dense_states_are_computed_again(dense: DenseStates, tmp_path: Path, lost: str) -> None:
    expected = dense.hidden(tokens())
    (file,) = (tmp_path / "states").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    if lost == "the note":
        file.with_name(f"{file.name}.sha256").unlink()
    later = DenseStates(dense.weights, tmp_path / "states")  # of another process
    assert torch.equal(later.hidden(tokens()), expected)


@pytest.mark.parametrize("shape", [(0, 20), (3, 1), (20,)])
def test_nothing_to_predict_is_an_error(dense: DenseStates, shape: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match="at least one row of two positions"):
        divergence(dense, dense.weights, torch.zeros(shape, dtype=torch.int64))


def test_a_model_that_gives_no_number_is_an_error(dense: DenseStates) -> None:
    with pytest.raises(NumericsError, match="the compressed model"):
        divergence(dense, damaged(math.nan), tokens())


def test_means_of_rows_become_means_of_the_text() -> None:
    found = Divergence.of(torch.tensor([[1.0, 1.5, 0.2, 0.5], [2.0, 2.5, 0.4, 1.0]], dtype=torch.float64), 10)
    assert replace(found, kl=0.0, kl_stderr=None, top1_stderr=None, kl_by_position=()) == Divergence(
        2, 20, math.exp(1.5), math.exp(2.0), 0.5, 0.0, 0.0, None, 0.75, None
    )
    assert found.kl == pytest.approx(0.3)
