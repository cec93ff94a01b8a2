"""Hugging Face folders: dense, compressed-tensors, GPTQ; with their code, tokenizer and model card.

Read ``packing.py`` first: bytes that other programs must agree with. ``tensors.py`` says which tensors a folder holds,
``configs.py`` what its ``config.json`` says, ``padding.py`` makes value heads whole again, ``writing.py`` writes,
``runner.py`` runs the result in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flatq.export import Artifact, DecoderConfig, Exported, Exporter, ExportError, Grid, absent_packages
from flatq_safetensors.check import objections
from flatq_safetensors.options import SafetensorsOptions
from flatq_safetensors.sizes import estimated_bytes

if TYPE_CHECKING:
    from flatq_safetensors.runner import TransformersRunner

__all__ = ["SafetensorsExporter", "SafetensorsOptions"]

READER = {"compressed_tensors": ("compressed-tensors", "pip install 'flatq[hf]'")}


class SafetensorsExporter(Exporter):
    """Writes ``config.json``, ``model*.safetensors`` and what belongs beside them."""

    Options = SafetensorsOptions

    def check(self, config: DecoderConfig, grids: Mapping[str, Grid], options: SafetensorsOptions) -> list[str]:
        """Objections to writing this model so; see ``flatq.export.Exporter.check``."""
        return objections(config, grids, options)

    def bytes(
        self, config: DecoderConfig, grids: Mapping[str, Grid], options: SafetensorsOptions, *, itemsize: int = 2
    ) -> int:
        """Size of the weights, from shapes."""
        return estimated_bytes(config, grids, options, itemsize)

    def dense(self, options: SafetensorsOptions) -> SafetensorsOptions:
        """The model before compression: a plain checkpoint, computed in float32 as ``open`` does."""
        return SafetensorsOptions(format="fp32", max_shard_size=options.max_shard_size)

    def write(self, artifact: Artifact, out: Path, options: SafetensorsOptions) -> Exported:
        """Write the folder; ``config.json`` appears last, when all that it promises is there.

        Raises:
            ExportError: ``check`` objects, or a tensor cannot be stored as the format wants it.
        """
        problems = self.check(artifact.config, artifact.grids, options)
        if problems:
            raise ExportError("\n".join(problems))
        from flatq_safetensors.writing import write_folder

        return write_folder(artifact, out, options)

    def missing(self, options: SafetensorsOptions, *, opening: bool = True) -> list[str]:
        """compressed-tensors, with which transformers opens the format of that name.

        GPTQ's files are compared through flatq's own decoding, since the kernels of their readers need a compiler.
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

        It computes in float32, so ``exact`` changes nothing.
        """
        from flatq_safetensors.runner import TransformersRunner

        return TransformersRunner(exported, provider=provider, threads=threads)
