"""flatq compresses large language models after training: FLAT low-rank compression, GPTQ quantization, exports.

The public names are imported when they are first used, because reading a recipe does not need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flatq.hf.autoload import register_with_transformers

if TYPE_CHECKING:
    from flatq.artifact import Artifact
    from flatq.hf.artifact_model import load
    from flatq.pipeline.run import run
    from flatq.recipe.grammar import Recipe

__version__ = "0.1.0"
__all__ = ["Artifact", "Recipe", "__version__", "load", "run"]

_HOMES = {
    "Artifact": "flatq.artifact",
    "Recipe": "flatq.recipe.grammar",
    "load": "flatq.hf.artifact_model",
    "run": "flatq.pipeline.run",
}

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flatq' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
