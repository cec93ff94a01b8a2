"""What a recipe means and what it will cost, said before anything is computed.

Sizes are exact (they follow from shapes). Memory and time are estimates: memory adds up what the walk holds at its
largest block, time divides counted operations by a short measurement of this machine's matrix products.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from flatq.bench import BenchResult
from flatq.compress.stage import RankPlan
from flatq.decoder import LINEARS, DecoderConfig
from flatq.errors import ArtifactError, RecipeError
from flatq.export import Exporter
from flatq.feed import BATCH_TOKENS, WORKING_SET, activation_bytes
from flatq.footprint import decode_bytes, weight_bytes
from flatq.quantize.grid import Grid
from flatq.quantize.stage import planned_grids
from flatq.recipe import Recipe
from flatq.report import size
from flatq.specs import CONTEXT
from flatq.walk import forward_precision

if TYPE_CHECKING:
    from flatq.delivery import PlannedExport

PROCESS = 700_000_000  # bytes that Python, torch and transformers hold before any model is opened


def explanation(recipe: Recipe) -> list[str]:
    """The recipe in words, one line per step."""
    calibration, lines = recipe.calibration, [f"model        {recipe.model.path}"]
    text = calibration.path or calibration.dataset
    lines.append(f"calibration  {calibration.samples} x {calibration.seq_len} tokens of {text}")
    if (flat := recipe.flat) is not None:
        kind = ", the same widths in all layers" if flat.uniform else ""
        lines.append(f"flat         {flat.budget}, {flat.parts.allocation} allocation{kind}")
    if (gptq := recipe.gptq) is not None:
        kind = "symmetric" if gptq.symmetric else "asymmetric"
        choices = "/".join(map(str, sorted(gptq.bit_choices)))
        bits = f"{gptq.bits}" if gptq.average_bits is None else f"{gptq.average_bits:g} (on average, of {choices})"
        group = "one group per row" if gptq.group_size == -1 else f"groups of {gptq.group_size}"
        table = f", embedding {gptq.embedding.bits} bit" if gptq.embedding else ""
        lines.append(f"gptq         {bits} bit {kind}, {group}{table}")
        for pattern, rule in gptq.overrides.items():
            changed = ", ".join(f"{key} {value}" for key, value in rule.model_dump(exclude_unset=True).items())
            lines.append(f"             {pattern}: {changed}")
    for spec in recipe.exports:
        options = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        lines.append(f"export       {spec.name}: {spec.format} {options}".rstrip())
    if recipe.bench is not None:
        lines.append(f"bench        prompt {recipe.bench.prompt}, {recipe.bench.new_tokens} new tokens")
    return lines


def disk_bytes(config: DecoderConfig, recipe: Recipe, itemsize: int) -> int:
    """What a run writes besides its exports: artifact (a code is a byte there) and hidden states."""
    decoder = config.decoder_parameters()
    states = 2 * 4 * recipe.calibration.samples * recipe.calibration.seq_len * config.d_model
    return decoder * (1 if recipe.gptq else itemsize) + (config.parameters() - decoder) * itemsize + states


def peak_memory(config: DecoderConfig, recipe: Recipe) -> int:
    """Estimated peak resident bytes: the process, the largest block with its Grams and solves, or the embedding."""
    d_model, width = config.d_model, max(dims.d_ff for dims in config.layers)
    inner = max(width, max(dims.heads * dims.d_v for dims in config.layers))
    tokens = min(recipe.calibration.samples * recipe.calibration.seq_len, max(BATCH_TOKENS, recipe.calibration.seq_len))
    largest = max(
        max(dims.shape(name, d_model)[0] * dims.shape(name, d_model)[1] for name in LINEARS) for dims in config.layers
    )
    block = 4 * 3 * largest + 4 * (inner**2 + d_model**2)
    solve = 8 * 4 * inner**2 + 4 * 4 * largest
    activations = 4 * tokens * (3 * width + 4 * d_model)
    states = 2 * 4 * recipe.calibration.samples * recipe.calibration.seq_len * d_model
    table = 4 * 2 * config.vocab * d_model
    return PROCESS + states + max(block + max(solve, activations), table)


def working_set(config: DecoderConfig, recipe: Recipe, memory: int | None) -> int:
    """Bytes for the activations of a batch, so that the whole stays below ``memory``.

    Raises:
        RecipeError: a single sample does not fit.
    """
    if memory is None:
        return WORKING_SET
    one = recipe.calibration.seq_len * activation_bytes(config)
    rest = peak_memory(config, recipe) - max(WORKING_SET, one)
    if rest + one > memory:
        raise RecipeError(
            f"--memory {size(memory)}: this model needs about {size(rest + one)} with one sample of "
            f"{recipe.calibration.seq_len} tokens at a time; give that much, or lower calibration.seq_len"
        )
    return min(memory - rest, WORKING_SET)


def operations(dense: DecoderConfig, plan: RankPlan, recipe: Recipe) -> tuple[float, float]:
    """Floating-point operations of the forward passes with their Grams, and of the solves."""
    tokens = recipe.calibration.samples * recipe.calibration.seq_len
    narrow = dense.with_layers(plan.layers).decoder_parameters()
    wide = dense.decoder_parameters()
    measured = recipe.flat is not None and plan.layers != dense.layers and recipe.flat.parts.allocation != "uniform"
    importance = wide if measured else 0
    grams = sum(2 * dense.d_model**2 + (d.heads * d.d_v) ** 2 + d.d_ff**2 for d in dense.layers)
    forward = 2.0 * tokens * (importance + wide + narrow + grams)
    solves = 0.0
    for before, after in zip(dense.layers, plan.layers, strict=True):
        if recipe.flat is not None:
            solves += 2.0 * before.d_ff**3
        if recipe.gptq is not None:
            for name in LINEARS:
                rows, columns = after.shape(name, dense.d_model)
                solves += 2.0 * rows * columns**2 + 2.0 * columns**3 * (name in ("q", "o", "gate", "down"))
    scored = recipe.evaluation.tokens
    return forward, solves + 2.0 * scored * (dense.parameters() + wide)


def rates(device: str, precision: str) -> tuple[float, float]:
    """Operations per second in the forward pass and in float32, measured in about a second."""
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)

    def measure() -> float:
        best = float("inf")
        for _ in range(4):
            started = time.perf_counter()
            (a @ b).sum().item()
            best = min(best, time.perf_counter() - started)
        return 2 * 2048**3 / best

    exact = measure()
    with forward_precision(precision):
        fast = measure()
    return fast, exact


def forecast(
    recipe: Recipe, dense: DecoderConfig, plan: RankPlan, exports: Sequence[PlannedExport], itemsize: int, device: str
) -> str:
    """The text of ``flatq plan``."""
    config = dense.with_layers(plan.layers)
    grids = planned_grids(config, recipe.gptq)
    table = Table(title=f"plan for {recipe.model.path}", show_header=True)
    for column in ("", "dense", "planned"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("parameters", f"{dense.parameters():,}", f"{config.parameters():,}")
    table.add_row("decoder parameters", f"{dense.decoder_parameters():,}", f"{config.decoder_parameters():,}")
    table.add_row("value cache per token", *(f"{sum(d.kv_heads * d.d_v for d in c.layers):,}" for c in (dense, config)))
    for name, cells in footprints(recipe, dense, config, grids, itemsize).items():
        table.add_row(name, *map(size, cells))
    table.add_row(
        "checkpoint / artifact", size(dense.parameters() * itemsize), size(disk_bytes(config, recipe, itemsize))
    )
    for item in exports:
        bytes_ = item.exporter.bytes(config, grids, item.options, itemsize=itemsize)
        table.add_row(f"export {item.name}", "", size(bytes_))
    fast, exact = rates(device, recipe.calibration.precision)
    forward, solves = operations(dense, plan, recipe)
    seconds = forward / fast + solves / exact
    table.add_row("peak memory, about", "", size(peak_memory(dense, recipe)))
    table.add_row("compress and evaluate, about", "", f"{seconds / 60:.1f} min on {device}")
    text = rendered(table)
    if recipe.flat is not None and recipe.flat.parts.allocation != "uniform":
        text += "widths per layer follow from the weights and are not planned here: sizes are for equal shares\n"
    if recipe.gptq is not None and recipe.gptq.average_bits is not None:
        text += "bits per linear follow from measured errors: sizes are for a choice of the same average\n"
    return text


def footprints(
    recipe: Recipe, dense: DecoderConfig, planned: DecoderConfig, grids: Mapping[str, Grid], itemsize: int
) -> dict[str, tuple[int, int]]:
    """Bytes stored and bytes read per decoded token, (dense, planned), in the units that budgets are given in."""
    context = recipe.flat.cache_context if recipe.flat else CONTEXT
    return {
        "weights": (weight_bytes(dense, {}, itemsize), weight_bytes(planned, grids, itemsize)),
        f"read per decoded token, context {context:,}": (
            decode_bytes(dense, {}, itemsize, context),
            decode_bytes(planned, grids, itemsize, context),
        ),
    }


def rendered(table: Table) -> str:
    """A rich table as plain text."""
    console = Console(file=io.StringIO(), width=110)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def bench_table(results: Sequence[BenchResult]) -> str:
    """Measured runners side by side."""
    table = Table(show_header=True)
    for column in ("", "prefill tok/s", "decode tok/s", "first token", "load", "peak RSS", "provider"):
        table.add_column(column, justify="left" if column in ("", "provider") else "right")
    for result in results:
        prefill, decode = result.prefill_tokens_per_second, result.decode_tokens_per_second
        table.add_row(
            result.name,
            f"{prefill.median:.1f} ({prefill.low:.1f}-{prefill.high:.1f})",
            f"{decode.median:.1f} ({decode.low:.1f}-{decode.high:.1f})",
            f"{result.first_token_seconds.median:.3f} s",
            f"{result.load_seconds:.2f} s",
            size(result.peak_rss_bytes),
            result.provider,
        )
    return rendered(table)


def checked_options(exporter: Exporter, options: dict[str, Any]) -> BaseModel:
    """An exporter's options from the command line.

    Raises:
        RecipeError: names each option that is refused.
    """
    try:
        return exporter.Options(**options)
    except ValidationError as error:
        raise RecipeError(
            [f"--option {'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        ) from error


def tokenizer_in(root: Path) -> Any:
    """The tokenizer that an artifact carries.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(root))
    except (OSError, ValueError) as wrong:
        raise ArtifactError(f"{root}: no usable tokenizer ({wrong}); run the recipe again with --fresh") from wrong
