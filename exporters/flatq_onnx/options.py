"""Options of an ONNX export.

This module does not import onnx, so that recipes can be checked with only the core installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flatq.export import DecoderConfig

# Defaults for each target; a recipe can override them, as far as `check.objections` allows.
TARGETS: Mapping[str, Mapping[str, Any]] = {
    "ort": {},
    "genai": {"attention": "gqa"},
    "optimum": {"attention": "gqa", "left_padding": True},
    "web": {"attention": "gqa", "left_padding": True},
    "cuda": {"attention": "gqa", "activations": "fp16"},
}

# By whether weights are codes, and the type of everything else; the key of transformers.js is without the underscore.
WEB_SUFFIXES = {(True, "fp32"): "_q4", (True, "fp16"): "_q4f16", (False, "fp32"): "", (False, "fp16"): "_fp16"}


class OnnxOptions(BaseModel):
    """Options of ``exports: - onnx: {...}``.

    Attributes:
        target: the program that will run the graph; sets layout, data type and additional files.
            ``ort`` is onnxruntime on a CPU, phones included; ``genai`` onnxruntime-genai (``genai_config.json`` and
            tokenizer); ``optimum`` ORTModelForCausalLM, with left padding (configuration and tokenizer in the format of
            transformers 4); ``cuda`` onnxruntime on CUDA; ``web`` transformers.js in browsers and Node, with left
            padding.
        attention: ``reduced`` has a value cache with the model's reduced width, written in place, and supports left
            and right padding. ``gqa`` is onnxruntime's GroupQueryAttention, whose value heads are as wide as keys
            (padded with zeros): the standard cache shape, which other programs expect.
        precision: ``fp32``, ``fp16``, or ``int4`` for MatMulNBits nodes with the artifact's codes of any bits;
            linears without a grid are not quantized.
        activations: data type of everything that is not quantized, including the cache.
        accuracy_level: precision of MatMulNBits: 4 is int8 activations (fast), 0 and 1 are float32. With ``fp16`` it is
            0: GPUs ignore it, and with 4 CPUs return zeros below onnxruntime's highest optimization level.
        cache_type: ``int8`` stores keys and values in 8 bits, with a scale per channel from calibration text: a
            quarter of the memory, and faster decoding with long contexts. Only for ``gqa`` without ``left_padding``,
            on a CPU. ``float`` is the type of ``activations``.
        decode_on_load: only for ``web`` with ``int4``: the file has the codes, and constant folding decodes them into
            float weights when it is loaded. For WebAssembly, where MatMulNBits is about ten times slower than a
            product of floats; memory is that of a float model.
        left_padding: only for ``gqa``: rotary embedding and mask outside the attention node, which supports
            left-padded batches. Without it a padded batch must be padded on the right.
        ngram_size: only for ``genai``: speculative decoding without a second model. The last ``ngram_size - 1`` tokens
            are looked up in the text so far, the tokens that followed them are proposed, and one step of the model
            confirms or rejects them. The text is the same where products of one row and of several are, which they are
            with float weights and ``accuracy_level`` 0; batches are refused by the program. None is off.
        max_draft_tokens: with ``ngram_size``: most tokens that are proposed at once; None is the program's own 4.
        context_length: maximum number of positions; None is the model's. It is stated in ``flatq_onnx.json``, and
            ``gqa`` without ``left_padding`` has rotary tables of that length.
        external_data_above: weights with more bytes than this are written to a separate file (protobuf's limit is
            2 GB).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Literal["ort", "genai", "optimum", "cuda", "web"] = "ort"
    attention: Literal["reduced", "gqa"] = "reduced"
    precision: Literal["fp32", "fp16", "int4"] = "int4"
    activations: Literal["fp32", "fp16"] = "fp32"
    accuracy_level: Literal[0, 1, 4] = 4
    decode_on_load: bool = False
    left_padding: bool = False
    cache_type: Literal["float", "int8"] = "float"
    ngram_size: int | None = Field(default=None, ge=2, le=16)
    max_draft_tokens: int | None = Field(default=None, ge=1, le=16)
    context_length: int | None = Field(default=None, ge=1)
    external_data_above: int = Field(default=1_500_000_000, ge=0, le=1_500_000_000)

    @model_validator(mode="before")
    @classmethod
    def _as_the_target_wants(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        half = {"activations": "fp16"} if data.get("precision") == "fp16" else {}
        wanted = data.get("target", "ort")
        grouped = {"attention": "gqa"} if data.get("cache_type") == "int8" else {}
        chosen = {**half, **grouped, **TARGETS.get(wanted if isinstance(wanted, str) else "", {}), **data}
        return {"accuracy_level": 0, **chosen} if chosen.get("activations") == "fp16" else chosen

    def positions(self, config: DecoderConfig) -> int:
        """Maximum number of positions."""
        return self.context_length or config.max_positions

    @property
    def model_file(self) -> str:
        """Path of the graph in the folder; transformers.js finds the precision by the file's name."""
        if self.target != "web":
            return "model.onnx"
        return f"onnx/model{WEB_SUFFIXES[self.precision == 'int4', self.activations]}.onnx"

    @property
    def data_file(self) -> str:
        """Name of the external data, which lie beside the graph."""
        return Path(self.model_file).name + ("_data" if self.target == "web" else ".data")

    @property
    def chooses_logits(self) -> bool:
        """Whether the graph has the input ``num_logits_to_keep``, which genai and optimum do not know."""
        return self.target not in ("genai", "optimum")

    @property
    def fused_rope(self) -> bool:
        """Whether GroupQueryAttention applies rotary embedding and mask, from the number of valid tokens per row."""
        return self.attention == "gqa" and not self.left_padding
