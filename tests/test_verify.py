"""A right export passes; every way of being wrong is found and named."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from flatq.artifact import Artifact
from flatq.errors import ExportError, RecipeError
from flatq.export.generate import DecoderRunner
from flatq.export.protocols import FloatArray, IntArray
from flatq.export.verify import EXACT_SHARE, Case, Limits, verify
from flatq.model.grid import Grid
from flatq.model.weights import Weights
from tests.models import RandomWeights, tiny_artifact, tiny_config


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = tiny_config(d_v=(12, 5), d_ff=(64, 96))
    return tiny_artifact(tmp_path_factory.mktemp("verify") / "artifact", config, grid=Grid(4, 32))


class Shifted(DecoderRunner):
    """Adds ``by`` to the logit of token 3 at one place."""

    def __init__(self, artifact: Weights, by: float, *, at_step: int | None = None) -> None:
        super().__init__(artifact)
        self.by, self.at_step, self.steps = by, at_step, 0

    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        logits = super().logits(tokens, valid)
        if self.at_step is None:
            logits[1, 5, 3] += self.by
        return logits

    def step(self, tokens: IntArray) -> FloatArray:
        logits = super().step(tokens)
        self.steps += 1
        if self.steps == self.at_step:
            logits[1, 3] += self.by
        return logits


class Noisy(DecoderRunner):
    """An approximation: noise of a given size on all logits."""

    def __init__(self, artifact: Artifact, noise: float) -> None:
        super().__init__(artifact)
        self.noise, self.random = noise, np.random.default_rng(0)

    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        clean = super().logits(tokens, valid)
        return clean + self.noise * self.random.standard_normal(clean.shape, dtype=np.float32)


class Forgetful(DecoderRunner):
    """Reads a prompt rightly, and loses its cache with each step."""

    def step(self, tokens: IntArray) -> FloatArray:
        return self.start(tokens[:, None], 1)


class Wrong(DecoderRunner):
    """Returns logits of the last position only."""

    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        return super().logits(tokens, valid)[:, -1:]


def test_the_decoder_agrees_with_itself(artifact: Artifact) -> None:
    found = verify(artifact, lambda: DecoderRunner(artifact))
    assert max(found.exact.max_abs, found.exact.decode_max_abs) < 1e-4
    assert found.exact.top1 == 1
    assert found.exact.kl < 1e-8
    assert found.exact.provider == "torch:cpu"
    assert found.exact.positions == 2 * (24 + 9)
    assert found.limit == pytest.approx(EXACT_SHARE * found.spread)
    assert found.deployed is None


def test_runners_are_opened_one_after_another(artifact: Artifact) -> None:
    opened: list[str] = []

    class Counted(DecoderRunner):
        def close(self) -> None:
            opened.append("closed")

    def open_as(name: str) -> DecoderRunner:
        opened.append(name)
        return Counted(artifact)

    verify(artifact, lambda: open_as("deployed"), open_exact=lambda: open_as("exact"))
    assert opened == ["exact", "closed", "deployed", "closed"]


def test_other_levels_are_opened_exact_and_as_deployed(artifact: Artifact) -> None:
    opened: list[str] = []

    def open_as(name: str) -> DecoderRunner:
        opened.append(name)
        return DecoderRunner(artifact)

    levels = {name: (partial(open_as, name), partial(open_as, f"{name} exact")) for name in ("basic", "disabled")}
    found = verify(artifact, partial(open_as, "all"), open_exact=partial(open_as, "all exact"), levels=levels)
    assert found.levels == ("basic", "disabled")
    assert opened == ["all exact", "all", "basic exact", "basic", "disabled exact", "disabled"]


@pytest.mark.parametrize(
    ("deployed", "exact", "message"),
    [
        (0.0, 1.0, r"onnx, optimization level basic \(exact\): the logit"),
        (40.0, 0.0, "onnx, optimization level basic: the runtime"),
    ],
)
def test_a_level_that_disagrees_is_named(artifact: Artifact, deployed: float, exact: float, message: str) -> None:
    levels = {"basic": (lambda: Noisy(artifact, deployed), lambda: Noisy(artifact, exact))}
    with pytest.raises(ExportError, match=message):
        verify(
            artifact,
            lambda: Noisy(artifact, 0.1),
            open_exact=lambda: DecoderRunner(artifact),
            levels=levels,
            name="onnx",
        )


def test_a_runner_that_is_wrong_is_closed_all_the_same(artifact: Artifact) -> None:
    wrong = Wrong(artifact)
    wrong.close = lambda: setattr(wrong, "closed", True)  # type: ignore[method-assign]
    with pytest.raises(ExportError):
        verify(artifact, lambda: wrong)
    assert vars(wrong)["closed"]


def test_a_format_without_a_runtime_is_not_verified(artifact: Artifact) -> None:
    assert verify(artifact, lambda: None, open_exact=lambda: None) is None


def test_real_text_is_compared_too(artifact: Artifact) -> None:
    text = torch.arange(5 * 40).reshape(5, 40) % artifact.config.vocab
    assert verify(artifact, lambda: DecoderRunner(artifact), tokens=text).exact.positions == 4 * (24 + 9)


def test_with_text_no_random_tokens_are_looked_at(artifact: Artifact) -> None:
    class Watched(DecoderRunner):
        def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
            assert (tokens == 7).all()
            return super().logits(tokens, valid)

    assert verify(artifact, lambda: Watched(artifact), tokens=torch.full((2, 40), 7)) is not None


class Cancelling(RandomWeights):
    """The last MLP adds large numbers that cancel, so that float32 rounding moves the logits."""

    def __init__(self, size: float) -> None:
        super().__init__(tiny_config())
        up, gate, down = (self.tensors[f"layers.1.{name}.weight"] for name in ("up", "gate", "down"))
        up[1::2], gate[1::2] = up[::2], gate[::2]
        noise = 0.1 * down[:, 1::2].clone()
        down[:, ::2] *= size
        down[:, 1::2] = noise - down[:, ::2]


class InAnotherOrder(DecoderRunner):
    """Another runtime: the same sums, taken in float64."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights, dtype=torch.float64)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5])
def test_what_is_exact_on_one_model_is_exact_on_all(size: float) -> None:
    model = Cancelling(size)
    found = verify(model, lambda: InAnotherOrder(model))
    assert found is not None
    assert found.exact.max_abs <= found.limit
    assert found.limit >= 10 * found.noise
    with pytest.raises(ExportError, match="differs from the artifact's"):
        verify(model, lambda: InAnotherOrder(RandomWeights(model.config, seed=5)))


def test_an_ill_conditioned_model_is_told_from_a_wrong_export(caplog: pytest.LogCaptureFixture) -> None:
    sound, ill = Cancelling(1.0), Cancelling(1e6)
    noise = Case.draw(ill, None, 0).noise
    for model, by in ((sound, 1.0), (ill, 1e4 * noise)):
        with pytest.raises(ExportError, match="The export or its runtime is faulty"):
            verify(model, lambda m=model, d=by: Shifted(m, d))
    assert caplog.text.count("float32 rounding alone moves its logits") == 1
    with pytest.raises(ExportError, match="The model is ill-conditioned: float32 rounding alone"):
        verify(ill, lambda: Shifted(ill, 30 * noise))
    assert verify(ill, lambda: Shifted(ill, 5 * noise)) is not None


@pytest.mark.parametrize("length", [0, 31])
def test_text_that_is_too_short_is_an_error(artifact: Artifact, length: int) -> None:
    with pytest.raises(RecipeError, match="rows of 32 or more"):
        verify(artifact, lambda: DecoderRunner(artifact), tokens=torch.zeros(2, length, dtype=torch.int64))


def test_other_weights_are_found(artifact: Artifact) -> None:
    with pytest.raises(ExportError, match=r"onnx, prefill: the logit of token \d+ at row \d, position \d+ differs"):
        verify(artifact, lambda: DecoderRunner(RandomWeights(artifact.config, seed=5)), name="onnx")


def test_one_wrong_logit_of_prefill_is_named(artifact: Artifact) -> None:
    with pytest.raises(ExportError, match=r"prefill: the logit of token 3 at row 1, position 5 differs .* 1 of 48"):
        verify(artifact, lambda: Shifted(artifact, 1.0))


@pytest.mark.parametrize("step", [1, 8])
def test_one_wrong_logit_of_decode_is_named(artifact: Artifact, step: int) -> None:
    with pytest.raises(ExportError, match=rf"decode: the logit of token 3 at row 1, position {23 + step} differs"):
        verify(artifact, lambda: Shifted(artifact, 1.0, at_step=step))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_is_found(artifact: Artifact, value: float) -> None:
    with pytest.raises(ExportError, match="position 5 differs"):
        verify(artifact, lambda: Shifted(artifact, value))
    with pytest.raises(ExportError, match="KL divergence of"):
        verify(artifact, lambda: Shifted(artifact, value), open_exact=lambda: DecoderRunner(artifact))


def test_a_cache_that_forgets_is_found(artifact: Artifact) -> None:
    with pytest.raises(ExportError, match="decode: the logit"):
        verify(artifact, lambda: Forgetful(artifact))


def test_logits_of_another_shape_are_found(artifact: Artifact) -> None:
    with pytest.raises(ExportError, match=r"shape \[2, 1, 128\] instead of \[2, 24, 128\]"):
        verify(artifact, lambda: Wrong(artifact))


def test_an_approximation_is_held_to_its_divergence(artifact: Artifact) -> None:
    found = verify(artifact, lambda: Noisy(artifact, 0.1), open_exact=lambda: DecoderRunner(artifact))
    assert found.deployed is not None
    assert found.deployed.max_abs > found.limit > found.exact.max_abs
    assert found.exact.kl < found.deployed.kl < 0.05
    with pytest.raises(ExportError, match=r"KL divergence .* at most 0.05"):
        verify(artifact, lambda: Noisy(artifact, 40.0), open_exact=lambda: DecoderRunner(artifact))


def test_an_approximation_without_an_exact_twin_is_held_to_the_exact_limits(artifact: Artifact) -> None:
    with pytest.raises(ExportError, match="differs from the artifact's"):
        verify(artifact, lambda: Noisy(artifact, 0.1))
    wide = verify(artifact, lambda: Noisy(artifact, 0.01), limits=Limits(max_abs=0.5, kl=0.05))
    assert wide.exact.max_abs > EXACT_SHARE * 0.5
    assert wide.limit == pytest.approx(0.5 * wide.spread)


def test_tokens_closer_than_the_limit_are_a_tie(tmp_path: Path) -> None:
    twins = RandomWeights(tiny_config(tied_head=False))
    twins.tensors["head.weight"][1::2] = twins.tensors["head.weight"][::2]  # every token has a twin of equal logit

    class Second(DecoderRunner):
        def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
            logits = super().logits(tokens, valid)
            logits[..., 1::2] += 1e-3
            return logits

    found = verify(twins, lambda: Second(twins))
    assert found.exact.top1 == 1
    assert found.exact.ties == 2 * 24
