"""GGUF export: files that an unchanged llama.cpp runs (and with it Ollama, LM Studio and others).

Read ``layouts.py`` first: which architecture a narrowed model borrows and what that costs. ``placement.py`` says where
rows and columns go, ``blocks.py`` carries codes into ggml's blocks, ``tensors.py`` plans and makes the tensors,
``tokenizer.py`` and ``metadata.py`` say the rest, ``runner.py`` runs the result in llama.cpp. Importing this package
does not need llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatq.export import Artifact, DecoderConfig, Exported, Exporter, ExportError, Grid, Runner, absent_packages
from flatq_gguf.check import objections
from flatq_gguf.options import GgufOptions
from flatq_gguf.sizes import estimated_bytes
from flatq_gguf.tensors import Contents
from flatq_gguf.tokenizer import objections as tokenizer_objections
from flatq_gguf.writing import write_file

__all__ = ["GgufExporter", "GgufOptions"]

RUNTIME = {"llama_cpp": ("llama-cpp-python", "pip install 'flatq[llamacpp]'")}


class GgufExporter(Exporter):
    """Writes one ``.gguf`` file, or numbered parts of one."""

    Options = GgufOptions

    def check(self, config: DecoderConfig, grids: Mapping[str, Grid], options: GgufOptions) -> list[str]:
        """Objections to writing this model so; see ``flatq.export.Exporter.check``."""
        return objections(config, grids, options)

    def check_tokenizer(self, described: Mapping[str, Any], config: DecoderConfig, options: GgufOptions) -> list[str]:
        """Objections to the tokenizer; see ``flatq.export.Exporter.check_tokenizer``."""
        return [f"gguf: {problem}" for problem in tokenizer_objections(described, config.vocab, options.pre_tokenizer)]

    def bytes(
        self, config: DecoderConfig, grids: Mapping[str, Grid], options: GgufOptions, *, itemsize: int = 2
    ) -> int:
        """Size of the files, from shapes."""
        return estimated_bytes(Contents.of(config, grids, options))

    def dense(self, options: GgufOptions) -> GgufOptions:
        """The family's own architecture in the type that ``baseline`` names."""
        return options.model_copy(update={"precision": options.baseline, "layout": "auto", "imatrix": False})

    def write(self, artifact: Artifact, out: Path, options: GgufOptions) -> Exported:
        """Write the file into ``out``; it appears when it is whole.

        Raises:
            ExportError: ``check`` objects, or the tokenizer cannot be described to llama.cpp.
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
            ExportError: llama-cpp-python is not installed, or llama.cpp refuses the file.
        """
        if absent := absent_packages(RUNTIME):
            raise ExportError(f"gguf: {absent[0]}; nothing else can run the file and compare it")
        from flatq_gguf.runner import LlamaCppRunner

        return LlamaCppRunner(exported, provider=provider, threads=threads, exact=exact)
