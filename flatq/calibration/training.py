"""Training inside the walk: gradient descent on one half layer, towards outputs that it should have.

What is trained is the caller's choice (``Trainable``); here are the loss, the steps and the rule when to stop. A step
draws rows of the calibration text, runs the half layer on the inputs that it has in the compressed model, and changes
every trained number by the same amount in the direction of its gradient's sign (sign-SGD, with a rate that falls to
zero). The sign makes the rates independent of the scale of weights and activations, and needs no memory between steps.

Every tenth row is held out. The state with the smallest error on those rows is kept, and the start is one of the states
compared: training never leaves a half layer worse than before on rows that it was not trained on.

Memory is one half layer, its gradients, the best state so far, and the activations of ``STEP_TOKENS`` tokens. Rows are
drawn with the seed, so the result is the same in each run, and a killed walk trains the interrupted block again. With
several processes rank 0 trains alone on the rows of all (``Block.inputs``).

Axes: n rows, s positions, m d_model.
Source: SignRound (arXiv 2309.05516), section 3: sign-SGD block by block, with a linearly falling rate.
Differs from it: it starts from a solution instead of from rounding to nearest; the unit is half a layer; rows are held
out, where the authors keep the best state on the training rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatq.calibration.block import Block
from flatq.machine.precision import blocks_in, forward_precision
from flatq.model.decoder import DecoderLayer, Positions

STEP_TOKENS = 1024  # tokens of a step, at least one row
HELD_OUT = 10  # every n-th row is held out
CHECKS = 6  # comparisons with the best state, spread evenly over the steps


def held_out(rows: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows that are held out, and of the others, int64."""
    numbers = torch.arange(rows)
    return numbers[::HELD_OUT], numbers[numbers % HELD_OUT != 0]


def is_compared(done: int, steps: int) -> bool:
    """Whether the state after ``done`` of ``steps`` steps, from 1, is compared with the best one."""
    return done * CHECKS // steps > (done - 1) * CHECKS // steps


class Trainable(Protocol):
    """Tensors that are trained, and the weights that follow from them."""

    def parameters(self) -> Sequence[tuple[Tensor, float]]:
        """The trained tensors (leaves that require gradients), each with its rate: the change of the first step."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """Weights by name of the linear, differentiable in the parameters."""
        ...


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Mean squared output error on the rows held out, before training and of the state kept."""

    before: float
    after: float


class _Half(nn.Module):
    """The output of o or down as a module, for ``functional_call``."""

    def __init__(self, layer: DecoderLayer, half: str) -> None:
        super().__init__()
        self.layer, self.name = layer, half

    def forward(self, x: Tensor, positions: Sequence[Positions]) -> Tensor:
        """[b, s, m] -> [b, s, m]."""
        return self.layer.output(self.name, x, positions)


class OutputTraining:
    """Training of a half layer towards the outputs that it has when this object is made.

    Args:
        block: observed, with the weights whose outputs are to be reached.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.inputs = block.inputs()
        self.targets = block.scratch()
        self.half = _Half(block.layer.to(block.device), block.half)
        step = max(1, STEP_TOKENS // self.inputs.shape[1])
        with forward_precision(block.precision, block.device):
            for rows in torch.arange(len(self.inputs)).split(step):
                self.targets[rows] = self._output(rows, {}).to(self.targets)
                block.forget()

    def run(self, trained: Trainable, steps: int, seed: int) -> HeldOut:
        """Train, and leave the state with the smallest held-out error in the tensors of ``trained``.

        Args:
            trained: what to train; with no steps it is left as it is.
            steps: number of steps.
            seed: of the order of the rows.
        """
        held, rest = held_out(len(self.inputs))
        draw, step = torch.Generator().manual_seed(seed), max(1, STEP_TOKENS // self.inputs.shape[1])
        tensors = [tensor for tensor, _ in trained.parameters()]
        with forward_precision(self.block.precision, self.block.device, gradients=True):
            before = least = self._error(held, trained)
            best = [tensor.detach().clone() for tensor in tensors]
            order: Sequence[Tensor] = ()
            for number in range(steps):
                if not order:
                    order = rest[torch.randperm(len(rest), generator=draw)].split(step)
                rows, *order = order
                self._step(rows, trained, 1 - number / steps)
                self.block.forget()
                if is_compared(number + 1, steps):
                    error = self._error(held, trained)
                    if error < least:
                        least, best = error, [tensor.detach().clone() for tensor in tensors]
            with torch.no_grad():
                for tensor, kept in zip(tensors, best, strict=True):
                    tensor.copy_(kept)
        return HeldOut(before, least)

    def _step(self, rows: Tensor, trained: Trainable, fraction: float) -> None:
        error = self._output(rows, trained.weights()) - self.targets[rows].to(self.block.device, torch.float32)
        self.block.together("wait")
        parameters = trained.parameters()
        gradients = torch.autograd.grad(error.square().mean(), [tensor for tensor, _ in parameters])
        with torch.no_grad():
            for (tensor, rate), gradient in zip(parameters, gradients, strict=True):
                tensor.sub_(gradient.sign_(), alpha=rate * fraction)

    def _output(self, rows: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Output of the half layer with other weights, float32 [rows, s, m]."""
        x = self.inputs[rows].to(self.block.device, torch.float32)
        replaced = {f"layer.{name}.weight": weight.to(x.device) for name, weight in weights.items()}
        with blocks_in(self.block.precision, self.block.device):
            return functional_call(self.half, replaced, (x, self.block.positions(len(x)))).float()

    @torch.no_grad()
    def _error(self, held: Tensor, trained: Trainable) -> float:
        """Mean squared error of the output on the rows held out."""
        weights, total = trained.weights(), 0.0
        for rows in held.split(max(1, STEP_TOKENS // self.inputs.shape[1])):
            target = self.targets[rows].to(self.block.device, torch.float32)
            total += float((self._output(rows, weights) - target).square().sum(dtype=torch.float64))
        return total / self.targets[held].numel()
