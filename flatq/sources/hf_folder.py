"""A Hugging Face model folder: ``config.json``, safetensors (one file or shards with an index), tokenizer.

The header of a safetensors file lists every tensor with its shape, and the library compares the file's length with the
header, so a truncated download is detected without reading any weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from torch import Tensor

from flatq.errors import ArtifactError, RecipeError, UnsupportedModel
from flatq.files import lfs_pointer, read_json
from flatq.model.folds import folded, is_folded
from flatq.model.hf_config import read_hf
from flatq.model.lacking import WRAPPERS
from flatq.model.weights import tensor_shapes
from flatq.sources.experts import Gathered, gathered, missing_experts, of_an_expert
from flatq.tokenizer import carry, companions, generation_settings, has_tokenizer, notes, open_tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
FIRST_LINEAR, HEAD = "layers.0.self_attn.o_proj.weight", "lm_head.weight"  # one of each kind in every decoder
OTHER_PARTS = tuple(f"{outer}{part}." for outer in ("", "model.") for part in ("vision_tower", "multi_modal_projector"))
DOWNLOAD = "download it again"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a safetensors header."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    rows: slice | None = None  # of a tensor that holds the rows of several linears
    experts: Gathered | None = None  # of a linear whose experts are separate tensors


class HfFolder:
    """A model folder, read lazily; satisfies ``flatq.sources.source.Storage``."""

    def __init__(self, root: Path, context: int | None = None) -> None:
        self.root = root
        config_file = root / "config.json"
        if not config_file.is_file():
            raise RecipeError(f"model: {root} has no config.json; give a Hugging Face model folder or a .gguf file")
        self._hf = read_json(config_file, dict[str, Any], DOWNLOAD)
        if self._hf.get("model_type") == "flatq":
            raise UnsupportedModel(f"{root}: this is a model that flatq has already compressed; give the original one")
        self._reading = read_hf(self._hf, str(config_file), context)
        self.config = self._reading.config
        if (root / ADAPTER).is_file():
            raise UnsupportedModel(
                f"{root}: {ADAPTER} says that a LoRA adapter belongs to this model; merge it first (merge_and_unload "
                "of peft), or remove it and its weights"
            )
        self._names = self._reading.family.names
        self._weight_map, self._shards = self._list_shards()
        self.has_weights = bool(self._shards)
        pickled = sorted(path.name for pattern in PICKLED for path in root.glob(pattern))
        if pickled and not self.has_weights:
            raise UnsupportedModel(
                f"{root}: only pickled weights ({pickled[0]}), which run code when opened; flatq reads safetensors and "
                "GGUF. Convert: transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        self.files = [config_file, *([root / INDEX] if (root / INDEX).is_file() else []), *companions(root)]
        self.files += [root / shard for shard in self._shards if (root / shard).is_file()]

    def _list_shards(self) -> tuple[dict[str, str] | None, list[str]]:
        index = self.root / INDEX
        if not index.is_file():
            single = (self.root / SINGLE).is_file()
            others = sorted(path.name for path in self.root.glob("*.safetensors"))
            if others and not single:
                raise ArtifactError(
                    f"{self.root}: {others[0]} needs {INDEX} in the same folder; download the index too"
                )
            return None, [SINGLE] if single else []
        weight_map = read_json(index, dict[str, Any], DOWNLOAD).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ArtifactError(f"{index}: no weight_map of names to files; download it again")
        shards = sorted(set(weight_map.values()))
        if (self.root / SINGLE).is_file() and SINGLE not in shards:
            raise ArtifactError(
                f"{self.root}: {SINGLE} and {INDEX}, which lists {shards[0]} and others, are two sets of weights; "
                "remove the one that is not wanted"
            )
        for shard in shards:
            # Prevents path traversal: a name with a path could refer to any file of this machine.
            if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
                raise ArtifactError(
                    f"{index}: {shard!r} is not a plain .safetensors file name; do not trust this folder"
                )
        return weight_map, shards

    @cached_property
    def _headers(self) -> tuple[dict[str, StoredTensor], list[str]]:
        stored: dict[str, StoredTensor] = {}
        damaged: list[str] = []
        for shard in self._shards:
            file = self.root / shard
            try:
                handle = self._handle(file)
            except ArtifactError as error:
                damaged.append(str(error))
                continue
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                if self._weight_map is None or self._weight_map.get(name) == shard:
                    header = handle.get_slice(name)
                    stored[name] = StoredTensor(name, file, tuple(header.get_shape()), header.get_dtype())
        return stored, damaged

    def _handle(self, file: Path) -> Any:
        # Opened for every read: pages of a mapping that stays open remain in memory, up to the whole model.
        if not file.is_file():
            raise ArtifactError(f"{file}: missing, though {INDEX} names it; the download is incomplete")
        if lfs_pointer(file):
            raise ArtifactError(f"{file}: a Git LFS pointer, not the file itself; run git lfs pull in its folder")
        try:
            return safetensors.safe_open(file, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: truncated or damaged ({error}); download it again") from error

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """See ``flatq.sources.source.Storage``."""
        stored = self._headers[0]
        found: dict[str, StoredTensor] = {}
        names = usual_names(stored)
        for name, usual in names.items():
            found |= self._divided(self._names.all_from_hf(usual), stored[name])
        shapes = {name: entry.shape for name, entry in stored.items()}
        for name, whole in gathered(self._reading.family, self.config, names, shapes).items():
            found[name] = replace(stored[whole.names[0]], shape=whole.shape, experts=whole)
        if self.config.tied_head and "embed.weight" not in found and "head.weight" in found:
            found["embed.weight"] = found.pop("head.weight")  # one matrix under the name of its other use
        return found

    def _divided(self, names: tuple[str, ...], entry: StoredTensor) -> dict[str, StoredTensor]:
        """The tensors whose rows are in this one; all of it if it does not have the expected number of rows."""
        rows = [self._shapes.get(name, (0,))[0] for name in names]
        if len(names) < 2 or sum(rows) != entry.shape[0]:
            return dict.fromkeys(names, entry)
        ends = list(accumulate(rows))
        return {
            name: replace(entry, shape=(count, *entry.shape[1:]), rows=slice(end - count, end))
            for name, count, end in zip(names, rows, ends, strict=True)
        }

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return tensor_shapes(self.config)

    @property
    def model_type(self) -> str:
        """See ``flatq.sources.source.Storage``."""
        return str(self._hf["model_type"])

    @property
    def dtype(self) -> torch.dtype:
        """Stored type of the embedding; without weights, the type in config.json."""
        entry = self.tensors.get("embed.weight")
        if entry is not None:
            return STORED_DTYPES.get(entry.dtype, torch.float32)
        stated = f"torch.{self._hf.get('dtype') or self._hf.get('torch_dtype')}"
        return next((dtype for dtype in STORED_DTYPES.values() if str(dtype) == stated), torch.float32)

    def dtype_of(self, name: str) -> torch.dtype:
        """See ``flatq.sources.source.Storage``."""
        if is_folded(self._reading.folds, name):
            return torch.float32
        return STORED_DTYPES.get(self.tensors[name].dtype, torch.float32)

    def damage(self) -> list[str]:
        """See ``flatq.sources.source.Storage``."""
        experts = missing_experts(self.config, usual_names(self._headers[0]))
        return [*self._headers[1], *(f"{self.root}: {words}" for words in experts), *self._wrong_token_ids()]

    def _wrong_token_ids(self) -> list[str]:
        found = []
        for key, value in self.settings().items():
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
                found.append(
                    f"{self.root}: {key} is {value!r} in generation_config.json or config.json; a token id or a list "
                    f"of token ids is expected; {DOWNLOAD}"
                )
        return found

    def objections(self) -> list[str]:
        """Unexpected tensors, unsupported data types, a tied head that differs from the embedding."""
        found = []
        usual = usual_names(self._headers[0])
        for name, entry in self._headers[0].items():
            if name.endswith("rotary_emb.inv_freq"):
                continue  # a table in old checkpoints; it is computed from the configuration
            if self.model_type in WRAPPERS and name.startswith(OTHER_PARTS):
                continue  # only the text part is read
            if self._names.from_hf(usual[name]) is None and not (self.config.experts and of_an_expert(usual[name])):
                found.append(f"{entry.file}: tensor {name} is not part of a {self.model_type} decoder")
            elif entry.dtype not in STORED_DTYPES:
                found.append(f"{entry.file}: tensor {name} is {entry.dtype}; supported: {', '.join(STORED_DTYPES)}")
        if not found and self._head_is_loose():
            found.append(
                f"{self.root / 'config.json'}: tie_word_embeddings is true, but lm_head.weight differs from the "
                "embedding; set it to false, or remove lm_head.weight"
            )
        return found

    def _head_is_loose(self) -> bool:
        both = self.config.tied_head and {"head.weight", "embed.weight"} <= set(self.tensors)
        return both and not torch.equal(self.read("head.weight"), self.read("embed.weight"))

    def read(self, name: str) -> Tensor:
        """See ``flatq.sources.source.Storage``."""
        entry = self.tensors[name]
        if entry.dtype not in STORED_DTYPES:
            raise UnsupportedModel(
                f"{entry.file}: tensor {name} is {entry.dtype}; supported: {', '.join(STORED_DTYPES)}"
            )
        if entry.experts is not None:
            stored = self._headers[0]
            part = entry.experts.join([self._handle(stored[one].file).get_tensor(one) for one in entry.experts.names])
        else:
            handle = self._handle(entry.file)
            part = handle.get_tensor(entry.name) if entry.rows is None else handle.get_slice(entry.name)[entry.rows]
        return folded(self._reading.folds, name, part, self.config, self._reading.keys)

    @property
    def has_tokenizer(self) -> bool:
        """See ``flatq.sources.source.Storage``."""
        return has_tokenizer(self.root)

    def tokenizer(self) -> Any:
        """See ``flatq.sources.source.Source``."""
        return open_tokenizer(self.root)

    def tokenizer_notes(self) -> list[str]:
        """See ``flatq.sources.source.Source``."""
        return notes(self.root)

    def carry(self, out: Path, tokenizer: Any) -> None:
        """See ``flatq.sources.source.Storage``."""
        carry(self.root, out, tokenizer)

    def settings(self) -> dict[str, Any]:
        """See ``flatq.sources.source.Source``."""
        # transformers generates by generation_config.json, and config.json only stands in for it.
        known = {**_stated(self._reading.keys), **_stated(self._hf), **_stated(generation_settings(self.root))}
        return {key: known[key] for key in TOKEN_IDS if key in known}

    def license(self) -> str | None:
        """``license`` in the front matter of the model card."""
        card = self.root / "README.md"
        if not card.is_file():
            return None
        parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
        if len(parts) < 3 or parts[0].strip():
            return None
        try:
            front = yaml.safe_load(parts[1])
        except yaml.YAMLError:
            return None  # an invalid model card does not make the model invalid
        stated = front.get("license") if isinstance(front, dict) else None
        return str(stated) if stated else None


def usual_names(stored: Iterable[str]) -> dict[str, str]:
    """Each name of a checkpoint, and the name that the tensor has in a plain checkpoint of a causal language model.

    Base models are saved without ``model.``; torch.compile, peft and models with more parts put a prefix before it.
    The prefix is taken from the name of the first layer's output projection.
    """
    names = list(stored)
    prefixes = {name.removesuffix(FIRST_LINEAR) for name in names if name.endswith(FIRST_LINEAR)}
    if len(prefixes) != 1:
        return {name: name for name in names}
    prefix = prefixes.pop()
    heads = {outer + HEAD for outer in ("", prefix.removesuffix("model."), prefix.removesuffix("language_model."))}

    def usual(name: str) -> str:
        if name in heads:
            return HEAD
        return "model." + name.removeprefix(prefix) if name.startswith(prefix) else name

    return {name: usual(name) for name in names}


def _stated(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}
