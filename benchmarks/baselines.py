"""Other people's ideas of how to make a decoder smaller, written small, for comparison only.

All see what flatq's own methods see: the same weights, the same calibration tokens, each block with the inputs that
the compressed blocks before it give. All spend the same budget, a share of the decoder's parameters, spread evenly.
None is a port of its authors' code; each docstring says what the paper has that is left out here.

    truncation   the first channels, no thought at all: what any method must beat
    magnitude    the channels with the largest weights
    svd          every linear as a product of two thin ones, nearest in its weights
    svd-llm      the same, nearest in its outputs (truncation-aware whitening)
    slicegpt     fewer directions of the residual stream

Axes: m d_model, f d_ff, k kv_heads, g group, d d_v before, r d_v after, o out, i in, n rows, s positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatq.calibration.block import Block
from flatq.calibration.grams import Gram
from flatq.calibration.perplexity import head_logits
from flatq.calibration.states import BATCH_TOKENS
from flatq.compress.mlp import leading_channels
from flatq.errors import NumericsError, RecipeError
from flatq.machine.precision import forward_precision
from flatq.model.decoder import DecoderConfig, DecoderLayer, LayerDims, locate
from flatq.model.weights import HALVES, Weights, dense, load_half, load_last_norm
from flatq.quantize.stage import READERS


class Stage(Protocol):
    """What is done to each block of the walk."""

    def apply(self, block: Block) -> None:
        """Change the block's linears."""
        ...


class Selection:
    """Keep some value dimensions of each head and some MLP channels as they are; nothing makes up for the others.

    ``by_norm`` keeps those whose weights have the largest norm: row of v with the columns of o that read it; rows of
    gate and up with the column of down (the group norm of structured magnitude pruning). Otherwise the first ones.
    """

    def __init__(self, layers: tuple[LayerDims, ...], *, by_norm: bool) -> None:
        self.layers, self.by_norm = layers, by_norm

    def apply(self, block: Block) -> None:
        """See ``Stage.apply``."""
        wanted, layer = self.layers[block.index], block.layer
        if block.half == "attention":
            scores = self._ranked(value_norms(layer, block.dims))  # [k, d]
            keep = torch.stack([leading_channels(head, wanted.d_v) for head in scores])  # [k, r]
            offset = block.dims.d_v * torch.arange(block.dims.heads)[:, None]
            rows = (keep + offset[: len(keep)]).flatten()
            columns = (keep.repeat_interleave(block.dims.group, 0) + offset).flatten()
            _keep_rows(block, "v", rows)
            block.narrow("o", layer.o.weight[:, columns], layer.o.bias)
        else:
            channels = leading_channels(self._ranked(channel_norms(layer)), wanted.d_ff)
            _keep_rows(block, "gate", channels)
            _keep_rows(block, "up", channels)
            block.narrow("down", layer.down.weight[:, channels], layer.down.bias)

    def _ranked(self, norms: Tensor) -> Tensor:
        """``norms``, or scores that fall with the index."""
        return norms if self.by_norm else -torch.arange(norms.shape[-1], dtype=norms.dtype).expand_as(norms)


def _keep_rows(block: Block, name: str, rows: Tensor) -> None:
    linear: nn.Linear = getattr(block.layer, name)
    block.narrow(name, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def value_norms(layer: DecoderLayer, dims: LayerDims) -> Tensor:
    """Squared norm of all weights that belong to a value dimension, [k, d]."""
    rows = layer.v.weight.view(dims.kv_heads, dims.d_v, -1).square().sum(-1)
    columns = layer.o.weight.view(-1, dims.kv_heads, dims.group, dims.d_v).square().sum((0, 2))
    return rows + columns


def channel_norms(layer: DecoderLayer) -> Tensor:
    """Squared norm of all weights that belong to an MLP channel, [f]."""
    return layer.gate.weight.square().sum(1) + layer.up.weight.square().sum(1) + layer.down.weight.square().sum(0)


class LowRank:
    """Every linear as a product of an [o, rank] and a [rank, i] matrix that together hold its share of parameters.

    The product is kept multiplied out: the outputs are those of the two thin matrices, and ``parameters`` counts them.
    ``whiten`` is SVD-LLM; without it this is the plain SVD, which does not look at any token.

    Source: SVD-LLM (arXiv 2403.07378), section 3.1. Left out: its second half, the parameter update by LoRA on 50,000
        instruction samples, which is training.
    Differs from the authors' code: o and down are whitened with what reaches them after the linears before them were
        truncated (theirs are of the dense model unless the sequential update is chosen).
    """

    def __init__(self, keep_ratio: float, *, whiten: bool) -> None:
        self.keep_ratio, self.whiten = keep_ratio, whiten

    def apply(self, block: Block) -> None:
        """See ``Stage.apply``."""
        for gram, names in READERS[block.half]:
            block.grams = {}  # what reaches o and down has changed with the linears before them
            root = square_root(block.observe()[gram].mean(), block.place) if self.whiten else None
            for name in names:
                linear: nn.Linear = getattr(block.layer, name)
                weight = nearest_of_rank(linear.weight, self.rank(tuple(linear.weight.shape)), root)
                block.narrow(name, weight, linear.bias)

    def rank(self, shape: tuple[int, ...]) -> int:
        """Rank at which two thin matrices hold ``keep_ratio`` of the parameters of one [o, i] matrix."""
        return max(1, round(self.keep_ratio * math.prod(shape) / sum(shape)))

    def parameters(self, config: DecoderConfig) -> int:
        """Weights of all thin matrices."""
        shapes = [shape for dims in config.layers for shape in linear_shapes(dims, config.d_model)]
        return sum(self.rank(shape) * sum(shape) for shape in shapes)


def linear_shapes(dims: LayerDims, d_model: int) -> Iterator[tuple[int, int]]:
    """[o, i] of the seven linears of a layer."""
    for readers in READERS.values():
        for _, names in readers:
            yield from (dims.shape(name, d_model) for name in names)


def square_root(gram: Tensor, place: str) -> Tensor:
    """Lower Cholesky factor of an input Gram, float64 [i, i], damped as little as makes it positive definite.

    Raises:
        NumericsError: a tenth of the mean diagonal was not enough.
    """
    c = gram.double()
    identity = torch.eye(len(c), dtype=c.dtype, device=c.device)
    for damping in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        lower, failed = torch.linalg.cholesky_ex(c + (damping * float(c.diagonal().mean()) or 1.0) * identity)
        if not failed:
            return lower
    raise NumericsError(f"{place}: the input Gram is not positive definite; check the weights for damage")


def nearest_of_rank(weight: Tensor, rank: int, root: Tensor | None = None) -> Tensor:
    """The [o, i] matrix of a rank that is nearest to ``weight``, in its outputs if the inputs' Gram is ``S S^T``.

    SVD-LLM cuts the singular values of ``W S`` and multiplies by ``S^-1``. With ``U`` the leading left singular
    vectors of ``W S`` that is ``U U^T W S S^-1 = U U^T W``, so the inverse is never formed.

    Args:
        root: S, [i, i]; None is the identity, the plain SVD.
    """
    w = weight.double()
    left = torch.linalg.svd(w if root is None else w @ root, full_matrices=False).U[:, :rank]
    return (left @ (left.T @ w)).to(weight.dtype)


@dataclass(frozen=True, slots=True)
class Sliced:
    """A sliced model's score: perplexity, width of its residual stream, its decoder parameters."""

    perplexity: float
    width: int
    parameters: int


@torch.inference_mode()
def slicegpt(
    weights: Weights, calibration: Tensor, heldout: Tensor, keep_ratio: float, *, precision: str = "auto"
) -> Sliced:
    """Perplexity of a decoder whose residual stream keeps its leading principal directions.

    Before each half layer the stream is rotated to the principal axes of its normed calibration tokens and cut to
    ``width``; the output projection writes into the axes of the next half, and a [width, width] matrix on the skip
    connection turns the old axes into the new ones. Rotating there and back is the same arithmetic as projecting the
    stream, ``x <- x Q Q^T``, which is what is done here: it needs no layer of another width, and the held-out tokens
    go through right behind the calibration tokens. The norm divides by the root mean square over the *old* width, as
    in the authors' code. Parameters are counted as deployed: sliced linears and skip matrices.

    Not reproduced: the saving in embedding and head (the budget is the decoder's), widths rounded to multiples of 8,
    layer-wise varying widths, the optional fine-tuning.

    Source: SliceGPT (arXiv 2401.15024), sections 3.2 to 3.4.

    Args:
        calibration: int64 [n, s]. heldout: int64 [n', s'], scored as ``perplexity`` scores.
    """
    config = weights.config
    width = sliced_width(config, keep_ratio)
    table = dense(weights.tensor("embed.weight"))
    seen, judged = F.embedding(calibration, table), F.embedding(heldout, table)
    for index in range(len(config.layers)):
        for half in HALVES:
            axes = principal_axes(seen, width, config.norm_eps)
            layer = load_half(weights, index, half)
            with forward_precision(precision):
                _through(layer, half, seen, axes)
            _through(layer, half, judged, axes)
    axes = principal_axes(seen, width, config.norm_eps)
    return Sliced(
        _score(weights, load_last_norm(weights)(judged @ axes @ axes.T), heldout),
        width,
        sliced_parameters(config, width),
    )


def sliced_parameters(config: DecoderConfig, width: int) -> int:
    """Decoder weights at a width of the residual stream: the linears, and a skip matrix per half layer if it is cut."""
    skips = 2 * len(config.layers) * width**2 if width < config.d_model else 0
    return sum(dims.parameters(width) for dims in config.layers) + skips


def sliced_width(config: DecoderConfig, keep_ratio: float) -> int:
    """The width whose parameters come closest to the budget; the whole width if nothing is to be removed."""
    budget = keep_ratio * config.decoder_parameters()
    if keep_ratio == 1:
        return config.d_model
    width = min(range(1, config.d_model), key=lambda width: abs(sliced_parameters(config, width) - budget))
    if width == 1:
        raise RecipeError(f"keep_ratio: {keep_ratio} leaves no residual stream; choose a larger one")
    return width


def principal_axes(x: Tensor, width: int, eps: float) -> Tensor:
    """Leading principal axes of the normed stream, [n, s, m] -> float32 [m, width]."""
    gram = Gram(x.shape[-1])
    for row in x:
        gram.update(row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps))
    vectors = torch.linalg.eigh(gram.mean().double()).eigenvectors
    return vectors.flip(-1)[:, :width].float()


def _through(layer: DecoderLayer, half: str, x: Tensor, axes: Tensor) -> None:
    """Project the stream and send it through half a layer, [n, s, m], in place."""
    for chunk in torch.split(x, max(1, BATCH_TOKENS // x.shape[1])):
        cut = chunk @ axes @ axes.T
        chunk.copy_(layer.run(half, cut, locate(layer.config, *cut.shape[:2])))


def _score(weights: Weights, hidden: Tensor, tokens: Tensor) -> float:
    targets = tokens[:, 1:].flatten()
    total = sum(
        F.cross_entropy(logits, targets[rows], reduction="sum").double().item()
        for rows, logits in head_logits(weights, hidden[:, :-1].flatten(0, 1))
    )
    mean = total / len(targets)
    if not math.isfinite(mean) or mean > 700:
        raise NumericsError(f"the sliced model's mean negative log-likelihood is {mean}, which is no perplexity")
    return math.exp(mean)
