"""The plug-in API: everything that an exporter may import from flatq.

Start with ``Exporter``. docs/writing-an-exporter.md has a complete example. The modules of the core import from the
modules that define these names, never from here.
"""

from __future__ import annotations

from flatq import __version__
from flatq.artifact import (
    ENERGIES,
    INDEX,
    MANIFEST,
    RANGES,
    Artifact,
    save_shard,
)
from flatq.cache import recall, remember
from flatq.chats import TemplateRefuses, written_out
from flatq.errors import ExportError, FlatqError, RecipeError, UnsupportedModel
from flatq.export.hub import loading_faults, register_with_transformers
from flatq.export.protocols import (
    Exported,
    Exporter,
    FloatArray,
    IntArray,
    Runner,
    absent_packages,
    require_positions,
)
from flatq.export.speed import Grids, Seconds, SpeedLoad, SpeedModel
from flatq.files import file_digest, read_json, write_atomically, write_json
from flatq.machine.environment import cpu_name
from flatq.model.decoder import LINEARS, DecoderConfig, LayerDims, Rope
from flatq.model.families import FAMILIES
from flatq.model.grid import Grid, QuantizedWeight
from flatq.model.hf_config import config_from_hf, config_to_hf
from flatq.model.names import matrix_shape
from flatq.model.weights import Weights, dense, tensor_shapes
from flatq.sources.gguf_file import pairs_from_halves
from flatq.sources.gguf_rope import ROPE_DIVISORS
from flatq.tokenizer import chat_templates, end_tokens, open_tokenizer

__all__ = [
    "ENERGIES",
    "FAMILIES",
    "INDEX",
    "LINEARS",
    "MANIFEST",
    "RANGES",
    "ROPE_DIVISORS",
    "Artifact",
    "DecoderConfig",
    "ExportError",
    "Exported",
    "Exporter",
    "FlatqError",
    "FloatArray",
    "Grid",
    "Grids",
    "IntArray",
    "LayerDims",
    "QuantizedWeight",
    "RecipeError",
    "Rope",
    "Runner",
    "Seconds",
    "SpeedLoad",
    "SpeedModel",
    "TemplateRefuses",
    "UnsupportedModel",
    "Weights",
    "__version__",
    "absent_packages",
    "chat_templates",
    "config_from_hf",
    "config_to_hf",
    "cpu_name",
    "dense",
    "end_tokens",
    "file_digest",
    "loading_faults",
    "matrix_shape",
    "open_tokenizer",
    "pairs_from_halves",
    "read_json",
    "recall",
    "register_with_transformers",
    "remember",
    "require_positions",
    "save_shard",
    "tensor_shapes",
    "write_atomically",
    "write_json",
    "written_out",
]
