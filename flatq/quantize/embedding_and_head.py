"""Quantization of the embedding and the LM head.

The head is quantized with GPTQ like any other linear (``quantize.gptq``), on the second moment of its inputs: the
residual stream after the last block and the final norm. With round-to-nearest, a 4-bit head adds several times the
error of all other linears together (docs/decisions/0010).

A tied table (embedding and head are one matrix) is quantized as the head, where its errors matter most; the walk then
starts from the unquantized embedding. An untied embedding is rounded to nearest before the walk, which starts from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from flatq.artifact import PARTS, save_shard
from flatq.calibration.grams import Gram
from flatq.calibration.states import Execution, HiddenStates
from flatq.errors import NumericsError
from flatq.machine.device import solver_of
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid, QuantizedWeight
from flatq.model.weights import Weights, head_stem, load_head, load_last_norm
from flatq.quantize.gptq import GptqResult
from flatq.quantize.stage import REMEDY, notes_on, quantize_table, quantized_together
from flatq.recipe.blocks import GptqSpec

EMBEDDING, ENDS = "embedding.safetensors", "ends.safetensors"
HEAD_AT_ONCE = 1 << 22  # weights that are quantized at once: small compared to a table; smaller values are slower


def first_table(weights: Weights, grids: Mapping[str, Grid]) -> Tensor | QuantizedWeight:
    """The embedding that the walk starts from, [vocab, m]."""
    if "embed" in grids and not _solved_last(weights.config, grids):
        return quantize_table(weights, "embed.weight", grids["embed"])
    return weights.tensor("embed.weight")


def head_moment(weights: Weights, states: HiddenStates, execution: Execution) -> Gram:
    """Second moment of the LM head's inputs, over the samples of all processes, [m, m].

    Args:
        states: the residual stream after the last block.
    """
    norm, moment = (
        load_last_norm(weights, device=execution.device),
        Gram(weights.config.d_model, device=execution.device),
    )
    with torch.inference_mode():
        for batch in states.batches():
            moment.update(norm(states.states[batch].to(execution.device, torch.float32)))
    moment.gather()
    moment.to(solver_of(execution.device))
    return moment


def quantized_head(weights: Weights, grid: Grid, moment: Gram, spec: GptqSpec) -> GptqResult:
    """The LM head quantized with GPTQ, [vocab, m]."""
    table = load_head(weights, device=str(moment.total.device)).weight
    return quantized_together([table], moment.mean(), grid, spec, at_once=HEAD_AT_ONCE)


def _solved_last(config: DecoderConfig, grids: Mapping[str, Grid]) -> bool:
    """Whether the embedding is tied to the head and quantized."""
    return config.tied_head and "embed" in grids


def save_first(weights: Weights, grids: Mapping[str, Grid], folder: Path) -> None:
    """Write the embedding that the walk starts from, unless it is quantized after the walk."""
    if not _solved_last(weights.config, grids):
        save_shard(folder / EMBEDDING, {"embed.weight": first_table(weights, grids)})


def saved_first(weights: Weights, grids: Mapping[str, Grid], folder: Path) -> Tensor | QuantizedWeight:
    """The embedding that ``save_first`` has written, memory-mapped."""
    if not (folder / EMBEDDING).exists():
        return first_table(weights, grids)
    shard: Any = safetensors.safe_open(folder / EMBEDDING, framework="pt")
    if "embed" not in grids:
        found: Tensor = shard.get_tensor("embed.weight")
        return found
    codes, scale, zero = (shard.get_tensor(f"embed.{part}") for part in PARTS)
    return QuantizedWeight(codes, scale, zero, grids["embed"])


def save_last(
    weights: Weights, grids: Mapping[str, Grid], moment: Gram | None, spec: GptqSpec | None, folder: Path
) -> dict[str, Any]:
    """Write the final norm and the head; returns the head's error and notes for the report, JSON-ready.

    Args:
        moment: from ``head_moment``; None leaves the head unquantized.
        spec: how to quantize it.
    """
    stem, said = head_stem(weights.config), dict[str, Any]()
    ends: dict[str, Tensor | QuantizedWeight] = {"norm.weight": weights.tensor("norm.weight")}
    if moment is not None and spec is not None:
        result = quantized_head(weights, grids[stem], moment, spec)
        if result.unheld:
            raise NumericsError(f"{stem}.weight: {result.unheld}; {REMEDY}")
        ends[f"{stem}.weight"] = result.weight
        said = {"error": result.error_of(), "notes": notes_on("head", result, spec.damping)}
    elif stem == "head":
        ends["head.weight"] = weights.tensor("head.weight")
    save_shard(folder / ENDS, ends)
    return said
