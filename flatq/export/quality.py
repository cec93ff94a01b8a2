"""Quality of an export in its runtime with default settings: the measures of ``calibration.divergence``.

The reference is the dense model, not the artifact, so that the loss includes that of the compression. Rows are computed
one by one, so that only the logits of one row are in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatq.calibration.divergence import (
    LOGITS_AT_ONCE,
    MEASURES,
    DenseStates,
    Divergence,
    parts_of,
    position_measures,
    row_means,
)
from flatq.errors import ExportError
from flatq.export.protocols import Runner

TOKENS = 2048  # per text: takes seconds per export on two cores, and differences of 0.02 nats are significant


def first_rows(tokens: Tensor, most: int = TOKENS) -> Tensor:
    """The first rows of int64 [n, s] with together at most ``most`` tokens, at least one row."""
    return tokens[: max(1, most // tokens.shape[1])]


@torch.inference_mode()
def runner_divergence(dense: DenseStates, runner: Runner, tokens: Tensor, *, name: str = "export") -> Divergence:
    """Compare a runtime with the dense model.

    Args:
        dense: the reference.
        runner: the open export.
        tokens: int64 [n, s]; position 0 of each row is given, positions 1 .. s-1 are predicted.
        name: of the export, for messages.

    Raises:
        ExportError: the runtime returns logits of another shape.
        NumericsError: a measure is not finite.
    """
    hidden, head = dense.hidden(tokens), dense.head()
    means = torch.zeros(len(tokens), MEASURES + parts_of(tokens.shape[1] - 1), dtype=torch.float64)
    step = max(1, LOGITS_AT_ONCE // len(head))
    for row, text in enumerate(tokens.cpu()):
        logits = torch.from_numpy(runner.logits(text[None].numpy()))
        if logits.shape != (1, len(text), len(head)):
            raise ExportError(
                f"{name}: the runtime returned logits of shape {list(logits.shape)} instead of "
                f"{[1, len(text), len(head)]}; the export does not follow the Runner protocol"
            )
        parts = []
        for start in range(0, len(text) - 1, step):
            at = slice(start, min(start + step, len(text) - 1))
            reference = head(hidden[row, at].to(dense.device))
            parts.append(position_measures(reference, logits[0, at].to(reference), text[1:][at].to(reference.device)))
        means[row] = row_means(torch.cat(parts)).cpu()
    return Divergence.of(means, tokens.shape[1] - 1)


def runner_perplexity(runner: Runner, tokens: Tensor) -> float:
    """Perplexity in a runtime, row by row.

    Args:
        runner: the open export.
        tokens: int64 [n, s]; position 0 of each row is given, positions 1 .. s-1 are predicted.
    """
    rows = [
        torch.nn.functional.cross_entropy(torch.from_numpy(runner.logits(text[None].numpy()))[0, :-1], text[1:])
        for text in tokens.cpu()
    ]
    return float(torch.stack(rows).double().mean().exp())
