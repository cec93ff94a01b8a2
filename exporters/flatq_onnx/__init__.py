"""ONNX export: one graph builder, two attention layouts, quantized weights as the artifact holds them.

Read ``graph.py`` first. ``options.py`` says what each target wants, ``check.py`` what stands against a model;
``tensors.py`` turns codes into bytes, ``linears.py`` and ``attention.py`` draw the two kinds of block,
``companions.py`` writes what the target's program wants beside the graph, ``runner.py`` runs the result in
onnxruntime. Importing this package needs neither onnx nor onnxruntime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flatq.export import (
    LINEARS,
    Artifact,
    DecoderConfig,
    Exported,
    Exporter,
    ExportError,
    Grid,
    Runner,
    absent_packages,
)
from flatq_onnx.check import INT8_SINCE, objections
from flatq_onnx.companions import TOKENIZER, write_companions
from flatq_onnx.contract import CONTRACT, Contract
from flatq_onnx.options import OnnxOptions
from flatq_onnx.sizes import estimated_bytes

__all__ = ["OnnxExporter", "OnnxOptions"]

INSTALL = "pip install 'flatq[cpu]'"
WRITER = {"onnx": ("onnx", INSTALL), "onnx_ir": ("onnx-ir", INSTALL)}
RUNTIME = {"onnxruntime": ("onnxruntime", INSTALL)}
INT8_CACHE_KL = 0.02  # nats that rounded keys and values may cost
HALF_KL = 0.01  # nats that float16 may cost; the rounding of one sum in a long row is the largest part


class OnnxExporter(Exporter):
    """Writes ``model.onnx`` (and ``model.onnx.data`` when large) with ``flatq_onnx.json`` beside it."""

    Options = OnnxOptions

    def check(self, config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
        """Objections to writing this model so; see ``flatq.export.Exporter.check``."""
        return objections(config, grids, options)

    def bytes(
        self, config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions, *, itemsize: int = 2
    ) -> int:
        """Size of the files, from shapes."""
        return estimated_bytes(config, grids, options)

    def dense(self, options: OnnxOptions) -> OnnxOptions:
        """The same graph with plain weights in a file of their own: written one by one, never all in memory."""
        plain = {"precision": options.activations, "cache_type": "float", "external_data_above": 0}
        return options.model_copy(update=plain)

    def needs_cache_ranges(self, options: OnnxOptions) -> bool:
        """See ``flatq.export.Exporter.needs_cache_ranges``."""
        return options.cache_type == "int8"

    def write(self, artifact: Artifact, out: Path, options: OnnxOptions) -> Exported:
        """Write the files into ``out``; the graph appears last, when all that it needs is there.

        Raises:
            ExportError: ``check`` objects, or the onnx packages are not installed.
        """
        problems = self.check(artifact.config, artifact.grids, options)
        if problems:
            raise ExportError("\n".join(problems))
        _need(self.missing(options, opening=False))
        from flatq_onnx.writing import save_model

        companions, changes = write_companions(artifact, out, options)
        files = [Contract.of(artifact, options).save(out), *companions]
        files += save_model(artifact, out, options, metadata_of(artifact))
        rounding = HALF_KL * (options.activations == "fp16") + INT8_CACHE_KL * (options.cache_type == "int8")
        return Exported(out, tuple(files), notes=(*_notes(artifact, options), *changes), rounding_kl=rounding)

    def open(
        self, exported: Path, options: OnnxOptions, *, provider: str = "auto", threads: int = 0, exact: bool = False
    ) -> Runner:
        """Open what ``write`` wrote, or a decoder graph of someone else's, in onnxruntime.

        See ``flatq.export.Exporter.open``.
        """
        _need(self.missing(options))
        from flatq_onnx.foreign import contract_of
        from flatq_onnx.runner import OnnxRunner

        contract = None if (exported / CONTRACT).exists() else contract_of(exported)
        return OnnxRunner(exported, provider=provider, threads=threads, exact=exact, contract=contract)

    def levels(self, options: OnnxOptions) -> tuple[str, ...]:
        """Optimization levels; without constant folding onnxruntime runs other kernels than at its default."""
        return ("extended", "basic", "disabled", "all without ConstantFolding")

    def open_at(
        self, exported: Path, options: OnnxOptions, level: str, *, provider: str = "auto", exact: bool = False
    ) -> Runner:
        """See ``flatq.export.Exporter.open_at``."""
        _need(self.missing(options))
        from flatq_onnx.runner import OnnxRunner

        return OnnxRunner(exported, provider=provider, exact=exact, level=level)

    def missing(self, options: OnnxOptions, *, opening: bool = True) -> list[str]:
        """The onnx packages to write, onnxruntime to run (and to write an ``.ort`` file)."""
        needed = WRITER | RUNTIME if opening or options.target == "mobile" else WRITER
        return absent_packages(needed)

    def providers(self) -> tuple[str, ...]:
        """See ``flatq.export.Exporter.providers``."""
        if absent_packages(WRITER | RUNTIME):
            return ()
        from flatq_onnx.session import available

        return available()


def metadata_of(artifact: Artifact) -> dict[str, str]:
    """Where a graph came from: digest of the recipe, family, widths."""
    return {
        "flatq.recipe_digest": str(artifact.manifest.get("recipe_digest", "")),
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
            floats = "float16" if options.activations == "fp16" else "float32"
            notes.append(f"stored as {floats}, for they have no codes: {', '.join([*plain, *ends])}")
        if any(grid.bits == 3 for grid in artifact.grids.values()):
            notes.append("3-bit codes are stored in 4 bits, for there is no 3-bit kernel")
    if options.target in ("genai", "optimum") and not (artifact.root / TOKENIZER).exists():
        notes.append(f"the artifact has no {TOKENIZER}, so {options.target} can only be given token ids")
    if options.cache_type == "int8":
        notes.append(f"keys and values are kept in int8; needs onnxruntime {INT8_SINCE} or later")
    if options.fused_rope:
        notes.append("a padded batch must be padded on the right; left_padding: true takes both")
    return notes


def _need(absent: list[str]) -> None:
    if absent:
        raise ExportError(f"onnx: {'; '.join(absent)}")
