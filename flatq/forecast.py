"""What each phase of a run will take, from a few seconds of the same work on this machine.

Time: a phase costs something per layer, something per token and layer, and something per token at the ends (embedding,
head). So the phase itself is run on one layer and on two, with few tokens and with twice as many, and the rest is
arithmetic. Layers that are too wide for a short measurement are measured narrower, by a whole factor k: what grows
with tokens is taken times k^2, the rest, which are solves, times k^3.

Memory: what a phase holds at its largest block is added up from shapes; the process itself is measured. Hidden states
do not count, they are on disk.

Left out: exports, their verification and the bench; those belong to exporters and runtimes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flatq import feed
from flatq.build import stages_of
from flatq.compress import curves, sensitivity
from flatq.compress.curves import error_curves
from flatq.compress.importance import layer_importance
from flatq.compress.sensitivity import output_sensitivity
from flatq.compress.stage import RankPlan
from flatq.decoder import DecoderConfig, LayerDims
from flatq.errors import RecipeError
from flatq.evaluate import LOGITS_AT_ONCE, perplexity
from flatq.feed import WORKING_SET, Sweep, activation_bytes
from flatq.memory import rss_bytes
from flatq.quantize.gptq import WEIGHTS_AT_ONCE
from flatq.quantize.grid import QuantizedWeight
from flatq.quantize.stage import planned_grids
from flatq.recipe import Recipe
from flatq.walk import walk
from flatq.weights import Weights, tensor_shapes

WIDEST = 2048  # MLP channels that are still measured as they are
SAMPLES = (2, 4)  # sequences in the two measurements
LENGTH = 512  # tokens in each of them, at most


@dataclass(frozen=True, slots=True)
class Forecast:
    """One phase: seconds, and the largest resident memory while it runs.

    With a GPU, ``peak_device_bytes`` is what it will hold; the main memory of the same phase is then an upper bound,
    as if the work were done there.
    """

    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int = 0


class FirstLayers:
    """The beginning of a model as a model of its own; noise where there are no weights to read. A ``Weights``."""

    def __init__(self, config: DecoderConfig, weights: Weights | None) -> None:
        self._config, self._weights = config, weights

    @property
    def config(self) -> DecoderConfig:
        """Of the layers that are there."""
        return self._config

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """Read now, or made up now."""
        if self._weights is not None:
            return self._weights.tensor(name)
        shape = tensor_shapes(self._config)[name]
        return torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[-1] ** -0.5


def forecasts(
    recipe: Recipe,
    config: DecoderConfig,
    plan: Sequence[LayerDims],
    weights: Weights | None,
    *,
    device: str = "cpu",
    room: int = WORKING_SET,
) -> dict[str, Forecast]:
    """By phase, in the order of a run.

    Args:
        config: the dense model.
        plan: widths that it will have, layer by layer, or with equal shares.
        weights: the model itself if it can be read: reading is then part of what is measured.
        room: bytes for the activations of a batch.
    """
    held, needs = rss_bytes(), working_bytes(config, recipe, room)
    times = _times(recipe, config, plan, weights, device, room)
    return {
        phase: Forecast(seconds, held + needs[phase], 0 if device == "cpu" else needs[phase])
        for phase, seconds in times.items()
    }


def _times(
    recipe: Recipe,
    config: DecoderConfig,
    plan: Sequence[LayerDims],
    weights: Weights | None,
    device: str,
    room: int,
) -> dict[str, float]:
    factor = max(1, -(-max(dims.d_ff for dims in config.layers) // WIDEST))
    small, planned = _narrowed(config, factor), _narrowed(config.with_layers(plan), factor).layers[0]
    length = min(LENGTH, recipe.calibration.seq_len)
    found: dict[tuple[int, int], dict[str, float]] = {}
    for layers in (1, 2):
        part = FirstLayers(small.with_layers(small.layers[:1] * layers), weights if factor == 1 else None)
        for samples in SAMPLES:
            tokens = torch.randint(small.vocab, (samples, length), generator=torch.Generator().manual_seed(0))
            best = [_measured(recipe, part, (planned,) * layers, tokens, device, room) for _ in range(2)]
            found[layers, samples] = {phase: min(one[phase] for one in best) for phase in best[0]}
    few, more = SAMPLES
    all_tokens = _tokens(recipe)
    result = {}
    for phase in found[1, few]:
        one, two, longer, both = (found[key][phase] for key in ((1, few), (2, few), (1, more), (2, more)))
        span = (more - few) * length
        per_token_and_layer = max(0.0, ((both - longer) - (two - one)) / span)
        per_token = max(0.0, (longer - one) / span - per_token_and_layer)
        per_layer = max(0.0, two - one - per_token_and_layer * few * length)
        fixed = max(0.0, one - per_layer - (per_token + per_token_and_layer) * few * length)
        layers, tokens_wanted = len(config.layers), all_tokens[phase]
        result[phase] = (
            fixed
            + layers * (per_layer * factor**3 + per_token_and_layer * factor**2 * tokens_wanted)
            + per_token * factor * tokens_wanted
        )
    return result


def _narrowed(config: DecoderConfig, factor: int) -> DecoderConfig:
    """The same proportions at a fraction of the widths; head sizes stay."""

    def fewer(count: int) -> int:
        return max(1, round(count / factor))

    def narrow(dims: LayerDims) -> LayerDims:
        kv_heads = fewer(dims.kv_heads)
        return replace(dims, heads=kv_heads * dims.group, kv_heads=kv_heads, d_ff=fewer(dims.d_ff) // 32 * 32 or 32)

    if factor == 1:
        return config
    layers = [narrow(dims) for dims in config.layers]
    return replace(config.with_layers(layers), d_model=fewer(config.d_model) // 64 * 64 or 64)


def _tokens(recipe: Recipe) -> dict[str, int]:
    """How many tokens each phase looks at."""
    calibration = recipe.calibration.samples * recipe.calibration.seq_len
    scored = recipe.evaluation.tokens
    return {
        "baseline": scored,
        "sensitivity": min(calibration, sensitivity.TOKENS),
        "curves": min(calibration, curves.TOKENS),
        "importance": calibration,
        "compress": calibration,
        "evaluate": scored,
    }


def _measured(
    recipe: Recipe, weights: Weights, plan: tuple[LayerDims, ...], tokens: Tensor, device: str, room: int
) -> dict[str, float]:
    """Seconds of every phase of the recipe on these layers and tokens."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for phase, work in _phases(recipe, weights, plan, tokens, Path(folder), device, room):
            started = time.perf_counter()
            work()
            seconds[phase] = time.perf_counter() - started
    return seconds


def _phases(
    recipe: Recipe,
    weights: Weights,
    plan: tuple[LayerDims, ...],
    tokens: Tensor,
    work: Path,
    device: str,
    room: int,
) -> Iterator[tuple[str, Callable[[], object]]]:
    spec, config, sweep = recipe.flat, weights.config, Sweep.of(recipe.calibration, device, room)
    yield "baseline", lambda: perplexity(weights, tokens, device=device)
    if spec is not None and plan != config.layers:
        if spec.sensitive:
            yield "sensitivity", lambda: output_sensitivity(weights, tokens, work, sweep=sweep)
        if spec.parts.allocation == "curves":
            yield "curves", lambda: error_curves(weights, tokens, None, work, ridge=spec.ridge, sweep=sweep)
        elif spec.parts.allocation == "iprs":
            yield "importance", lambda: layer_importance(weights, tokens, work, sweep=sweep)

    grids = planned_grids(config.with_layers(plan), recipe.gptq)

    def compress() -> None:
        stages = stages_of(recipe, RankPlan(plan, 1.0, 1.0), grids, config, work)
        reference = spec is not None and spec.corrects
        for block in walk(weights, tokens, work, lambda _: None, reference=reference, sweep=sweep):
            for stage in stages:
                stage.apply(block)

    if recipe.stages:
        yield "compress", compress
    yield "evaluate", lambda: perplexity(weights, tokens, device=device)


def working_bytes(config: DecoderConfig, recipe: Recipe, room: int = WORKING_SET) -> dict[str, int]:
    """What each phase holds at its largest, besides the process itself."""
    m, f, tables = config.d_model, max(dims.d_ff for dims in config.layers), config.vocab * config.d_model
    heads = max(dims.heads * dims.d_v for dims in config.layers)
    layer = max(dims.parameters(m) for dims in config.layers)
    half = 4 * max(3 * f * m, layer - 3 * f * m)
    text, scored = recipe.calibration, recipe.evaluation
    one = activation_bytes(config) * text.seq_len
    batch = min(max(room, one), activation_bytes(config) * min(feed.BATCH_TOKENS, text.samples * text.seq_len))
    rows = min(4, scored.tokens // scored.seq_len)  # that go through an evaluation together
    evaluated = 4 * scored.tokens * m + max(
        half + activation_bytes(config) * rows * scored.seq_len, 6 * tables + 8 * LOGITS_AT_ONCE
    )
    grams = 4 * (f**2 + m**2)
    fisher = 12 * m**2
    eliminating = grams + 8 * f**2 + 8 * f * m + fisher if recipe.flat is not None else 0
    solved = 4 * (2 * f * m + 5 * min(2 * f * m, WEIGHTS_AT_ONCE))
    rounding = grams + 20 * f**2 + solved if recipe.gptq is not None else 0
    gradients = 8 * min(sensitivity.TOKENS, text.samples * text.seq_len) * m
    length = min(sensitivity.LENGTH, text.seq_len)
    return {
        "baseline": int(evaluated),
        "sensitivity": int(gradients + max(half + 2 * batch, 6 * tables + 16 * length * config.vocab)),
        "curves": int(half + max(batch + grams, eliminating, 28 * heads**2)),
        "importance": int(2 * half + batch),
        "compress": int(max(half + max(batch + grams, eliminating, rounding), 10 * tables if recipe.gptq else 0)),
        "evaluate": int(evaluated),
    }


def working_set(config: DecoderConfig, recipe: Recipe, memory: int | None) -> int:
    """Bytes for the activations of a batch, so that the whole stays below ``memory``.

    Raises:
        RecipeError: a single sample does not fit.
    """
    if memory is None:
        return WORKING_SET
    least = rss_bytes() + max(working_bytes(config, recipe, 1).values())
    if least > memory:
        raise RecipeError(
            f"--memory: {memory / 1e9:.2f} GB is too little; with one sample of {recipe.calibration.seq_len} tokens at "
            f"a time this model needs about {least / 1e9:.2f} GB: give that much, or lower calibration.seq_len"
        )
    room = WORKING_SET
    while room > 1 and rss_bytes() + max(working_bytes(config, recipe, room).values()) > memory:
        room //= 2
    return room
