"""Hugging Face folders: dense, compressed-tensors, GPTQ; with model code, tokenizer and model card.

``packing.py`` packs codes in the layouts of other programs, ``tensors.py`` plans and creates the tensors of a folder,
``configs.py`` writes ``config.json``, ``padding.py`` pads value heads to their full width, ``writing.py`` writes the
folder, ``runner.py`` runs it in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flatq.export import Artifact, DecoderConfig, Exported, Exporter, ExportError, Grid, absent_packages
from flatq_safetensors.check import objections
from flatq_safetensors.options import SafetensorsOptions
from flatq_safetensors.sizes import estimated_bytes, matrix_bytes

if TYPE_CHECKING:
    from flatq_safetensors.runner import TransformersRunner

__all__ = ["SafetensorsExporter", "SafetensorsOptions"]

UNMIXED_BITS = 3
READER = {"compressed_tensors": ("compressed-tensors", "pip install 'flatq[hf]'")}


class SafetensorsExporter(Exporter):
    """Writes ``config.json``, ``model*.safetensors``, tokenizer, model card and, if needed, model code."""

    Options = SafetensorsOptions

    def check(self, config: DecoderConfig, grids: Mapping[str, Grid], options: SafetensorsOptions) -> list[str]:
        """See ``flatq.export.Exporter.check``."""
        return objections(config, grids, options)

    def bytes(
        self, config: DecoderConfig, grids: Mapping[str, Grid], options: SafetensorsOptions, *, itemsize: int = 2
    ) -> int:
        """Size of the weights, from shapes."""
        return estimated_bytes(config, grids, options, itemsize)

    def stores(self, config: DecoderConfig, grid: Grid, options: SafetensorsOptions) -> bool:
        """See ``flatq.export.Exporter.stores``.

        No release of compressed-tensors reads both 3 bits and zero points. Zero points are worth more: they make every
        grid finer, and 3 bits on average are a mix of 2 and 4.
        """
        mixed = options.format == "compressed-tensors" and not options.packed_embedding
        return not (mixed and grid.bits == UNMIXED_BITS) and super().stores(config, grid, options)

    def matrix_bytes(
        self, config: DecoderConfig, stem: str, grid: Grid | None, options: SafetensorsOptions, *, itemsize: int = 2
    ) -> int:
        """See ``flatq.export.Exporter.matrix_bytes``."""
        return matrix_bytes(config, stem, grid, options, itemsize)

    def dense(self, options: SafetensorsOptions) -> SafetensorsOptions:
        """Options for the dense model: a standard checkpoint in float32, the type in which ``open`` computes."""
        return SafetensorsOptions(format="fp32", max_shard_size=options.max_shard_size)

    def write(self, artifact: Artifact, out: Path, options: SafetensorsOptions) -> Exported:
        """Write the folder; ``config.json`` is written last, when all other files exist.

        Raises:
            ExportError: ``check`` has objections, or the format cannot store a tensor.
        """
        problems = self.check(artifact.config, artifact.grids, options)
        if problems:
            raise ExportError("\n".join(problems))
        from flatq_safetensors.writing import write_folder

        return write_folder(artifact, out, options)

    def missing(self, options: SafetensorsOptions, *, opening: bool = True) -> list[str]:
        """compressed-tensors, which transformers needs for the format of that name.

        GPTQ files are dequantized by flatq for verification, because the kernels of GPTQModel need a compiler.
        """
        return absent_packages(READER) if opening and options.format == "compressed-tensors" else []

    def providers(self) -> tuple[str, ...]:
        """See ``flatq.export.Exporter.providers``."""
        import torch

        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

    def open(
        self,
        exported: Path,
        options: SafetensorsOptions,
        *,
        provider: str = "auto",
        threads: int = 0,
        exact: bool = False,
    ) -> TransformersRunner:
        """Open what ``write`` wrote in transformers; see ``flatq.export.Exporter.open``.

        It computes in float32, so ``exact`` has no effect.
        """
        from flatq_safetensors.runner import TransformersRunner

        return TransformersRunner(exported, provider=provider, threads=threads)
