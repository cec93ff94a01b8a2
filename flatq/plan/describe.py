"""The texts of ``flatq check`` and ``flatq plan``: a recipe in words, and its sizes, memory and time.

Sizes are exact (computed from shapes). Memory and time by phase come from ``forecast``; times are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from flatq.compress.plan import RankPlan
from flatq.export.bench import rendered
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.plan.forecast import Forecast
from flatq.plan.sizes import artifact_bytes, cautions, disk_bytes, footprints
from flatq.quantize.grids import planned_grids
from flatq.recipe.grammar import Recipe
from flatq.units import seconds, size

if TYPE_CHECKING:
    from flatq.export.planned import PlannedExport


def explanation(recipe: Recipe) -> list[str]:
    """A description of the recipe, one line per step."""
    calibration, lines = recipe.calibration, [f"model        {recipe.model.path}"]
    lines.append(f"calibration  {calibration.samples} x {calibration.seq_len} tokens of {calibration.label}")
    if (budget := recipe.budget) is not None:
        of = f", of export {budget.export}" if budget.export else ""
        lines.append(f"budget       {budget.words}{of}, spent by predicted loss")
    if (flat := recipe.flat) is not None:
        kind = ", the same widths in all layers" if flat.uniform else ""
        lines.append(f"flat         {flat.budget}, {flat.parts.allocation} allocation{kind}")
    if (gptq := recipe.gptq) is not None:
        kind = "symmetric" if gptq.symmetric else "asymmetric"
        choices = "/".join(map(str, sorted(gptq.bit_choices)))
        bits = f"{gptq.bits}" if gptq.average_bits is None else f"{gptq.average_bits:g} (on average, of {choices})"
        group = "one group per row" if gptq.group_size == -1 else f"groups of {gptq.group_size}"
        table = f", embedding {gptq.embedding.bits} bit" if gptq.embedding else ""
        if budget is None:
            lines.append(f"gptq         {bits} bit {kind}, {group}{table}")
        else:
            listed, sizes = ("/".join(map(str, sorted(values))) for values in (budget.bits, budget.group_sizes))
            lines.append(f"gptq         bits and groups from the budget, of {listed} bits in groups of {sizes}{table}")
        for pattern, rule in gptq.overrides.items():
            changed = ", ".join(f"{key} {value}" for key, value in rule.model_dump(exclude_unset=True).items())
            lines.append(f"             {pattern}: {changed}")
    if (recover := recipe.recover) is not None:
        lines.append(f"recover      {recover.steps} steps of {recover.tokens} tokens, trains scales and norm gains")
    for spec in recipe.exports:
        options = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        unverified = "" if spec.verify else " (not verified)"
        lines.append(f"export       {spec.name}: {spec.format} {options}".rstrip() + unverified)
    if recipe.bench is not None:
        lines.append(f"bench        prompt {recipe.bench.prompt}, {recipe.bench.new_tokens} new tokens")
    return lines


def described(config: DecoderConfig) -> str:
    """The shapes of a model in one line."""
    dims = config.layers[0]
    mlp = f"d_ff {dims.d_ff}"
    if config.experts:
        mlp = f"{config.experts} experts of d_ff {dims.d_ff // config.experts}, {config.experts_per_token} per token"
    return (
        f"{config.family}: {len(config.layers)} layers, d_model {config.d_model}, {dims.heads} heads of {dims.d_qk} on "
        f"{dims.kv_heads} key-value heads, {mlp}, vocabulary {config.vocab:,}, {config.parameters():,} parameters"
    )


def of_experts(recipe: Recipe, config: DecoderConfig) -> list[str]:
    """What the stages do with a mixture of experts, and what they leave."""
    if not config.experts or not recipe.stages:
        return []
    found = [
        "experts: each is solved on the tokens that the router sends it; where it is sent fewer tokens than it has "
        "inputs, the layer's mean replaces those lacking, and the report says so; routers stay unquantized"
    ]
    if recipe.flat is not None and recipe.flat.keep_ratio != 1:
        found.append(
            "experts: all experts of a layer get one width; decode_bytes counts the weights of all of them, because "
            "exports may read them all"
        )
    return found


def forecast(
    recipe: Recipe,
    dense: DecoderConfig,
    plan: RankPlan,
    exports: Sequence[PlannedExport],
    itemsize: int,
    phases: Mapping[str, Forecast],
    grids: Mapping[str, Grid] | None = None,
) -> str:
    """The text of ``flatq plan``.

    Args:
        recipe: of the run.
        dense: the model.
        plan: planned widths.
        exports: of the recipe.
        itemsize: bytes of an unquantized number.
        phases: forecast of each phase.
        grids: planned for a budget; None follows from the gptq stage.
    """
    config = dense.with_layers(plan.layers)
    grids = planned_grids(config, recipe.gptq) if grids is None else grids
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
        table.add_row(name, size(phase.peak_rss_bytes), _about(phase.seconds))
    table.add_row(
        "all but exports and bench",
        size(max(phase.peak_rss_bytes for phase in phases.values())),
        _about(sum(phase.seconds for phase in phases.values())),
    )
    if held := max(phase.peak_device_bytes for phase in phases.values()):
        table.add_row("memory of the GPU", "", size(held))
    text = rendered(table)
    if recipe.budget is not None:
        text += "widths and bits depend on measurements during the run; sizes are for guessed errors\n"
    elif recipe.flat is not None and recipe.flat.parts.allocation != "uniform":
        text += "widths per layer depend on measurements during the run; sizes are for equal shares of all layers\n"
    if recipe.gptq is not None and recipe.gptq.average_bits is not None:
        text += "bits per linear depend on measurements during the run; sizes are for a choice of the same average\n"
    said = [*of_experts(recipe, dense), *cautions(recipe, dense)]
    return text + "".join(f"{caution}\n" for caution in said)


def _about(duration: float) -> str:
    """A duration rounded to two digits."""
    return f"about {seconds(float(f'{duration:.2g}'))}".replace(".0 s", " s")
