"""What an exporter of Hugging Face folders needs of flatq's transformers classes.

transformers takes a second to import, so it is imported inside the functions.
"""

from __future__ import annotations

from typing import Any


def register_with_transformers() -> None:
    """Make transformers' auto classes load folders with flatq's model types; safe to call again."""
    import flatq.hf.artifact_model  # noqa: F401 (importing it registers the classes)


def loading_faults(found: Any) -> list[str]:
    """Tensors that were missing, misshapen or unknown, by transformers' ``output_loading_info``; empty if none."""
    from flatq.hf import modeling_flatq

    return modeling_flatq.loading_faults(found)
