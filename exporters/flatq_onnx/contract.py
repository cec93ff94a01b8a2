"""The file ``flatq_onnx.json``: everything that a program must know to run the graph.

The graph also contains the shapes of its inputs, but not the end-of-text ids, the widths of each layer and the limits
of the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from flatq.export import DecoderConfig, ExportError, Grid, read_json, write_json
from flatq_onnx.check import oldest_onnxruntime
from flatq_onnx.options import OnnxOptions

CONTRACT = "flatq_onnx.json"


class CacheShape(BaseModel):
    """One layer's cache: keys [b, heads, t, key_width], values [b, heads, t, value_width]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: int
    key_width: int
    value_width: int


class Contract(BaseModel):
    """Inputs, outputs and limits of the graph.

    Attributes:
        onnxruntime: oldest version that gives the graph's numbers; empty if unknown.
        left_padding: whether left-padded batches are supported; otherwise padding must be on the right.
        growth: how past becomes present. ``fixed``: both are one preallocated buffer and the mask is as long as the
            buffer, so all shapes are constant; ``shared``: the same, but the mask ends at the last token;
            ``returned``: present is a new tensor, longer than past.
        float_type: of logits, and of the cache unless ``cache_type`` is int8.
        context_length: maximum number of positions; None if unknown (graphs of other programs).
        sliding_window: of every layer; None if some layer sees all positions.
        token_ids: bos, eos and pad ids of the model's configuration.
        layers: widths of each layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[3] = 3
    onnxruntime: str = ""
    model: str
    attention: str
    precision: str
    left_padding: bool
    growth: Literal["fixed", "shared", "returned"]
    float_type: Literal["float32", "float16"]
    cache_type: Literal["float", "int8"] = "float"
    context_length: int | None
    sliding_window: int | None
    vocab: int
    token_ids: dict[str, Any]
    inputs: list[str]
    outputs: list[str]
    layers: list[dict[str, int]]
    cache: list[CacheShape]

    @classmethod
    def of(
        cls, config: DecoderConfig, grids: Mapping[str, Grid], settings: Mapping[str, Any], options: OnnxOptions
    ) -> Contract:
        """The contract of the export of an artifact's ``config``, ``grids`` and ``settings``."""
        reduced = options.attention == "reduced"
        pairs = [f"{index}.{part}" for index in range(len(config.layers)) for part in ("key", "value")]
        return cls(
            model=options.model_file,
            onnxruntime=oldest_onnxruntime(config, grids, options),
            attention=options.attention,
            precision=options.precision,
            left_padding=not options.fused_rope,
            growth="fixed" if reduced or options.fused_rope else "shared",
            float_type="float16" if options.activations == "fp16" else "float32",
            cache_type=options.cache_type,
            context_length=options.positions(config),
            sliding_window=config.sliding_window,
            vocab=config.vocab,
            token_ids={name: value for name, value in settings.items() if name.endswith("_token_id")},
            inputs=[
                "input_ids",
                "attention_mask",
                *(["num_logits_to_keep"] if options.chooses_logits else []),
                *(["cache_position"] if reduced else []),
                *(f"past_key_values.{pair}" for pair in pairs),
            ],
            outputs=["logits", *(f"present.{pair}" for pair in pairs)],
            layers=[asdict(dims) for dims in config.layers],
            cache=[
                CacheShape(heads=dims.kv_heads, key_width=dims.d_qk, value_width=dims.d_v if reduced else dims.d_qk)
                for dims in config.layers
            ],
        )

    @property
    def cache_number(self) -> str:
        """Name of the data type of the cache."""
        return "int8" if self.cache_type == "int8" else self.float_type

    def save(self, root: Path) -> Path:
        """Write it into a folder."""
        path = root / CONTRACT
        write_json(path, self.model_dump())
        return path

    @classmethod
    def load(cls, root: Path) -> Contract:
        """Read it from the folder of an export.

        Raises:
            ExportError: the file is missing or invalid.
        """
        return read_json(root / CONTRACT, cls, "export the model again", error=ExportError)
