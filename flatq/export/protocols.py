"""The plug-in interface for file formats: ``Exporter``, the ``Runner`` of a runtime, and the result of a write.

The core never imports an exporter. A plug-in is a subclass of ``Exporter``, registered as

    [project.entry-points."flatq.exporters"]
    onnx = "flatq_onnx:OnnxExporter"

Importing the plug-in must not need its runtime (onnxruntime, gguf, ...): those are imported inside ``write`` and
``open``, so that a recipe can be checked on a machine with only the core installed. ``missing`` lists missing packages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from flatq.artifact import Artifact
from flatq.errors import ExportError, RecipeError
from flatq.export.speed import SpeedLoad, SpeedModel
from flatq.model import footprint
from flatq.model.decoder import DecoderConfig
from flatq.model.footprint import weight_bytes
from flatq.model.grid import Grid
from flatq.model.names import matrix_shape, stems_of

GROUP = "flatq.exporters"
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Exported:
    """Files that an exporter wrote, all inside ``root``.

    Attributes:
        notes: warnings and remarks for the user.
        rounding_kl: KL divergence from the artifact, in nats, that is allowed because the exporter rounded weights
            (float16, fewer bits); 0 if the files hold the artifact's numbers.
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
    """An export opened in its runtime.

    ``logits`` and ``start`` raise an ExportError for more positions than the model has, see ``require_positions``.
    """

    @property
    def provider(self) -> str:
        """The provider that was actually used, e.g. ``CPUExecutionProvider``."""
        ...

    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        """Logits of every position without a past: [b, s] -> [b, s, vocab]; ``valid`` is 0 at padding."""
        ...

    def start(self, tokens: IntArray, capacity: int) -> FloatArray:
        """Reset the cache, prefill it with a prompt, return the last logits: [b, s] -> [b, vocab].

        ``capacity`` is the maximum number of positions, including the prompt.
        """
        ...

    def step(self, tokens: IntArray) -> FloatArray:
        """Decode step: append one token per row to the cache, return its logits: [b] -> [b, vocab]."""
        ...

    def close(self) -> None:
        """Free the session."""
        ...


class Exporter(ABC):
    """Base class of a file format. ``Options``, ``check`` and ``write`` are required, the rest has defaults.

    A format with a runtime overrides ``open``, ``providers`` and ``missing`` together.
    """

    Options: ClassVar[type[BaseModel]]
    """Schema of the options that a recipe may set; it forbids unknown keys."""

    @abstractmethod
    def check(self, config: DecoderConfig, grids: Mapping[str, Grid], options: Any) -> list[str]:
        """Reasons why this model cannot be exported, each with a remedy; empty if it can.

        Args:
            config: the planned widths.
            grids: grid of each linear that will be quantized, by stem (``layers.0.q``, ``embed``).
            options: an instance of ``Options``.
        """

    @abstractmethod
    def write(self, artifact: Artifact, out: Path, options: Any) -> Exported:
        """Write the files into the empty folder ``out``.

        Raises:
            ExportError: it cannot be written; the message gives a remedy.
        """

    def bytes(self, config: DecoderConfig, grids: Mapping[str, Grid], options: Any, *, itemsize: int = 2) -> int:
        """Estimated size of the files that ``write`` creates, from shapes alone.

        The default is the size of the weights with packed codes.

        Args:
            config: the planned widths.
            grids: grid of each linear that will be quantized, by stem.
            options: an instance of ``Options``.
            itemsize: bytes of an unquantized number of the artifact.
        """
        return weight_bytes(config, grids, itemsize)

    def stores(self, config: DecoderConfig, grid: Grid, options: Any) -> bool:
        """Whether a budget may choose this grid for a linear: the files hold its codes, and its runtime reads them.

        The default asks ``check``: the grid brings no objection that the unquantized model does not have.

        Args:
            config: of the dense model.
            grid: of all linears of the layers.
            options: an instance of ``Options``.
        """
        found = self.check(config, dict.fromkeys(stems_of(config), grid), options)
        return set(found) <= set(self.check(config, {}, options))

    def matrix_bytes(
        self, config: DecoderConfig, stem: str, grid: Grid | None, options: Any, *, itemsize: int = 2
    ) -> int:
        """Bytes of one matrix in the files of ``write``; what ``bytes`` adds up, together with a constant.

        A budget is spent by these prices, so a matrix whose narrowing or grid saves nothing in this format is not
        narrowed or given that grid. The default follows from ``bytes``: the matrix's share of the unquantized file, and
        the difference that the grid makes. Exact prices make better plans.

        Args:
            config: planned widths of all layers.
            stem: of the matrix: ``layers.0.q``, ``embed``, ``head``; a tied head is the embedding.
            grid: its grid, None if it is not quantized.
            options: an instance of ``Options``.
            itemsize: bytes of an unquantized number of the artifact.
        """
        if type(self).bytes is Exporter.bytes:
            return footprint.matrix_bytes(matrix_shape(config, stem), grid, itemsize)
        plain = self.bytes(config, {}, options, itemsize=itemsize)
        share = prod(matrix_shape(config, stem)) / config.parameters()
        codes = {} if grid is None else {stem: grid}
        return round(self.bytes(config, codes, options, itemsize=itemsize) - (1 - share) * plain)

    def cache_bytes(self, config: DecoderConfig, index: int, context: int, options: Any) -> int:
        """Bytes of the KV cache of a layer in the format's runtime, for ``context`` tokens; the default is float16."""
        return footprint.cache_bytes(config, index, config.layers[index], context)

    def check_tokenizer(self, described: Mapping[str, Any], config: DecoderConfig, options: Any) -> list[str]:
        """Objections to the model's tokenizer, for a format that converts the tokenizer.

        Args:
            described: the content of ``tokenizer.json``.
            config: the planned widths.
            options: an instance of ``Options``.
        """
        return []

    def usage(self, options: Any) -> str:
        """How to run the files in other programs, in Markdown with headings of level 2; part of the folder's README.

        Args:
            options: those of the ``write``.
        """
        return ""

    def needs_cache_ranges(self, options: Any) -> bool:
        """Whether ``write`` needs ``Artifact.cache_ranges``, as for a format with a quantized KV cache."""
        return False

    def speed_model(self, config: DecoderConfig, options: Any, load: SpeedLoad) -> SpeedModel:
        """Predicted times of exports of a model on this machine, on the CPU, for any widths and grids.

        Kernels are measured when a prediction needs them, and cached for this machine.

        Args:
            config: the widths before compression, the largest that a plan has.
            options: an instance of ``Options``.
            load: context, prompt and threads of the prediction.

        Raises:
            ExportError: this exporter, or this one with these options, cannot predict speed.
        """
        raise ExportError("this exporter cannot predict speed; limit the size, or use an exporter that can (onnx)")

    def dense(self, options: Any) -> Any | None:
        """Options for exporting the dense model for the same runtime; None if that is not supported."""
        return None

    def missing(self, options: Any, *, opening: bool = True) -> list[str]:
        """Required packages that are not installed, each as a sentence with the command that installs it.

        Args:
            options: an instance of ``Options``.
            opening: False excludes packages that only ``open`` needs.
        """
        return []

    def providers(self) -> tuple[str, ...]:
        """The available providers of ``open``: ``cpu``, ``cuda``; empty if no runtime is installed."""
        return ()

    def open(
        self, exported: Path, options: Any, *, provider: str = "auto", threads: int = 0, exact: bool = False
    ) -> Runner | None:
        """Open an export in its runtime; None if flatq supports no runtime for the format.

        Args:
            exported: the folder that ``write`` has filled.
            options: the options of that ``write``.
            provider: ``auto``, ``cpu`` or ``cuda``; ``cuda`` raises an ExportError if it is not available.
            threads: 0 is the runtime's default.
            exact: disable approximations of the runtime (int8 activations), for comparison with the artifact.
        """
        return None

    def levels(self, options: Any) -> tuple[str, ...]:
        """Settings of the runtime, other than its default, at which users may open the files.

        The files must give the same numbers at all of them: verification opens each with ``open_at``.
        """
        return ()

    def open_at(
        self, exported: Path, options: Any, level: str, *, provider: str = "auto", exact: bool = False
    ) -> Runner | None:
        """``open`` at one of ``levels``."""
        return None


def require_positions(what: str, positions: int, limit: int | None) -> None:
    """Refuse more positions than a model has: beyond them its text becomes nonsense.

    Args:
        what: the opened files, for the message.
        positions: of a prompt and the new tokens.
        limit: of the model; None if it is unknown.

    Raises:
        ExportError: with both numbers.
    """
    if limit is not None and positions > limit:
        raise ExportError(
            f"{what}: {positions} positions are more than its context length of {limit}; use a shorter prompt or fewer "
            "new tokens"
        )


def absent_packages(needed: Mapping[str, tuple[str, str]]) -> list[str]:
    """Sentences for ``Exporter.missing``.

    Args:
        needed: by module name, the name of its package and the command that installs it.
    """
    return [
        f"the package {package} is not installed; install it with `{command}`"
        for module, (package, command) in needed.items()
        if find_spec(module) is None
    ]


def exporter_named(name: str) -> Exporter:
    """The exporter with this name.

    Raises:
        RecipeError: it is not installed (the message lists installed exporters), or it is no ``Exporter``.
    """
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in entries:
        raise RecipeError(f"exports: no exporter is named {name!r}; installed: {', '.join(sorted(entries)) or 'none'}")
    kind = entries[name].load()
    if not (isinstance(kind, type) and issubclass(kind, Exporter) and hasattr(kind, "Options")):
        raise RecipeError(
            f"exports: the exporter {name!r} ({entries[name].value}) is no subclass of flatq.export.Exporter with an "
            "Options schema; update or uninstall its package"
        )
    try:
        return kind()
    except TypeError as incomplete:  # Python's message lists the abstract methods that are missing
        raise RecipeError(
            f"exports: the exporter {name!r} ({entries[name].value}) cannot be created ({incomplete}); update or "
            "uninstall its package"
        ) from incomplete
