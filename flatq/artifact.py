"""The artifact: the compressed model on disk, with its provenance.

The folder is a Hugging Face model folder (``config.json`` with ``model_type: flatq``, safetensors shards, an index, the
tokenizer), which transformers loads. Each block (attention or MLP of one layer) is a separate shard, written when the
block is finished, so that an interrupted run can be resumed and memory stays small.

A quantized linear is stored as three tensors, ``NAME.codes`` (uint8, one code per byte), ``NAME.scale`` (float16) and
``NAME.zero`` (uint8); ``config.json`` lists its grid under ``grids``. Two files are not part of the model:
``energies.safetensors`` holds the mean square of each input of each linear during calibration, for exporters whose
quantizer uses it; ``cache_ranges.safetensors``, if an export needs it, holds the largest keys and values. Nothing in
the folder depends on the time or the machine's name: the same recipe gives the same bytes.

``manifest.json`` holds the SHA-256 of every other file and of itself. ``Artifact.open`` verifies them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from flatq.digests import Findings, compared, digests_of
from flatq.errors import ArtifactError, RecipeError
from flatq.files import as_json, file_digest, first_fault, read_json, write_checksummed, write_json
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid, QuantizedWeight
from flatq.tokenizer import chat_templates, deliver_companions, generation_settings, open_tokenizer

INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
ENERGIES = "energies.safetensors"
RANGES = "cache_ranges.safetensors"
PARTS = ("codes", "scale", "zero")
AGAIN = "run the recipe again with --fresh"
log = logging.getLogger(__name__)


class Index(BaseModel):
    """``model.safetensors.index.json``: the file of each tensor."""

    weight_map: dict[str, str]


class Stated(BaseModel):
    """The keys of an artifact's ``config.json`` that are specific to flatq."""

    decoder: dict[str, Any]
    grids: dict[str, Grid]


class Listed(BaseModel):
    """What every manifest has."""

    files: dict[str, str]
    recipe: str


def save_shard(path: Path, tensors: Mapping[str, Tensor | QuantizedWeight]) -> None:
    """Write one safetensors file atomically; a quantized ``X.weight`` becomes ``X.codes``, ``X.scale``, ``X.zero``.

    Raises:
        ArtifactError: the file cannot be written, for example because the disk is full.
    """
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedWeight):
            stem = name.removesuffix(".weight")
            flat |= {f"{stem}.{part}": getattr(tensor, part).contiguous().cpu() for part in PARTS}
        else:
            flat[name] = tensor.contiguous().cpu()
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors.torch.save_file(flat, partial, metadata={"format": "pt"})
    except (safetensors.SafetensorError, OSError) as failed:  # a full disk is a SafetensorError
        partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path}: cannot be written ({failed}); free some space or choose another place with --out, and run again"
        ) from failed
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.chmod(0o644)  # the library creates it with mode 0600, which is unexpected in a published folder
    partial.replace(path)


class Artifact:
    """A finished model folder, read lazily; satisfies ``Weights``."""

    def __init__(self, root: Path, settings: dict[str, Any], manifest: dict[str, Any], index: dict[str, str]) -> None:
        self.root, self.settings, self.manifest = root, settings, manifest
        self._config, self.grids = _described(root / "config.json", settings)
        self._index = index

    @classmethod
    def open(cls, root: Path | str, *, check: bool = True) -> Artifact:
        """Open a folder that ``finish`` wrote (or a run folder that holds one).

        Args:
            root: the folder.
            check: compare every file with its digest first; files that were right before and have not been written
                since are not read again.

        Raises:
            ArtifactError: a file is missing, damaged or invalid.
        """
        root = artifact_in(Path(root)) or Path(root)
        for name in (MANIFEST, "config.json", INDEX):
            if not (root / name).is_file():
                raise ArtifactError(
                    f"{root} is no flatq artifact: {name} is missing; give the folder that `flatq run` wrote"
                )
        manifest = _manifest(root)
        if check:
            _refuse_damage(root, manifest, remembered=True)
        settings = read_json(root / "config.json", dict[str, Any], AGAIN)
        index = read_json(root / INDEX, Index, AGAIN).weight_map
        for file in set(index.values()):
            if Path(file).name != file:
                raise ArtifactError(f"{root / INDEX}: {file!r} is not a plain file name; do not trust this folder")
        return cls(root, settings, manifest, index)

    @property
    def config(self) -> DecoderConfig:
        """Widths and switches of the compressed model."""
        return self._config

    def names(self) -> list[str]:
        """Names of all tensors; a quantized linear is listed once, as ``X.weight``."""
        stems = {name.removesuffix(".codes") + ".weight" for name in self._index if name.endswith(".codes")}
        plain = {name for name in self._index if not name.endswith(tuple(f".{part}" for part in PARTS))}
        return sorted(stems | plain)

    def tensor(self, name: str) -> Tensor | QuantizedWeight:
        """Read one tensor."""
        stem = name.removesuffix(".weight")
        if stem in self.grids:
            codes, scale, zero = (self._read(f"{stem}.{part}") for part in PARTS)
            return QuantizedWeight(codes, scale, zero, self.grids[stem])
        return self._read(name)

    def energies(self) -> dict[str, Tensor]:
        """Mean square of every input of every linear on the calibration tokens, float32 [i], by stem.

        Raises:
            ArtifactError: the artifact has none (an uncompressed model, or written by an early version).
        """
        path = self.root / ENERGIES
        if not path.exists():
            raise ArtifactError(f"{path}: is missing; only `flatq run` makes it, so run the recipe again")
        return _loaded(path)

    def cache_ranges(self) -> dict[str, Tensor]:
        """Largest magnitudes of keys and values, see ``flatq.calibration.cache_ranges``.

        Raises:
            ArtifactError: they were never measured.
        """
        path = self.root / RANGES
        if not path.exists():
            raise ArtifactError(f"{path}: is missing; `flatq run` and `flatq export` make it where an export needs it")
        return _loaded(path)

    def _read(self, name: str) -> Tensor:
        if name not in self._index:
            raise ArtifactError(f"{self.root}: no tensor {name!r}; the artifact is damaged, run again with --fresh")
        # Opened for every read: pages of a mapping that stays open remain in memory, up to the whole model.
        path = self.root / self._index[name]
        try:
            shard: Any = safetensors.safe_open(path, framework="pt")
            tensor: Tensor = shard.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as damaged:
            raise ArtifactError(f"{path}: is damaged ({damaged}); {AGAIN}") from damaged
        return tensor

    def generation(self) -> dict[str, Any]:
        """The publisher's generation settings (``generation_config.json``): end tokens, sampling; empty without."""
        return generation_settings(self.root)

    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name; a single one is called ``default``."""
        return chat_templates(self.root)

    def copy_companions(self, out: Path, files: Sequence[Path] | None = None) -> tuple[list[Path], list[str]]:
        """Tokenizer, chat templates and generation settings, copied byte for byte into an export.

        Args:
            out: folder of the export.
            files: only these; None is all of them.

        Returns:
            The files, and in words every change that was made so that readers can open them; usually none.
        """
        return deliver_companions(self.root, out, files)

    def bytes(self) -> int:
        """Size of all tensors if codes are packed to ``bits`` each, as in a deployment."""
        total = 0
        for name in self.names():
            tensor = self.tensor(name)
            if isinstance(tensor, QuantizedWeight):
                total += tensor.grid.stored_bytes(*tensor.codes.shape)
            else:
                total += tensor.numel() * tensor.element_size()
        return total

    def note_origin(self, provenance: Mapping[str, Any]) -> None:
        """State the recipe of this run in the manifest, if the artifact was kept from a run of a former one."""
        if self.manifest["recipe_digest"] != provenance["recipe_digest"]:
            self.manifest |= as_json(provenance)
            write_checksummed(self.root / MANIFEST, self.manifest)

    def note_quality(self, quality: Mapping[str, Any]) -> None:
        """Write measured quality into the manifest, from where model cards read it."""
        if self.manifest.get("quality") != quality:
            self.manifest["quality"] = dict(quality)
            write_checksummed(self.root / MANIFEST, self.manifest)

    def add(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one more safetensors file and note its digest in the manifest."""
        save_shard(self.root / file, tensors)
        self.manifest["files"] = {**self.manifest["files"], file: file_digest(self.root / file)}
        write_checksummed(self.root / MANIFEST, self.manifest)

    def remove(self, file: str) -> None:
        """Remove a file that ``add`` wrote, if it is there."""
        if file in self.manifest["files"]:
            del self.manifest["files"][file]
            write_checksummed(self.root / MANIFEST, self.manifest)
            (self.root / file).unlink()

    def verify(self) -> None:
        """Read every file and compare it with its digest in the manifest.

        Raises:
            ArtifactError: names each file that differs or is missing.
        """
        _refuse_damage(self.root, _manifest(self.root), remembered=False)


def artifact_in(path: Path) -> Path | None:
    """The artifact's folder where ``path`` is one or a run folder that holds one; else None."""
    return next((root for root in (path, path / "artifact") if (root / MANIFEST).is_file()), None)


def compared_artifact(root: Path, *, remembered: bool) -> Findings:
    """Compare an artifact with the digests in its manifest, see ``flatq.digests``.

    Raises:
        ArtifactError: the manifest itself is missing or damaged.
    """
    return compared(root, _manifest(root)["files"], beside=[MANIFEST], remembered=remembered)


def _manifest(root: Path) -> dict[str, Any]:
    manifest = read_json(root / MANIFEST, dict[str, Any], AGAIN, checksummed=True)
    try:
        Listed.model_validate(manifest)
    except ValidationError as wrong:
        raise ArtifactError(f"{root / MANIFEST}: is no manifest of flatq ({first_fault(wrong)}); {AGAIN}") from wrong
    return manifest


def _refuse_damage(root: Path, manifest: Mapping[str, Any], *, remembered: bool) -> None:
    found = compared(root, manifest["files"], beside=[MANIFEST], remembered=remembered)
    if found.wrong:
        raise ArtifactError(f"{root}: {found.wrong}; {AGAIN}")
    if found.unexpected:
        log.warning("%s: %s does not list these files: %s", root, MANIFEST, ", ".join(found.unexpected))


def _described(path: Path, settings: Mapping[str, Any]) -> tuple[DecoderConfig, dict[str, Grid]]:
    """Widths, switches and grids out of ``config.json``."""
    try:
        stated = Stated.model_validate(settings)
        config = DecoderConfig.from_dict(stated.decoder)
        TypeAdapter(DecoderConfig).validate_python(config.to_dict())
    except ValidationError as wrong:
        raise ArtifactError(f"{path}: is damaged ({first_fault(wrong)}); {AGAIN}") from wrong
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as wrong:
        raise ArtifactError(f"{path}: is damaged (decoder: {wrong}); {AGAIN}") from wrong
    return config, stated.grids


def _loaded(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as damaged:
        raise ArtifactError(f"{path}: is damaged ({damaged}); {AGAIN}") from damaged


def finish(
    partial: Path,
    root: Path,
    *,
    config: DecoderConfig,
    grids: Mapping[str, Grid],
    settings: Mapping[str, Any],
    manifest: Mapping[str, Any],
    weight_files: Sequence[str],
) -> Artifact:
    """Turn a folder of shards into an artifact: write index, config and manifest, then rename it to ``root``.

    Args:
        partial: folder with ``weight_files`` and the tokenizer's files.
        settings: extra top-level keys of ``config.json`` (token ids, dtype).
        manifest: provenance; the files' digests and its own are added here.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file in weight_files:
        with safetensors.safe_open(partial / file, framework="pt") as shard:
            weight_map |= dict.fromkeys(shard.keys(), file)
        total += (partial / file).stat().st_size
    write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    described = {
        "model_type": "flatq",
        "architectures": ["FlatqForCausalLM"],
        **settings,
        "decoder": config.to_dict(),
        "grids": {name: asdict(grid) for name, grid in sorted(grids.items())},
    }
    write_json(partial / "config.json", described)
    write_checksummed(partial / MANIFEST, {**manifest, "files": digests_of(partial, but=[MANIFEST])})
    partial.replace(root)
    return Artifact.open(root, check=False)


def shard_name(index: int, half: str) -> str:
    """File name of one block."""
    return f"layer-{index:05d}-{half}.safetensors"


def tokenizer_in(root: Path) -> Any:
    """The tokenizer of an artifact.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        return open_tokenizer(root)
    except RecipeError as wrong:
        raise ArtifactError(f"{root}: no usable tokenizer ({wrong}); run the recipe again with --fresh") from wrong
