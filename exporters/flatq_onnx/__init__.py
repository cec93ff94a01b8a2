"""ONNX export: one graph builder, two attention layouts, quantized weights as the artifact holds them.

Read ``graph.py`` first. ``blocks.py`` turns codes into bytes, ``matmul.py`` and ``attention.py`` draw the two
kinds of block, ``runner.py`` runs the result in onnxruntime. Importing this package needs neither onnx nor
onnxruntime.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from flatq.artifact import Artifact
from flatq.decoder import LINEARS, DecoderConfig
from flatq.errors import ExportError
from flatq.export import Exported, Runner
from flatq.quantize.grid import Grid
from flatq_onnx.contract import Contract
from flatq_onnx.options import OnnxOptions, objections
from flatq_onnx.size import estimated_bytes

__all__ = ["OnnxExporter", "OnnxOptions"]


class OnnxExporter:
    """Writes ``model.onnx`` (and ``model.onnx.data`` when large) with ``flatq_onnx.json`` beside it."""

    Options = OnnxOptions

    def check(self, config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
        """Objections to writing this model so; see ``flatq.export.Exporter.check``."""
        return objections(config, grids, options)

    def bytes(self, config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> int:
        """Size of the files, from shapes."""
        return estimated_bytes(config, grids, options)

    def dense(self, options: OnnxOptions) -> OnnxOptions:
        """The same graph with float32 weights in a file of their own: written one by one, never all in memory."""
        return options.model_copy(update={"precision": "fp32", "external_data_above": 0})

    def write(self, artifact: Artifact, out: Path, options: OnnxOptions) -> Exported:
        """Write the files into ``out``; the graph appears last, when all that it needs is there.

        Raises:
            ExportError: ``check`` objects, or the onnx packages are not installed.
        """
        problems = self.check(artifact.config, artifact.grids, options)
        if problems:
            raise ExportError("\n".join(problems))
        _need_packages()
        from flatq_onnx.saving import save_model

        files = [Contract.of(artifact, options).save(out), *save_model(artifact, out, options, metadata_of(artifact))]
        return Exported(out, tuple(files), notes=tuple(_notes(artifact, options)))

    def open(
        self, exported: Path, options: OnnxOptions, *, provider: str = "auto", threads: int = 0, exact: bool = False
    ) -> Runner:
        """Open what ``write`` wrote in onnxruntime; see ``flatq.export.Exporter.open``."""
        _need_packages()
        from flatq_onnx.runner import OnnxRunner

        return OnnxRunner(exported, provider=provider, threads=threads, exact=exact)


def metadata_of(artifact: Artifact) -> dict[str, str]:
    """Where a graph came from: digest of the recipe's text, format, family."""
    recipe = artifact.manifest.get("recipe", "")
    text = recipe if isinstance(recipe, str) else json.dumps(recipe, sort_keys=True)
    return {
        "flatq.recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "flatq.family": artifact.config.family,
        "flatq.decoder": json.dumps(artifact.config.to_dict(), sort_keys=True),
    }


def _notes(artifact: Artifact, options: OnnxOptions) -> list[str]:
    notes = []
    if options.precision == "int4":
        plain = sorted(
            {
                name
                for name in LINEARS
                for index in range(len(artifact.config.layers))
                if f"layers.{index}.{name}" not in artifact.grids
            }
        )
        ends = [
            name for name in ("embed",) + (() if artifact.config.tied_head else ("head",)) if name not in artifact.grids
        ]
        if plain or ends:
            notes.append(f"stored as float32, for they have no codes: {', '.join([*plain, *ends])}")
        if any(grid.bits == 3 for grid in artifact.grids.values()):
            notes.append("3-bit codes are stored in 4 bits, for there is no 3-bit kernel")
    if options.fused_rope:
        notes.append("a padded batch must be padded on the right; left_padding: true takes both")
    return notes


def _need_packages() -> None:
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as missing:
        raise ExportError(
            f"onnx: the package {missing.name} is not installed; install flatq[cpu], or flatq[gpu] where CUDA is"
        ) from missing
