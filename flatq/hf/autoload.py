"""Register flatq with ``AutoModelForCausalLM`` when transformers is imported.

``import flatq`` must be fast (checking a recipe needs neither torch nor transformers), but after it
``AutoModelForCausalLM.from_pretrained`` must know ``model_type: flatq``, independent of the order of imports.
Registration needs the model classes, and they need torch. So if transformers is already imported, the classes are
registered immediately; otherwise an import hook registers them after the first import of transformers. Only the
top-level package is hooked: when its import ends, transformers is initialised and circular imports cannot occur.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterTransformers:
    """A meta-path finder that delegates to the other finders and adds the registration to ``import transformers``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec of transformers with the registration after its execution; None for other modules."""
        if name != "transformers":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # not removed earlier: find_spec is also called just to test for existence
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
