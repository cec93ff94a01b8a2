"""How much the model's loss minds an error at each point of the residual stream.

A block's output error e changes the loss, to second order, by ``e F e^T / 2`` with F the Fisher information at that
point: the second moment of the loss's gradient. Measured once on a few thousand calibration tokens, it gives errors of
different layers, and of attention and MLP, one unit, so that one budget can be shared out between all of them.

The gradient comes from one forward and one backward sweep, block by block: the hidden states between blocks are kept in
a memory-mapped file, and each block is differentiated alone, so memory is one block and its activations.

Gradients of single tokens are heavy-tailed (the first token of a sequence carries hundreds of times the median), so
each is shortened to three times the median length before it enters the sum.

Axes: n rows, s positions, m d_model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatq.decoder import DecoderConfig, RMSNorm, locate
from flatq.progress import progress
from flatq.walk import Feed, forward_precision
from flatq.weights import HALVES, Weights, dense, load_half

FILE = "sensitivity.f32"
TOKENS, LENGTH = 4096, 512  # of the calibration tokens, in rows of
LONGEST = 3.0  # of a token's gradient, in median lengths


def output_sensitivity(
    weights: Weights, tokens: Tensor, work: Path, *, precision: str = "auto", device: str = "cpu"
) -> Tensor:
    """Fisher information of the residual stream after every block, float32 [2 * layers, m, m], per token.

    The result lives in a memory-mapped file of ``work``; ``measured_sensitivity`` opens it again.

    Args:
        tokens: calibration tokens, int64 [n, s]; the first ``TOKENS`` are used.
        work: folder for the hidden states.
    """
    config = weights.config
    length = min(LENGTH, tokens.shape[1])
    tokens = tokens[: max(1, TOKENS // length), :length]
    order = [(index, half) for index in range(len(config.layers)) for half in HALVES]
    shape = (*tokens.shape, config.d_model)
    work.mkdir(parents=True, exist_ok=True)
    feed = Feed(work / "gradients.f32", (shape[0] * (len(order) + 1), shape[1], shape[2]))
    states = feed.states.view(-1, *shape)
    states[0] = F.embedding(tokens, dense(weights.tensor("embed.weight")))
    positions = locate(config, shape[0], length, device=torch.device(device))
    found = measured_sensitivity(config, work)
    with progress("sensitivity", 2 * len(order)) as advance, forward_precision(precision, gradients=True):
        for done, (index, half) in enumerate(order):
            layer = load_half(weights, index, half, device=device)
            with torch.no_grad():
                states[done + 1] = layer.run(half, states[done].to(device), positions).cpu()
            advance()
        gradient = _loss_gradient(weights, states[-1], tokens, device)
        for done, (index, half) in reversed(list(enumerate(order))):
            found[done] = _second_moment(gradient)
            layer = load_half(weights, index, half, device=device)
            x = states[done].to(device).requires_grad_()
            (gradient,) = torch.autograd.grad(layer.run(half, x, positions), x, gradient)
            advance()
    feed.path.unlink()
    return found


def measured_sensitivity(config: DecoderConfig, work: Path) -> Tensor:
    """What ``output_sensitivity`` left in ``work``, read from the disk as it is used."""
    return Feed(work / FILE, (len(HALVES) * len(config.layers), config.d_model, config.d_model)).states


def _loss_gradient(weights: Weights, last: Tensor, tokens: Tensor, device: str) -> Tensor:
    """Gradient of the summed log-likelihood at the stream that the final norm reads, [n, s, m], row by row."""
    config = weights.config
    norm = RMSNorm(config.d_model, config.norm_eps).to(device)
    norm.weight = nn.Parameter(dense(weights.tensor("norm.weight")).to(device), requires_grad=False)
    head = dense(weights.tensor("embed.weight" if config.tied_head else "head.weight")).to(device)
    rows = []
    for row, target in zip(last, tokens, strict=True):
        x = row.to(device).requires_grad_()
        loss = F.cross_entropy(F.linear(norm(x[:-1]), head), target[1:].to(device), reduction="sum")
        rows += torch.autograd.grad(loss, x)
    return torch.stack(rows)


def _second_moment(gradient: Tensor) -> Tensor:
    rows = gradient.flatten(0, -2)
    length = rows.norm(dim=1)
    rows = rows * (LONGEST * length.median() / length.clamp(min=1e-30)).clamp(max=1)[:, None]
    return (rows.T @ rows / len(rows)).cpu()


def weighted(w: Tensor, fisher: Tensor | None) -> Tensor:
    """``F^(1/2) W`` for a projection into the residual stream, [m, i]: squared errors become changes of the loss."""
    if fisher is None:
        return w.double()
    values, vectors = torch.linalg.eigh(fisher.double())
    return (vectors * values.clamp(min=0).sqrt()).T @ w.double()
