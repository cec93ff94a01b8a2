"""Operation counts of each phase of a run, from shapes: FLOPs of forward passes, FLOPs of solves, bytes moved.

Counted are operations that grow with the cube of a width or with tokens times a squared width, and element-wise
operations on whole weights. Constants of an algorithm are explained next to its formula. Of a mixture of n experts,
those of a token are computed; the solves are of each expert.

Axes: t tokens, s positions, m d_model, f d_ff, o out_features, i in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from flatq.calibration.self_text import SIDE_BY_SIDE
from flatq.calibration.training import CHECKS, HELD_OUT, STEP_TOKENS
from flatq.machine.precision import resolved
from flatq.machine.speed import Speed
from flatq.model.decoder import DecoderConfig, LayerDims
from flatq.model.grid import CLIPS
from flatq.plan.decide import measurements
from flatq.quantize.stage import READERS
from flatq.recipe.grammar import Recipe
from flatq.stages import dense_states_needed

DOUBLE = 2.5  # cost of float64 products and factorizations, relative to float32 products
PASSES = 12 * len(CLIPS) + 60  # float32 passes over a weight: scale search and column loop of GPTQ
CHOICES = 6  # grids that a budget typically chooses from
STEP_PASSES = 40  # float32 passes over a weight in a step of training: decoding, its gradient, the update
READING = 12  # bytes moved for each weight that is read and converted to float32
FACTOR_BYTES = 40  # bytes moved for each weight in a step of recover: its gradient, sums over what a factor scales


@dataclass(frozen=True, slots=True)
class Operations:
    """FLOPs of forward passes, FLOPs of solves, and bytes moved."""

    forward: float = 0
    solve: float = 0
    moved: float = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def seconds(self, speed: Speed) -> float:
        """Time at the given speed, without overlap."""
        return self.forward / speed.forward + self.solve / speed.solve + self.moved / speed.moved


def operations(
    recipe: Recipe, config: DecoderConfig, plan: Sequence[LayerDims], tokens: dict[str, int], ranges: bool
) -> dict[str, Operations]:
    """Operations by phase, in the order of a run.

    Args:
        config: the dense model.
        plan: planned widths of each layer.
        tokens: number of tokens that each phase processes.
        ranges: whether an export needs the ranges of keys and values.
    """
    planned = config.with_layers(plan)
    length, scored = recipe.calibration.seq_len, recipe.evaluation[0].seq_len
    phases = {
        "self-text": lambda t: _written(recipe, config, t),
        "baseline": lambda t: _evaluated(config, t, scored),
        "sensitivity": lambda t: _sensitivity(config, t, length),
        "curves": lambda t: _curves(config, t, length),
        "importance": lambda t: _passed(config, t, length),
        "bits": lambda t: _bits(recipe, config, t, length),
        "choices": lambda t: _choices(config, t, length),
        "compress": lambda t: _compressed(recipe, config, planned, t),
        "recover": lambda t: _recovered(recipe, config, planned, t) + _evaluated(planned, tokens["evaluate"], scored),
        "evaluate": lambda t: _evaluated(planned, t, scored),
        "cache-ranges": lambda t: _passed(planned, t, length),
    }
    wanted = ["self-text"] if tokens["self-text"] else []
    wanted += ["baseline", *measurements(recipe, narrows=planned.layers != config.layers)]
    wanted += ["compress", *after_walk(recipe), "evaluate", *(["cache-ranges"] if ranges else [])]
    return {phase: phases[phase](tokens[phase]) for phase in wanted}


def _halves(config: DecoderConfig, dims: LayerDims, s: int) -> tuple[float, float]:
    """FLOPs per token of attention and of the MLP; a token attends to half of the positions on average."""
    m = config.d_model
    mlp, used = 3 * m * dims.d_ff, config.experts_per_token / config.experts if config.experts else 1.0
    attention = 2 * (dims.parameters(m) - mlp) + dims.heads * (dims.d_qk + dims.d_v) * s
    return attention, 2 * mlp * used


def _forward(config: DecoderConfig, t: int, s: int) -> float:
    return t * sum(sum(_halves(config, dims, s)) for dims in config.layers)


def _passed(config: DecoderConfig, t: int, s: int, times: float = 1) -> Operations:
    """Forward passes through all layers, with the bytes of activations: about 40 [m], 10 [f] and 2 [heads, s]."""
    m = config.d_model
    activations = sum(40 * m + 10 * dims.d_ff + 2 * dims.heads * s for dims in config.layers)
    return Operations(times * _forward(config, t, s), moved=4 * times * t * activations + READING * config.parameters())


def _written(recipe: Recipe, config: DecoderConfig, t: int) -> Operations:
    """Text generation in batches of rows; each step reads all weights."""
    text = recipe.calibration
    products = _forward(config, t, text.seq_len) + 2 * t * config.d_model * config.vocab
    moved = config.parameters() * t / min(SIDE_BY_SIDE, text.samples)
    if resolved(text.precision) == "bfloat16":
        return Operations(forward=products, moved=2 * moved)
    return Operations(solve=products, moved=4 * moved)


def _grams(config: DecoderConfig, dims: LayerDims) -> float:
    """FLOPs per token of the Grams of a layer; half of each symmetric matrix is computed, of experts all."""
    m = config.d_model
    attention = m**2 + (dims.heads * dims.d_v) ** 2 + 2 * dims.kv_heads * dims.d_v**2
    if config.experts:
        return attention + 2 * config.experts_per_token * (m**2 + (dims.d_ff // config.experts) ** 2)
    return attention + m**2 + dims.d_ff**2


def _evaluated(config: DecoderConfig, t: int, s: int) -> Operations:
    """Evaluation, in float32 independent of the precision of calibration."""
    head = 2 * t * config.d_model * config.vocab
    passed = _passed(config, t, s)
    return Operations(solve=passed.forward + head, moved=passed.moved + 16 * t * config.vocab)


def _sensitivity(config: DecoderConfig, t: int, s: int) -> Operations:
    """Forward pass, then forward again with backward pass; logits, and noise in their place for the gradients."""
    m, v = config.d_model, config.vocab
    moments = 2 * len(config.layers) * 2 * t * m**2
    return _passed(config, t, s, 3) + Operations(moments + 4 * t * m * v, moved=100 * t * v)


def _curves(config: DecoderConfig, t: int, s: int) -> Operations:
    m = config.d_model
    n = config.mlp_parts
    inner = sum(
        (config.experts_per_token * 2 if config.experts else 1) * (dims.d_ff // n) ** 2 for dims in config.layers
    )
    grams = inner + sum((dims.heads * dims.d_v) ** 2 for dims in config.layers)
    solves = sum(
        n * _eliminated(dims.d_ff // n, dims.d_ff // n // 10, m) + _value_basis(dims, m) for dims in config.layers
    )
    return _passed(config, t, s) + Operations(t * grams, solves)


def _eliminated(f: int, width: int, m: int) -> float:
    """Factor of the Fisher information, inverse of a Gram, and its updates until ``width`` channels are left."""
    return DOUBLE * m**3 / 3 + 2 * m**2 * f + f**3 + 0.85 * (f**3 - width**3) + m * (f**2 - width**2)


def _value_basis(dims: LayerDims, m: int) -> float:
    weighted = DOUBLE * m**3 / 3 + 2 * m**2 * dims.heads * dims.d_v
    return weighted + DOUBLE * (30 * dims.kv_heads * dims.d_v**3 + 2 * m * dims.heads * dims.d_v**2)


def _narrowed(recipe: Recipe, before: LayerDims, after: LayerDims, m: int, n: int) -> float:
    """The solves of the FLAT stage in one layer, whose MLP has n parts."""
    if recipe.flat is None:
        return 0
    (f, s), (wide, narrow) = (before.d_ff // n, after.d_ff // n), (before.heads * before.d_v, after.heads * after.d_v)
    found = 0.0
    if s < f:
        by_leverage = recipe.flat.parts.channels == "leverage"
        found += n * (f**3 if by_leverage else _eliminated(f, s, m))
        found += n * (2 * s * f * m + DOUBLE * (s**3 / 3 + 2 * s**2 * m) + 2 * f**2 * m)
    if narrow < wide:
        refit = 2 * wide**2 * narrow + 2 * wide * narrow**2 + narrow**3 / 3 + 2 * narrow**2 * m
        found += _value_basis(before, m) + DOUBLE * refit * recipe.flat.parts.refit + 2 * wide**2 * narrow
    return found + n * (s**3 / 3 + 2 * s**2 * m) * recipe.flat.corrects


def _rounded(o: int, i: int) -> Operations:
    """GPTQ of one weight: factorization, error propagation between columns, output energy."""
    return Operations(solve=i**3 / 3 + 3 * o * i**2, moved=4 * PASSES * o * i)


def _layer_rounded(config: DecoderConfig, dims: LayerDims) -> Operations:
    """GPTQ of a layer; linears that read the same activation share one factorization."""
    found, m, n = Operations(), config.d_model, config.mlp_parts
    expert = replace(dims, d_ff=dims.d_ff // n)
    for half, readers in READERS.items():
        for _, names in readers:
            shapes = [expert.shape(name, m) for name in names]
            once = _rounded(sum(o for o, _ in shapes), shapes[0][1])
            times = n if half == "mlp" else 1
            found += Operations(solve=times * once.solve, moved=times * once.moved)
    return found


def _tuned(config: DecoderConfig, steps: int, t: int, s: int) -> Operations:
    """Training of codes and scales: the outputs to reach, the steps (a backward pass is two forward), the checks."""
    passes = t + CHECKS * t / HELD_OUT + 3 * steps * s * max(1, STEP_TOKENS // s)
    return _passed(config, t, s, passes / t) + Operations(moved=4 * STEP_PASSES * steps * config.decoder_parameters())


def after_walk(recipe: Recipe) -> list[str]:
    """Names of the phases between the walk and the evaluation."""
    return [] if recipe.recover is None else ["recover"]


def _recovered(recipe: Recipe, config: DecoderConfig, planned: DecoderConfig, t: int) -> Operations:
    """Distillation: dense states of all tokens, checks on those held out, and steps.

    A step is four forward passes. Both heads are computed for every token of a step and of a check, and a product for
    the gradient. A step reads all weights twice, and has a gradient of each.
    """
    assert recipe.recover is not None
    s, m, v = recipe.calibration.seq_len, config.d_model, config.vocab
    checked = (CHECKS + 1) * -(-t // HELD_OUT)
    trained = recipe.recover.steps * s * max(1, recipe.recover.tokens // s)
    heads = Operations(2 * m * v * (2 * checked + 3 * trained), moved=40 * v * (checked + trained))
    passes = _passed(config, t, s) + _passed(planned, checked + 4 * trained, s)
    weights = recipe.recover.steps * planned.decoder_parameters() * (2 * READING + FACTOR_BYTES)
    return passes + heads + Operations(moved=weights)


def _bits(recipe: Recipe, config: DecoderConfig, t: int, s: int) -> Operations:
    """Measurement of bit errors: GPTQ of each unit with each choice, and a float32 forward pass of its block."""
    assert recipe.gptq is not None
    m, choices, found = (
        config.d_model,
        len(set(recipe.gptq.bit_choices)),
        Operations(moved=READING * config.parameters()),
    )
    for dims in config.layers:
        runs = 1 + 2 * choices  # a half layer has two units
        forward = t * sum(_halves(config, dims, s))
        found += Operations(2 * forward + t / 2 * _grams(config, dims), runs * (forward + 2 * t * m**2))
        once = _layer_rounded(config, dims)
        found += Operations(solve=choices * once.solve, moved=choices * once.moved)
    return found


def _choices(config: DecoderConfig, t: int, s: int) -> Operations:
    """Measurement of a budget's choices: as ``_bits``, but only one unit of a half layer needs forward passes."""
    m, found = config.d_model, Operations(moved=READING * config.parameters())
    for dims in config.layers:
        forward, once = t * sum(_halves(config, dims, s)), _layer_rounded(config, dims)
        found += Operations(2 * forward + t * _grams(config, dims), (1 + CHOICES) * (forward + t * m**2))
        found += Operations(solve=CHOICES * once.solve, moved=CHOICES * once.moved)
    head = _rounded(config.vocab, m)
    return found + Operations(solve=CHOICES * head.solve, moved=CHOICES * head.moved)


def _compressed(recipe: Recipe, config: DecoderConfig, planned: DecoderConfig, t: int) -> Operations:
    """The walk: each block is observed, changed and run again; with the dense model's blocks if a stage needs them."""
    m, s = config.d_model, recipe.calibration.seq_len
    reference, lag = dense_states_needed(recipe)
    along = reference or lag
    found = _passed(config, t, s, 2 if along else 1) + _passed(planned, t, s)
    for before, after in zip(config.layers, planned.layers, strict=True):
        drift = along * 2 * before.d_ff * m + lag * (4 * m**2 + 2 * before.heads * before.d_v * m)
        found += Operations(t * (_grams(config, before) + drift), _narrowed(recipe, before, after, m, config.mlp_parts))
        if recipe.gptq is not None:
            found += _layer_rounded(config, after)
    if recipe.gptq is not None and recipe.gptq.tune_steps:
        found += _tuned(planned, recipe.gptq.tune_steps, t, s)
    if recipe.gptq is not None and recipe.gptq.embedding is not None:
        found += Operations(t * m**2) + _rounded(config.vocab, m)
    return found
