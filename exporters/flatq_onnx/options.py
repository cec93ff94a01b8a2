"""What a recipe may say about an ONNX export.

Nothing here needs onnx: a recipe is checked on a machine that only has the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What each consumer needs; a recipe may still say otherwise, as long as `check.objections` has nothing against it.
TARGETS: Mapping[str, Mapping[str, Any]] = {
    "ort": {},
    "mobile": {},
    "genai": {"attention": "gqa"},
    "optimum": {"attention": "gqa", "left_padding": True},
    "cuda": {"attention": "gqa", "activations": "fp16"},
}


class OnnxOptions(BaseModel):
    """Options of ``exports: - onnx: {...}``.

    Attributes:
        target: the program that will run the graph; sets the layout, the type of numbers and the files beside it.
            ``ort`` is onnxruntime itself on a CPU; ``genai`` onnxruntime-genai (``genai_config.json`` and tokenizer);
            ``optimum`` ORTModelForCausalLM, right for left-padded batches (configuration and tokenizer as
            transformers 4 reads them); ``cuda`` onnxruntime on CUDA; ``mobile`` one ``.ort`` file, which
            onnxruntime's builds for phones read.
        attention: ``reduced`` has a value cache as narrow as the model's value heads, written in place, and is right
            for left- and right-padded batches. ``gqa`` is onnxruntime's GroupQueryAttention, whose value heads are as
            wide as the keys' (missing columns are zero): the usual cache shape, which other programs expect.
        precision: ``fp32``, ``fp16``, or ``int4`` for MatMulNBits nodes that hold the artifact's own codes, whatever
            their bits (the name is that of the usual case); linears without a grid stay plain.
        activations: type of all numbers that are not codes, the cache included.
        accuracy_level: what MatMulNBits may compute in: 4 int8 activations (fast), 0 and 1 float32. With ``fp16``
            it is 0: GPUs do not look at it, and with 4 CPUs give zeros below onnxruntime's highest optimization level.
        cache_type: ``int8`` keeps keys and values in 8 bits, one scale per channel, measured on calibration text: a
            quarter of the memory, and faster decoding the longer the context. Only for ``gqa`` without
            ``left_padding``, on a CPU. ``float`` is the type of ``activations``.
        left_padding: only for ``gqa``: rotary embedding and mask outside the attention node, so that left-padded
            batches are right. Without it a padded batch must be padded on the right.
        last_logits_only: whether a program that does not set the input ``logits_from`` gets the last position's
            logits only.
        context_length: positions in the rotary tables of ``gqa`` without ``left_padding``; None is the model's own
            limit. The other layouts compute the angles and have no limit.
        external_data_above: weights of more bytes than this go into a file of their own (protobuf ends at 2 GB).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Literal["ort", "genai", "optimum", "cuda", "mobile"] = "ort"
    attention: Literal["reduced", "gqa"] = "reduced"
    precision: Literal["fp32", "fp16", "int4"] = "int4"
    activations: Literal["fp32", "fp16"] = "fp32"
    accuracy_level: Literal[0, 1, 4] = 4
    left_padding: bool = False
    cache_type: Literal["float", "int8"] = "float"
    last_logits_only: bool = False
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

    @property
    def fused_rope(self) -> bool:
        """Whether GroupQueryAttention itself rotates and masks, by the number of valid tokens in each row."""
        return self.attention == "gqa" and not self.left_padding
