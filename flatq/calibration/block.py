"""A block (attention or MLP of one layer) with its inputs for all calibration tokens; stages observe and change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flatq.calibration.grams import Gram, finite
from flatq.calibration.routed import RoutedGram, scarce
from flatq.calibration.states import HiddenStates
from flatq.errors import NumericsError
from flatq.machine import distributed
from flatq.machine.device import solver_of
from flatq.machine.precision import blocks_in, forward_precision
from flatq.model.decoder import DecoderLayer, LayerDims, Positions
from flatq.model.grid import QuantizedWeight

MOMENTS = frozenset(("input", "values", "inner"))  # all second moments that a block can measure


@dataclass
class Block:
    """Attention or MLP of one layer with its inputs; stages change ``layer`` and ``grams`` together."""

    index: int
    half: str
    layer: DecoderLayer
    feed: HiddenStates
    positions: Callable[[int], Sequence[Positions]]
    precision: str = "auto"
    device: str = "cpu"
    reference: Reference | None = None
    out: HiddenStates | None = None
    moments: frozenset[str] = MOMENTS
    ahead: HiddenStates | None = None
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    grams: dict[str, Gram] = field(default_factory=dict)
    drift: Tensor | None = None
    lag: Tensor | None = None
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Name for messages, such as ``layer 7 attention``."""
        return f"layer {self.index} {self.half}"

    @property
    def dims(self) -> LayerDims:
        """Widths of the model that the block was read from."""
        return self.layer.config.layers[self.index]

    def observe(self) -> dict[str, Gram]:
        """Measure the Grams of the block over all calibration tokens; the first call measures, later calls reuse.

        ``input`` [d_model] is the input of q, k, v or gate, up; ``inner`` is the input of o [heads * d_v] or down
        [d_ff]; ``values`` [kv_heads blocks of d_v] are the value heads. Only those in ``moments`` are measured. With a
        reference, ``drift`` [inner, d_model] of an MLP is the sum of ``inner^T (y_dense - y)`` over tokens, where y is
        the residual stream after the current block, or with post norms the output of down, in front of its norm
        (docs/decisions/0034). With ``reference.inputs``, ``drift`` is also measured for attention, and so is
        ``lag`` [d_model, d_model], the sum of ``input^T (input_dense - input)``. Experts have a block per expert in
        both Grams, and their drift is divided by the number of experts per token (docs/decisions/0041). If ``out`` is
        set, the block's outputs are written to it.

        Raises:
            NumericsError: an activation or a second moment is not finite.
        """
        if not self.grams:
            self.together("observe")
            self._begin()
            with forward_precision(self.precision, self.device):
                for batch in self.feed.batches():
                    self._observe(self.feed.states[batch].to(self.device, torch.float32), batch)
                for name, gram in self.grams.items():
                    gram.gather()
                    if not gram.finite:
                        raise NumericsError(f"{self.place}: the second moment of {name!r} is not finite; {REMEDY}")
                    gram.to(solver_of(self.device))
            self.notes += scarce(self.grams)
            self.layer.to(solver_of(self.device))
            if self.drift is not None and self.layer.config.experts and self.half == "mlp":
                drift = distributed.all_reduce(self.drift).to(solver_of(self.device))
                self.drift = drift / self.layer.config.experts_per_token
            elif self.drift is not None:
                # The block's own output follows from the Gram, so no second pass over the tokens is needed.
                known = self.grams["inner"].total[0] @ self._last.weight.T
                self.drift = distributed.all_reduce(self.drift).to(known.device) - known
            if self.lag is not None:
                self.lag = distributed.all_reduce(self.lag).to(solver_of(self.device))
        return self.grams

    def _begin(self) -> None:
        """Sums of zero tokens, in the shapes of this block: a process without samples has the same ones as others."""
        d_model, inner, device = self.layer.config.d_model, self._last.in_features, self.device
        self.grams = {"input": Gram(d_model, device=device), "inner": Gram(inner, device=device)}
        if self.half == "attention":
            heads = self.dims.kv_heads
            self.grams["values"] = Gram(self.layer.v.out_features // heads, heads, device)
        elif experts := self.layer.config.experts:
            self.grams = {
                "input": RoutedGram(d_model, experts, shared=True, device=device),
                "inner": RoutedGram(inner // experts, experts, shared=False, device=device),
            }
        self.grams = {name: gram for name, gram in self.grams.items() if name in self.moments}
        if self.reference is not None and (self.half == "mlp" or self.reference.inputs):
            self.drift = torch.zeros(inner, d_model, device=device)
        if self.reference is not None and self.reference.inputs:
            self.lag = torch.zeros(d_model, d_model, device=device)

    @property
    def _last(self) -> nn.Linear:
        """The linear that reads the inner activation: o or down."""
        return self.layer.o if self.half == "attention" else self.layer.down

    def together(self, what: str) -> None:
        """Broadcast a command from rank 0; the other processes wait for it while rank 0 runs the loop body."""
        if distributed.first():
            distributed.broadcast(what)

    def inputs(self) -> Tensor:
        """Inputs of the block for the samples of all processes, [samples, s, d_model], in main memory."""
        self.together("inputs")
        return self.feed.everyone()

    def scratch(self) -> Tensor:
        """Space for numbers of the shape of all inputs, [samples, s, d_model], until the loop body ends.

        One process takes the file that the walk writes the block's outputs to after the loop body; several processes
        share that file, so rank 0 then takes memory.
        """
        if self.ahead is None or distributed.size() > 1:
            return torch.empty(self.feed.states.shape)
        return self.ahead.states

    def forget(self) -> None:
        """Release the resident pages of inputs and scratch space."""
        self.feed.forget()
        if self.ahead is not None:
            self.ahead.forget()

    def answer(self, command: str) -> None:
        """Take part in what the loop body does with this block on rank 0; ``wait`` only shows that rank 0 is alive."""
        if command == "observe":
            self.observe()
        elif command == "inputs":
            self.inputs()
        elif command != "wait":
            raise ValueError(f"{self.place}: unknown command {command!r}")

    def activations(self, x: Tensor) -> dict[str, Tensor]:
        """Inputs of the block's linears for a residual stream [b, s, d_model], float32; names as for ``observe``."""
        layer = self.layer
        with blocks_in(self.precision, self.device):
            found = {"input": layer.enter(self.half, x)}
            if self.half == "attention":
                if "values" in self.moments:
                    found["values"] = layer.v(found["input"])
                found["inner"] = layer.mix(found["input"], self.positions(x.shape[0]))
            else:
                found["inner"] = layer.widen(found["input"])
        return {name: activation.float() for name, activation in found.items()}

    def _observe(self, x: Tensor, batch: slice) -> None:
        seen = self.activations(x)
        for name, activation in seen.items():
            if name in self.grams:
                self._must_be_finite(ACTIVATIONS[self.half][name], activation, batch)
                gram = self.grams[name]
                if isinstance(gram, RoutedGram):
                    gram.route(activation, self.layer.router(seen["input"]))
                else:
                    gram.update(activation)
        if self.out is not None:
            with blocks_in(self.precision, self.device):
                left = self.layer.leave(self.half, x, self.layer.close(self.half, seen["inner"]))
            self._write(left, batch, self.out)
        if self.reference is not None:
            before, output, after = self.reference.follow(self, batch)
            if self.drift is not None:
                lacking = output if self.layer.config.post_norms else after.sub_(x)
                if self._last.bias is not None:
                    lacking -= self._last.bias
                if self.layer.config.experts and self.half == "mlp":
                    lacking = lacking - self.layer.close(self.half, seen["inner"])
                _add_product(self.drift, seen["inner"], lacking)
            if self.lag is not None:
                with blocks_in(self.precision, self.device):
                    ahead = self.layer.enter(self.half, before).float()
                _add_product(self.lag, seen["input"], ahead - seen["input"])

    def advance(self, out: HiddenStates) -> None:
        """Run the current block on all inputs and write its outputs to ``out``."""
        self.layer.to(self.device)
        with forward_precision(self.precision, self.device):
            for batch in self.feed.batches():
                self._write(self.run(self.feed.states[batch].to(self.device, torch.float32)), batch, out)

    def run(self, x: Tensor) -> Tensor:
        """Run the current block on the residual stream, [b, s, d_model] -> [b, s, d_model]."""
        with blocks_in(self.precision, self.device):
            return self.layer.run(self.half, x, self.positions(x.shape[0]))

    def _write(self, y: Tensor, batch: slice, out: HiddenStates) -> None:
        self._must_be_finite("the output", y, batch)
        out.states[batch] = y
        out.forget()

    def _must_be_finite(self, what: str, x: Tensor, batch: slice) -> None:
        if not finite(x):
            bad = batch.start + int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise NumericsError(f"{self.place}: {what} for calibration sample {bad} is not finite; {REMEDY}")

    def narrow(self, linear: str, weight: Tensor, bias: Tensor | None) -> None:
        """Replace a linear by one of another shape, weight [o, i] and bias [o]; the only way to change a width."""
        rows, columns = weight.shape
        narrowed = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        narrowed.weight = nn.Parameter(weight.float(), requires_grad=False)
        if bias is not None:
            narrowed.bias = nn.Parameter(bias.float(), requires_grad=False)
        setattr(self.layer, linear, narrowed)

    def quantize(self, linear: str, weight: QuantizedWeight) -> None:
        """Replace a linear's weight by a quantized one; from now on the block runs with the dequantized weight."""
        self.quantized[linear] = weight
        getattr(self.layer, linear).weight = nn.Parameter(weight.dequantize(), requires_grad=False)


@dataclass(frozen=True)
class Reference:
    """Hidden states of the dense model before and after a block; ``inputs`` also measures the inputs' lag."""

    before: HiddenStates
    after: HiddenStates
    inputs: bool = False

    def follow(self, block: Block, batch: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Run samples of the dense model through a block that is not changed yet.

        Returns:
            Input of the block, output of its last linear, output of the block, each [b, s, d_model].
        """
        x = self.before.states[batch].to(block.device, torch.float32)
        with blocks_in(block.precision, block.device):
            output = block.layer.output(block.half, x, block.positions(x.shape[0]))
            y = block.layer.leave(block.half, x, output)
        self.after.states[batch] = y
        self.before.forget()
        self.after.forget()
        return x, output.float(), y


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add ``x^T y`` over all tokens to ``total`` [i, o], for [b, s, i] and [b, s, o]."""
    total.addmm_(x.flatten(0, 1).T, y.flatten(0, 1))


ACTIVATIONS = {
    "attention": {"input": "the input of q, k and v", "values": "the output of v", "inner": "the input of o"},
    "mlp": {"input": "the input of gate and up", "inner": "the input of down"},
}
REMEDY = "check the weights for damage, or choose other calibration text"
