"""Second moments of the inputs of experts, each from the tokens that the router sends it.

A token's activation is counted times its routing weight, for so much of an error of the expert reaches the output. An
expert that is sent fewer tokens than its linears have inputs would be solved from noise. Each token that it lacks is
replaced by a token of the layer's mean: for gate and up, whose inputs all experts share, the mean moment of all routed
tokens; for down, whose inputs no other expert has, uncorrelated inputs of the layer's mean energy. So an expert
without any token is rounded to nearest, and its channels are chosen by their weights; nothing changes for one with
enough tokens.

Axes: E experts, d features of one expert's input.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flatq.calibration.grams import Gram
from flatq.linalg import submatrix
from flatq.machine import distributed

SHOWN = 8  # experts named in a report


class RoutedGram(Gram):
    """A Gram with a block per expert.

    Args:
        features: d.
        experts: E.
        shared: all experts have the same features (the input of gate and up), and the activation is not yet weighted.
        device: of the sums.
    """

    def __init__(self, features: int, experts: int, *, shared: bool, device: torch.device | str = "cpu") -> None:
        super().__init__(features, experts, device)
        self.shared, self.tokens = shared, torch.zeros(experts, dtype=torch.int64)

    def route(self, x: Tensor, share: Tensor) -> None:
        """Add tokens.

        Args:
            x: [..., d] if shared, else [..., E * d] and already times the routing weights.
            share: routing weights, [..., E]; 0 where a token is not sent.
        """
        weights = share.reshape(-1, share.shape[-1]).float()  # [tokens, E]
        rows = x.reshape(-1, x.shape[-1])
        parts = (rows,) * len(self.tokens) if self.shared else rows.chunk(len(self.tokens), -1)
        for expert, (part, weight) in enumerate(zip(parts, weights.unbind(-1), strict=True)):
            sent = weight.nonzero()[:, 0]
            seen = part[sent].float()
            seen = seen * weight[sent, None] if self.shared else seen
            self._total[expert].addmm_(seen.T, seen)
            self.tokens[expert] += len(sent)
        self.count += len(weights)

    def gather(self) -> None:
        """Sum over all processes, in place."""
        super().gather()
        self.tokens = distributed.all_reduce(self.tokens)

    @property
    def features(self) -> int:
        """Number of features of one expert's input."""
        return self._total.shape[-1]

    def lacking(self) -> Tensor:
        """Number of tokens that each expert has less than features, int64 [E]."""
        return (self.features - self.tokens).clamp(min=0)

    def mean(self) -> Tensor:
        """``E[x^T x]`` of every expert over all tokens, lacking tokens replaced, float32 [E, d, d]."""
        mean, lacking = self.total / max(self.count, 1), self.lacking()
        if not bool(lacking.any()) or not bool(self.tokens.any()):
            return mean
        usual = mean.sum(0) / int(self.tokens.sum())  # of one routed token
        if not self.shared:
            usual = torch.eye(len(usual), device=usual.device) * usual.diagonal().mean()
        return mean + lacking[:, None, None].to(mean) * usual

    def energy(self) -> Tensor:
        """Mean square of every feature, float32 [d] if shared, else [E * d]."""
        energy = super().energy()
        return energy.view(len(self.tokens), -1).sum(0) if self.shared else energy

    def select(self, index: Tensor) -> RoutedGram:
        """Gram of the features in ``index``, of all experts' features in a row, as many of each expert."""
        experts, features, _ = self._total.shape
        own = index.view(experts, -1) - features * torch.arange(experts, device=index.device)[:, None]
        blocks = [submatrix(block, some) for block, some in zip(self.total, own, strict=True)]
        other = RoutedGram(0, experts, shared=self.shared)
        other._total, other.count, other.tokens = torch.stack(blocks), self.count, self.tokens
        return other


def scarce(grams: Mapping[str, Gram]) -> list[str]:
    """A sentence for the report about experts that were sent too few tokens; empty without."""
    found = []
    for name, linears in (("input", "gate+up"), ("inner", "down")):
        gram = grams.get(name)
        if isinstance(gram, RoutedGram) and bool(gram.lacking().any()):
            few = gram.lacking().nonzero()[:, 0].tolist()
            counts = ", ".join(f"{number} ({int(gram.tokens[number])})" for number in few[:SHOWN])
            more = f" and {len(few) - SHOWN} more" if len(few) > SHOWN else ""
            found.append(
                f"{linears}: FEW TOKENS: of {len(gram.tokens)} experts {len(few)} were sent fewer tokens than they "
                f"have inputs ({gram.features}); the layer's mean replaces those lacking: expert {counts}{more}"
            )
    return found
