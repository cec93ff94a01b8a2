"""A mixture of experts as one wide MLP, of which a router lets every token use a few slices.

The experts' rows of gate and up, and their columns of down, are slices of three matrices: expert e has the inner
channels ``[e * f / E, (e + 1) * f / E)``. The routing weight of an expert multiplies its slice of the inner activation,
and is 0 for the experts that a token is not sent to. That is exact, because down is linear, and every part of flatq
that knows an MLP knows the experts too: only the router is new.

Axes: E experts, k experts per token, t tokens, m d_model, f inner channels of all experts together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Router(nn.Module):
    """Sends every token to ``active`` experts; no ``nn.Linear``, so that no quantizer takes it for one.

    Args:
        d_model: width of the residual stream.
        experts: number of experts.
        active: experts per token.
        normed: the weights of a token's experts are divided by their sum.
    """

    def __init__(self, d_model: int, experts: int, active: int, *, normed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, d_model))
        self.active, self.normed = active, normed

    def forward(self, x: Tensor) -> Tensor:
        """Routing weights, [..., m] -> [..., E], 0 for experts that are not used; computed in float32 or better."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # logits of 8 bits choose other experts
            probabilities = F.linear(x.to(dtype), self.weight.to(dtype)).softmax(-1)
            share, chosen = probabilities.topk(self.active, dim=-1)
            if self.normed:
                share = share / share.sum(-1, keepdim=True)
            return torch.zeros_like(probabilities).scatter(-1, chosen, share).to(x.dtype)


def widened(x: Tensor, share: Tensor, gate: nn.Module, up: nn.Module, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The inner activation of all experts, each times its routing weight, [..., m] -> [..., f].

    An expert is computed for the tokens that it is sent, if its weights are available.

    Args:
        x: input of the MLP, [..., m].
        share: routing weights, [..., E].
        gate: linear of all experts, [f, m].
        up: as ``gate``.
        activation: of the gate.
    """
    experts = share.shape[-1]
    if type(gate) is not nn.Linear or type(up) is not nn.Linear or gate.bias is not None or up.bias is not None:
        inner = activation(gate(x)) * up(x)
        return (inner.unflatten(-1, (experts, -1)) * share[..., None].to(inner.dtype)).flatten(-2)
    tokens, shares = x.reshape(-1, x.shape[-1]), share.reshape(-1, experts)
    parts = []
    for slices in zip(gate.weight.chunk(experts), up.weight.chunk(experts), shares.unbind(-1), strict=True):
        opening, widening, own = slices
        used = own.nonzero()[:, 0]
        mine = tokens[used]
        inner = activation(F.linear(mine, opening)) * F.linear(mine, widening) * own[used, None]
        parts.append(inner.new_zeros(len(tokens), len(opening)).index_copy(0, used, inner))
    return torch.cat(parts, -1).view(*x.shape[:-1], -1)


def summed(inner: Tensor, down: Tensor, experts: int) -> Tensor:
    """Sum of the experts' outputs, [..., f] -> [..., m]; an expert is computed where its slice is not 0.

    Args:
        inner: inner activation of all experts, each times its routing weight.
        down: weight of all experts, [m, f].
        experts: E.
    """
    rows = inner.reshape(-1, inner.shape[-1])
    total, dtype = (
        rows.new_zeros(len(rows), len(down), dtype=torch.promote_types(rows.dtype, torch.float32)),
        rows.dtype,
    )
    for own, weight in zip(rows.chunk(experts, 1), down.chunk(experts, 1), strict=True):
        used = own.any(1).nonzero()[:, 0]
        output = F.linear(own[used], weight)
        total.index_add_(0, used, output.to(total.dtype))
        dtype = output.dtype
    return total.to(dtype).view(*inner.shape[:-1], -1)
