"""Options of a GGUF export."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["codes", "f32", "f16", "bf16", "q8_0", "q5_0", "q4_1", "q4_0", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"]


class GgufOptions(BaseModel):
    """Options of ``exports: - gguf: {...}``.

    Attributes:
        layout: ``auto`` is the family's architecture if no layer was narrowed, else ``deci``; ``deci`` supports any
            widths per layer, with value heads padded with zeros; ``compact`` (architecture ``mimo2``) has narrower
            value heads and a smaller V cache, for untied models with plain rope and one rank in all layers.
        precision: ``codes`` stores the artifact's codes exactly, in Q4_0, Q5_0 or Q8_0. All others write every matrix
            in that type: Q8_0 to Q4_0 by round-to-nearest, with embedding and head in Q8_0; the K types by llama.cpp's
            quantizer.
        otherwise: with ``codes``, the type of matrices that are not quantized or whose codes no block type can store.
        quantize_with: tool for the K types: ``llama-cpp-python``, the program ``llama-quantize`` on the PATH, or
            ``auto``, the first of the two that is available.
        imatrix: also write the activation statistics of the calibration as an importance matrix in llama.cpp's format,
            and use it for the K types.
        ffn_multiple: MLP widths are padded to a multiple of this with zero channels; K-quants need 256.
        context_length: context length in the file; None is the model's limit.
        baseline: type of the dense model that ``bench`` measures for comparison.
        name: ``general.name`` and the beginning of the file name; None derives it from the recipe's model.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, for a tokenizer that is not recognized.
        split_above: bytes of tensors in one file, unless a single tensor is larger; 0 never splits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Literal["auto", "deci", "compact"] = "auto"
    precision: Precision = "codes"
    otherwise: Literal["f32", "f16", "bf16", "q8_0"] = "q8_0"
    quantize_with: Literal["auto", "llama-cpp-python", "llama-quantize"] = "auto"
    imatrix: bool = False
    ffn_multiple: Literal[32, 256] = 32
    context_length: int | None = Field(default=None, ge=1)
    baseline: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = "f16"
    name: str | None = Field(default=None, pattern=r"^[\w .+-]+$")
    pre_tokenizer: str | None = Field(default=None, min_length=1)
    split_above: int = Field(default=40_000_000_000, ge=0)
