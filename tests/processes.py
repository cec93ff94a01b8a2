"""Every statistic that several processes measure together, for the test that compares them with one process.

``python -m tests.processes FOLDER ROWS`` under torchrun writes what the first process got.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flatq.calibration.divergence import DenseStates, dense_perplexity, divergence
from flatq.calibration.importance import layer_importance
from flatq.calibration.perplexity import perplexity
from flatq.calibration.sensitivity import output_sensitivity
from flatq.calibration.walk import last_states, walk
from flatq.compress.error_curves import error_curves
from flatq.machine import distributed
from flatq.quantize.bit_errors import bit_errors
from flatq.quantize.embedding_and_head import head_moment
from flatq.recipe.blocks import GptqSpec
from tests.models import EXACT, RandomWeights, tiny_config


def statistics(rows: int, work: Path) -> dict[str, Tensor]:
    """All of them on ``rows`` rows of text, by name; ``work`` is a folder that all processes share."""
    weights, other = RandomWeights(tiny_config()), RandomWeights(tiny_config(), seed=1)
    tokens = torch.arange(rows * 24).mul(7).remainder(128).view(rows, 24)
    found: dict[str, Tensor] = {}

    def note(name: str, *values: float) -> None:
        found[name] = torch.tensor(values, dtype=torch.float64)

    note("perplexity", perplexity(weights, tokens).value)
    dense = DenseStates(weights, work / "dense")
    note("dense perplexity", dense_perplexity(dense, tokens))
    note("divergence", *(measured := divergence(dense, other, tokens)).kl_by_position, measured.damage)
    note("importance", *layer_importance(weights, tokens, work, execution=EXACT))
    fisher = output_sensitivity(weights, tokens, work, execution=EXACT)
    found["sensitivity"] = torch.stack([fisher[n] for n in range(len(fisher))])
    for n, curve in enumerate(error_curves(weights, tokens, fisher, work, ridge=1e-2, execution=EXACT)):
        note(f"curve {n}", *curve.value, *curve.mlp)
    for unit, costs in bit_errors(weights, tokens, GptqSpec(group_size=16), fisher, work, execution=EXACT).items():
        note(f"bits {unit}", *costs.values())
    for block in walk(weights, tokens, work / "walk", lambda _: None, execution=EXACT, lag=True):
        for name, gram in block.observe().items():
            found[f"{block.place} {name}"] = gram.mean()
        for name, sums in (("drift", block.drift), ("lag", block.lag)):
            if sums is None or not block.index:  # before the first change they are rounding errors
                continue
            found[f"{block.place} {name}"] = sums
        last = "o" if block.half == "attention" else "down"
        block.narrow(last, getattr(block.layer, last).weight / 2, None)  # later blocks differ from the dense model
    found["head"] = head_moment(weights, last_states(weights, tokens, work / "walk", EXACT), EXACT).mean()
    return found


if __name__ == "__main__":
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    with distributed.joined():
        measured = statistics(rows, folder)
        if distributed.first():
            save_file({name: value.contiguous() for name, value in measured.items()}, folder / "statistics.safetensors")
