"""What a recipe means and what it will cost, said before anything is computed.

Sizes are exact (they follow from shapes). Memory and time by phase come from ``forecast``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from flatq.calibration import sensitivity
from flatq.calibration.states import stored_as
from flatq.compress.stage import RankPlan
from flatq.errors import ArtifactError, RecipeError
from flatq.export.bench import BenchResult
from flatq.export.protocols import Exporter
from flatq.model.decoder import DecoderConfig
from flatq.model.footprint import decode_bytes, weight_bytes
from flatq.model.grid import Grid
from flatq.model.weights import HALVES
from flatq.plan.decide import measurements
from flatq.plan.forecast import Forecast
from flatq.quantize.stage import planned_grids
from flatq.recipe.blocks import CONTEXT
from flatq.recipe.grammar import Recipe
from flatq.report.render import seconds, size

if TYPE_CHECKING:
    from flatq.export.deliver import PlannedExport


def explanation(recipe: Recipe) -> list[str]:
    """The recipe in words, one line per step."""
    calibration, lines = recipe.calibration, [f"model        {recipe.model.path}"]
    lines.append(f"calibration  {calibration.samples} x {calibration.seq_len} tokens of {calibration.label}")
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


def artifact_bytes(config: DecoderConfig, recipe: Recipe, itemsize: int) -> int:
    """Weights of the artifact; a code is a byte there."""
    decoder = config.decoder_parameters()
    return decoder * (1 if recipe.gptq else itemsize) + (config.parameters() - decoder) * itemsize


def disk_bytes(config: DecoderConfig, recipe: Recipe, itemsize: int) -> int:
    """What a run writes besides its exports: the artifact, the files of hidden states, what the sensitivity needs."""
    text, m, blocks = recipe.calibration, config.d_model, len(HALVES) * len(config.layers)
    tokens = text.samples * text.seq_len
    files = 4 if any(stage.corrects for stage in recipe.stages) else 2  # the dense model's, too
    states = files * tokens * m * stored_as(text.states, tokens, m).itemsize
    if "sensitivity" in measurements(recipe, narrows=recipe.flat is not None and recipe.flat.keep_ratio != 1):
        few = min(tokens, sensitivity.TOKENS)
        gradients = (blocks + 1) * few * m * stored_as(text.states, blocks * few, m).itemsize
        states = max(states, gradients) + 4 * blocks * m**2
    return artifact_bytes(config, recipe, itemsize) + states


def forecast(
    recipe: Recipe,
    dense: DecoderConfig,
    plan: RankPlan,
    exports: Sequence[PlannedExport],
    itemsize: int,
    phases: Mapping[str, Forecast],
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
        "checkpoint / artifact", size(dense.parameters() * itemsize), size(artifact_bytes(config, recipe, itemsize))
    )
    for item in exports:
        bytes_ = item.exporter.bytes(config, grids, item.options, itemsize=itemsize)
        table.add_row(f"export {item.name}", "", size(bytes_))
    table.add_row("disk of the run, without exports", "", size(disk_bytes(config, recipe, itemsize)))
    for name, phase in phases.items():
        table.add_row(name, size(phase.peak_rss_bytes), seconds(phase.seconds))
    table.add_row(
        "all but exports and bench",
        size(max(phase.peak_rss_bytes for phase in phases.values())),
        seconds(sum(phase.seconds for phase in phases.values())),
    )
    if held := max(phase.peak_device_bytes for phase in phases.values()):
        table.add_row("memory of the GPU", "", size(held))
    text = rendered(table)
    if recipe.flat is not None and recipe.flat.parts.allocation != "uniform":
        text += "widths per layer follow from the weights and are not planned here: sizes are for equal shares\n"
    if recipe.gptq is not None and recipe.gptq.average_bits is not None:
        text += "bits per linear follow from measured errors: sizes are for a choice of the same average\n"
    return text + "".join(f"{caution}\n" for caution in cautions(recipe, dense))


def cautions(recipe: Recipe, dense: DecoderConfig) -> list[str]:
    """What is allowed and costs quality that nothing else would tell of."""
    given = recipe.calibration
    tokens, widest = given.samples * given.seq_len, max(dims.d_ff for dims in dense.layers)
    if not recipe.stages or tokens >= widest:
        return []
    return [
        f"calibration: {tokens:,} tokens are fewer than the {widest:,} inputs of the widest linear, so what is fitted "
        f"to them follows chance: give {-(-widest // given.seq_len)} samples of {given.seq_len} or more"
    ]


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
        held = result.device_memory_bytes
        device = [] if held is None else [f"{size(held)} on the device"]
        table.add_row(
            result.name,
            f"{prefill.median:.1f} ({prefill.low:.1f}-{prefill.high:.1f})",
            f"{decode.median:.1f} ({decode.low:.1f}-{decode.high:.1f})",
            f"{result.first_token_seconds.median:.3f} s",
            f"{result.load_seconds:.2f} s",
            " + ".join([size(result.peak_rss_bytes), *device]),
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
