"""The whole decoder as one ONNX graph, built from the configuration.

The model is not traced: a traced graph has four times as many nodes, no named cache, and no MatMulNBits. Inputs are
``input_ids`` [b, s], ``attention_mask`` [b, t] (1 = valid), the cache and, with ``attention: reduced``,
``cache_position`` [b], the position of a row's first new token in the cache; outputs are ``logits`` and the new cache.
With the input ``num_logits_to_keep`` [], which genai and optimum graphs do not have, logits are computed only for so
many last positions (0: for all), which saves most of the head's time for long prompts.

The first and the last norm are RMSNormalization of opset 23, because onnx's checker rejects onnxruntime's older
SimplifiedLayerNormalization, which is declared as a standard operator; all others are fused with the preceding addition
(SkipSimplifiedLayerNormalization). Fewer nodes are faster: at the width of SmolLM2 the overhead of a node is as large
as the computation of an element-wise operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from flatq.export import DecoderConfig, Grid
from flatq_onnx.attention import Attention, Grouped, Reduced
from flatq_onnx.builder import FLOAT, FLOAT16, INT64, MICROSOFT, Builder, Dims, ints
from flatq_onnx.experts import Experts
from flatq_onnx.int8_cache import QuantizedGrouped
from flatq_onnx.linears import TOKENS, Linears, Part, Read
from flatq_onnx.options import OnnxOptions


def draw(
    config: DecoderConfig,
    grids: Mapping[str, Grid],
    read: Read,
    options: OnnxOptions,
    metadata: dict[str, str],
    ranges: Mapping[str, Tensor] | None = None,
) -> Any:
    """Build the model, an ``onnx_ir.Model`` whose weights are read when it is saved.

    Args:
        config: widths and switches.
        grids: grid of each quantized linear; ignored unless ``precision: int4``.
        read: reads a tensor by its name.
        options: layout and precision.
        metadata: written as the model's metadata_props.
        ranges: of keys and values, for ``cache_type: int8``.
    """
    return _Sheet(config, grids if options.precision == "int4" else {}, read, options, ranges or {}).model(metadata)


class _Sheet:
    def __init__(
        self,
        config: DecoderConfig,
        grids: Mapping[str, Grid],
        read: Read,
        options: OnnxOptions,
        ranges: Mapping[str, Tensor],
    ) -> None:
        self.config, self.options, self.ranges = config, options, ranges
        self.builder = Builder(FLOAT16 if options.activations == "fp16" else FLOAT)
        self.linears = Linears(
            self.builder,
            grids,
            read,
            options.accuracy_level,
            standard_lookup=options.target == "web",
            decode_on_load=options.decode_on_load,
        )
        self.experts = Experts(self.builder, self.linears, config, grids, options)

    def model(self, metadata: dict[str, str]) -> Any:
        build, config = self.builder, self.config
        tokens = build.input("input_ids", TOKENS, INT64)
        valid = build.input("attention_mask", ["batch_size", "total"], INT64)
        kept = build.input("num_logits_to_keep", [], INT64) if self.options.chooses_logits else None
        attention = self._attention(tokens, valid)
        pasts = [self._past(attention, index) for index in range(len(config.layers))]
        outputs = self._decoder(attention, tokens, pasts, kept)
        parts = [f"{index}.{part}" for index in range(len(pasts)) for part in ("key", "value")]
        for value, name in zip(outputs, ["logits", *(f"present.{part}" for part in parts)], strict=True):
            build.output(value, name)
        return build.model("flatq", metadata)

    def _decoder(self, attention: Attention, tokens: Any, pasts: Sequence[tuple[Any, Any]], kept: Any) -> list[Any]:
        """Logits of the last ``kept`` positions (None: of all), and each layer's present keys and values."""
        build, config = self.builder, self.config
        stream, update, presents = self.linears.embed(tokens, config), None, list[Any]()
        for index, past in enumerate(pasts):
            stream, update, *present = self._layer(attention, stream, update, index, past)
            presents += present
        stream = build.op("Add", [stream, update], [*TOKENS, config.d_model])
        lead: Dims = TOKENS
        if kept is not None:
            lead = ("batch_size", "kept")
            zero, one, end = (build.constant(f"const.{number}", ints(number)) for number in (0, 1, 2**62))
            first = build.op("Unsqueeze", [build.op("Neg", [kept], [], dtype=INT64), zero], [1], dtype=INT64)
            stream = build.op("Slice", [stream, first, end, one], [*lead, config.d_model])
        logits = self.linears.head(self._norm(stream, "norm", lead), config, lead)
        return [self._capped(logits, [*lead, config.vocab]), *presents]

    def _capped(self, logits: Any, shape: Dims) -> Any:
        """``cap * tanh(logits / cap)``, or ``logits`` without a cap."""
        build, cap = self.builder, self.config.logit_cap
        if cap is None:
            return logits
        limit = build.constant("logit_cap", np.array(cap, build.float_type.numpy()))
        return build.op("Mul", [build.op("Tanh", [build.op("Div", [logits, limit], shape)], shape), limit], shape)

    def _attention(self, tokens: Any, valid: Any) -> Attention:
        parts = self.builder, self.linears, self.config, tokens, valid
        if self.options.attention == "reduced":
            return Reduced(*parts)
        limit = self.options.positions(self.config)
        if self.options.cache_type == "int8":
            return QuantizedGrouped(*parts, positions=limit, ranges=self.ranges)
        return Grouped(*parts, positions=limit if self.options.fused_rope else None)

    def _past(self, attention: Attention, index: int) -> tuple[Any, Any]:
        keys, values = (
            self.builder.input(f"past_key_values.{index}.{part}", shape, attention.kept)
            for part, shape in zip(("key", "value"), attention.cache(self.config.layers[index]), strict=True)
        )
        return keys, values

    def _layer(
        self, attention: Attention, x: Any, update: Any, index: int, past: tuple[Any, Any]
    ) -> tuple[Any, Any, Any, Any]:
        """Residual stream after the attention, the MLP's output (not yet added), and the layer's present cache.

        Args:
            update: MLP output of the previous layer, to be added to ``x``; None in the first layer.
        """
        name = f"layers.{index}"
        normed, x = self._added(x, update, f"{name}.attention_norm")
        mixed, keys, values = attention.mix(normed, index, past)
        out = self._left(self.linears.stacked(mixed, [Part.of(self.config, index, "o")]), f"{name}.attention_post_norm")
        normed, x = self._added(x, out, f"{name}.mlp_norm")
        return x, self._left(self._mlp(normed, index), f"{name}.mlp_post_norm"), keys, values

    def _mlp(self, normed: Any, index: int) -> Any:
        if self.config.experts and self.experts.has_node(index):
            return self.experts.node(normed, index)
        gate, up = self.linears.project(normed, [Part.of(self.config, index, part) for part in ("gate", "up")])
        wide = [*TOKENS, self.config.layers[index].d_ff]
        product = self.builder.op("Mul", [self._active(gate, wide), up], wide)
        if self.config.experts:
            product = self.builder.op("Mul", [product, self.experts.shares(normed, index)], wide)
        return self.linears.stacked(product, [Part.of(self.config, index, "down")])

    def _active(self, gate: Any, shape: Dims) -> Any:
        """The activation function of the MLP."""
        if self.config.activation == "silu":
            return self.builder.op("Mul", [gate, self.builder.op("Sigmoid", [gate], shape)], shape)
        approximate = {"gelu": "none", "gelu_tanh": "tanh"}[self.config.activation]
        return self.builder.op("Gelu", [gate], shape, approximate=approximate)

    def _left(self, out: Any, name: str) -> Any:
        """The output of attention or MLP after its norm, if the family has one."""
        return self._norm(out, name) if self.config.post_norms else out

    def _added(self, x: Any, update: Any, name: str) -> tuple[Any, Any]:
        """Norm of ``x + update``, and ``x + update``, from one node; without norms of inputs the sum for both."""
        shape = [*TOKENS, self.config.d_model]
        if not self.config.pre_norms:
            total = x if update is None else self.builder.op("Add", [x, update], shape)
            return total, total
        if update is None:
            return self._norm(x, name), x
        weight = self.linears.vector(f"{name}.weight", self.config.d_model)
        normed, _, _, total = self.builder.ops(
            "SkipSimplifiedLayerNormalization",
            [x, update, weight],
            [shape, None, None, shape],
            domain=MICROSOFT,
            epsilon=self.config.norm_eps,
        )
        return normed, total

    def _norm(self, x: Any, name: str, lead: Dims = TOKENS) -> Any:
        weight = self.linears.vector(f"{name}.weight", self.config.d_model)
        shape = [*lead, self.config.d_model]
        return self.builder.op(
            "RMSNormalization", [x, weight], shape, axis=-1, epsilon=self.config.norm_eps, stash_type=1
        )
