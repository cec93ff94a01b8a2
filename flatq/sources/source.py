"""Open a pretrained model and read its tensors one at a time.

A model is a Hugging Face folder, a hub id, a ``.gguf`` file, or ``package:DIST/FILE`` (a file that an installed Python
package ships, so that real weights are available without the hub). Two storages implement the formats (``hf_folder``,
``gguf_file``). ``Source`` adds what both need: checks for NaN and infinity, comparison of all shapes with the
configuration before the run starts, digests for the manifest.

Only safetensors and GGUF are supported. Pickled checkpoints (``.bin``, ``.pt``) run code when opened and are rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flatq.calibration.grams import unusable
from flatq.errors import ArtifactError, NumericsError, RecipeError, UnsupportedModel
from flatq.files import file_digest
from flatq.model.decoder import DecoderConfig
from flatq.model.weights import tensor_shapes
from flatq.recipe.blocks import ModelSpec
from flatq.sources.gguf_file import GgufFile
from flatq.sources.hf_folder import HfFolder
from flatq.sources.places import locate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Stored(Protocol):
    """A tensor's entry in the header of a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes in torch's order."""
        ...

    @property
    def file(self) -> Path:
        """File that holds the tensor."""
        ...


class Storage(Protocol):
    """A file format: headers are read on opening, tensors on demand, under flatq's names."""

    config: DecoderConfig
    files: list[Path]
    has_weights: bool

    @property
    def model_type(self) -> str:
        """Family of the checkpoint, before its weights are folded."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Stored type of the weights; float32 if they are quantized blocks."""
        ...

    def dtype_of(self, name: str) -> torch.dtype:
        """Stored type of one of ``tensors``; float32 if it is quantized blocks."""
        ...

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor that is part of the decoder, by flatq's name."""
        ...

    def damage(self) -> list[str]:
        """One message for each file that cannot be read."""
        ...

    def objections(self) -> list[str]:
        """One message for each tensor that is readable but not supported."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor as stored (quantized blocks: dequantized to float32)."""
        ...

    @property
    def has_tokenizer(self) -> bool:
        """Whether the files of a tokenizer exist."""
        ...

    def tokenizer(self) -> Any:
        """A ``PreTrainedTokenizerFast``."""
        ...

    def tokenizer_notes(self) -> list[str]:
        """What exports will change in the tokenizer's files, in words."""
        ...

    def carry(self, out: Path, tokenizer: Any) -> None:
        """Put the tokenizer's files into a folder, as they are where the model has them as files."""
        ...

    def settings(self) -> dict[str, Any]:
        """Token ids for a ``config.json``."""
        ...

    def license(self) -> str | None:
        """License in the model's metadata, if any."""
        ...


@dataclass(frozen=True)
class Source:
    """An open pretrained model; satisfies ``flatq.model.weights.Weights``.

    Attributes:
        storage: the file format.
        origin: name for messages: path, hub id with its commit, or package file.
        wanted: dtype that ``tensor`` converts to; None keeps the stored dtype.
        hub_id: ``owner/name`` on the Hugging Face hub; None if the model comes from elsewhere.
    """

    storage: Storage
    origin: str
    wanted: torch.dtype | None = None
    hub_id: str | None = None

    @property
    def config(self) -> DecoderConfig:
        """Widths and switches."""
        return self.storage.config

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights as returned by ``tensor``; float32 for quantized GGUF."""
        return self.wanted or self.storage.dtype

    def dtype_of(self, name: str) -> torch.dtype:
        """Data type of one tensor as returned by ``tensor``; ``dtype`` for a tensor that the model does not have."""
        stored = name in self.storage.tensors
        return self.wanted or (self.storage.dtype_of(name) if stored else self.storage.dtype)

    @property
    def files(self) -> list[Path]:
        """All files of the model."""
        return self.storage.files

    @property
    def has_weights(self) -> bool:
        """False for a folder with only a ``config.json``, which is sufficient for ``flatq plan``."""
        return self.storage.has_weights

    @property
    def license(self) -> str | None:
        """License in the model's metadata, if any."""
        return self.storage.license()

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return tensor_shapes(self.config)

    def names(self) -> list[str]:
        """Names of all tensors of the configuration."""
        return sorted(self._shapes)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor and check that it has the shape given by the configuration.

        Raises:
            ArtifactError: it is missing, has another shape, or cannot be read.
            NumericsError: it contains NaN or infinity, or numbers whose squares leave float32.
        """
        wrong = self._wrong(name)
        if wrong is not None:
            raise ArtifactError(wrong)
        tensor = self.storage.read(name)
        if self.wanted is not None:
            tensor = tensor.to(self.wanted)
        if words := unusable(tensor):
            as_what = f" as {self.wanted}" if self.wanted else ""
            raise NumericsError(
                f"{self.storage.tensors[name].file}: tensor {name} holds {words}{as_what}; results would be "
                "meaningless. Download the file again, or use another dtype"
            )
        return tensor

    def _wrong(self, name: str) -> str | None:
        stored, shape = self.storage.tensors.get(name), self._shapes.get(name)
        if stored is None:
            return f"{self.origin}: tensor {name} is missing; the download may be incomplete"
        if shape != stored.shape:
            return f"{stored.file}: tensor {name} has shape {list(stored.shape)}, the configuration expects {shape}"
        return None

    def validate(self) -> None:
        """Check names and shapes of all tensors from the headers, without reading weights.

        Raises:
            ArtifactError: missing tensors, wrong shapes, damaged files; lists all of them.
            UnsupportedModel: the weights are complete, but contain tensors that flatq does not support.
        """
        damage = self.storage.damage()
        damage += [wrong for name in self.names() if (wrong := self._wrong(name)) is not None]
        if damage:
            raise ArtifactError("\n".join(_shortened(damage)))
        unexpected = sorted(set(self.storage.tensors) - set(self._shapes) - {"head.weight"})
        objections = self.storage.objections() + [
            f"{self.storage.tensors[name].file}: tensor {name} is not part of this {self.config.family} configuration"
            for name in unexpected
        ]
        if objections:
            raise UnsupportedModel("\n".join(_shortened(objections)))

    @cached_property
    def _digests(self) -> dict[str, str]:
        root = self.files[0].parent
        return {path.relative_to(root).as_posix(): file_digest(path) for path in self.files}

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file, by its path in the folder; computed once."""
        return self._digests

    @property
    def has_tokenizer(self) -> bool:
        """Whether the files of a tokenizer exist; ``flatq plan`` does not need them."""
        return self.storage.has_tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        return self.storage.tokenizer()

    def tokenizer(self) -> Any:
        """The model's ``PreTrainedTokenizerFast``; loaded once.

        Raises:
            RecipeError: its files are missing; the message lists which to add.
        """
        return self._tokenizer

    def tokenizer_notes(self) -> list[str]:
        """What exports will change in the tokenizer's files so that readers can open them; usually nothing."""
        return self.storage.tokenizer_notes()

    def carry_tokenizer(self, out: Path) -> None:
        """Put tokenizer, chat templates and generation settings into a folder, byte for byte where they are files.

        Raises:
            RecipeError: there is no tokenizer.
        """
        self.storage.carry(out, self.tokenizer())

    def settings(self) -> dict[str, Any]:
        """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, if the model defines them."""
        return self.storage.settings()


def _shortened(problems: list[str], most: int = 20) -> list[str]:
    rest = len(problems) - most
    return problems if rest <= 0 else [*problems[:most], f"... and {rest} more"]


def open_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    context_length: int | None = None,
    need_weights: bool = True,
) -> Source:
    """Open a pretrained model lazily.

    Args:
        path: Hugging Face folder, hub id ``owner/name``, ``.gguf`` file, or ``package:DIST/FILE``.
        revision: branch, tag or commit of a hub id.
        dtype: ``auto`` = as stored; or ``float32``, ``bfloat16``, ``float16``.
        context_length: number of positions that the model shall be made for; None is the most that can be read.
        need_weights: False accepts a folder with only a ``config.json``.

    Raises:
        RecipeError: the model does not exist, or has no weights.
        UnsupportedModel: its family or a switch is not supported.
        ArtifactError: a file is damaged.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise RecipeError(f"dtype: {dtype!r} is not known; allowed: auto, {', '.join(DTYPES)}")
    place, origin = locate(path, revision, need_weights=need_weights)
    if place.is_file() and context_length is not None:
        raise RecipeError(f"context_length: {context_length} is only for Hugging Face folders; {path} is a GGUF file")
    storage: Storage = GgufFile(place) if place.is_file() else HfFolder(place, context_length)
    if need_weights and not storage.has_weights:
        raise RecipeError(f"model: {place} holds no weights (*.safetensors); download them, or give another folder")
    hub_id, _, commit = origin.partition("@")
    return Source(storage, origin, DTYPES.get(dtype), hub_id if commit and place.name == commit else None)


def open_named(model: ModelSpec, *, need_weights: bool = True) -> Source:
    """The model that a recipe names; see ``open_model``."""
    return open_model(**model.model_dump(), need_weights=need_weights)
