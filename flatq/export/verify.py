"""Verification of exports: run each export in its runtime and compare its logits with the artifact's.

An export that loads may still be wrong: with a wrong rope convention, swapped nibbles or an off-by-one error in the
cache it generates fluent nonsense. The reference is one forward pass of flatq's decoder in float32, half a layer at a
time. Logits do not depend on later tokens, so one pass is the reference for both tests of the runtime: prefill of a
prompt without a cache, and decoding (the prompt into the cache, then the remaining tokens one by one).

Tolerances. A fault changes logits by about their spread (standard deviation over the vocabulary, averaged over
positions), so the limit is relative, ``5e-3`` of the spread. Another summation order in float32 also changes logits: by
2e-5 of the spread on SmolLM2-135M, and by much more on models with cancellation of large numbers. So the reference is
also computed in float64 for a few rows; its difference from float32 is the rounding noise of the model, and the limit
is at least ten times the noise, for logits and for KL divergence. The same limits then work for all models, and an
error message can distinguish an ill-conditioned model from a wrong export. If the two best tokens of the reference are
closer than the limit, both are accepted (a tie). For a runtime with intended approximations only the KL divergence is
limited (int8 activations: 0.006 to 0.009 nats on the same model); its exact mode, if any, must meet the limits above.

Axes: b rows, s positions of the prompt, t positions in total.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flatq.calibration.perplexity import final_hidden, head_logits
from flatq.errors import ExportError, RecipeError
from flatq.export.difference import Difference
from flatq.export.protocols import FloatArray, IntArray, Runner
from flatq.model.weights import Weights

log = logging.getLogger(__name__)
PROMPT, NEW_TOKENS, ROWS, TEXT_ROWS = 24, 8, 2, 4
EXACT_SHARE = 5e-3
NOISE_ROWS = 2
NOISE_FACTOR = 10  # on Qwen2.5-Coder-0.5B the rounding error of another runtime was five times that of this decoder
LEVEL_KL = 2  # times the limit of the KL divergence: one row scatters more than the mean of several
Open = Callable[[], Runner | None]
Turn = tuple[Open, "Limits", str]


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest allowed differences of an export; None is not checked.

    Attributes:
        max_abs: largest logit difference, as a fraction of the spread of the reference's logits.
        kl: mean KL divergence in nats.
    """

    max_abs: float | None
    kl: float


EXACT = Limits(max_abs=EXACT_SHARE, kl=1e-3)
APPROXIMATE = Limits(max_abs=None, kl=0.05)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Comparison of a runtime with the artifact.

    Attributes:
        provider: the provider that was used.
        positions: number of compared positions, prefill and decode.
        max_abs, mean_abs: logit differences in prefill.
        decode_max_abs: largest logit difference in decoding.
        top1: fraction of positions with the same most likely token; ties count as the same.
        ties: number of positions where the most likely token differs, but by less than the limit.
        kl: mean of KL(artifact || runtime), nats.
    """

    provider: str
    positions: int
    max_abs: float
    mean_abs: float
    decode_max_abs: float
    top1: float
    ties: int
    kl: float


@dataclass(frozen=True, slots=True)
class Verification:
    """A passed comparison.

    Attributes:
        spread: standard deviation of the reference's logits over the vocabulary.
        limit: largest allowed logit difference of the exact mode, ``5e-3 * spread`` or ten times ``noise``.
        exact: the runtime without approximations.
        deployed: the runtime with default settings, if these approximate; None if they are exact.
        noise: largest difference between the reference in float32 and in float64.
        levels: the runtime's other settings that passed on one short row.
    """

    spread: float
    limit: float
    exact: Agreement
    deployed: Agreement | None
    noise: float = 0.0
    levels: tuple[str, ...] = ()


def verify(
    artifact: Weights,
    open_runner: Open,
    *,
    open_exact: Open | None = None,
    levels: Mapping[str, tuple[Open, Open]] | None = None,
    tokens: Tensor | None = None,
    seed: int = 0,
    name: str = "export",
    limits: Limits = EXACT,
) -> Verification | None:
    """Compare an export in its runtime with its artifact.

    Uses up to four rows of held-out text; without text, two rows of random tokens, on which models are often more
    sensitive than on text. The reference, the exact runner and the deployed runner are in memory one after the other,
    because a runtime's session needs about twice the size of the model.

    Args:
        artifact: artifact of the export.
        open_runner: opens the export with default settings.
        open_exact: opens the export without the runtime's approximations. If given, it must meet ``limits`` and
            ``open_runner`` only ``APPROXIMATE`` (plus the KL divergence of ``limits``); otherwise ``open_runner`` must
            meet ``limits``.
        levels: by name, other settings of the runtime: opens the export with default settings, and without
            approximations. Each reads one short row and must meet the same limits, of the KL divergence twice.
        tokens: held-out text, int64 [rows, at least 32].
        seed: of the random tokens.
        name: of the export, for messages.
        limits: wider than ``EXACT`` only for an export with additionally rounded weights (float16).

    Returns:
        None if an opener returns None because there is no runtime.

    Raises:
        ExportError: a difference is above its limit; with its position, value, limit and a remedy.
        RecipeError: ``tokens`` is too short.
    """
    case = Case.draw(artifact, tokens, seed)
    if case.ill_conditioned:
        log.warning(
            "%s: the model is ill-conditioned: float32 rounding alone moves its logits by %.3g (spread %.3g); "
            "runtimes will differ, check its perplexity",
            name,
            case.noise,
            case.spread,
        )
    found = []
    for opener, held_to, called in _turns(open_runner, open_exact, limits, name):
        runner = opener()
        if runner is None:
            return None
        with closing(runner):
            found.append(compare(case, runner, held_to, called))
    for level, openers in (levels or {}).items():
        for opener, held_to, called in _turns(*openers, limits, f"{name}, optimization level {level}"):
            runner = opener()
            if runner is not None:
                with closing(runner):
                    compare_prompt(case, runner, held_to, called)
    deployed = found[1] if open_exact is not None else None
    return Verification(case.spread, case.limit(limits), found[0], deployed, case.noise, tuple(levels or {}))


def _turns(open_runner: Open, open_exact: Open | None, limits: Limits, name: str) -> list[Turn]:
    """What is opened, one after another, and what it is held to."""
    if open_exact is None:
        return [(open_runner, limits, name)]
    rounding = 0.0 if limits == EXACT else limits.kl
    allowed = Limits(None, APPROXIMATE.kl + rounding)
    return [(open_exact, limits, f"{name} (exact)"), (open_runner, allowed, name)]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Tokens int64 [b, t] and the artifact's logits float32 [b, t, vocab], the reference.

    Attributes:
        spread: standard deviation of the logits over the vocabulary.
        noise, noise_kl: largest logit difference and mean KL divergence of float32 from float64.
    """

    tokens: IntArray
    logits: FloatArray
    spread: float
    noise: float
    noise_kl: float

    def limit(self, limits: Limits) -> float:
        """Largest allowed logit difference."""
        return max((limits.max_abs or EXACT_SHARE) * self.spread, NOISE_FACTOR * self.noise)

    def limit_kl(self, limits: Limits) -> float:
        """Largest allowed KL divergence."""
        return max(limits.kl, NOISE_FACTOR * self.noise_kl)

    @property
    def ill_conditioned(self) -> bool:
        """Whether float32 rounding alone changes the logits by more than the limit for exports."""
        return self.noise > EXACT_SHARE * self.spread

    def explained(self, times_limit: float) -> bool:
        """Whether rounding may explain a difference of ``times_limit`` times the limit."""
        return self.ill_conditioned and times_limit < NOISE_FACTOR

    @classmethod
    def draw(cls, artifact: Weights, tokens: Tensor | None, seed: int) -> Case:
        """Choose tokens and compute the reference."""
        length = PROMPT + NEW_TOKENS
        if tokens is None:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(artifact.config.vocab, (ROWS, length), generator=generator)
        else:
            if tokens.ndim != 2 or tokens.shape[1] < length:
                raise RecipeError(f"verify: tokens of shape {list(tokens.shape)}: rows of {length} or more are needed")
            drawn = tokens[:TEXT_ROWS, :length].cpu()
        hidden = final_hidden(artifact, drawn)
        with torch.inference_mode():
            logits = torch.cat([part for _, part in head_logits(artifact, hidden.flatten(0, 1))])
            spread = logits.std(-1).mean().item()
            noise, noise_kl = _rounding(artifact, drawn[:NOISE_ROWS], logits)
        return cls(drawn.numpy(), logits.view(*drawn.shape, -1).numpy(), spread, noise, noise_kl)


def _rounding(artifact: Weights, tokens: Tensor, logits: Tensor) -> tuple[float, float]:
    """Largest difference and mean KL divergence of the float32 logits [positions, vocab] from those in float64."""
    hidden, largest, divergence = final_hidden(artifact, tokens, dtype=torch.float64).flatten(0, 1), 0.0, 0.0
    for rows, exact in head_logits(artifact, hidden):
        largest = max(largest, (exact - logits[rows]).abs().max().item())
        log_p, log_q = exact.log_softmax(-1), logits[rows].double().log_softmax(-1)
        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
    return largest, divergence / len(hidden)


def compare(case: Case, runner: Runner, limits: Limits, name: str) -> Agreement:
    """Run prefill and decoding, measure the differences, compare them with the limits; errors as for ``verify``."""
    tokens, length = case.tokens, case.tokens.shape[1]
    prefill = _shaped(runner.logits(tokens[:, :PROMPT]), case.logits[:, :PROMPT], f"{name}, prefill")
    steps = [runner.start(tokens[:, :PROMPT], length)]
    steps += [runner.step(tokens[:, position]) for position in range(PROMPT, length)]
    decode = _shaped(np.stack(steps, 1), case.logits[:, PROMPT - 1 :], f"{name}, decode")

    tie = case.limit(limits)
    read = Difference.between(prefill, case.logits[:, :PROMPT], tie)
    written = Difference.between(decode, case.logits[:, PROMPT - 1 :], tie)
    positions = read.kl.size + written.kl.size
    misses = int(read.missed.sum() + written.missed.sum())
    found = Agreement(
        provider=runner.provider,
        positions=positions,
        max_abs=float(read.largest.max()),
        mean_abs=float(read.mean.mean()),
        decode_max_abs=float(written.largest.max()),
        top1=1 - misses / positions,
        ties=int(read.tied.sum() + written.tied.sum()),
        kl=float((read.kl.sum() + written.kl.sum()) / positions),
    )
    for where, difference, first in (("prefill", read, 0), ("decode", written, PROMPT - 1)):
        _judge(difference, limits, case, f"{name}, {where}", first)
    _judge_kl(found.kl, positions, limits, case, f"{name}: the runtime ({runner.provider})")
    return found


def compare_prompt(case: Case, runner: Runner, limits: Limits, name: str) -> None:
    """Run the prompt of the first row only and judge; errors as ``verify``."""
    limits = replace(limits, kl=LEVEL_KL * limits.kl)
    reference = case.logits[:1, :PROMPT]
    prefill = _shaped(runner.logits(case.tokens[:1, :PROMPT]), reference, name)
    read = Difference.between(prefill, reference, case.limit(limits))
    _judge(read, limits, case, name, 0)
    _judge_kl(float(read.kl.mean()), read.kl.size, limits, case, f"{name}: the runtime ({runner.provider})")


def _judge(difference: Difference, limits: Limits, case: Case, name: str, first: int) -> None:
    """Raise an error for the largest difference above the limit; ``first`` is the text position of column 0."""
    if limits.max_abs is None:
        return
    limit = case.limit(limits)
    row, column = np.unravel_index(difference.largest.argmax(), difference.largest.shape)
    worst, token = difference.largest[row, column], difference.token[row, column]
    if not worst <= limit:
        wrong = int((difference.largest > limit).sum())
        raise ExportError(
            f"{name}: the logit of token {token} at row {row}, position {first + column} differs from the artifact's "
            f"by {worst:.3g}; at most {limit:.3g} is allowed ({limits.max_abs:g} of the logits' spread, "
            f"{case.spread:.3g}, or {NOISE_FACTOR} times the rounding noise of float32, {case.noise:.2g}), and {wrong} "
            f"of {difference.largest.size} positions are above it. {_way_out(limits, case, float(worst) / limit)}"
        )
    if difference.missed.any():
        row, column = np.argwhere(difference.missed)[0]
        raise ExportError(
            f"{name}: the most likely token at row {row}, position {first + column} is not the artifact's; this holds "
            f"for {int(difference.missed.sum())} of {difference.missed.size} positions, not counting ties (logits "
            f"closer than {limit:.3g}); none is allowed. {_way_out(limits, case, 1.0)}"
        )


def _judge_kl(kl: float, positions: int, limits: Limits, case: Case, who: str) -> None:
    if not kl <= case.limit_kl(limits):
        raise ExportError(
            f"{who} gives a KL divergence of {kl:.3g} nats from the artifact, mean of {positions} positions; at most "
            f"{case.limit_kl(limits):g} is allowed. {_way_out(limits, case, kl / case.limit_kl(limits))}"
        )


def _way_out(limits: Limits, case: Case, times_limit: float) -> str:
    if case.explained(times_limit):
        return (
            f"The model is ill-conditioned: float32 rounding alone changes its logits by {case.noise:.3g}, so no "
            "runtime can reproduce them, and the export is not necessarily wrong. Check the model's perplexity, and "
            "use more calibration tokens, more shrinkage, or a larger budget."
        )
    if limits.max_abs is None:
        return (
            "The runtime's approximation is too coarse for this model: set the exporter's option for computation in "
            "float (for ONNX `accuracy_level: 0`), or use a smaller group_size."
        )
    return (
        "The export or its runtime is faulty, so it must not be used: try other options of the exporter or another "
        "version of the runtime, and report this message."
    )


def _shaped(got: FloatArray, reference: FloatArray, name: str) -> FloatArray:
    if got.shape != reference.shape:
        raise ExportError(
            f"{name}: the runtime returned logits of shape {list(got.shape)} instead of {list(reference.shape)}; "
            "the export does not follow the Runner protocol"
        )
    return got.astype(np.float32, copy=False)
