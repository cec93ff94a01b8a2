"""Distillation: factors of a compressed model's scales and norm gains, trained towards the dense model's predictions.

This is a kind of training. The loss is the KL divergence of the compressed model's next-token distribution from the
dense model's, mean over tokens. What is trained is few numbers (``factors``), and codes do not change.

A step takes one forward and one backward pass, half a layer at a time, as the Fisher information does: the hidden
states between half layers are kept in a memory-mapped file, each half layer is read twice and differentiated
separately. The dense model runs once over all tokens, and only its final hidden states are kept, in another file; the
logits of both are made for a few tokens at a time. So memory is one half layer with its gradients, the activations of a
batch, and the factors with the optimiser's moments and the best state (four numbers for each).

Every tenth row is held out. The state with the smallest divergence there is kept, and the start is one of the states
compared. The order of rows follows from the seed. The state is saved every few steps, and a killed run goes on from
there with the same result.

Axes: n rows, s positions, m d_model, v vocabulary.
Source: knowledge distillation (Hinton et al., arXiv 1503.02531), temperature 1; Adam (arXiv 1412.6980), algorithm 1;
scales alone, end to end, after rounding as in EfficientQAT (arXiv 2407.11062), section 3.3.
Differs from the last: the loss, there the text's log-likelihood; norm gains are trained, too; a tenth is held out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from flatq.artifact import save_shard
from flatq.calibration.block import REMEDY
from flatq.calibration.factors import ROWS, Factored, factor_shapes, slopes
from flatq.calibration.half_layers import half_layers
from flatq.calibration.states import Execution, HiddenStates, batch_tokens, embedded, stored_as
from flatq.calibration.training import HELD_OUT, held_out, is_compared
from flatq.errors import NumericsError
from flatq.files import as_noted, note_digest
from flatq.machine.precision import blocks_in, forward_precision
from flatq.machine.progress import progress
from flatq.model.decoder import DecoderLayer, locate
from flatq.model.grid import Grid
from flatq.model.weights import HALVES, Head, Weights, load_head, load_last_norm

LOGITS = 512  # tokens whose logits are in memory together
MOMENTS = (0.9, 0.99)  # decay of Adam's moments
EPSILON = 1e-12  # of Adam, relative to gradients of mean losses
GAINS = 2.0  # rate of norm gains, relative to that of linears
WARM_UP = 0.05  # share of the steps in which the rate rises
SAVE_EVERY = 10  # steps between saved states
STATE, STATES, DENSE, HELD = "recover.safetensors", "recover-states", "recover-dense", "recover-held"


@dataclass(frozen=True, slots=True)
class Distilled:
    """Mean KL divergence from the dense model on the rows held out, nats per token, and steps of the state kept."""

    before: float
    after: float
    step: int


class Distillation:
    """Distillation of a compressed model; all work is done by the calling process.

    Args:
        weights: the compressed model.
        grids: of its quantized weights, by stem.
        dense: the model that it was made from.
        tokens: int64 [n, s], at least two rows.
        work: folder for hidden states and the saved state.
        execution: settings of the forward passes.
        on_half: called for each half layer that is read, for the processes that wait.
    """

    def __init__(
        self,
        weights: Weights,
        grids: Mapping[str, Grid],
        dense: Weights,
        tokens: Tensor,
        work: Path,
        execution: Execution,
        on_half: Callable[[], object] = lambda: None,
    ) -> None:
        self.weights, self.grids, self.dense, self.tokens = weights, grids, dense, tokens
        self.work, self.execution, self.device = work, execution, execution.device
        self.on_half = on_half
        held, self.rest = held_out(len(tokens))
        self.held = tokens[held]
        self.logs = {name: torch.zeros(shape) for name, shape in factor_shapes(weights.config, grids).items()}
        self.moments = {name: (torch.zeros_like(log), torch.zeros_like(log)) for name, log in self.logs.items()}
        self.best = {name: log.clone() for name, log in self.logs.items()}
        self.done, self.found = 0, Distilled(math.nan, math.inf, 0)
        config, (_, length) = weights.config, tokens.shape
        self._files: dict[str, HiddenStates] = {}
        self.positions = locate(config, 1, length, device=torch.device(self.device))
        # Gradients need as much memory as activations.
        self.rows_at_once = max(1, batch_tokens(config, execution.working_set_bytes) // 2 // length)

    def run(self, steps: int, step_tokens: int, rate: float, seed: int) -> Distilled:
        """Train, and leave the state with the smallest held-out divergence in ``best``.

        Args:
            steps: number of steps.
            step_tokens: tokens of a step, at least one row.
            rate: change of the logarithm of a factor in a step, at most; it falls to 0 along a cosine.
            seed: of the order of the rows.

        Raises:
            NumericsError: the divergence is not finite.
        """
        self._restore()
        rows = min(len(self.rest), max(1, step_tokens // self.tokens.shape[1]))
        with (
            progress("recover", steps) as advance,
            forward_precision(self.execution.precision, self.device, gradients=True),
        ):
            advance(self.done)
            if self.done == 0 or self.done < steps:
                dense = self._final(self.dense, self.tokens, DENSE)
            if self.done == 0:
                self._compare(dense)
            while self.done < steps:
                self._step(drawn_rows(self.rest, rows, self.done, seed), dense, rate * share_of_rate(self.done, steps))
                self.done += 1
                compared = is_compared(self.done, steps)
                if compared:
                    self._compare(dense)
                if compared or self.done % SAVE_EVERY == 0:
                    self._save()
                advance()
        self._remove_states()
        return self.found

    def _step(self, rows: Tensor, dense: Tensor, rate: float) -> None:
        """One step of Adam; each half layer is changed as soon as its gradients are known."""
        model, blocks = Factored(self.weights, self.logs), len(HALVES) * len(self.weights.config.layers)
        tokens, states = self.tokens[rows], self._states(STATES, (blocks + 1) * len(rows))
        levels = states.view(blocks + 1, len(rows), *states.shape[1:])
        levels[0] = embedded(tokens, model.tensor("embed.weight"))
        for done, _, half, layer in self._halves(model):
            for batch in self._batches(len(rows)):
                levels[done + 1, batch] = self._through(layer, half, levels[done, batch])
        gradient = self._pull(model, levels[-1], dense[rows], rate)
        for done, index, half, layer in self._halves(model, backwards=True):
            names = {name: part for name, part in layer.named_parameters() if self._trains(f"layers.{index}.{name}")}
            sums = [torch.zeros_like(part) for part in names.values()]
            for part in names.values():
                part.requires_grad_()
            for batch in self._batches(len(rows)):
                x = levels[done, batch].to(self.device, torch.float32).requires_grad_()
                output = self._run(layer, half, x)
                first, *found = torch.autograd.grad(output, [x, *names.values()], gradient[batch])
                gradient[batch] = first
                for total, slope in zip(sums, found, strict=True):
                    total += slope
            for (name, weight), total in zip(names.items(), sums, strict=True):
                self._change(f"layers.{index}.{name}", weight.detach(), total, rate)

    def _trains(self, name: str) -> bool:
        """Whether a tensor has factors."""
        return name in self.logs or (name.endswith(".weight") and name.removesuffix(".weight") + ROWS in self.logs)

    def _pull(self, model: Weights, states: Tensor, dense: Tensor, rate: float) -> Tensor:
        """Gradient of the loss at the input of the final norm, [b, s, m]; changes the final norm's factors."""
        norm, heads = load_last_norm(model, device=self.device), self._heads(model)
        norm.weight.requires_grad_()
        found, total = torch.empty(states.shape, device=self.device), torch.zeros_like(norm.weight)
        flat, wanted, pulled = states.flatten(0, 1), dense.flatten(0, 1), found.flatten(0, 1)
        for some in torch.arange(len(flat)).split(LOGITS):
            x = flat[some].to(self.device, torch.float32).requires_grad_()
            normed = norm(x)
            with torch.no_grad(), blocks_in(self.execution.precision, self.device):
                target = heads[0](wanted[some].to(self.device, torch.float32)).float().softmax(-1)
                logits = heads[1](normed).float()
                slope = heads[1].slope(logits)
                pull = logits.softmax(-1).sub_(target).div_(len(flat))
                pull = ((pull if slope is None else pull * slope) @ heads[1].weight).float()
            pulled[some], gain = torch.autograd.grad(normed, [x, norm.weight], pull)
            total += gain
        self._change("norm.weight", norm.weight.detach(), total, rate)
        return found

    def _change(self, name: str, weight: Tensor, gradient: Tensor, rate: float) -> None:
        """A step of Adam for the factors of one tensor."""
        for key, slope in slopes(name, weight, gradient, self.grids).items():
            mean, square = self.moments[key]
            slope = slope.cpu()
            mean.lerp_(slope, 1 - MOMENTS[0])
            square.mul_(MOMENTS[1]).addcmul_(slope, slope, value=1 - MOMENTS[1])
            unbiased = [
                moment / (1 - decay ** (self.done + 1)) for moment, decay in zip((mean, square), MOMENTS, strict=True)
            ]
            step = rate * (GAINS if key == name else 1)
            self.logs[key].addcdiv_(unbiased[0], unbiased[1].sqrt_().add_(EPSILON), value=-step)

    def _compare(self, dense: Tensor) -> None:
        """Divergence of the present state on the rows held out; keep the state if none was better."""
        model = Factored(self.weights, self.logs)
        states, total = self._final(model, self.held, HELD), 0.0
        wanted, heads = dense[::HELD_OUT], self._heads(model)
        for row in range(len(self.held)):
            for some in torch.arange(self.held.shape[1]).split(LOGITS):
                total += self._divergence(heads, wanted[row, some], states[row, some])
        mean = total / self.held.numel()
        if not math.isfinite(mean):
            raise NumericsError(
                f"recover: the divergence from the dense model is {mean} after {self.done} steps; {REMEDY}"
            )
        if self.done == 0:
            self.found = Distilled(mean, mean, 0)
        elif mean < self.found.after:
            self.found = Distilled(self.found.before, mean, self.done)
            self.best = {name: log.clone() for name, log in self.logs.items()}

    def _divergence(self, heads: tuple[Head, Head], dense: Tensor, states: Tensor) -> float:
        """Sum over tokens of KL(dense || compressed), from final hidden states [p, m]."""
        with torch.no_grad(), blocks_in(self.execution.precision, self.device):
            pair = [head(x.to(self.device, torch.float32)) for head, x in zip(heads, (dense, states), strict=True)]
        wanted, found = (logits.float().log_softmax(-1) for logits in pair)
        return float(F.kl_div(found, wanted, reduction="sum", log_target=True))

    def _final(self, weights: Weights, tokens: Tensor, name: str) -> Tensor:
        """Hidden states of some rows after the final norm, [n, s, m], in a file."""
        found, table = self._states(name, len(tokens)), weights.tensor("embed.weight")
        for batch in self._batches(len(tokens)):
            found[batch] = embedded(tokens[batch], table)
        for _, _, half, layer in self._halves(weights):
            for batch in self._batches(len(tokens)):
                found[batch] = self._through(layer, half, found[batch])
        norm = load_last_norm(weights, device=self.device)
        with torch.no_grad():
            for batch in self._batches(len(tokens)):
                found[batch] = norm(found[batch].to(self.device, torch.float32)).to(found)
        return found

    def _halves(self, weights: Weights, *, backwards: bool = False) -> Iterator[tuple[int, int, str, DecoderLayer]]:
        for found in half_layers(weights, device=self.device, backwards=backwards):
            self.on_half()
            yield found

    @torch.no_grad()
    def _through(self, layer: DecoderLayer, half: str, x: Tensor) -> Tensor:
        """Output of half a layer, in the type and place of its input, [b, s, m]."""
        return self._run(layer, half, x.to(self.device, torch.float32)).to(x)

    def _run(self, layer: DecoderLayer, half: str, x: Tensor) -> Tensor:
        with blocks_in(self.execution.precision, self.device):
            return layer.run(half, x, self.positions)

    def _heads(self, model: Weights) -> tuple[Head, Head]:
        """LM heads of the dense and of the compressed model."""
        return load_head(self.dense, device=self.device), load_head(model, device=self.device)

    def _batches(self, rows: int) -> Iterator[slice]:
        """Slices of a number of rows, each a forward or backward pass."""
        for start in range(0, rows, self.rows_at_once):
            yield slice(start, min(start + self.rows_at_once, rows))
            for file in self._files.values():
                file.forget()

    def _states(self, name: str, rows: int) -> Tensor:
        """A file of hidden states, [rows, s, m]; one for each name."""
        if name not in self._files:
            shape = (rows, self.tokens.shape[1], self.weights.config.d_model)
            dtype = stored_as(self.execution.states, rows * shape[1], shape[2])
            self._files[name] = HiddenStates(self.work / name, shape, dtype)
        return self._files[name].states

    def _save(self) -> None:
        """Write what the following steps depend on."""
        kept = {f"log/{name}": log for name, log in self.logs.items()}
        kept |= {f"best/{name}": log for name, log in self.best.items()}
        for place, which in enumerate(("mean", "square")):
            kept |= {f"{which}/{name}": moments[place] for name, moments in self.moments.items()}
        kept["steps"] = torch.tensor([self.done, self.found.step])
        kept["divergences"] = torch.tensor([self.found.before, self.found.after], dtype=torch.float64)
        save_shard(self.work / STATE, kept)
        note_digest(self.work / STATE)

    def _restore(self) -> None:
        """Take what a killed run has saved; a damaged file is as none."""
        if not as_noted(self.work / STATE):
            return
        kept = load_file(self.work / STATE)
        for name in self.logs:
            self.logs[name], self.best[name] = kept[f"log/{name}"], kept[f"best/{name}"]
            self.moments[name] = kept[f"mean/{name}"], kept[f"square/{name}"]
        self.done, step = kept["steps"].tolist()
        before, after = kept["divergences"].tolist()
        self.found = Distilled(before, after, step)

    def _remove_states(self) -> None:
        """Delete the files of hidden states."""
        for file in self._files.values():
            file.path.unlink(missing_ok=True)


def drawn_rows(rows: Tensor, count: int, step: int, seed: int) -> Tensor:
    """The rows of a step, int64 [count]: all rows in one random order after another, so a step needs no former one.

    Args:
        rows: int64 [n], to draw from.
        count: of a step, at most n.
        step: number of the step.
        seed: of the orders.
    """
    found = []
    for place in range(step * count, (step + 1) * count):
        turn, at = divmod(place, len(rows))
        found.append(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + turn))[at]])
    return torch.stack(found)


def share_of_rate(step: int, steps: int) -> float:
    """The share of the rate in a step: rises linearly at first, then falls to 0 along a cosine."""
    return min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
