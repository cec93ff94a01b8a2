"""The phases of a run, played on the first layer of its model and a few of its tokens, with a clock inside.

The clock tells apart what grows with what: forward passes and Grams with tokens and layers, solves with layers, logits
with tokens, reading the embedding and solving the head with nothing. It knows where a phase is by what the phase reads:
a tensor of a layer, or one of the ends. So one look is enough where differences between several (one layer and two,
few tokens and more) would multiply their noise by all layers and tokens.

Batches are as long as the run's. The second of two rounds counts where it is quicker: the first also starts threads
and reads the weights from the disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flatq.artifact import PARTS
from flatq.calibration import sensitivity, states
from flatq.calibration.block import Block
from flatq.calibration.cache_ranges import cache_ranges, ranged
from flatq.calibration.importance import layer_importance
from flatq.calibration.perplexity import perplexity
from flatq.calibration.self_text import SIDE_BY_SIDE, FixedCache, drawn_ids
from flatq.calibration.sensitivity import Sensitivity, output_sensitivity
from flatq.calibration.states import Execution
from flatq.calibration.tokens import self_tokens
from flatq.calibration.walk import last_states, walk
from flatq.compress import error_curves
from flatq.compress.error_curves import block_curve, observed_blocks
from flatq.compress.plan import RankPlan
from flatq.machine.progress import hidden, progress
from flatq.model.decoder import DecoderConfig, LayerDims
from flatq.model.grid import QuantizedWeight
from flatq.model.weights import Weights, head_stem, load_decoder, tensor_shapes
from flatq.plan.decide import measurements
from flatq.quantize.bit_errors import block_errors, judged_blocks
from flatq.quantize.bits import free_units
from flatq.quantize.embedding_and_head import first_table, head_moment, quantized_head
from flatq.quantize.grids import planned_grids
from flatq.recipe.grammar import Recipe
from flatq.stages import stages_of, walked_along

BATCHES = 2  # of calibration tokens
POSITIONS = 16  # of rows that the model writes itself; their attention is short, as most of it is
TOGETHER = 4  # rows that an evaluation sends through a layer together


class FirstLayers:
    """The beginning of a model as a model of its own; noise where there are no weights to read. A ``Weights``."""

    def __init__(self, config: DecoderConfig, weights: Weights | None) -> None:
        self._config, self._weights, self._noise = config, weights, dict[str, Tensor]()

    @property
    def config(self) -> DecoderConfig:
        """Of the layers that are there."""
        return self._config

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """Read now, or made up once."""
        if self._weights is not None:
            return self._weights.tensor(name)
        if name not in self._noise:
            shape = tensor_shapes(self._config)[name]
            with torch.inference_mode(False):  # it will be asked for again where there are gradients
                self._noise[name] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[-1] ** -0.5
        return self._noise[name]


@dataclass(slots=True)
class Spent:
    """Seconds of a phase.

    Attributes:
        layers: with ``tokens`` tokens in one layer.
        solves: in one layer, however many tokens there are; reading it is part of that.
        ends: with ``tokens`` tokens before the first and after the last layer.
        tables: there, however many tokens there are.
        head: in quantizing it.
        tokens: how many went through.
    """

    layers: float = 0.0
    solves: float = 0.0
    ends: float = 0.0
    tables: float = 0.0
    head: float = 0.0
    tokens: int = 0

    def grown(self, layers: int, tokens: int, wider: int) -> float:
        """Seconds of a whole phase of a model that is ``wider`` times as wide."""
        more = tokens / self.tokens
        each = self.layers * more * wider**2 + self.solves * wider**3
        return layers * each + wider * (self.ends * more + self.tables) + wider**2 * self.head

    def quicker(self, other: Spent) -> Spent:
        """Part by part."""
        return Spent(*(min(getattr(self, part.name), getattr(other, part.name)) for part in fields(Spent)))


class Clock:
    """Gives the time that passes to one part after another."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, tokens: int) -> None:
        """A new phase."""
        self.spent, self._part, self._since = Spent(tokens=tokens), "ends", time.perf_counter()

    def turn(self, part: str) -> str:
        """From now on it is this part; returns which it was."""
        now, before = time.perf_counter(), self._part
        setattr(self.spent, before, getattr(self.spent, before) + now - self._since)
        self._part, self._since = part, now
        return before

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """The enclosed time is this part's."""
        before = self.turn(part)
        yield
        self.turn(before)


@dataclass(frozen=True)
class Watched:
    """A model that turns the clock when it is read. A ``Weights``."""

    weights: Weights
    clock: Clock

    @property
    def config(self) -> DecoderConfig:
        """The model's."""
        return self.weights.config

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """Reading takes as long for few tokens as for many; what follows it does not."""
        reading, using = ("solves", "layers") if name.startswith("layers.") else ("tables", "ends")
        self.clock.turn(reading)
        found = self.weights.tensor(name)
        self.clock.turn(using)
        return found


@dataclass
class Rehearsal:
    """The phases of a recipe on a model of one layer.

    Attributes:
        plan: widths that the layer will have.
        device: where to compute.
        working_set_bytes: bytes for the activations of a batch.
        ranges: whether an export asks for the ranges of keys and values.
    """

    recipe: Recipe
    weights: Weights
    plan: tuple[LayerDims, ...]
    device: str = "cpu"
    working_set_bytes: int = states.WORKING_SET
    ranges: bool = False
    clock: Clock = field(default_factory=Clock)
    made: dict[str, Tensor | QuantizedWeight] = field(default_factory=dict)

    def played(self) -> dict[str, Spent]:
        """What every phase spends, in the order of a run."""
        with progress("forecast", 2) as advance:
            first = self._round()
            advance()
            second = self._round()
            advance()
        return {phase: spent.quicker(second[phase]) for phase, spent in first.items()}

    def _round(self) -> dict[str, Spent]:
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for phase, (tokens, work) in self._phases(Path(folder)).items():
                self.clock.start(tokens.numel())
                with hidden():
                    work(tokens)
                self.clock.turn("ends")
                found[phase] = self.clock.spent
        return found

    def _phases(self, work: Path) -> dict[str, tuple[Tensor, Callable[[Tensor], object]]]:
        """Tokens and work of each; ``work`` is a folder for hidden states."""
        text, scored = self.recipe.calibration, self.recipe.evaluation[0]
        rows = max(1, states.BATCH_TOKENS // text.seq_len) * BATCHES
        calibration = self._drawn(min(rows, text.samples), text.seq_len)
        heldout = self._drawn(min(TOGETHER, scored.tokens // scored.seq_len), scored.seq_len)
        found: dict[str, tuple[Tensor, Callable[[Tensor], object]]] = {}
        if self_tokens(text, self.recipe.evaluation):
            found["self-text"] = self._drawn(min(SIDE_BY_SIDE, text.samples), POSITIONS), self._write
        found["baseline"] = heldout, lambda tokens: self._score(tokens, self.weights)
        few, some = (
            states.pieces(calibration, sensitivity.LENGTH, most) for most in (sensitivity.TOKENS, error_curves.TOKENS)
        )
        ways: dict[str, tuple[Tensor, Callable[[Tensor], object]]] = {
            "sensitivity": (few, lambda tokens: self._sense(tokens, work)),
            "curves": (some, lambda tokens: self._curves(tokens, work)),
            "importance": (calibration, lambda tokens: self._importance(tokens, work)),
            "bits": (calibration, lambda tokens: self._bits(tokens, work)),
        }
        narrows = self.plan != self.weights.config.layers
        found |= {phase: ways[phase] for phase in measurements(self.recipe, narrows=narrows)}
        if self.recipe.stages:
            found["compress"] = calibration, lambda tokens: self._compress(tokens, work)
        found["evaluate"] = heldout, lambda tokens: self._score(tokens, self._result())
        if self.ranges:
            found["cache-ranges"] = ranged(calibration), self._ranges
        return found

    def _drawn(self, rows: int, length: int) -> Tensor:
        vocab = self.weights.config.vocab
        return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))

    @property
    def _sweep(self) -> Execution:
        return Execution.of(self.recipe.calibration, self.device, self.working_set_bytes)

    @property
    def _watched(self) -> Watched:
        return Watched(self.weights, self.clock)

    @torch.inference_mode()
    def _write(self, tokens: Tensor) -> None:
        decoder = load_decoder(self._watched, device=self.device)
        cache = FixedCache(decoder.config, *tokens.shape, device=self.device)
        for position in tokens.to(self.device).split(1, dim=1):
            with self.clock.during("layers"):
                hidden_states = decoder.hidden(position, cache=cache, past=cache.past)
            with self.clock.during("ends"):
                chances = torch.rand(len(tokens), dtype=torch.float64).to(self.device)
                drawn_ids(decoder.logits(hidden_states[:, -1]), chances)
            cache.past += 1

    def _score(self, tokens: Tensor, weights: Weights) -> None:
        perplexity(Watched(weights, self.clock), tokens, device=self.device)

    def _sense(self, tokens: Tensor, work: Path) -> None:
        output_sensitivity(self._watched, tokens, work, execution=self._sweep)

    def _importance(self, tokens: Tensor, work: Path) -> None:
        layer_importance(self._watched, tokens, work, execution=self._sweep)

    def _curves(self, tokens: Tensor, work: Path) -> None:
        assert self.recipe.flat is not None
        fisher = Sensitivity(self.weights.config, work)
        for number, block in enumerate(observed_blocks(self._watched, tokens, work, execution=self._sweep)):
            with self.clock.during("solves"):
                block_curve(block, fisher[number], self.recipe.flat.ridge)

    def _bits(self, tokens: Tensor, work: Path) -> None:
        spec, config = self.recipe.gptq, self.weights.config
        assert spec is not None
        (_, units), grids = free_units(config, spec), planned_grids(config, spec)
        fisher, solving = Sensitivity(config, work), partial(self.clock.during, "solves")
        for number, block in enumerate(judged_blocks(self._watched, tokens, work, execution=self._sweep)):
            block_errors(block, units, grids, spec, fisher[number], solving=solving)

    def _compress(self, tokens: Tensor, work: Path) -> None:
        config = self.weights.config
        plan = RankPlan(self.plan, 1.0, 1.0)
        grids = planned_grids(config.with_layers(self.plan), self.recipe.gptq)
        stages = stages_of(self.recipe, plan, grids, config, work)
        reference, lag = walked_along(self.recipe)
        with self.clock.during("tables"):
            self.made["embed.weight"] = first_table(self.weights, grids)
        for block in walk(
            self._watched,
            tokens,
            work,
            self._keep,
            embed=self.made["embed.weight"],
            reference=reference,
            lag=lag,
            execution=self._sweep,
        ):
            block.observe()
            with self.clock.during("solves"):
                for stage in stages:
                    stage.apply(block)
        stem = head_stem(config)
        if stem in grids and self.recipe.gptq is not None:
            moment = head_moment(self._watched, last_states(self.weights, tokens, work, self._sweep), self._sweep)
            with self.clock.during("head"):
                solved = quantized_head(self.weights, grids[stem], moment, self.recipe.gptq)
                self.made[f"{stem}.weight"] = in_main_memory(solved.weight)

    def _ranges(self, tokens: Tensor) -> None:
        precision = self.recipe.calibration.precision
        cache_ranges(Watched(self._result(), self.clock), tokens, precision=precision, device=self.device)

    def _keep(self, block: Block) -> None:
        found: dict[str, Tensor | QuantizedWeight] = dict(block.layer.named_parameters())
        found |= {f"{linear}.weight": weight for linear, weight in block.quantized.items()}
        self.made |= {f"layers.{block.index}.{name}": in_main_memory(tensor) for name, tensor in found.items()}

    def _result(self) -> Weights:
        """What the compression has made, and what it leaves as it was."""
        return Made(self.weights.config.with_layers(self.plan), self.weights, self.made)


def in_main_memory(weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
    """As it would come back from the artifact's files."""
    if isinstance(weight, Tensor):
        return weight.cpu()
    return replace(weight, **{part: getattr(weight, part).cpu() for part in PARTS})


@dataclass(frozen=True)
class Made:
    """A model of which some tensors are new. A ``Weights``."""

    config: DecoderConfig
    rest: Weights
    made: Mapping[str, Tensor | QuantizedWeight]

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """The new one, if there is one."""
        found = self.made.get(name)
        return self.rest.tensor(name) if found is None else found
