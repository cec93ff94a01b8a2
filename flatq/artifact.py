"""The artifact: the compressed model on disk, with its provenance.

The folder is a Hugging Face model folder (``config.json`` with ``model_type: flatq``, safetensors shards, an index, the
tokenizer), which transformers loads. Each block (attention or MLP of one layer) is a separate shard, written when the
block is finished, so that an interrupted run can be resumed and memory stays small.

A quantized linear is stored as three tensors, ``NAME.codes`` (uint8, one code per byte), ``NAME.scale`` (float16) and
``NAME.zero`` (uint8); ``config.json`` lists its grid under ``grids``. Two files are not part of the model:
``energies.safetensors`` holds the mean square of each input of each linear during calibration, for exporters whose
quantizer uses it; ``cache_ranges.safetensors``, if an export needs it, holds the largest keys and values. Nothing in
the folder depends on the time or the machine's name: the same recipe gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from flatq.errors import ArtifactError
from flatq.files import file_digest, write_json
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid, QuantizedWeight

INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
ENERGIES = "energies.safetensors"
RANGES = "cache_ranges.safetensors"
PARTS = ("codes", "scale", "zero")


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
    except (
        safetensors.SafetensorError,
        OSError,
    ) as failed:  # a full disk is a SafetensorError
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
        self._config = DecoderConfig.from_dict(settings["decoder"])
        self.grids = {name: Grid(**grid) for name, grid in settings["grids"].items()}
        self._index = index

    @classmethod
    def open(cls, root: Path | str) -> Artifact:
        """Open a folder that ``finish`` wrote (or a run folder that holds one).

        Raises:
            ArtifactError: a file is missing or invalid.
        """
        root = Path(root)
        if not (root / MANIFEST).exists() and (root / "artifact" / MANIFEST).exists():
            root = root / "artifact"
        try:
            settings = json.loads((root / "config.json").read_text())
            manifest = json.loads((root / MANIFEST).read_text())
            index = json.loads((root / INDEX).read_text())["weight_map"]
        except FileNotFoundError as missing:
            raise ArtifactError(
                f"{root} is no flatq artifact: {missing.filename} is missing; give the folder that `flatq run` wrote"
            ) from missing
        except (json.JSONDecodeError, KeyError) as damaged:
            raise ArtifactError(
                f"{root}: damaged artifact ({damaged!r}); run the recipe again with --fresh"
            ) from damaged
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
        return safetensors.torch.load_file(path)

    def cache_ranges(self) -> dict[str, Tensor]:
        """Largest magnitudes of keys and values, see ``flatq.calibration.cache_ranges``.

        Raises:
            ArtifactError: they were never measured.
        """
        path = self.root / RANGES
        if not path.exists():
            raise ArtifactError(f"{path}: is missing; `flatq run` and `flatq export` make it where an export needs it")
        return safetensors.torch.load_file(path)

    def _read(self, name: str) -> Tensor:
        if name not in self._index:
            raise ArtifactError(f"{self.root}: no tensor {name!r}; the artifact is damaged, run again with --fresh")
        # Opened for every read: pages of a mapping that stays open remain in memory, up to the whole model.
        shard: Any = safetensors.safe_open(self.root / self._index[name], framework="pt")
        tensor: Tensor = shard.get_tensor(name)
        return tensor

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

    def note_quality(self, quality: Mapping[str, Any]) -> None:
        """Write measured quality into the manifest, from where model cards read it."""
        if self.manifest.get("quality") != quality:
            self.manifest["quality"] = dict(quality)
            write_json(self.root / MANIFEST, self.manifest)

    def verify(self) -> None:
        """Compare every file with the checksum in the manifest.

        Raises:
            ArtifactError: names each file that differs or is missing.
        """
        wrong = [
            file
            for file, digest in self.manifest["files"].items()
            if not (self.root / file).exists() or file_digest(self.root / file) != digest
        ]
        if wrong:
            raise ArtifactError(f"{self.root}: damaged files: {', '.join(wrong)}; run the recipe again with --fresh")


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
        manifest: provenance; file checksums are added here.
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
    files = {path.name: file_digest(path) for path in sorted(partial.iterdir()) if path.name != MANIFEST}
    write_json(partial / MANIFEST, {**manifest, "files": files})
    partial.replace(root)
    return Artifact.open(root)


def shard_name(index: int, half: str) -> str:
    """File name of one block."""
    return f"layer-{index:05d}-{half}.safetensors"


def tokenizer_in(root: Path) -> Any:
    """The tokenizer of an artifact.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(root))
    except (OSError, ValueError) as wrong:
        raise ArtifactError(f"{root}: no usable tokenizer ({wrong}); run the recipe again with --fresh") from wrong
