"""What a recipe may say about a Hugging Face folder, and the objections to a model that cannot be written so.

Nothing here needs transformers: a recipe is checked on a machine that only has the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq_safetensors.configs import Versions, family_settings
from flatq_safetensors.grouping import ENDS, LEAST, written_ends, written_grids
from flatq_safetensors.padding import padded_config

GPTQ_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
GPTQ_MULTIPLE = 32


class SafetensorsOptions(BaseModel):
    """Options of ``exports: - safetensors: {...}``.

    Attributes:
        format: ``compressed-tensors`` keeps the codes and is what transformers reads on any machine (package
            ``compressed-tensors``) and vLLM runs; ``gptq`` (v1) and ``gptq_v2`` keep them for GPTQModel and all who
            read AutoGPTQ's files; ``bf16``, ``fp16`` and ``fp32`` are dense, codes decoded.
        dtype: of the tensors that are not quantized, in the formats that keep codes; None is as in the artifact.
        pad_values: pad value heads with zeros to the width of the key heads. With one MLP width in all layers the
            folder is then a plain checkpoint of its family, which needs no extra code and saves nothing on v and o.
        one_group_size: in the formats ``gptq`` and ``gptq_v2``, cut all linears to the smallest group size that any of
            them needs (the same weights, more scales): transformers reads no other GPTQ folders. False writes each
            linear in its own size, for GPTQModel and vLLM.
        packed_embedding: write a quantized embedding (and head) as codes, too; a tied head stays tied. Read by
            compressed-tensors 0.20 or later, for models with their own widths per layer: stock classes ask for the
            embedding's weight before it is unpacked. False writes them dense.
        max_shard_size: bytes of weights in one file, unless a single tensor is larger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["compressed-tensors", "gptq", "gptq_v2", "bf16", "fp16", "fp32"] = "compressed-tensors"
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    pad_values: bool = False
    one_group_size: bool = True
    packed_embedding: bool = False
    max_shard_size: int = Field(default=5_000_000_000, ge=1)

    @property
    def keeps_codes(self) -> bool:
        """Whether quantized linears stay quantized in the files."""
        return self.format in ("compressed-tensors", "gptq", "gptq_v2")

    @property
    def gptq_version(self) -> int | None:
        """1 or 2; None for the formats that are not GPTQ's."""
        return {"gptq": 1, "gptq_v2": 2}.get(self.format)

    def written_grids(self, config: DecoderConfig, grids: Mapping[str, Grid]) -> dict[str, Grid]:
        """See ``grouping.written_grids``."""
        one_size = self.one_group_size and self.gptq_version is not None
        written = written_grids(config, grids, pad_values=self.pad_values, one_size=one_size)
        return written | (written_ends(config, grids) if self.packed_embedding else {})


def objections(config: DecoderConfig, grids: Mapping[str, Grid], options: SafetensorsOptions) -> list[str]:
    """Everything that stands against writing this model so, each with the way out."""
    problems = _padding(config, options) + _packed_embedding(config, grids, options)
    if not options.keeps_codes:
        if options.dtype is not None:
            problems.append(f"dtype {options.dtype}: format {options.format} already says it; leave dtype out")
        return problems
    inside = [grid for stem, grid in grids.items() if stem.startswith("layers.")]
    if not inside:
        problems.append(f"format {options.format}: no linear is quantized; write format bf16 or fp16, or add gptq")
    if options.format == "compressed-tensors" and Versions.reading(inside, embedding=options.packed_embedding) is None:
        problems.append(
            "format compressed-tensors: no release of that package reads asymmetric weights beside 3 bits or a packed "
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
    widths = sorted({dims.d_ff for dims in config.layers})
    if len(widths) > 1:
        return [
            f"pad_values: a plain {config.family} checkpoint has one MLP width, this model has {len(widths)} "
            f"({widths[0]} to {widths[-1]}); plan with uniform: true, or leave pad_values out"
        ]
    if family_settings(padded_config(config)) is None:
        return [
            f"pad_values: the switches of this model are not those of a {config.family} checkpoint; "
            "leave pad_values out"
        ]
    return []


def _packed_embedding(config: DecoderConfig, grids: Mapping[str, Grid], options: SafetensorsOptions) -> list[str]:
    if not options.packed_embedding:
        return []
    if options.format != "compressed-tensors":
        return [f"packed_embedding: no reader of format {options.format} knows it; write format compressed-tensors"]
    if "embed" not in grids:
        return ["packed_embedding: the embedding is not quantized; add embedding: {bits: 8} to the gptq stage"]
    if family_settings(padded_config(config) if options.pad_values else config) is not None:
        return [
            f"packed_embedding: a stock {config.family} class asks for the embedding's weight before it is unpacked, "
            "so that only models with their own widths load with it; leave packed_embedding out"
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
            f"GPTQ readers know -1 and {', '.join(map(str, GPTQ_GROUPS))}; plan widths in multiples of the group "
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
