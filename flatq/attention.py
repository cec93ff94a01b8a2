"""Softmax attention for value heads of any width, by torch's fused kernels.

Over short rows it is computed in float32, whatever the products around it are: turning small tiles to bfloat16 took 3
to 5 times the time at 64 to 166 tokens, as much at 640, less from there on (docs/decisions.md).
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor
from torch.nn import functional as F

from flatq.device import products

SHORT = 640  # tokens of a row


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """[b, h, s, d] looks at [b, kv, t, d] and takes [b, kv, t, r], r <= d: [b, h, s, r]; causal if there is no mask."""
    length, width, rank = query.shape[-2], query.shape[-1], value.shape[-1]
    with products("highest") if length < SHORT else nullcontext():
        # The fused kernels want one head size, so narrower values are padded with zeros for the call.
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            F.pad(value, (0, width - rank)),
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            enable_gqa=query.shape[1] > key.shape[1],
        )
    return mixed[..., :rank]
