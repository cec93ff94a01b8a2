"""How much each decoder layer turns the residual stream: one walk over the dense model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from flatq.decoder import locate
from flatq.progress import progress
from flatq.statistics import Angle
from flatq.walk import Feed, forward_precision
from flatq.weights import HALVES, Weights, dense, load_half


def layer_importance(
    weights: Weights, tokens: Tensor, work: Path, *, precision: str = "auto", device: str = "cpu"
) -> list[float]:
    """Mean angle between each layer's input and output, in [0, 1], for int64 tokens [samples, seq].

    Source: FLAT-LLM (arXiv 2505.23966): ``t_i = E[arccos(cos(x_in, x_out))] / pi`` on the dense model.
    """
    config = weights.config
    samples, length = tokens.shape
    work.mkdir(parents=True, exist_ok=True)
    feed = Feed(work / "dense.f32", (samples, length, config.d_model))
    feed.states[:] = nn.functional.embedding(tokens, dense(weights.tensor("embed.weight")))
    angles = []
    with progress("importance", len(config.layers)) as advance:
        for index in range(len(config.layers)):
            attention, mlp = (load_half(weights, index, half, device=device) for half in HALVES)
            angle = Angle()
            with forward_precision(precision):
                for batch in feed.batches():
                    before = feed.states[batch].to(device)
                    positions = locate(config, len(before), length, device=before.device)
                    after = mlp.transform(attention.attend(before, positions))
                    angle.update(before, after)
                    feed.states[batch] = after.cpu()
            angles.append(angle.mean())
            advance()
    feed.path.unlink()
    return angles
