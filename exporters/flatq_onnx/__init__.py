"""ONNX export: one graph builder, two attention layouts, weights with the artifact's codes.

Start with ``graph.py``. ``options.py`` defines the targets, ``check.py`` the unsupported cases; ``tensors.py`` packs
codes, ``linears.py`` and ``attention.py`` build linears and attention, ``companions.py`` writes the other files that a
target needs, ``runner.py`` runs the model in onnxruntime. Importing this package needs neither onnx nor onnxruntime.
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
    SpeedLoad,
    SpeedModel,
    absent_packages,
)
from flatq_onnx.check import INT8_SINCE, objections
from flatq_onnx.companions import TOKENIZER, write_companions
from flatq_onnx.contract import CONTRACT, Contract
from flatq_onnx.kinds_of_experts import words_on_experts
from flatq_onnx.options import OnnxOptions
from flatq_onnx.sizes import cached_bytes, estimated_bytes, stored_bytes
from flatq_onnx.usage import usage

__all__ = ["OnnxExporter", "OnnxOptions"]

INSTALL = "pip install 'flatq[cpu]'"
WRITER = {"onnx": ("onnx", INSTALL), "onnx_ir": ("onnx-ir", INSTALL)}
RUNTIME = {"onnxruntime": ("onnxruntime", INSTALL)}
UNPAID_BITS = 3  # stored as 4
INT8_CACHE_KL = 0.02  # nats, allowed for int8 keys and values
HALF_KL = 0.01  # nats, allowed for float16; mostly due to the rounding of sums over long rows


class OnnxExporter(Exporter):
    """Writes ``model.onnx`` (and ``model.onnx.data`` if large) and ``flatq_onnx.json``."""

    Options = OnnxOptions

    def check(self, config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> list[str]:
        """See ``flatq.export.Exporter.check``."""
        return objections(config, grids, options)

    def bytes(
        self, config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions, *, itemsize: int = 2
    ) -> int:
        """Size of the files, from shapes."""
        return estimated_bytes(config, grids, options)

    def stores(self, config: DecoderConfig, grid: Grid, options: OnnxOptions) -> bool:
        """See ``flatq.export.Exporter.stores``; 3-bit codes take 4 bits and run no faster, so they are not chosen."""
        return grid.bits != UNPAID_BITS and super().stores(config, grid, options)

    def matrix_bytes(
        self, config: DecoderConfig, stem: str, grid: Grid | None, options: OnnxOptions, *, itemsize: int = 2
    ) -> int:
        """See ``flatq.export.Exporter.matrix_bytes``."""
        return stored_bytes(config, stem, grid, options)

    def cache_bytes(self, config: DecoderConfig, index: int, context: int, options: OnnxOptions) -> int:
        """See ``flatq.export.Exporter.cache_bytes``."""
        return cached_bytes(config, index, context, options)

    def speed_model(self, config: DecoderConfig, options: OnnxOptions, load: SpeedLoad) -> SpeedModel:
        """See ``flatq.export.Exporter.speed_model``."""
        _need(self.missing(options))
        from flatq_onnx.speed import OnnxSpeed

        return OnnxSpeed(config, options, load)

    def dense(self, options: OnnxOptions) -> OnnxOptions:
        """Options for the dense model: the same graph with unquantized weights, as external data to save memory."""
        plain = {"precision": options.activations, "cache_type": "float", "external_data_above": 0}
        return options.model_copy(update=plain)

    def usage(self, options: OnnxOptions) -> str:
        """See ``flatq.export.Exporter.usage``."""
        return usage(options)

    def needs_cache_ranges(self, options: OnnxOptions) -> bool:
        """See ``flatq.export.Exporter.needs_cache_ranges``."""
        return options.cache_type == "int8"

    def write(self, artifact: Artifact, out: Path, options: OnnxOptions) -> Exported:
        """Write the files into ``out``; the contract is written last.

        Raises:
            ExportError: ``check`` has objections, or the onnx packages are not installed.
        """
        problems = self.check(artifact.config, artifact.grids, options)
        if problems:
            raise ExportError("\n".join(problems))
        _need(self.missing(options, opening=False))
        from flatq_onnx.writing import save_model

        graph = save_model(artifact, out, options, metadata_of(artifact))
        companions, changes = write_companions(artifact, out, options, graph)
        files = [
            *graph,
            *companions,
            Contract.of(artifact.config, artifact.grids, artifact.settings, options).save(out),
        ]
        rounding = HALF_KL * (options.activations == "fp16") + INT8_CACHE_KL * (options.cache_type == "int8")
        return Exported(out, tuple(files), notes=(*_notes(artifact, options), *changes), rounding_kl=rounding)

    def open(
        self, exported: Path, options: OnnxOptions, *, provider: str = "auto", threads: int = 0, exact: bool = False
    ) -> Runner:
        """Open an export, or an ONNX decoder of another program, in onnxruntime.

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
        """The onnx packages to write, onnxruntime to run."""
        needed = WRITER | RUNTIME if opening else WRITER
        return absent_packages(needed)

    def providers(self) -> tuple[str, ...]:
        """See ``flatq.export.Exporter.providers``."""
        if absent_packages(WRITER | RUNTIME):
            return ()
        from flatq_onnx.session import available

        return available()


def metadata_of(artifact: Artifact) -> dict[str, str]:
    """Provenance in the graph's metadata: digest of the recipe, family, widths."""
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
            notes.append(f"stored as {floats} because they are not quantized: {', '.join([*plain, *ends])}")
        if any(grid.bits == 3 for grid in artifact.grids.values()):
            notes.append("3-bit codes are stored in 4 bits because onnxruntime has no 3-bit kernel")
    if options.target in ("genai", "optimum", "web") and not (artifact.root / TOKENIZER).exists():
        notes.append(f"the artifact has no {TOKENIZER}, so {options.target} accepts only token ids")
    if options.cache_type == "int8":
        notes.append(f"the KV cache is int8, which needs onnxruntime {INT8_SINCE} or later")
    if options.ngram_size is not None:
        notes.append("onnxruntime-genai reads ngram_size from 0.16 on, and then refuses batches of more than one row")
        if options.precision == "int4" and options.accuracy_level == 4:
            notes.append(
                "ngram_size: with accuracy_level: 4 onnxruntime rounds one row otherwise than several, so a text may "
                "differ from that without ngram_size; accuracy_level: 0 keeps it"
            )
    notes += words_on_experts(artifact.config, artifact.grids, options)
    if options.fused_rope:
        notes.append("a padded batch must be padded on the right; left_padding: true supports both sides")
    return notes


def _need(absent: list[str]) -> None:
    if absent:
        raise ExportError(f"onnx: {'; '.join(absent)}")
