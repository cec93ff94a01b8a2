"""Access to flatq's transformers classes, for exporters of Hugging Face folders.

The import of transformers takes a second, so it is inside the functions.
"""

from __future__ import annotations

from typing import Any


def register_with_transformers() -> None:
    """Register flatq's model types with the auto classes of transformers; can be called repeatedly."""
    import flatq.hf.artifact_model  # noqa: F401 (importing it registers the classes)


def loading_faults(found: Any) -> list[str]:
    """Missing tensors, wrong shapes and unknown tensors in transformers' ``output_loading_info``; empty if none."""
    from flatq.hf import modeling_flatq

    return modeling_flatq.loading_faults(found)
