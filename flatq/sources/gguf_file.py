"""A GGUF file as a source of weights: reads its metadata, dequantizes its tensors, restores the row order.

The metadata is converted to the keys of a Hugging Face ``config.json`` and validated by the same code
(``hf_config.config_from_hf``), so that support for a model is decided in one place. The gguf package reads the file and
dequantizes its blocks; a dequantized tensor is float32 and has exactly the values that llama.cpp uses.

Changes of llama.cpp's converter are reverted: rows of q and k (in architecture ``llama`` it interleaves the two rows of
a rotary pair; flatq's decoder stores them in halves), and tables of the rope (``gguf_rope``).

Architecture ``deci``, in which narrowed models are written, is a Llama or Qwen2 with MLP widths per layer.
Architectures that flatq reads but does not write are in ``gguf_others``.

Left out: split files (join them with llama-gguf-split --merge), and layers without attention or MLP.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from flatq.errors import ArtifactError, RecipeError, UnsupportedModel
from flatq.model.decoder import DecoderConfig
from flatq.model.families import FAMILIES
from flatq.model.family import Family
from flatq.model.folds import folded, is_folded
from flatq.model.hf_config import read_hf
from flatq.model.layer_kinds import FULL, WINDOWED
from flatq.model.weights import tensor_shapes
from flatq.sources.gguf_others import OTHERS, fused_parts
from flatq.sources.gguf_rope import ROPE_TENSORS, Described, rope_keys, with_divisors
from flatq.sources.gguf_tokenizer import read_tokenizer
from flatq.tokenizer import save

PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BY_LAYER = "deci"
NUMBERS_AT_ONCE = 1 << 20  # numbers dequantized in one call; gguf's temporaries are a few times as large
# GGUF key (below the architecture's name) -> key of config.json
KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Numbers of layers by which llama.cpp recognises the two models whose scores have another scale.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """One entry of the file's tensor table."""

    file: Path
    shape: tuple[int, ...]
    tensor: Any  # gguf.ReaderTensor, memory-mapped
    rows: slice | None = None  # those of the tensor that are this one; None is all


class GgufFile:
    """A GGUF file, read lazily; satisfies ``flatq.sources.source.Storage``."""

    has_weights = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ArtifactError(f"{path}: truncated or damaged GGUF file ({error}); download it again") from error
        self._blocks = {
            entry.name: StoredBlocks(path, tuple(int(n) for n in reversed(entry.shape)), entry)
            for entry in self._reader.tensors
        }
        self._architecture = str(self._value("general.architecture"))
        self._described = Described(path, self._architecture, self._value, self._vector)
        self._other = OTHERS.get(self._architecture)
        self.family = self._family()
        self.config = self._configuration()

    def _value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            return None
        value = field.contents()
        if field.types[-1] == gguf.GGUFValueType.FLOAT32 and isinstance(value, float):
            return float(str(np.float32(value)))  # 1e-05 instead of 9.999999747378752e-06
        return value

    def _vector(self, name: str) -> Tensor | None:
        entry = self._blocks.get(name)
        return None if entry is None else torch.from_numpy(np.array(entry.tensor.data, dtype=np.float32))

    def _family(self) -> Family:
        architecture = self._architecture
        if architecture == BY_LAYER:
            only_qkv = "blk.0.attn_q.bias" in self._blocks and "blk.0.attn_output.bias" not in self._blocks
            architecture = "qwen2" if only_qkv else "llama"
        known = {name: FAMILIES[other.model_type] for name, other in OTHERS.items()}
        windowed = bool(self._value(f"{architecture}.attention.sliding_window"))
        for family in FAMILIES.values():
            if family.gguf and (family.gguf not in known or (windowed and family.window == "alternating")):
                known[family.gguf] = family
        if architecture not in known:
            raise UnsupportedModel(
                f"{self.path}: GGUF architecture {architecture!r} is not supported; supported: {', '.join(known)}, "
                f"{BY_LAYER}"
            )
        if (self._value("split.count") or 1) > 1:
            raise UnsupportedModel(f"{self.path}: one part of a split file; join them: llama-gguf-split --merge")
        return known[architecture]

    def _configuration(self) -> DecoderConfig:
        values: dict[str, Any] = {"model_type": self.family.model_type, "sliding_window": None}
        for key, name in KEYS.items():
            value = self._value(f"{self._architecture}.{key}")
            if value is not None:
                values[name] = value
        widths = self._widths_by_layer(values)
        heads, width = values.get("num_attention_heads"), values.get("hidden_size")
        values.setdefault("num_key_value_heads", heads)
        if isinstance(heads, int) and isinstance(width, int) and heads > 0:
            values.setdefault("head_dim", width // heads)
        embedding = self._blocks.get("token_embd.weight")
        if embedding is None:
            raise ArtifactError(f"{self.path}: tensor token_embd.weight is missing; download the file again")
        values["vocab_size"] = embedding.shape[0]
        values["tie_word_embeddings"] = "output.weight" not in self._blocks
        values["attention_bias"] = not self._blocks.keys().isdisjoint(("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"))
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in self._blocks
        values |= rope_keys(self._described, ntk_alpha=self.family.ntk_alpha)
        values |= self._kinds_of_layers()
        if self._other is not None and isinstance(head_dim := values.get("head_dim"), int) and head_dim > 0:
            values |= self._other.read(self._described, head_dim, partial=self.family.partial)
        if self.family.gguf in GEMMA_27B and isinstance(heads, int) and isinstance(width, int):
            large = values.get("num_hidden_layers") == GEMMA_27B[self.family.gguf]
            values["query_pre_attn_scalar"] = width // heads if large else values["head_dim"]
        self._refuse_extras(values)
        reading = read_hf(values, where=str(self.path))
        config, self._keys = reading.config, reading.keys
        self._folds = self.family.gguf_folds if self._other is None else reading.folds
        if widths:
            config = config.with_layers([replace(config.layers[0], d_ff=width) for width in widths])
        rope = with_divisors(self._described, config.rope, config.layers[0].d_qk, config.max_positions)
        return replace(config, rope=rope)

    def _widths_by_layer(self, values: dict[str, Any]) -> list[int]:
        """MLP width of each layer, if the file lists them; the lists in ``values`` become single numbers."""
        widths, layers = values.get("intermediate_size"), values.get("num_hidden_layers")
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            listed = values.get(name)
            if not isinstance(listed, list):
                continue
            alike = name == "intermediate_size" or len(set(listed)) == 1
            if len(listed) != layers or not listed or not alike or min(listed) < 1:
                raise UnsupportedModel(
                    f"{self.path}: {name} differs by layer, or a layer has none; flatq reads MLP widths by layer only"
                )
            values[name] = listed[0]
        return widths if isinstance(widths, list) else []

    def _kinds_of_layers(self) -> dict[str, Any]:
        """Keys of the windows of a family that has them in some layers only."""
        prefix = self._architecture
        if self.family.window != "alternating":
            return {}
        found: dict[str, Any] = {"sliding_window": self._value(f"{prefix}.attention.sliding_window")}
        pattern = self._value(f"{prefix}.attention.sliding_window_pattern")
        if isinstance(pattern, list):
            found["layer_types"] = [WINDOWED if windowed else FULL for windowed in pattern]
        elif pattern is not None:
            found["sliding_window_pattern"] = pattern
        local = self._value(f"{prefix}.rope.freq_base_swa")
        return found | ({} if local is None else {"rope_local_base_freq": local})

    def _refuse_extras(self, values: Mapping[str, Any]) -> None:
        """Reject metadata that changes the computation and cannot be expressed in a config.json of these families."""
        prefix = self._architecture
        head_dim, context = values.get("head_dim"), values.get("max_position_embeddings") or 0
        window = self._value(f"{prefix}.attention.sliding_window")
        problems = []
        partial = self._other is not None and self.family.partial
        for key in ("attention.value_length", *(() if partial else ("rope.dimension_count",))):
            found = self._value(f"{prefix}.{key}")
            if found not in (None, head_dim):
                problems.append(f"{self.path}: {prefix}.{key} is {found}; only the head size {head_dim} is supported")
        if self._value(f"{prefix}.rope.dimension_sections"):
            problems.append(f"{self.path}: {prefix}.rope.dimension_sections: positions of pictures are not supported")
        local, theta = self._value(f"{prefix}.rope.freq_base_swa"), values.get("rope_theta")
        if local not in (None, theta) and self.family.local_theta != "rope_local_base_freq":
            problems.append(f"{self.path}: {prefix}.rope.freq_base_swa is {local}; only rope.freq_base is supported")
        if self._value(f"{prefix}.expert_count"):
            problems.append(f"{self.path}: {prefix}.expert_count: mixtures of experts are not supported")
        if window and window < context and not values["sliding_window"]:
            problems.append(f"{self.path}: {prefix}.attention.sliding_window {window}: use the Hugging Face folder")
        if problems:
            raise UnsupportedModel("\n".join(problems))

    @cached_property
    def tensors(self) -> dict[str, StoredBlocks]:
        """See ``flatq.sources.source.Storage``."""
        shapes, found = tensor_shapes(self.config), dict[str, StoredBlocks]()
        for name, entry in self._blocks.items():
            parts = self._parts(name)
            counts = [shapes.get(part, (0,))[0] for part in parts]
            if len(parts) < 2 or sum(counts) != entry.shape[0]:
                found |= dict.fromkeys(parts, entry)
                continue
            for part, count, end in zip(parts, counts, accumulate(counts), strict=True):
                found[part] = replace(entry, shape=(count, *entry.shape[1:]), rows=slice(end - count, end))
        return found

    def _parts(self, name: str) -> tuple[str, ...]:
        """Our tensors whose rows are in this one, in their order."""
        if self._other is not None and (fused := fused_parts(name, self._blocks)):
            return fused
        ours = self.family.names.from_gguf(name)
        return () if ours is None else (ours,)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the linears; float32 if any of them is quantized."""
        kinds = {entry.tensor.tensor_type.name for entry in self._blocks.values() if len(entry.shape) > 1}
        return PLAIN_DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    def dtype_of(self, name: str) -> torch.dtype:
        """See ``flatq.sources.source.Storage``."""
        if is_folded(self._folds, name):
            return torch.float32
        return PLAIN_DTYPES.get(self.tensors[name].tensor.tensor_type.name, torch.float32)

    @property
    def model_type(self) -> str:
        """See ``flatq.sources.source.Storage``."""
        return self.family.model_type

    def damage(self) -> list[str]:
        """Always empty: a truncated file raises an error when it is opened."""
        return []

    def objections(self) -> list[str]:
        """Tensors that are not part of the decoder."""
        return [
            f"{self.path}: tensor {name} is not part of a {self.family.model_type} decoder"
            for name in self._blocks
            if not self._parts(name) and name not in ROPE_TENSORS
        ]

    def read(self, name: str) -> Tensor:
        """See ``flatq.sources.source.Storage``."""
        stored = self.tensors[name]
        entry = stored.tensor
        tensor = torch.empty(stored.shape, dtype=PLAIN_DTYPES.get(entry.tensor_type.name, torch.float32))
        rows = max(1, NUMBERS_AT_ONCE // stored.shape[-1])
        stored_rows = entry.data if stored.rows is None else entry.data[stored.rows]
        try:
            for part, data in zip(
                tensor.split(rows), np.split(stored_rows, range(rows, len(tensor), rows)), strict=True
            ):
                part.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(data, entry.tensor_type))))
        except NotImplementedError as unknown:
            raise UnsupportedModel(
                f"{self.path}: tensor {entry.name} is stored as {entry.tensor_type.name}, which gguf cannot decode; "
                "use an F16, Q8_0 or K-quant file of this model"
            ) from unknown
        self._forget()
        dims = self.config.layers[0]
        permuted = self.family.gguf_permuted if self._other is None else self._other.permuted
        if (permuted or self._architecture == BY_LAYER) and name.startswith("layers."):
            linear = name.split(".")[2]
            if linear in ("q", "k"):
                tensor = halves_from_pairs(tensor, dims.heads if linear == "q" else dims.kv_heads)
        return folded(self._folds, name, tensor, self.config, self._keys)

    def _forget(self) -> None:
        """Release the pages of the mapped file; otherwise the whole model would stay in memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._reader.data._mmap.madvise(mmap.MADV_DONTNEED)

    @property
    def has_tokenizer(self) -> bool:
        """See ``flatq.sources.source.Storage``."""
        return self._reader.get_field("tokenizer.ggml.tokens") is not None

    def tokenizer(self) -> Any:
        """See ``flatq.sources.source.Source``."""
        if not self.has_tokenizer:
            raise RecipeError(f"model: {self.path} holds no tokenizer; get a complete GGUF file, or use the HF folder")
        return read_tokenizer(self.path, self._value("tokenizer.ggml.model"), self._value("tokenizer.ggml.pre"))

    def tokenizer_notes(self) -> list[str]:
        """Always empty: the files are created."""
        return []

    def carry(self, out: Path, tokenizer: Any) -> None:
        """See ``flatq.sources.source.Storage``; the files are created, because a GGUF file contains the tokenizer."""
        save(tokenizer, out)

    def settings(self) -> dict[str, Any]:
        """See ``flatq.sources.source.Source``."""
        found = {name: self._value(f"tokenizer.ggml.{kind}_token_id") for kind, name in TOKEN_IDS.items()}
        return {name: value for name, value in found.items() if value is not None}

    def license(self) -> str | None:
        """``general.license``."""
        stated = self._value("general.license")
        return str(stated) if stated else None


def halves_from_pairs(rows: Tensor, heads: int) -> Tensor:
    """Interleaved rotary pairs to halves (all first elements, then all second): [heads * d, ...] -> the same shape."""
    paired = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [heads, d / 2, 2, ...]
    return paired.transpose(1, 2).reshape(rows.shape)


def pairs_from_halves(rows: Tensor, heads: int) -> Tensor:
    """Inverse of ``halves_from_pairs``."""
    halved = rows.reshape(heads, 2, -1, *rows.shape[1:])  # [heads, 2, d / 2, ...]
    return halved.transpose(1, 2).reshape(rows.shape)
