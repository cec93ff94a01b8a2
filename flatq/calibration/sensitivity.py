"""Fisher information of the loss with respect to the residual stream after each block.

An output error e of a block changes the loss, to second order, by ``e F e^T / 2``, where F is the Fisher information at
that point. It is estimated once on a few thousand calibration tokens. It converts errors of all layers, attention and
MLP, to the same unit, so that one budget can be divided between them.

This is the true Fisher, not the empirical one: at the logits it is ``diag(p) - p p^T`` with the model's probabilities
p. Gaussian noise of that covariance is backpropagated through the model, and its second moment at each block is F. The
empirical Fisher (gradients of the text's log-likelihood) is dominated by the few tokens that the model predicts badly,
and gives worse choices from the same number of tokens (Kunstner et al., arXiv 1905.12558; numbers in
docs/decisions/0016).

The gradient takes one forward and one backward pass, block by block: the hidden states between blocks are kept in a
memory-mapped file, and each block is differentiated separately, so memory is one block and its activations.

Gradients of single tokens are heavy-tailed (the first token of a sequence has hundreds of times the median norm), so
each gradient is clipped to three times the median norm before it enters the sum.

Axes: n rows, s positions, m d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from flatq.calibration.block import REMEDY
from flatq.calibration.grams import finite
from flatq.calibration.half_layers import half_layers
from flatq.calibration.states import AUTO, Execution, HiddenStates, batch_tokens, embedded, pieces, stored_as
from flatq.errors import ArtifactError, NumericsError
from flatq.linalg import factor_
from flatq.machine import distributed
from flatq.machine.precision import blocks_in, forward_precision
from flatq.machine.progress import progress
from flatq.model.decoder import DecoderConfig, DecoderLayer, locate
from flatq.model.weights import HALVES, Weights, load_head, load_last_norm

FILE = "sensitivity.f32"
TOKENS, LENGTH = 2048, 256  # of the calibration tokens, in rows of
LOGITS = 512  # tokens whose logits are in memory together (at least one row)
LONGEST = 3.0  # clipping norm of a token's gradient, in median norms


class Sensitivity:
    """Fisher information of the residual stream after every block, [2 * layers, m, m], on disk; read one at a time.

    Args:
        config: of the dense model.
        work: folder of the file.
        new: whether to create it.

    Raises:
        ArtifactError: it was not measured.
    """

    def __init__(self, config: DecoderConfig, work: Path, *, new: bool = False) -> None:
        if not new and not (work / FILE).exists():
            raise ArtifactError(f"{work / FILE}: was not measured or is lost; start over with --fresh")
        self._feed = HiddenStates(work / FILE, (len(HALVES) * len(config.layers), config.d_model, config.d_model))

    def __len__(self) -> int:
        return len(self._feed.states)

    def __getitem__(self, block: int) -> Tensor:
        found = self._feed.states[block].clone()
        self._feed.forget()
        return found

    def __setitem__(self, block: int, moment: Tensor) -> None:
        self._feed.states[block] = moment
        self._feed.forget()


def output_sensitivity(weights: Weights, tokens: Tensor, work: Path, *, execution: Execution = AUTO) -> Sensitivity:
    """Fisher information of the residual stream after every block, mean over tokens.

    The result is a memory-mapped file in ``work``; ``Sensitivity`` opens it again.

    Args:
        tokens: calibration tokens, int64 [n, s]; ``TOKENS`` of them are used.
        work: folder for the hidden states.
    """
    config = weights.config
    tokens = pieces(tokens, LENGTH, TOKENS)
    work.mkdir(parents=True, exist_ok=True)
    blocks = len(HALVES) * len(config.layers)
    dtype = stored_as(execution.states, blocks * tokens.numel(), config.d_model)
    states = _States(weights, tokens, work / "gradients", dtype, execution)
    found = Sensitivity(config, work, new=True)
    with (
        progress("sensitivity", 2 * blocks) as advance,
        forward_precision(execution.precision, execution.device, gradients=True),
    ):
        for done, _, half, layer in half_layers(weights, device=execution.device):
            states.forward(done, layer, half)
            advance()
        gradient = states.drawn_gradient(weights)
        for done, index, half, layer in half_layers(weights, device=execution.device, backwards=True):
            at_output = states.before_norm(done, layer, half, gradient)
            moment = _second_moment(at_output, states.mine, len(tokens))
            if not finite(moment):
                raise NumericsError(f"layer {index} {half}: the gradient after it is not finite; {REMEDY}")
            found[done] = moment
            del at_output
            gradient = states.backward(done, layer, half, gradient)
            advance()
    states.close()
    return found


class _States:
    """Hidden states between all blocks, [2 * layers + 1, n, s, m] on disk; forward and backward through a block."""

    def __init__(self, weights: Weights, tokens: Tensor, path: Path, dtype: torch.dtype, execution: Execution) -> None:
        config = weights.config
        (rows, length), points = tokens.shape, len(HALVES) * len(config.layers) + 1
        self.feed = HiddenStates(path, (points * rows, length, config.d_model), dtype)
        self.states = self.feed.states.view(points, rows, length, config.d_model)
        self.length, self.mine, self.execution, self.device = (
            length,
            distributed.share(rows),
            execution,
            execution.device,
        )
        # Gradients need as much memory as activations.
        self.batch_tokens = batch_tokens(config, execution.working_set_bytes) // 2
        self.positions = locate(config, 1, length, device=torch.device(self.device))
        for rows_at_once in self.batches(self.batch_tokens):
            self.states[0, rows_at_once] = embedded(tokens[rows_at_once], weights.tensor("embed.weight"))

    def batches(self, tokens: int) -> Iterator[slice]:
        """Slices of this process's rows, at most ``tokens`` tokens each (at least one row)."""
        step = max(1, tokens // self.length)
        for start in range(self.mine.start, self.mine.stop, step):
            yield slice(start, min(start + step, self.mine.stop))
            self.feed.forget()

    def forward(self, done: int, layer: DecoderLayer, half: str) -> None:
        with torch.no_grad():
            for rows in self.batches(self.batch_tokens):
                x = self.states[done, rows].to(self.device, torch.float32)
                self.states[done + 1, rows] = self._run(layer, half, x).cpu()

    def _run(self, layer: DecoderLayer, half: str, x: Tensor) -> Tensor:
        with blocks_in(self.execution.precision, self.device):
            return layer.run(half, x, self.positions)

    def backward(self, done: int, layer: DecoderLayer, half: str, gradient: Tensor) -> Tensor:
        """Gradient before the block from the one after it, for the rows of this process, [n, s, m]."""
        for rows in self.batches(self.batch_tokens):
            mine = self._of_mine(rows)
            x = self.states[done, rows].to(self.device, torch.float32).requires_grad_()
            (gradient[mine],) = torch.autograd.grad(self._run(layer, half, x), x, gradient[mine])
        return gradient

    def before_norm(self, done: int, layer: DecoderLayer, half: str, gradient: Tensor) -> Tensor:
        """Gradient of the output of o or down, [n, s, m]; that of the residual stream unless a norm is in between."""
        if not layer.config.post_norms:
            return gradient
        found = torch.empty_like(gradient)
        for rows in self.batches(self.batch_tokens):
            mine, x = self._of_mine(rows), self.states[done, rows].to(self.device, torch.float32)
            with blocks_in(self.execution.precision, self.device):
                with torch.no_grad():
                    output = layer.output(half, x, self.positions)
                output = output.float().requires_grad_()
                (found[mine],) = torch.autograd.grad(layer.leave(half, x, output), output, gradient[mine])
        return found

    def drawn_gradient(self, weights: Weights) -> Tensor:
        """Logit noise with the Fisher covariance, backpropagated to the input of the final norm, [n, s, m]."""
        device = self.device
        norm, head = load_last_norm(weights, device=device), load_head(weights, device=device)
        found = torch.zeros(len(self.mine), *self.states.shape[2:], device=device)
        for rows in self.batches(LOGITS):
            x = self.states[-1, rows].to(device, torch.float32).requires_grad_()
            normed = norm(x)
            logits = head(normed.detach())
            chances, slope = logits.softmax(-1), head.slope(logits)
            del logits
            pull = unsure(chances, _noise(rows, chances))
            pull = (pull if slope is None else pull * slope) @ head.weight
            (found[self._of_mine(rows)],) = torch.autograd.grad(normed, x, pull)
        return found

    def _of_mine(self, rows: slice) -> slice:
        """The same rows, relative to the first row of this process."""
        return slice(rows.start - self.mine.start, rows.stop - self.mine.start)

    def close(self) -> None:
        """Delete the file of hidden states."""
        distributed.barrier()
        self.feed.path.unlink(missing_ok=True)


def unsure(chances: Tensor, noise: Tensor) -> Tensor:
    """Noise of covariance ``diag(p) - p p^T``, [..., vocab]: the Fisher information of a categorical distribution.

    Args:
        chances: probabilities p, [..., vocab]; overwritten.
        noise: standard normal, the same shape; overwritten.
    """
    root = chances.sqrt_()
    noise.mul_(root)
    return noise.sub_(root.square_().mul_(noise.sum(-1, keepdim=True)))


def _noise(rows: slice, like: Tensor) -> Tensor:
    """Standard normal noise, seeded per row, so that it does not depend on batches, processes or devices."""
    noise = torch.empty(like.shape)
    for row, part in zip(range(rows.start, rows.stop), noise, strict=True):
        part.normal_(generator=torch.Generator().manual_seed(row))
    return noise.to(like.device)


def _second_moment(gradient: Tensor, mine: range, rows: int) -> Tensor:
    """Second moment over all tokens of all processes, gradients clipped to ``LONGEST`` median norms, [m, m]."""
    lengths = gradient.new_zeros(rows, gradient.shape[1])
    lengths[mine.start : mine.stop] = gradient.norm(dim=-1)
    longest = LONGEST * distributed.all_reduce(lengths).median()
    cut = gradient * (longest / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
    flat = cut.flatten(0, 1)
    return distributed.all_reduce(flat.T @ flat).cpu() / lengths.numel()


def weighted(w: Tensor, fisher: Tensor | None) -> Tensor:
    """``R^T W`` with ``R R^T = F``, for the weight W of a projection into the residual stream, [m, i].

    Squared errors of the result are changes of the loss. Any square root R works, and the Cholesky factor is much
    cheaper than the symmetric root. The ridge of 1e-6 times the norm covers directions without gradients.

    Args:
        w: [m, i].
        fisher: F, [m, m]; None returns ``w``.
    """
    if fisher is None:
        return w
    root = fisher.to(w.device, torch.float64, copy=True).mT
    root.diagonal().add_(1e-6 * float(fisher.norm()) or 1.0)
    return factor_(root).to(w.dtype).T @ w
