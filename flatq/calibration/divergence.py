"""Divergence of a model from the dense one: perplexities, KL divergence, top-1 agreement, with standard errors.

Perplexity measures how well a text is predicted; on text similar to the calibration text it underestimates the loss of
quality. KL divergence and top-1 agreement compare the predictions of the two models at every position, independent of
the text's own next token.

Standard errors are over rows, not over tokens: tokens of a row share their context, so their measures are correlated
and an error over tokens would be too small. Rows are windows of the text and are treated as independent. The error
of the damage is paired (difference of the two models on the same row), which removes the variance between rows. With
one row the standard error is None.

Memory is half a layer, the final hidden states of both models ([tokens, m] float32) and the logits of a few positions.

Axes: n rows, s positions, m d_model, p positions of a chunk, v vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor
from torch.nn import functional as F

from flatq.artifact import save_shard
from flatq.calibration.perplexity import final_hidden
from flatq.errors import NumericsError, RecipeError
from flatq.files import as_noted, note_digest
from flatq.machine import distributed
from flatq.machine.device import exact
from flatq.model.weights import Head, Weights, load_head

LOGITS_AT_ONCE = 1 << 22  # 16 MiB of float32; a chunk holds about six arrays of that size
MEASURES = 4  # per position: nll of the dense model, nll of the other, KL, agreement
BINS = 16  # parts of a row, for how KL depends on the position


@dataclass(frozen=True, slots=True)
class Divergence:
    """Comparison of a model with the dense one on one text; standard errors are over rows, None for a single row.

    Attributes:
        rows, tokens: number of windows, and of predicted positions in them.
        baseline_perplexity, perplexity: of the dense model and of the compared model.
        damage: ``ln(perplexity / baseline_perplexity)``, nats per token.
        kl: mean over positions of KL(dense || other), nats.
        top1: fraction of positions where the most likely token is the same.
        kl_by_position: mean KL of consecutive parts of a row, nearly equal in length, first part first; nats.
    """

    rows: int
    tokens: int
    baseline_perplexity: float
    perplexity: float
    damage: float
    damage_stderr: float | None
    kl: float
    kl_stderr: float | None
    top1: float
    top1_stderr: float | None
    kl_by_position: tuple[float, ...] = ()

    @classmethod
    def of(cls, means: Tensor, positions: int) -> Divergence:
        """Aggregate the mean measures of each row.

        Args:
            means: float64 [n, 4 + parts], see ``row_means``.
            positions: number of predicted positions in each row.

        Raises:
            NumericsError: a measure is not finite, or too large for a perplexity.
        """
        dense, other, kl, top1, *parts = (value.item() for value in means.mean(0))
        largest = math.log(torch.finfo(torch.float64).max)
        for what, value in (("the dense model", dense), ("the compressed model", other)):
            if not math.isfinite(value) or value > largest:
                raise NumericsError(
                    f"evaluation: the mean negative log-likelihood of {what} is {value}, which is no perplexity; its "
                    "weights are damaged or overflow float32: check the source checkpoint with `flatq check`"
                )
        paired = torch.stack([means[:, 1] - means[:, 0], means[:, 2], means[:, 3]], 1)
        errors: list[float | None] = [None, None, None]
        if len(means) > 1:
            errors = [value.item() for value in paired.std(0) / math.sqrt(len(means))]
        return cls(
            rows=len(means),
            tokens=len(means) * positions,
            baseline_perplexity=math.exp(dense),
            perplexity=math.exp(other),
            damage=other - dense,
            damage_stderr=errors[0],
            kl=kl,
            kl_stderr=errors[1],
            top1=top1,
            top1_stderr=errors[2],
            kl_by_position=tuple(parts),
        )


def parts_of(positions: int) -> int:
    """Into how many parts a row of so many predicted positions is divided."""
    return min(BINS, positions)


def row_means(measures: Tensor) -> Tensor:
    """Means of a row, and of the KL in each of its parts: float64 [p, 4] -> float64 [4 + parts]."""
    parts = torch.tensor_split(measures[:, 2], parts_of(len(measures)))
    return torch.cat([measures.mean(0), torch.stack([part.mean() for part in parts])])


class DenseStates:
    """Final hidden states of the dense model, computed once per text and cached on disk for later comparisons.

    Args:
        weights: of the dense model.
        folder: of the cache; may contain states of an earlier process.
    """

    def __init__(self, weights: Weights, folder: Path, *, device: str = "cpu") -> None:
        self.weights, self.device = weights, device
        self._folder = folder
        self._whole = set[Path]()  # files whose digest this process has compared, or that it wrote

    def hidden(self, tokens: Tensor, *, on_half: Callable[[], object] | None = None) -> Tensor:
        """Inputs of the dense model's LM head, int64 [n, s] -> float32 [n, s, m].

        Cached states are used if their tokens start with these rows.
        """
        for path in sorted(self._folder.glob("*.safetensors")):
            if path not in self._whole and not as_noted(path):
                continue
            self._whole.add(path)
            with safetensors.safe_open(path, framework="pt") as stored:
                known: Tensor = stored.get_tensor("tokens")
                if known.shape[1:] == tokens.shape[1:] and torch.equal(known[: len(tokens)], tokens.cpu()):
                    found: Tensor = stored.get_slice("hidden")[: len(tokens)]
                    return found
        hidden = final_hidden(self.weights, tokens, device=self.device, on_half=on_half)
        self._folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
        path = self._folder / f"{name}.safetensors"
        save_shard(path, {"tokens": tokens, "hidden": hidden})
        note_digest(path)
        self._whole.add(path)
        return hidden

    def head(self) -> Head:
        """The dense model's head, float32, on its device."""
        return load_head(self.weights, device=self.device)


def shared_rows(tokens: Tensor) -> Tensor:
    """The rows of int64 [n, s] that this process computes.

    Raises:
        RecipeError: fewer than one row or two positions.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise RecipeError(
            f"evaluation tokens have shape {list(tokens.shape)}: at least one row of two positions is needed; "
            "give more held-out text or a shorter seq_len"
        )
    mine = distributed.share(len(tokens))
    return tokens[mine.start : mine.stop]


@torch.inference_mode()
def divergence(
    dense: DenseStates, weights: Weights, tokens: Tensor, *, on_half: Callable[[], object] | None = None
) -> Divergence:
    """Compare a model with the dense one; several processes split the rows between them.

    Args:
        dense: the reference.
        weights: of the compared model; same vocabulary.
        tokens: int64 [n, s]; position 0 of each row is given, positions 1 .. s-1 are predicted.
        on_half: called after each half layer of ``weights``.

    Raises:
        RecipeError: fewer than one row or two positions, or a token is not in the vocabulary.
        NumericsError: a measure is not finite.
    """
    own, mine = shared_rows(tokens), distributed.share(len(tokens))
    means = torch.zeros(len(tokens), MEASURES + parts_of(tokens.shape[1] - 1), dtype=torch.float64)
    if len(own):
        reference = dense.hidden(own)
        hidden = final_hidden(weights, own, device=dense.device, on_half=on_half)
        heads = dense.head(), load_head(weights, device=dense.device)
        step = max(1, LOGITS_AT_ONCE // weights.config.vocab)
        for row in range(len(own)):
            parts = []
            for start in range(0, own.shape[1] - 1, step):
                at = slice(start, min(start + step, own.shape[1] - 1))
                pair = [
                    head(states[row, at].to(dense.device))
                    for states, head in zip((reference, hidden), heads, strict=True)
                ]
                parts.append(position_measures(pair[0], pair[1], own[row, 1:][at].to(dense.device)))
            means[mine.start + row] = row_means(torch.cat(parts)).cpu()
    return Divergence.of(distributed.all_reduce(means), tokens.shape[1] - 1)


@torch.inference_mode()
def dense_perplexity(dense: DenseStates, tokens: Tensor, *, on_half: Callable[[], object] | None = None) -> float:
    """Perplexity of the dense model; caches its hidden states for ``divergence``. Raises the same errors."""
    own, head = shared_rows(tokens), dense.head()
    total = torch.zeros((), dtype=torch.float64)
    if len(own):
        hidden, targets = dense.hidden(own, on_half=on_half)[:, :-1].flatten(0, 1), own[:, 1:].flatten()
        step = max(1, LOGITS_AT_ONCE // len(head))
        for states, wanted in zip(torch.split(hidden, step), torch.split(targets, step), strict=True):
            logits = head(states.to(dense.device))
            total += exact(F.cross_entropy(logits, wanted.to(dense.device), reduction="none")).sum().cpu()
    mean = distributed.all_reduce(total).item() / (len(tokens) * (tokens.shape[1] - 1))
    if not math.isfinite(mean) or mean > math.log(torch.finfo(torch.float64).max):
        raise NumericsError(
            f"evaluation: the mean negative log-likelihood of the dense model is {mean}, which is no perplexity; the "
            "weights are damaged or overflow float32: check the source checkpoint with `flatq check`"
        )
    return math.exp(mean)


def position_measures(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Measures of each position.

    KL is summed as ``p (d + exp(-d) - 1)`` with ``d = log p - log q``, which equals ``p d`` because both distributions
    sum to one. Every term is at least 0, so rounding makes no divergence negative, and equal logits give exactly 0.

    Args:
        reference, logits: float32 [p, v].
        targets: int64 [p].

    Returns:
        float64 [p, 4]: nll of the reference, nll of the other, KL(reference || other), 1 where top-1 agrees.
    """
    log_p, log_q = F.log_softmax(reference.float(), -1), F.log_softmax(logits.float(), -1)
    apart = log_p - log_q
    kl = (log_p.exp() * (apart + torch.expm1(-apart)).clamp_(min=0)).sum(-1)
    at = targets[:, None]
    agree = reference.argmax(-1) == logits.argmax(-1)
    found = (-log_p.gather(1, at)[:, 0], -log_q.gather(1, at)[:, 0], kl, agree.float())
    return torch.stack([exact(value) for value in found], 1)
