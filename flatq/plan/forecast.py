"""Forecast of time and memory for each phase of a run.

Time: the number of operations of each phase, counted from shapes (see ``operations``), divided by the measured speed of
this machine (see ``machine.speed``). Small matrices are slower and the load of a shared machine varies, so the result
is an order-of-magnitude estimate (docs/writing-a-recipe.md).

Memory: the largest tensors of a phase, computed from shapes, plus the measured memory of the process. Hidden states are
not included because they are on disk.

Left out: exports, their verification and the bench, which depend on exporters and runtimes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flatq.calibration import cache_ranges, distillation, sensitivity, states
from flatq.calibration.perplexity import LOGITS_AT_ONCE
from flatq.calibration.self_text import SIDE_BY_SIDE, writing_bytes
from flatq.calibration.states import WORKING_SET, activation_bytes
from flatq.calibration.tokens import self_tokens
from flatq.calibration.training import STEP_TOKENS
from flatq.compress import error_curves
from flatq.errors import RecipeError
from flatq.machine.memory import give_back, rss_bytes
from flatq.machine.precision import resolved
from flatq.machine.speed import measured_speed
from flatq.model.decoder import DecoderConfig, LayerDims
from flatq.plan.decide import measurements
from flatq.plan.operations import after_walk, operations
from flatq.quantize import bit_errors, choice_errors
from flatq.quantize.embedding_and_head import HEAD_AT_ONCE
from flatq.quantize.gptq import WEIGHTS_AT_ONCE
from flatq.recipe.grammar import Recipe

TOGETHER = 4  # batch size of an evaluation, in rows


@dataclass(frozen=True, slots=True)
class Forecast:
    """Estimated seconds and peak resident memory of one phase.

    On a GPU, ``peak_device_bytes`` is its peak memory; ``peak_rss_bytes`` is then an upper bound that assumes
    computation in main memory.
    """

    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int = 0


def forecasts(
    recipe: Recipe,
    config: DecoderConfig,
    plan: Sequence[LayerDims],
    *,
    device: str = "cpu",
    working_set_bytes: int = WORKING_SET,
    ranges: bool = False,
) -> dict[str, Forecast]:
    """Forecasts by phase, in the order of a run.

    Args:
        config: the dense model.
        plan: planned widths of each layer.
        working_set_bytes: bytes for the activations of a batch.
        ranges: whether an export needs the ranges of keys and values.
    """
    speed = measured_speed(device, recipe.calibration.precision)
    works = operations(recipe, config, plan, _tokens(recipe), ranges)
    needs = working_bytes(config, recipe, working_set_bytes, ranges)
    give_back()
    held = rss_bytes()
    return {
        phase: Forecast(work.seconds(speed), held + needs[phase], 0 if device == "cpu" else needs[phase])
        for phase, work in works.items()
    }


def _tokens(recipe: Recipe) -> dict[str, int]:
    """Number of tokens that each phase processes."""
    calibration = recipe.calibration.samples * recipe.calibration.seq_len
    scored = recipe.evaluation[0].tokens
    further = 0 if recipe.recover is None else recipe.recover.samples
    return {
        "self-text": self_tokens(recipe.calibration, recipe.evaluation, further),
        "baseline": scored,
        "sensitivity": min(calibration, sensitivity.TOKENS),
        "curves": min(calibration, error_curves.TOKENS),
        "importance": calibration,
        "bits": min(calibration, bit_errors.TOKENS),
        "choices": min(calibration, choice_errors.TOKENS),
        "compress": calibration,
        "recover": further * recipe.calibration.seq_len,
        "evaluate": scored,
        "cache-ranges": min(calibration, max(recipe.calibration.seq_len, cache_ranges.TOKENS)),
    }


def working_bytes(
    config: DecoderConfig, recipe: Recipe, working_set_bytes: int = WORKING_SET, ranges: bool = False
) -> dict[str, int]:
    """Peak bytes of tensors in each phase, without the process itself."""
    m, f, tables = config.d_model, max(dims.d_ff for dims in config.layers), config.vocab * config.d_model
    heads = max(dims.heads * dims.d_v for dims in config.layers)
    layer = max(dims.parameters(m) for dims in config.layers)
    half = 4 * max(3 * f * m, layer - 3 * f * m)
    text, scored = recipe.calibration, recipe.evaluation[0]
    one = activation_bytes(config) * text.seq_len
    batch = min(
        max(working_set_bytes, one), activation_bytes(config) * min(states.BATCH_TOKENS, text.samples * text.seq_len)
    )
    rows = min(TOGETHER, scored.tokens // scored.seq_len)  # batch of an evaluation
    evaluated = 4 * scored.tokens * m + max(
        half + activation_bytes(config) * rows * scored.seq_len, 6 * tables + 8 * LOGITS_AT_ONCE
    )
    embedding = 5.5 * tables  # stored and as float32
    left = f * (recipe.flat.keep_ratio or 1.0 if recipe.flat is not None else 1.0)
    n = config.mlp_parts  # each of which has Grams
    squares, inputs, few = f**2 / n, n * m**2, left**2 / n
    grams, fisher = 4 * (squares + inputs), 12 * m**2
    # Gram, its mean and the temporaries of the elimination; then the least-squares fit of the remaining channels.
    eliminating = grams + 8 * squares + 12 * f * m + fisher
    fitting = grams + 4 * squares + 4 * f * m + 8 * left * m + max(12 * few, 8 * few + 16 * left * m)
    narrowing = max(eliminating, fitting) if recipe.flat is not None else 0
    solved = 4 * (3 * f * m + 5 * (min(2 * f * m, WEIGHTS_AT_ONCE) + min(f * m, WEIGHTS_AT_ONCE)))  # both at once
    rounding = 4 * (few + inputs) + 16 * few + solved if recipe.gptq is not None else 0
    # Position, best one, decoded weight, codes, scales, range and two gradients; three times the activations of a step.
    training = 8 * half + 3 * activation_bytes(config) * max(STEP_TOKENS, text.seq_len)
    tuning = training if recipe.gptq is not None and recipe.gptq.tune_steps else 0
    outputs = 6 * min(bit_errors.TOKENS, text.samples * text.seq_len) * m  # three versions of half of the outputs
    chooses = recipe.budget is not None
    quantizes_head = recipe.gptq is not None and (chooses or recipe.gptq.embedding is not None)
    heading = 8 * tables + 16 * m**2 + 20 * min(tables, HEAD_AT_ONCE) if quantizes_head else embedding
    judging = 12 * tables + 16 * choice_errors.LOGITS_AT_ONCE * config.vocab + 20 * min(tables, WEIGHTS_AT_ONCE)
    ranging = 4 * _tokens(recipe)["cache-ranges"] * m + max(half + cache_ranges.ROWS * one, embedding)
    gradients = 8 * min(sensitivity.TOKENS, text.samples * text.seq_len) * m
    length = min(sensitivity.LENGTH, text.seq_len)
    step = max(text.seq_len, recipe.recover.tokens if recipe.recover is not None else 0)
    recovering = 4 * half + 3 * batch  # weights, as they were, gradients and their sums; activations with gradients
    judged = 8 * tables + 24 * distillation.LOGITS * config.vocab  # both heads
    found = {
        "self-text": writing_bytes(
            config,
            min(SIDE_BY_SIDE, text.samples),
            max(text.seq_len, scored.seq_len),
            getattr(torch, resolved(text.precision)),
        ),
        "baseline": evaluated,
        "sensitivity": gradients + max(half + 2 * batch, 6 * tables + 16 * length * config.vocab),
        "curves": max(half + max(batch + grams, eliminating, 28 * heads**2), embedding),
        "importance": max(2 * half + batch, embedding),
        "bits": max(half + 4 * m**2 + outputs + max(batch + 2 * grams, grams + 16 * f**2 + solved), embedding),
        "choices": max(half + 4 * m**2 + outputs + max(batch + 4 * grams, 2 * grams + 16 * f**2 + solved), judging),
        "compress": max(half + max(batch + grams, narrowing, rounding + tuning), heading),
        "recover": 8 * step * m + max(recovering, judged, evaluated),
        "evaluate": evaluated,
        "cache-ranges": ranging,
    }
    phases = ["self-text"] if self_tokens(text, recipe.evaluation) else []
    phases += ["baseline", *measurements(recipe), "compress", *after_walk(recipe), "evaluate"]
    phases += ["cache-ranges"] if ranges else []
    return {phase: int(found[phase]) for phase in phases}


def working_set(config: DecoderConfig, recipe: Recipe, memory: int | None, ranges: bool = False) -> int:
    """Bytes for the activations of a batch, chosen so that peak memory stays below ``memory``.

    Raises:
        RecipeError: ``memory`` is too small for a single sample.
    """
    if memory is None:
        return WORKING_SET
    least = rss_bytes() + max(working_bytes(config, recipe, 1, ranges).values())
    if least > memory:
        raise RecipeError(
            f"--memory: {memory / 1e9:.2f} GB is too little; with one sample of {recipe.calibration.seq_len} tokens at "
            f"a time this model needs about {least / 1e9:.2f} GB: raise --memory, or lower calibration.seq_len"
        )
    working_set_bytes = WORKING_SET
    while (
        working_set_bytes > 1
        and rss_bytes() + max(working_bytes(config, recipe, working_set_bytes, ranges).values()) > memory
    ):
        working_set_bytes //= 2
    return working_set_bytes
