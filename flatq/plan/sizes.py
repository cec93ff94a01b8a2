"""Sizes of artifacts and temporary files, from shapes; warnings about settings that hurt quality."""

from __future__ import annotations

from collections.abc import Mapping

from flatq.calibration import sensitivity
from flatq.calibration.states import stored_as
from flatq.model.decoder import DecoderConfig
from flatq.model.footprint import decode_bytes, weight_bytes
from flatq.model.grid import Grid
from flatq.model.weights import HALVES
from flatq.plan.decide import measurements
from flatq.recipe.blocks import CONTEXT
from flatq.recipe.grammar import Recipe
from flatq.stages import dense_states_needed

# Tokens per input of the widest linear that are needed without shrinkage. SmolLM2-135M, method paper, 20 % removed,
# 1,536 inputs, dense perplexity 7.67: 36.9 with 1 token per input, 14.0 with 1.3, 10.7 with 5.3; with shrinkage 9.6
# with 1.
UNSHRUNK = 4


def artifact_bytes(config: DecoderConfig, recipe: Recipe, itemsize: int) -> int:
    """Bytes of the artifact's weights, where each code takes one byte."""
    decoder = config.decoder_parameters()
    return decoder * (1 if recipe.gptq else itemsize) + (config.parameters() - decoder) * itemsize


def disk_bytes(config: DecoderConfig, recipe: Recipe, itemsize: int) -> int:
    """Bytes that a run writes without exports: artifact, hidden states, gradients for the sensitivity."""
    text, m, blocks = recipe.calibration, config.d_model, len(HALVES) * len(config.layers)
    tokens = text.samples * text.seq_len
    files = 4 if any(dense_states_needed(recipe)) else 2  # the dense model's, too
    states = files * tokens * m * stored_as(text.states, tokens, m).itemsize
    if "sensitivity" in measurements(recipe, narrows=recipe.flat is not None and recipe.flat.keep_ratio != 1):
        few = min(tokens, sensitivity.TOKENS)
        gradients = (blocks + 1) * few * m * stored_as(text.states, blocks * few, m).itemsize
        states = max(states, gradients) + 4 * blocks * m**2
    if recipe.recover is not None:  # a second artifact; the dense model's states, and those of a step between blocks
        step = (blocks + 1) * max(text.seq_len, recipe.recover.tokens) * m * 4
        trained = recipe.recover.samples * text.seq_len * m * 4
        states += artifact_bytes(config, recipe, itemsize) + trained + step
    return artifact_bytes(config, recipe, itemsize) + states


def cautions(recipe: Recipe, dense: DecoderConfig) -> list[str]:
    """Warnings about settings that are valid but likely to hurt quality."""
    given = recipe.calibration
    tokens, widest = given.samples * given.seq_len, _widest(dense)
    bare, enough = unshrunk(recipe), -(-UNSHRUNK * widest // given.seq_len)
    if not recipe.stages or tokens >= (UNSHRUNK if bare else 1) * widest:
        return []
    if bare:
        return [
            f"calibration: {tokens:,} tokens are fewer than {UNSHRUNK} times the {widest:,} inputs of the widest "
            f"linear, which overfits without shrinkage: give {enough} samples of {given.seq_len} or more, or set "
            "shrinkage: 0.1"
        ]
    return [
        f"calibration: {tokens:,} tokens are fewer than the {widest:,} inputs of the widest linear, which overfits: "
        f"give {-(-widest // given.seq_len)} samples of {given.seq_len} or more"
    ]


def _widest(dense: DecoderConfig) -> int:
    """Inputs of the widest linear; of experts so many times fewer as tokens are sent to each."""
    return max(dims.d_ff for dims in dense.layers) // max(1, dense.experts_per_token)


def unshrunk(recipe: Recipe) -> bool:
    """Whether a flat stage narrows without shrinkage."""
    return recipe.flat is not None and recipe.flat.keep_ratio != 1 and recipe.flat.parts.shrinkage == 0


def too_few_tokens(recipe: Recipe, dense: DecoderConfig) -> list[str]:
    """An objection to fewer calibration tokens than inputs of the widest linear, without shrinkage.

    The Gram matrix is then singular, and fits on it are arbitrary: on SmolLM2-135M perplexity rose from 7.67 to 430,280
    with 1,024 tokens for 1,536 inputs.
    """
    given = recipe.calibration
    tokens, widest = given.samples * given.seq_len, _widest(dense)
    if not unshrunk(recipe) or tokens >= widest:
        return []
    return [
        f"calibration: {tokens:,} tokens are fewer than the {widest:,} inputs of the widest linear, which without "
        f"shrinkage ruins the model; give {-(-UNSHRUNK * widest // given.seq_len)} samples of {given.seq_len} or more, "
        "or set shrinkage: 0.1 in the flat stage"
    ]


def footprints(
    recipe: Recipe, dense: DecoderConfig, planned: DecoderConfig, grids: Mapping[str, Grid], itemsize: int
) -> dict[str, tuple[int, int]]:
    """Bytes stored and bytes read per decoded token, (dense, planned), counted as for budgets."""
    context = recipe.flat.cache_context if recipe.flat else CONTEXT
    return {
        "weights": (weight_bytes(dense, {}, itemsize), weight_bytes(planned, grids, itemsize)),
        f"read per decoded token, context {context:,}": (
            decode_bytes(dense, {}, itemsize, context),
            decode_bytes(planned, grids, itemsize, context),
        ),
    }
