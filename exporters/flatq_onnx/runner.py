"""Runner for exports in onnxruntime: prefill in one call, then one token per call, with the cache on the device.

Axes: b batch, s new positions, t all positions.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np

from flatq.export import ExportError, FloatArray, IntArray, require_positions
from flatq_onnx.cache import NO_GRAPH, Cache, empty_cache, run_options
from flatq_onnx.check import too_old_for_int8
from flatq_onnx.contract import Contract
from flatq_onnx.session import CUDA, DEFAULT_LEVEL, open_session


class OnnxRunner:
    """An open export; satisfies ``flatq.export.Runner``.

    Args:
        root: export folder.
        provider: ``auto``, ``cpu`` or ``cuda``.
        threads: 0 is one per physical core.
        exact: compute with float32 activations, for comparison with the artifact.
        contract: of a graph that flatq did not write, see ``foreign.contract_of``.
        level: of onnxruntime's graph optimizations, one of ``session.LEVELS``.

    Raises:
        ExportError: the folder is no ONNX export, or the provider does not support it.
    """

    def __init__(
        self,
        root: Path,
        *,
        provider: str = "auto",
        threads: int = 0,
        exact: bool = False,
        contract: Contract | None = None,
        level: str = DEFAULT_LEVEL,
    ) -> None:
        self.root, self.contract = root, contract or Contract.load(root)
        path = root / self.contract.model
        if not path.exists():
            raise ExportError(f"{path} is missing; export the model again")
        if self.contract.cache_type == "int8":
            provider = self._for_int8(provider)
        codes, fixed = self.contract.precision == "int4", self.contract.growth == "fixed"
        self.session = open_session(
            path, provider=provider, threads=threads, exact=exact, codes=codes, replay=fixed, level=level
        )
        self.device = "cuda" if self.session.wanted == CUDA else "cpu"
        self._cache: Cache | None = None
        self._graphs = count(1)  # ids of CUDA graphs; a graph belongs to the buffers of one cache

    def _for_int8(self, provider: str) -> str:
        """The provider that supports an int8 cache."""
        if old := too_old_for_int8():
            raise ExportError(f"{self.root}: {old}; update it")
        if provider == "cuda" and self.contract.float_type == "float32":
            raise ExportError(f"{self.root}: CUDA has no float32 attention with an int8 cache; use provider cpu")
        return "cpu" if self.contract.float_type == "float32" else provider

    @property
    def provider(self) -> str:
        """The provider that runs the nodes."""
        return self.session.provider

    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        """Logits of every position without a past, [b, s] -> [b, s, vocab]; ``valid`` is 0 at padding.

        Raises:
            ExportError: left padding in a layout that supports only right padding, or more tokens than its limit.
        """
        batch, length = tokens.shape
        mask = np.ones_like(tokens) if valid is None else np.asarray(valid, np.int64)
        self._allow(length)
        if not self.contract.left_padding and bool((np.diff(mask, axis=1) > 0).any()):
            raise ExportError(
                f"{self.root}: this attention layout supports only right padding; pad on the right, or export with "
                "attention: reduced or left_padding: true"
            )
        known = {
            "input_ids": tokens,
            "attention_mask": mask,
            "cache_position": np.zeros(batch),
            "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
            "num_logits_to_keep": np.zeros(()),
        }
        wanted = self.contract.inputs
        feeds = {name: array.astype(np.int64) for name, array in known.items() if name in wanted}
        past = length if self.contract.growth == "fixed" and "cache_position" in wanted else 0
        feeds |= empty_cache(self.contract, batch, past)
        options = run_options(NO_GRAPH) if self.session.replays else None
        found: FloatArray = self.session.ort.run(["logits"], feeds, options)[0]
        return found.astype(np.float32, copy=False)

    def start(self, tokens: IntArray, capacity: int) -> FloatArray:
        """Reset the cache, prefill it with a prompt, return the last logits, [b, s] -> [b, vocab]."""
        if capacity < tokens.shape[1]:
            raise ExportError(f"{self.root}: capacity {capacity} is less than the prompt's {tokens.shape[1]} tokens")
        self._allow(capacity)
        if self._cache is None or not self._cache.restart(tokens.shape[0], capacity):
            self._cache = None  # frees the memory of the old cache first
            parts = self.session.ort, self.contract, tokens.shape[0], capacity, self.device
            self._cache = Cache(*parts, graphs=self._graphs if self.session.replays else None)
        return self._cache.append(tokens)

    def step(self, tokens: IntArray) -> FloatArray:
        """Append one token per row to the cache, [b] -> [b, vocab]."""
        if self._cache is None:
            raise ExportError(f"{self.root}: step was called before start; call start first")
        return self._cache.append(tokens[:, None])

    def close(self) -> None:
        """Free the session and the cache."""
        self._cache = None
        del self.session

    def _allow(self, positions: int) -> None:
        require_positions(str(self.root), positions, self.contract.context_length)
