"""Reasons why a model cannot be written as a Hugging Face folder, each with a remedy.

This module does not import transformers, so that recipes can be checked with only the core installed.
"""

from __future__ import annotations

from collections.abc import Mapping

from flatq.export import DecoderConfig, Grid
from flatq_safetensors.configs import Versions, family_settings
from flatq_safetensors.grouping import ENDS, LEAST
from flatq_safetensors.options import SafetensorsOptions
from flatq_safetensors.padding import padded_config

GPTQ_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
GPTQ_MULTIPLE = 32


def objections(config: DecoderConfig, grids: Mapping[str, Grid], options: SafetensorsOptions) -> list[str]:
    """Reasons why this model cannot be written with these options, each with a remedy."""
    problems = _padding(config, options) + _packed_embedding(config, grids, options)
    if not options.keeps_codes:
        if options.dtype is not None:
            problems.append(f"dtype {options.dtype}: format {options.format} determines it; leave dtype out")
        return problems
    inside = [grid for stem, grid in grids.items() if stem.startswith("layers.")]
    if not inside:
        problems.append(f"format {options.format}: no linear is quantized; write format bf16 or fp16, or add gptq")
    if options.format == "compressed-tensors" and Versions.reading(inside, embedding=options.packed_embedding) is None:
        problems.append(
            "format compressed-tensors: no release of that package reads asymmetric weights with 3 bits or a packed "
            "embedding; quantize with symmetric: true, leave packed_embedding out, or write format gptq_v2"
        )
    written = padded_config(config) if options.pad_values else config
    found: dict[str, list[str]] = {}
    for stem, grid in options.written_grids(config, grids).items():
        rows, columns = config.vocab, config.d_model
        if stem not in ENDS:
            _, index, linear = stem.split(".")
            rows, columns = written.layers[int(index)].shape(linear, config.d_model)
        for problem in _linear(rows, columns, grids[stem], grid, options):
            found.setdefault(problem, []).append(stem)
    return problems + [f"{_some(stems)}: {problem}" for problem, stems in found.items()]


def _padding(config: DecoderConfig, options: SafetensorsOptions) -> list[str]:
    if not options.pad_values:
        return []
    if len({dims.d_ff for dims in config.layers}) > 1:
        return [
            f"pad_values: a standard {config.family} checkpoint has one MLP width, the layers of this model differ; "
            "plan with uniform: true, or leave pad_values out"
        ]
    if family_settings(padded_config(config), codes=options.keeps_codes) is None:
        return [
            f"pad_values: the switches of this model are not those of a {config.family} checkpoint; "
            "leave pad_values out"
        ]
    return []


def _packed_embedding(config: DecoderConfig, grids: Mapping[str, Grid], options: SafetensorsOptions) -> list[str]:
    if not options.packed_embedding:
        return []
    if options.format != "compressed-tensors":
        return [f"packed_embedding: no reader of format {options.format} supports it; write format compressed-tensors"]
    if "embed" not in grids:
        return ["packed_embedding: the embedding is not quantized; add embedding: {bits: 8} to the gptq stage"]
    if family_settings(padded_config(config) if options.pad_values else config, codes=True) is not None:
        return [
            f"packed_embedding: the {config.family} class of transformers uses the embedding's weight before it is "
            "unpacked, so it works only for models with widths per layer; leave packed_embedding out"
        ]
    return []


def _linear(rows: int, columns: int, quantized: Grid, grid: Grid, options: SafetensorsOptions) -> list[str]:
    problems = []
    if 0 < grid.group_size < LEAST:
        problems.append(
            f"groups of {quantized.group_size} among {columns} inputs can only be written as groups of "
            f"{grid.group_size}; plan widths in multiples of {LEAST} or more (round_to), or choose group_size -1"
        )
    if options.gptq_version is None:
        return problems
    if rows % GPTQ_MULTIPLE or columns % GPTQ_MULTIPLE:
        problems.append(
            f"shape {rows} x {columns}: GPTQ files pack in blocks of {GPTQ_MULTIPLE} outputs and inputs; plan "
            f"widths in multiples of {GPTQ_MULTIPLE}, or write format compressed-tensors"
        )
    if grid.group_size not in (-1, *GPTQ_GROUPS):
        problems.append(
            f"{columns} inputs in groups of {quantized.group_size} would be written as groups of {grid.group_size}; "
            f"GPTQ readers support -1 and {', '.join(map(str, GPTQ_GROUPS))}; plan widths in multiples of the group "
            "size, or write format compressed-tensors"
        )
    if options.gptq_version == 1 and not grid.symmetric:
        problems.append(
            "format gptq (v1) stores zero - 1 and cannot hold the zero of a group without negative weights; write "
            "format gptq_v2 or compressed-tensors, or quantize with symmetric: true"
        )
    return problems


def _some(stems: list[str]) -> str:
    return stems[0] if len(stems) == 1 else f"{stems[0]} and {len(stems) - 1} more"
