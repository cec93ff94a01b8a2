"""GGUF export: files that unmodified llama.cpp (and Ollama, LM Studio and others) can run.

Start with ``layouts.py``: the llama.cpp architecture that a narrowed model is written as. ``placement.py`` maps rows
and columns, ``blocks.py`` packs codes into ggml's blocks, ``tensors.py`` plans and creates the tensors,
``tokenizer.py`` and ``metadata.py`` write the metadata, ``runner.py`` runs the file in llama.cpp. Importing this
package does not need llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatq.export import Artifact, DecoderConfig, Exported, Exporter, ExportError, Grid, Runner, absent_packages
from flatq_gguf.check import objections
from flatq_gguf.layouts import architecture
from flatq_gguf.options import GgufOptions
from flatq_gguf.sizes import estimated_bytes, matrix_bytes
from flatq_gguf.tensors import Contents
from flatq_gguf.tokenizer import objections as tokenizer_objections
from flatq_gguf.usage import USAGE
from flatq_gguf.writing import write_file

__all__ = ["GgufExporter", "GgufOptions"]

RUNTIME = {"llama_cpp": ("llama-cpp-python", "pip install 'flatq[llamacpp]'")}


class GgufExporter(Exporter):
    """Writes one ``.gguf`` file, or numbered parts of one."""

    Options = GgufOptions

    def check(self, config: DecoderConfig, grids: Mapping[str, Grid], options: GgufOptions) -> list[str]:
        """See ``flatq.export.Exporter.check``."""
        return objections(config, grids, options)

    def check_tokenizer(self, described: Mapping[str, Any], config: DecoderConfig, options: GgufOptions) -> list[str]:
        """Objections to the tokenizer; see ``flatq.export.Exporter.check_tokenizer``."""
        return [f"gguf: {problem}" for problem in tokenizer_objections(described, config.vocab, options.pre_tokenizer)]

    def bytes(
        self, config: DecoderConfig, grids: Mapping[str, Grid], options: GgufOptions, *, itemsize: int = 2
    ) -> int:
        """Size of the files, from shapes."""
        return estimated_bytes(Contents.of(config, grids, options))

    def matrix_bytes(
        self, config: DecoderConfig, stem: str, grid: Grid | None, options: GgufOptions, *, itemsize: int = 2
    ) -> int:
        """See ``flatq.export.Exporter.matrix_bytes``."""
        return matrix_bytes(Contents.of(config, {} if grid is None else {stem: grid}, options), stem)

    def cache_bytes(self, config: DecoderConfig, index: int, context: int, options: GgufOptions) -> int:
        """See ``flatq.export.Exporter.cache_bytes``; value heads are as wide as the file has them."""
        return super().cache_bytes(architecture(config, options).written, index, context, options)

    def usage(self, options: GgufOptions) -> str:
        """See ``flatq.export.Exporter.usage``."""
        return USAGE

    def dense(self, options: GgufOptions) -> GgufOptions:
        """Options for the dense model: the family's architecture, in the type of the option ``baseline``."""
        return options.model_copy(update={"precision": options.baseline, "layout": "auto", "imatrix": False})

    def write(self, artifact: Artifact, out: Path, options: GgufOptions) -> Exported:
        """Write the file into ``out``, atomically.

        Raises:
            ExportError: ``check`` has objections, or llama.cpp does not support the tokenizer.
        """
        problems = self.check(artifact.config, artifact.grids, options)
        if problems:
            raise ExportError("\n".join(problems))
        return write_file(artifact, out, Contents.of(artifact.config, artifact.grids, options))

    def missing(self, options: GgufOptions, *, opening: bool = True) -> list[str]:
        """llama-cpp-python, to run the file; writing needs the core only."""
        return absent_packages(RUNTIME) if opening else []

    def providers(self) -> tuple[str, ...]:
        """See ``flatq.export.Exporter.providers``."""
        if absent_packages(RUNTIME):
            return ()
        from flatq_gguf.runner import available

        return available()

    def open(
        self, exported: Path, options: GgufOptions, *, provider: str = "auto", threads: int = 0, exact: bool = False
    ) -> Runner:
        """Open what ``write`` wrote in llama.cpp; see ``flatq.export.Exporter.open``.

        Raises:
            ExportError: llama-cpp-python is not installed, or llama.cpp cannot load the file.
        """
        if absent := absent_packages(RUNTIME):
            raise ExportError(f"gguf: {absent[0]}; it is needed to run the file")
        from flatq_gguf.runner import LlamaCppRunner

        return LlamaCppRunner(exported, provider=provider, threads=threads, exact=exact)
