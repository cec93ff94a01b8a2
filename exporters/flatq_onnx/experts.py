"""Mixtures of experts: onnxruntime's node for them where it is exact, else every expert for every token.

``QMoE`` computes each expert for the tokens that are sent to it. Tried on a CPU with onnxruntime 1.23 to 1.31: with 4
bits it agrees with float64 to 1e-6, with 8 or 2 bits only to 1e-2 (activations are rounded); 1.23 is wrong where a row
is one block. It always normalizes the routing weights, unless it gets them as an input, which exists from 1.25 on.
``MoE``, for float weights, gave wrong results inside a graph where the same node alone gave right ones, so it is not
used. On GPUs and in browsers the node was not tried, and in float16 it would
choose experts by float16 scores.

The first matrix of the node has the rows of gate and up in turn (``swiglu_fusion`` 1); ``swiglu`` with alpha 1 and beta
0 is the gated silu.

Axes: E experts, f inner channels of an expert, m d_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatq.export import DecoderConfig, Grid, QuantizedWeight
from flatq_onnx.builder import FLOAT, INT64, MICROSOFT, Builder, ints
from flatq_onnx.kinds_of_experts import computes_all
from flatq_onnx.linears import TOKENS, Linears
from flatq_onnx.options import OnnxOptions
from flatq_onnx.tensors import Blocks


class Experts:
    """Builds the MLP of a layer with experts.

    Args:
        linears: of the same graph.
        grids: of the linears that become codes.
    """

    def __init__(
        self,
        builder: Builder,
        linears: Linears,
        config: DecoderConfig,
        grids: Mapping[str, Grid],
        options: OnnxOptions,
    ) -> None:
        self.builder, self.linears, self.config, self.grids, self.options = builder, linears, config, grids, options

    def has_node(self, index: int) -> bool:
        """Whether a layer is one node; else ``shares`` multiplies the inner activation of a plain MLP."""
        return computes_all(self.config, index, self.grids, self.options) == ""

    def node(self, normed: Any, index: int) -> Any:
        """The output of the experts, [b, s, m] -> [b, s, m]."""
        build, config, width = self.builder, self.config, self.config.d_model
        scores = self._scores(normed, index)
        rows = build.constant("shape.rows_of_experts", ints(-1, config.experts))
        flat: list[int | str] = ["tokens", config.experts]
        logits = build.op("Reshape", [scores, rows], flat)
        codes, scales, zeros = self._codes(index, "gate_up")
        codes2, scales2, zeros2 = self._codes(index, "down")
        weights = None
        if not config.normed_routing:
            weights = build.op("Softmax", [logits], flat, axis=-1)
        inputs = [
            normed,
            logits,
            codes,
            scales,
            None,
            codes2,
            scales2,
            None,
            None,
            None,
            None,
            zeros,
            zeros2,
            None,
            weights,
        ]
        return build.op(
            "QMoE",
            inputs,
            [*TOKENS, width],
            domain=MICROSOFT,
            expert_weight_bits=4,
            block_size=Blocks.of(self.grids[f"layers.{index}.gate"], 1, width).block,
            k=config.experts_per_token,
            normalize_routing_weights=int(config.normed_routing),
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
        )

    def _codes(self, index: int, part: str) -> list[Any]:
        """Codes, scales and zeros of ``gate_up`` [E, 2 f, m] or ``down`` [E, m, f]."""
        experts = self.config.experts
        each, width = self.config.layers[index].d_ff // experts, self.config.d_model
        rows, columns = (2 * each, width) if part == "gate_up" else (width, each)

        stems = [f"layers.{index}.{name}" for name in part.split("_")]

        def weight() -> QuantizedWeight:
            found = [one for stem in stems if isinstance(one := self.linears.read(f"{stem}.weight"), QuantizedWeight)]
            join = _in_turn if part == "gate_up" else self._by_expert
            codes, scale, zero = (join([getattr(one, name) for one in found]) for name in ("codes", "scale", "zero"))
            return QuantizedWeight(codes, scale, zero, found[0].grid)

        blocks = Blocks.of(self.grids[stems[0]], experts * rows, columns)
        return self.linears.packed_experts(f"layers.{index}.{part}", blocks, weight, experts)

    def _by_expert(self, parts: list[Tensor]) -> Tensor:
        """Rows of down of all experts, [m, E * f] -> [E * m, f]."""
        return torch.cat(parts[0].chunk(self.config.experts, 1))

    def _scores(self, normed: Any, index: int) -> Any:
        """What the router says of every expert, float32 [b, s, E]."""
        build, lead = self.builder, [*TOKENS, self.config.experts]
        if build.float_type != FLOAT:
            normed = build.op("Cast", [normed], [*TOKENS, self.config.d_model], dtype=FLOAT, to=FLOAT)
        return build.op("MatMul", [normed, self.linears.router(self.config, index)], lead, dtype=FLOAT)

    def shares(self, normed: Any, index: int) -> Any:
        """The routing weight of each inner channel's expert, [b, s, E * f]; 0 for experts that a token is not sent to.

        The routing is float32 in every graph, because float16 would choose other experts.
        """
        build, config, f = self.builder, self.config, self.config.layers[index].d_ff
        lead, active = [*TOKENS, config.experts], [*TOKENS, config.experts_per_token]
        likely = build.op("Softmax", [self._scores(normed, index)], lead, dtype=FLOAT, axis=-1)
        count = build.constant(f"const.[{config.experts_per_token}]", ints(config.experts_per_token))
        share, chosen = build.ops("TopK", [likely, count], [active, active], dtype=[FLOAT, INT64], axis=-1)
        if config.normed_routing:
            last = build.constant("const.[-1]", ints(-1))
            total = build.op("ReduceSum", [share, last], [*TOKENS, 1], dtype=FLOAT, keepdims=1)
            share = build.op("Div", [share, total], active, dtype=FLOAT)
        none = build.op("Sub", [likely, likely], lead, dtype=FLOAT)
        weights = build.op("ScatterElements", [none, chosen, share], lead, dtype=FLOAT, axis=-1)
        if build.float_type != FLOAT:
            weights = build.op("Cast", [weights], lead, to=build.float_type)
        each = np.repeat(np.arange(config.experts), f // config.experts)
        owners = build.constant(f"experts.{f}", each.astype(np.int64))
        return build.op("Gather", [weights, owners], [*TOKENS, f], axis=2)


def _in_turn(parts: list[Tensor]) -> Tensor:
    """Rows of two matrices in turn, [n, k] each -> [2 n, k]."""
    return torch.stack(parts, 1).flatten(0, 1)
