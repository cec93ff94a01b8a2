"""Options of a Hugging Face export.

This module does not import transformers, so that recipes can be checked with only the core installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from flatq.export import DecoderConfig, Grid
from flatq_safetensors.grouping import written_ends, written_grids


class SafetensorsOptions(BaseModel):
    """Options of ``exports: - safetensors: {...}``.

    Attributes:
        format: ``compressed-tensors`` keeps the codes; transformers reads it on any machine (with the package
            ``compressed-tensors``), vLLM runs it; ``gptq`` (v1) and ``gptq_v2`` keep the codes for GPTQModel and other
            readers of AutoGPTQ files; ``bf16``, ``fp16`` and ``fp32`` are dense, with dequantized weights.
        dtype: of unquantized tensors, in the formats that keep codes; None is the artifact's.
        pad_values: pad value heads with zeros to the width of the key heads. With one MLP width in all layers the
            folder is then a standard checkpoint of its family, which needs no extra code and saves nothing on v and o.
        one_group_size: in the formats ``gptq`` and ``gptq_v2``, use the smallest group size that any linear needs for
            all linears (the same weights, more scales), which transformers requires for GPTQ folders. False writes
            each linear with its own size, for GPTQModel and vLLM.
        packed_embedding: also write a quantized embedding (and head) as codes; a tied head stays tied. Supported by
            compressed-tensors 0.20 or later, for models with widths per layer (the family classes of transformers use
            the embedding's weight before it is unpacked). False writes them dense.
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
