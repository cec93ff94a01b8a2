"""Perplexity of a source or an artifact, with half a layer in memory at a time.

The dense model of a large run may not fit into memory. So the loop runs over half layers outside and over texts inside.
Memory is one half layer and the residual stream of all tokens (``4 * n * s * m`` bytes); each weight is read once. The
same code computes the reference logits that exports are verified against.

Everything runs in float32, independent of the stored type of the weights: dense source and quantized artifact use the
same arithmetic, so that the difference of their perplexities is caused by the compression alone.

Left out: sliding evaluation windows with overlap (each row is scored separately, as in the papers' tables) and
benchmark tasks (use lm-eval).

Axes: n rows, s positions, m d_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from flatq.calibration.half_layers import send_through
from flatq.calibration.states import embedded
from flatq.errors import NumericsError, RecipeError
from flatq.machine import distributed
from flatq.machine.device import exact
from flatq.model.weights import Weights, load_head, load_last_norm

LOGITS_AT_ONCE = 1 << 24  # 64 MiB of float32: large enough for an efficient product, small compared to half a layer


@dataclass(frozen=True, slots=True)
class Perplexity:
    """``value = exp(nll_sum / tokens)``; ``nll_sum`` in nats over the ``tokens`` predicted positions."""

    value: float
    nll_sum: float
    tokens: int


@torch.inference_mode()
def perplexity(
    weights: Weights,
    tokens: Tensor,
    *,
    device: str = "cpu",
    batch: int = 4,
    on_half: Callable[[], object] | None = None,
) -> Perplexity:
    """Perplexity of the model on rows of tokens.

    Args:
        weights: a source or an artifact.
        tokens: int64 [n, s]; position 0 of each row is context, positions 1 .. s-1 are scored.
        device: where half a layer and ``batch`` rows are computed.
        batch: rows per forward pass; changes speed and memory, not the result.
        on_half: called after each half layer, ``2 * layers`` times, for a progress bar.

    Raises:
        RecipeError: there is nothing to predict, or a token is not in the vocabulary.
        NumericsError: a log-likelihood is not finite.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise RecipeError(
            f"evaluation tokens have shape {list(tokens.shape)}: at least one row of two positions is needed; "
            "give more held-out text or a shorter seq_len"
        )
    mine, targets = distributed.share(len(tokens)), tokens[:, 1:]
    total = torch.zeros((), dtype=torch.float64)
    if mine:
        hidden = final_hidden(weights, tokens[mine.start : mine.stop], device=device, batch=batch, on_half=on_half)
        own = targets[mine.start : mine.stop].flatten()
        for rows, logits in head_logits(weights, hidden[:, :-1].flatten(0, 1), device=device):
            nll = F.cross_entropy(logits, own[rows].to(logits.device), reduction="none")
            total += exact(nll).sum().cpu()
    mean = distributed.all_reduce(total).item() / targets.numel()
    if not math.isfinite(mean) or mean > math.log(torch.finfo(torch.float64).max):
        raise NumericsError(
            f"evaluation: the mean negative log-likelihood is {mean}, so perplexity is not finite; the weights are "
            "damaged or overflow float32: check the source checkpoint with `flatq check`"
        )
    return Perplexity(math.exp(mean), total.item(), targets.numel())


@torch.inference_mode()
def final_hidden(
    weights: Weights,
    tokens: Tensor,
    *,
    device: str = "cpu",
    batch: int = 4,
    on_half: Callable[[], object] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Input of the LM head: residual stream after the final norm, int64 [n, s] -> ``dtype`` [n, s, m].

    The result stays in main memory; ``device`` holds half a layer and ``batch`` rows. In float64, whose rounding is
    a billionth of float32's, it shows how much of a number is float32's rounding noise.

    Raises:
        RecipeError: a token is not in the vocabulary.
    """
    config = weights.config
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab:
        raise RecipeError(
            f"tokens: ids run from {int(tokens.min())} to {int(tokens.max())}, the model's vocabulary is 0 to "
            f"{config.vocab - 1}; the tokenizer belongs to another model"
        )
    hidden = embedded(tokens.cpu(), weights.tensor("embed.weight")).to(dtype)
    chunks = torch.split(hidden, batch)  # views: written in place
    send_through(weights, chunks, device=device, on_half=on_half, dtype=dtype)
    norm = load_last_norm(weights)
    for chunk in chunks:
        chunk.copy_(norm(chunk))
    return hidden


def head_logits(weights: Weights, hidden: Tensor, *, device: str = "cpu") -> Iterator[tuple[slice, Tensor]]:
    """Logits of a few rows at a time, so that ``[rows, vocab]`` of a large vocabulary is never in memory.

    Args:
        weights: of the model.
        hidden: float32 or float64 [rows, m], from ``final_hidden``.
        device: where the head is computed.

    Yields:
        The slice of rows and their logits, of the type of ``hidden``, [some, vocab], on ``device``.
    """
    head = load_head(weights, device=device)
    head = replace(head, weight=head.weight.to(hidden.dtype))
    step = max(1, LOGITS_AT_ONCE // weights.config.vocab)
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, min(start + step, hidden.shape[0]))
        yield rows, head(hidden[rows].to(device))
