"""Write the folder: shards with an index, configuration, model code, tokenizer, model card.

One shard is in memory at a time. Files are written atomically and ``config.json`` last; a folder without it is an
unfinished export.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatq.export import INDEX, Artifact, Exported, ExportError, save_shard, write_atomically, write_json
from flatq_safetensors.card import model_card
from flatq_safetensors.configs import (
    Versions,
    compressed_tensors_config,
    family_settings,
    gptq_config,
    hub_settings,
)
from flatq_safetensors.grouping import ENDS
from flatq_safetensors.options import SafetensorsOptions
from flatq_safetensors.tensors import Layout, shapes_of

SINGLE = "model.safetensors"
CODE = {
    "modeling_flatq": "flatq.hf",
    "decoder": "flatq.model",
    "config": "flatq.model",
    "rope": "flatq.model",
    "dims": "flatq.model",
    "experts": "flatq.model",
}  # copied modules
ROUNDING_KL = {torch.float16: 2e-3, torch.bfloat16: 0.02}  # nats; bfloat16 keeps 8 bits of a number
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_folder(artifact: Artifact, out: Path, options: SafetensorsOptions) -> Exported:
    """Write everything; see ``SafetensorsExporter.write``."""
    out.mkdir(parents=True, exist_ok=True)
    stored = getattr(torch, str(artifact.settings.get("dtype", "float32")))
    layout = Layout.of(artifact.config, artifact.grids, options, stored, _vectors(artifact))
    files = _write_weights(artifact, layout, out)
    if not layout.plain:
        files += [_write(out / f"{name}.py", travelling_source(name)) for name in CODE]
    companions, changes = _companions(artifact, out)
    files += companions
    notes = _notes(artifact, layout) + changes
    files.append(_write(out / "README.md", model_card(artifact, layout, notes)))
    settings = _settings(artifact, layout)
    if options.gptq_version is not None:
        write_json(out / "quantize_config.json", settings["quantization_config"])
        files.append(out / "quantize_config.json")
    write_json(out / "config.json", settings)
    details = {"plain": layout.plain}
    kl = ROUNDING_KL[layout.dtype] if _rounded(artifact, layout, stored) else 0.0
    return Exported(out, (*files, out / "config.json"), notes=tuple(notes), details=details, rounding_kl=kl)


def _vectors(artifact: Artifact) -> dict[str, torch.dtype]:
    """Data types of norms and biases; some publishers keep them in float32 beside bfloat16 matrices."""
    names = [name for name, shape in shapes_of(artifact.config).items() if len(shape) == 1]
    return {name: tensor.dtype for name in names if isinstance(tensor := artifact.tensor(name), Tensor)}


def travelling_source(name: str) -> str:
    """Source of a flatq module with relative imports, for a copy in the folder."""
    module = f"{CODE[name]}.{name}"
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ExportError(f"{module} has no source file to copy; reinstall flatq from a wheel or a checkout")
    return re.sub(r"^from flatq\.\w+\.", "from .", Path(spec.origin).read_text(encoding="utf-8"), flags=re.MULTILINE)


def _write(path: Path, text: str) -> Path:
    write_atomically(path, text.encode())
    return path


def _settings(artifact: Artifact, layout: Layout) -> dict[str, Any]:
    settings = family_settings(layout.config, codes=bool(layout.grids)) or hub_settings(layout.config)
    settings |= {key: artifact.settings[key] for key in TOKEN_IDS if key in artifact.settings}
    settings["dtype"] = settings["torch_dtype"] = str(layout.dtype).removeprefix("torch.")
    if layout.grids:
        version = layout.options.gptq_version
        settings["quantization_config"] = (
            compressed_tensors_config(layout.config, layout.grids)
            if version is None
            else gptq_config(layout.config, layout.grids, version)
        )
    return settings


def _shards(layout: Layout) -> list[list[str]]:
    """The artifact's tensor names, divided into files of at most ``max_shard_size`` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in layout.names():
        size = sum(plan.bytes for plan in layout.planned(name).values())
        if shards[-1] and filled + size > layout.options.max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_weights(artifact: Artifact, layout: Layout, out: Path) -> list[Path]:
    shards, total = _shards(layout), 0
    where: dict[str, str] = {}
    files: list[Path] = []
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(_tensors(artifact, layout, names))
        save_shard(out / file, tensors)
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        files.append(out / file)
    if len(shards) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
        files.append(out / INDEX)
    return files


def _tensors(artifact: Artifact, layout: Layout, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield from layout.made(name, artifact.tensor(name)).items()


def _companions(artifact: Artifact, out: Path) -> tuple[list[Path], list[str]]:
    """Copy tokenizer, chat templates and generation settings; without the latter, write one with the token ids."""
    copied, changes = artifact.copy_companions(out)
    if not artifact.generation():
        ids = {key: artifact.settings[key] for key in TOKEN_IDS if key in artifact.settings}
        write_json(out / "generation_config.json", ids)
        copied.append(out / "generation_config.json")
    return copied, changes


def _rounded(artifact: Artifact, layout: Layout, stored: torch.dtype) -> bool:
    """Whether the export rounds weights, so that its logits differ from the artifact's."""
    decoded = any(stem not in layout.grids for stem in artifact.grids)
    return layout.dtype is not torch.float32 and (decoded or layout.dtype is not stored)


def _origin(artifact: Artifact, layout: Layout) -> list[str]:
    """What was changed while the weights were read."""
    family, origin = layout.config.family, artifact.manifest.get("source", {}).get("model_type")
    notes = []
    if origin not in (None, family):
        notes.append(
            f"read from a checkpoint of type {origin} and written as {family}: fused matrices are divided, the two "
            "channels of a rotary pair are half a head apart, multipliers are part of the weights; the logits are "
            "the same"
        )
    if layout.config.rope.scaling in ("yarn", "longrope"):
        notes.append(
            "the factor that its rotary embedding has for attention is part of the weights, so attention_factor is 1"
        )
    return notes


def _notes(artifact: Artifact, layout: Layout) -> list[str]:
    notes = _origin(artifact, layout)
    ends = sorted(stem for stem in artifact.grids if stem in ENDS and stem not in layout.grids)
    if ends and layout.options.keeps_codes:
        notes.append(f"{' and '.join(ends)} written dense: few readers of this format support quantized ones")
    finer = sum(0 < grid.group_size < artifact.grids[stem].group_size for stem, grid in layout.grids.items())
    if finer:
        notes.append(f"{finer} linears are written in smaller groups that share scales, so that the size divides them")
    if layout.options.keeps_codes and layout.dtype is torch.bfloat16:
        notes.append(
            "transformers computes in bfloat16 by default and then rounds the scales to it; "
            "dtype=torch.float16 or float32 keeps them exact"
        )
    if layout.options.format == "compressed-tensors" and (readers := Versions.reading(layout.grids.values())):
        notes.append(f"to load it into transformers: {readers}")
    if layout.options.pad_values and artifact.config != layout.config:
        notes.append("value heads are padded with zeros: v and o are as large as in the original model")
    if layout.options.gptq_version is not None and len(set(layout.grids.values())) > 1:
        notes.append("linears differ in bits or group size; readers must support the key `dynamic` (GPTQModel, vLLM)")
    return notes
