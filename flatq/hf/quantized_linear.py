"""Quantized linear and embedding modules for torch.

The codes are dequantized on first use and the dense matrix is kept, so a forward pass is as fast as a dense one, and
the memory is that of the dense model plus the codes. This is the reference that every export is compared with;
computation on packed codes is left to the runtimes of the exporters.

The scale stays float16 when the module is cast: rounding it to bfloat16 would change every weight of its group. A cast
only changes the data type of the computation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatq.model.grid import Grid, QuantizedWeight


class QuantizedModule(nn.Module):
    """Codes, scales and zeros as buffers, and the dequantized weight.

    Buffers, named as in an artifact: ``codes`` uint8 [o, i], ``scale`` float16 [o, G], ``zero`` uint8 [o, G].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, in_features: int, out_features: int, grid: Grid) -> None:
        super().__init__()
        self.in_features, self.out_features, self.grid = in_features, out_features, grid
        groups = grid.groups(in_features)
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(out_features, groups, dtype=torch.float16))
        self.register_buffer("zero", torch.zeros(out_features, groups, dtype=torch.uint8))
        self.compute_dtype = torch.get_default_dtype()
        self._decoded: Tensor | None = None

    @property
    def quantized(self) -> QuantizedWeight:
        """The buffers as a ``QuantizedWeight``."""
        return QuantizedWeight(self.codes, self.scale, self.zero, self.grid)

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix, ``compute_dtype`` [o, i]; computed on first use, then cached."""
        if self._decoded is None:
            with torch.no_grad():
                self._decoded = self.quantized.dequantize(self.compute_dtype)
        return self._decoded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        """Move the buffers; a cast sets ``compute_dtype`` and does not change the stored scale."""
        kept, probe = self.scale, torch.empty(0, dtype=self.compute_dtype, device=self.scale.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = fn(probe).dtype
        if self.scale.dtype != kept.dtype:
            self.scale = kept.to(self.scale.device)
        self._decoded = None
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._decoded = None

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        kind = "symmetric" if self.grid.symmetric else "asymmetric"
        return f"{self.in_features}, {self.out_features}, bits={self.grid.bits}, group={self.grid.group_size}, {kind}"


class QuantizedLinear(QuantizedModule):
    """Quantized ``nn.Linear``, [..., i] -> [..., o]; the bias, if any, is not quantized."""

    def __init__(self, in_features: int, out_features: int, grid: Grid, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, grid)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., i] -> [..., o]."""
        return F.linear(x, self.weight, self.bias)


class QuantizedEmbedding(QuantizedModule):
    """Quantized ``nn.Embedding``; a tied head uses ``weight``."""

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., i]."""
        return F.embedding(tokens, self.weight)


def quantized_like(module: nn.Module, grid: Grid) -> QuantizedModule:
    """An uninitialized quantized module with the shape of a dense linear or embedding.

    Raises:
        TypeError: the module is neither.
    """
    if isinstance(module, nn.Linear):
        return QuantizedLinear(module.in_features, module.out_features, grid, bias=module.bias is not None)
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(module.embedding_dim, module.num_embeddings, grid)
    raise TypeError(f"only nn.Linear and nn.Embedding can be quantized, not {type(module).__name__}")
