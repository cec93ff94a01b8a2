"""The door between the core and the formats: two protocols, found by entry point ``flatq.exporters``.

The core never imports an exporter. A plug-in is a class with the methods of ``Exporter``, registered as

    [project.entry-points."flatq.exporters"]
    onnx = "flatq_onnx:OnnxExporter"

Importing the plug-in must not need its runtime (onnxruntime, gguf, ...): those are imported inside ``write`` and
``open``, so that a recipe can be checked on a machine that only has the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from flatq.artifact import Artifact
from flatq.errors import RecipeError
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid

GROUP = "flatq.exporters"
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Exported:
    """Files that an exporter wrote, all inside ``root``.

    Attributes:
        notes: things a user should know.
        rounding_kl: KL divergence from the artifact, in nats, that is allowed because the exporter rounded weights
            once more (float16, fewer bits); 0 if the files hold the artifact's numbers.
    """

    root: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    rounding_kl: float = 0.0

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.files)


class Runner(Protocol):
    """An export opened by the runtime that its users have."""

    @property
    def provider(self) -> str:
        """What really ran the nodes, e.g. ``CPUExecutionProvider``."""
        ...

    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        """Logits of every position without a past: [b, s] -> [b, s, vocab]; ``valid`` is 0 at padding."""
        ...

    def start(self, tokens: IntArray, capacity: int) -> FloatArray:
        """Forget the past, read a prompt into the cache, return its last logits: [b, s] -> [b, vocab].

        ``capacity`` is the number of positions (prompt included) that will be asked for.
        """
        ...

    def step(self, tokens: IntArray) -> FloatArray:
        """Append one token per row to the cache, return its logits: [b] -> [b, vocab]."""
        ...

    def close(self) -> None:
        """Free the session."""
        ...


class Exporter(Protocol):
    """A file format."""

    Options: type[BaseModel]

    def check(self, config: DecoderConfig, grids: Mapping[str, Grid], options: Any) -> list[str]:
        """Objections in words, with the way out; an empty list means that it can be written.

        Args:
            config: the planned widths.
            grids: grid of each linear that will be quantized, by stem (``layers.0.q``, ``embed``).
        """
        ...

    def bytes(self, config: DecoderConfig, grids: Mapping[str, Grid], options: Any, *, itemsize: int = 2) -> int:
        """Size of the files that ``write`` would make, estimated from shapes alone.

        Args:
            config, grids, options: as for ``check``.
            itemsize: bytes of a number that the artifact holds unquantized.
        """
        ...

    def dense(self, options: Any) -> Any | None:
        """Options that write the model before compression for the same runtime; None if there is no such form."""
        ...

    def write(self, artifact: Artifact, out: Path, options: Any) -> Exported:
        """Write the files into the empty folder ``out``."""
        ...

    def providers(self) -> tuple[str, ...]:
        """What ``open`` can compute on here, of ``cpu`` and ``cuda``; empty if the runtime is not installed."""
        ...

    def open(
        self, exported: Path, options: Any, *, provider: str = "auto", threads: int = 0, exact: bool = False
    ) -> Runner | None:
        """Open what ``write`` wrote in its runtime; None if the format has no runtime of its own.

        Args:
            provider: ``auto``, ``cpu`` or ``cuda``; the last is an ExportError where it cannot be had.
            threads: 0 lets the runtime choose.
            exact: switch off approximations of the runtime (int8 activations), for comparison with the artifact.
        """
        ...


@runtime_checkable
class TokenizerCarrier(Protocol):
    """An exporter whose files hold the tokenizer too, in a form that cannot say everything."""

    def check_tokenizer(self, described: Mapping[str, Any], config: DecoderConfig, options: Any) -> list[str]:
        """Objections to the model's tokenizer, as ``Exporter.check``; ``described`` is its ``tokenizer.json``."""
        ...


@runtime_checkable
class CacheQuantizer(Protocol):
    """An exporter that can have its runtime keep keys and values in few bits, and must know how large they become."""

    def needs_cache_ranges(self, options: Any) -> bool:
        """Whether ``write`` will ask for ``Artifact.cache_ranges`` with these options."""
        ...


def exporter_named(name: str) -> Exporter:
    """One exporter.

    Raises:
        RecipeError: no such exporter is installed; the message lists those that are.
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        raise RecipeError(f"exports: no exporter is named {name!r}; installed: {', '.join(sorted(found)) or 'none'}")
    exporter: Exporter = found[name].load()()
    return exporter
