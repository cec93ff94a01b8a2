"""Teach ``AutoModelForCausalLM`` about flatq the moment transformers is there, and not before.

``import flatq`` must be light (checking a recipe needs neither torch nor transformers), yet after it
``AutoModelForCausalLM.from_pretrained`` must know ``model_type: flatq``, whichever of the two was imported first.
Registering needs the classes themselves, and they need torch. So: if transformers is already loaded, register
now; otherwise wait for its first import and register right after it. Only the import of the package itself is
waited for: at its end no part of transformers is half initialised, so nothing can go round in a circle.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterTransformers:
    """A finder that leaves finding to the others, and has a say only in what follows ``import transformers``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec of transformers, its execution followed by the registration; None for all else."""
        if name != "transformers":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # stays until here: libraries also ask for a spec only to see if it exists
                sys.meta_path.remove(self)
            importlib.import_module("flatq.hf.artifact_model")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Register ``FlatqConfig`` and ``FlatqForCausalLM`` now or at the first import of transformers."""
    if "transformers" in sys.modules:
        importlib.import_module("flatq.hf.artifact_model")
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())
