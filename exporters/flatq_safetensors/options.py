"""What a recipe may say about a Hugging Face folder.

Nothing here needs transformers: a recipe is checked on a machine that only has the core.
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
