"""Layer importance: the angle by which each decoder layer rotates the residual stream of the dense model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flatq.calibration.grams import Angle
from flatq.calibration.states import AUTO, Execution, HiddenStates, batch_tokens, stored_as
from flatq.machine import distributed
from flatq.machine.precision import blocks_in, forward_precision
from flatq.machine.progress import progress
from flatq.model.decoder import locate
from flatq.model.weights import HALVES, Weights, load_half


def layer_importance(weights: Weights, tokens: Tensor, work: Path, *, execution: Execution = AUTO) -> list[float]:
    """Mean angle between each layer's input and output, in [0, 1], for int64 tokens [samples, seq].

    Source: FLAT-LLM (arXiv 2505.23966): ``t_i = E[arccos(cos(x_in, x_out))] / pi`` on the dense model.
    """
    config = weights.config
    samples, length = tokens.shape
    work.mkdir(parents=True, exist_ok=True)
    dtype = stored_as(execution.states, tokens.numel(), config.d_model)
    size = batch_tokens(config, execution.working_set_bytes)
    feed = HiddenStates(work / "importance-states", (samples, length, config.d_model), dtype, size)
    feed.embed(tokens, weights.tensor("embed.weight"))
    angles = []
    with progress("importance", len(config.layers)) as advance:
        for index in range(len(config.layers)):
            attention, mlp = (load_half(weights, index, half, device=execution.device) for half in HALVES)
            angle = Angle()
            with forward_precision(execution.precision, execution.device):
                for batch in feed.batches():
                    before = feed.states[batch].to(execution.device, torch.float32)
                    positions = locate(config, len(before), length, device=before.device)
                    with blocks_in(execution.precision, execution.device):
                        after = mlp.run("mlp", attention.run("attention", before, positions), positions)
                    angle.update(before, after)
                    feed.states[batch] = after.cpu()
            angle.gather()
            angles.append(angle.mean())
            advance()
    distributed.barrier()
    feed.path.unlink(missing_ok=True)
    return angles
