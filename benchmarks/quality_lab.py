"""Makes and scores one row of the grid.

The flat rows take the way of ``flatq run``: its rank plan, its stages in its walk. Only what becomes of a finished
block differs: it stays in memory instead of going to disk. The source's tensors are read once for all rows, so the
seconds of a row are those of the method and not of the disk.
"""

from __future__ import annotations

import hashlib
import math
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import baselines
import torch
from quality_grid import BASELINES, GPTQ, Row
from torch import Tensor

import flatq
from flatq.calibration.block import Block
from flatq.calibration.perplexity import perplexity
from flatq.calibration.self_text import SelfText
from flatq.calibration.states import WORKING_SET, Execution
from flatq.calibration.tokens import Tokens, token_batches
from flatq.calibration.walk import walk
from flatq.errors import FlatqError, RecipeError
from flatq.job import Job
from flatq.model.decoder import DecoderConfig, LayerDims
from flatq.model.grid import QuantizedWeight
from flatq.plan.decide import rank_plan
from flatq.plan.objections import raise_objections
from flatq.quantize.grids import planned_grids
from flatq.recipe.blocks import FlatSpec, ModelSpec
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source, open_model
from flatq.stages import stages_of


class Remembered(Source):
    """A source that reads (and decodes) each tensor once."""

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {}

    def tensor(self, name: str) -> Tensor:
        """A copy of the tensor: a stage that works in place must not change the next row's model."""
        if name not in self._tensors:
            self._tensors[name] = super().tensor(name)
        return self._tensors[name].clone()


@dataclass
class Overlay:
    """A compressed model in memory: its own blocks over the source's embedding, norm and head. A ``Weights``."""

    source: Source
    config: DecoderConfig
    tensors: dict[str, Tensor | QuantizedWeight] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """From a block if it is there, else from the source."""
        return self.tensors[name] if name in self.tensors else self.source.tensor(name)

    def save(self, block: Block) -> None:
        """Keep a finished block, rounded to the dtype that it would be stored in."""
        for name, parameter in block.layer.named_parameters():
            linear = name.removesuffix(".weight")
            full = f"layers.{block.index}.{name}"
            if name.endswith(".weight") and linear in block.quantized:
                self.tensors[full] = block.quantized[linear]
                continue
            stored = parameter.detach().to(self.source.dtype)
            parameter.data = stored.float()
            self.tensors[full] = stored


@dataclass(frozen=True)
class Made:
    """A compressed model's score, and what it cost."""

    perplexity: float
    parameters: int
    compress_seconds: float
    score_seconds: float
    cpu_seconds: float  # of compressing, over all threads: what is left of a noisy machine's seconds


@dataclass
class Laboratory:
    """One model, and what rows share: its tensors, the drawn tokens, the dense perplexity."""

    model: str
    device: str = "cpu"
    _tokens: dict[str, Tokens] = field(default_factory=dict)
    _dense: dict[str, float] = field(default_factory=dict)

    @cached_property
    def source(self) -> Source:
        """The model, checked."""
        opened = open_model(self.model)
        opened.validate()
        return Remembered(opened.storage, opened.origin, opened.wanted)

    @cached_property
    def name(self) -> str:
        """The model in a row's settings: how it was called (a path: its last part) and a digest of its files."""
        digests = "".join(digest for _, digest in sorted(self.source.digests().items()))
        called = Path(self.model).name if Path(self.model).exists() else self.model
        return f"{called}@{hashlib.sha256(digests.encode()).hexdigest()[:12]}"

    def tokens(self, row: Row) -> Tokens:
        """Calibration and held-out tokens; only the last ones are kept."""
        key = row.calibration.model_dump_json() + row.evaluation.model_dump_json()
        if key not in self._tokens:
            writer = SelfText(self.source, Path(tempfile.gettempdir()) / "flatq-self-text", self.device)
            self._tokens = {key: token_batches(row.calibration, [row.evaluation], self.source.tokenizer(), writer)}
        return self._tokens[key]

    def dense(self, heldout: Tensor) -> float:
        """Perplexity of the model as it was."""
        key = hashlib.sha256(str(heldout.shape).encode() + heldout.numpy().tobytes()).hexdigest()
        if key not in self._dense:
            self._dense[key] = perplexity(self.source, heldout, device=self.device).value
        return self._dense[key]

    def measure(self, row: Row) -> dict[str, Any]:
        """A row's result, JSON-ready; one that cannot be had says why under ``refused``."""
        result: dict[str, Any] = {
            "label": row.variant.label,
            **row.settings(self.name),
            "code": code_digest(),
            "flatq": flatq.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.device}",
        }
        try:
            tokens = self.tokens(row)
            made = self._make(row, tokens)
        except FlatqError as error:
            return {**result, "damage": None, "refused": str(error)}
        dense = self.dense(tokens.heldout)
        return {
            **result,
            "share": made.parameters / self.source.config.decoder_parameters(),
            "dense_perplexity": dense,
            "perplexity": made.perplexity,
            "damage": math.log(made.perplexity / dense),
            "compress_seconds": round(made.compress_seconds, 2),
            "compress_cpu_seconds": round(made.cpu_seconds, 2),
            "score_seconds": round(made.score_seconds, 2),
        }

    def _make(self, row: Row, tokens: Tokens) -> Made:
        if row.variant.method in BASELINES and self.device != "cpu":
            raise RecipeError(f"--device {self.device}: the baselines compute on the CPU; measure them with cpu")
        started, busy = time.perf_counter(), time.process_time()
        if row.variant.method == "slicegpt":
            made = baselines.slicegpt(
                self.source,
                tokens.calibration,
                tokens.heldout,
                row.keep_ratio,
                precision=row.calibration.precision,
            )
            # Both texts go through in one pass, so its cost is shared out by their tokens.
            took = time.perf_counter() - started
            share = tokens.calibration.numel() / (tokens.heldout.numel() + tokens.calibration.numel())
            busy = share * (time.process_time() - busy)
            return Made(made.perplexity, made.parameters, share * took, (1 - share) * took, busy)
        compress = self._recipe if row.variant.is_flat or row.variant.method == "none" else self._baseline
        overlay, parameters = compress(row, tokens)
        compressed, busy = time.perf_counter(), time.process_time() - busy
        value = perplexity(overlay, tokens.heldout, device=self.device).value
        return Made(value, parameters, compressed - started, time.perf_counter() - compressed, busy)

    def _recipe(self, row: Row, tokens: Tokens) -> tuple[Overlay, int]:
        """What ``flatq run`` would make of the recipe that this row stands for."""
        flat = row.variant.flat(row.keep_ratio) if row.variant.is_flat else None
        recipe = Recipe(
            version=1,
            model=ModelSpec(path=self.model),
            calibration=row.calibration,
            evaluation=(row.evaluation,),
            stages=(*([flat] if flat else []), *([GPTQ] if row.gptq else [])),
        )
        with tempfile.TemporaryDirectory() as place:
            folder = RunFolder(Path(place) / "run", recipe)
            with folder.working():
                plan = rank_plan(Job(recipe, self.source, tokens, folder, self._execution(recipe)))
                raise_objections(recipe, self.source.config.with_layers(plan.layers), [])
                grids = planned_grids(self.source.config.with_layers(plan.layers), recipe.gptq)
                stages = stages_of(recipe, plan, grids, self.source.config, folder.work)
                reference = flat is not None and flat.corrects
                overlay = self._walked(row, tokens, stages, plan.layers, folder.work, reference=reference)
        return overlay, overlay.config.decoder_parameters()

    def _baseline(self, row: Row, tokens: Tokens) -> tuple[Overlay, int]:
        """One of the baselines; those that narrow use the widths of the paper's uniform plan."""
        config = self.source.config
        if row.variant.method in ("svd", "svd-llm"):
            low_rank = baselines.LowRank(row.keep_ratio, whiten=row.variant.method == "svd-llm")
            return self._spooled(row, tokens, low_rank, config.layers), low_rank.parameters(config)
        layers = self._uniform_widths(row, tokens)
        by_norm = {"truncation": False, "magnitude": True}[row.variant.method]
        overlay = self._spooled(row, tokens, baselines.Selection(layers, by_norm=by_norm), layers)
        return overlay, overlay.config.decoder_parameters()

    def _uniform_widths(self, row: Row, tokens: Tokens) -> tuple[LayerDims, ...]:
        flat = FlatSpec(method="paper", allocation="uniform", keep_ratio=row.keep_ratio)
        recipe = Recipe(version=1, model=ModelSpec(path=self.model), calibration=row.calibration, stages=(flat,))
        with tempfile.TemporaryDirectory() as place:
            folder = RunFolder(Path(place) / "run", recipe)
            with folder.working():
                return rank_plan(Job(recipe, self.source, tokens, folder, self._execution(recipe))).layers

    def _execution(self, recipe: Recipe) -> Execution:
        return Execution.of(recipe.calibration, self.device, WORKING_SET)

    def _spooled(self, row: Row, tokens: Tokens, stage: baselines.Stage, layers: tuple[LayerDims, ...]) -> Overlay:
        with tempfile.TemporaryDirectory() as place:
            return self._walked(row, tokens, [stage], layers, Path(place))

    def _walked(
        self,
        row: Row,
        tokens: Tokens,
        stages: Sequence[baselines.Stage],
        layers: tuple[LayerDims, ...],
        work: Path,
        *,
        reference: bool = False,
    ) -> Overlay:
        overlay = Overlay(self.source, self.source.config.with_layers(layers))
        precision = row.calibration.precision
        execution = Execution(precision, device=self.device)
        for block in walk(
            self.source, tokens.calibration, work, overlay.save, execution=execution, reference=reference
        ):
            for stage in stages:
                stage.apply(block)
            block.observe()  # no-op after a stage that observed; the dense model's hidden states are needed
        return overlay


def code_digest() -> str:
    """Digest of the code that rows depend on: the core without its exports, reports and command line."""
    root = Path(flatq.__file__).parent
    folders = ("calibration", "compress", "quantize")
    parts = [*(path for folder in folders for path in root.glob(f"{folder}/*.py")), Path(baselines.__file__)]
    parts += [
        root / name
        for name in (
            "linalg.py",
            "model/config.py",
            "model/decoder.py",
            "model/grid.py",
            "model/rope.py",
            "recipe/blocks.py",
        )
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(parts))).hexdigest()[:12]
