"""``config.json`` and ``quantize_config.json`` for the loaders of each format.

There are two kinds of folders. A model with equal layers is a standard checkpoint of its family. A model with widths
per layer has ``model_type: flatq_hub``; its code is in the folder (``auto_map``) and in flatq.

Widths per layer are stored under the key ``decoder``. The key ``per_layer_config`` of transformers is not used, because
with it reading ``intermediate_size`` raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flatq.export import FAMILIES, LINEARS, DecoderConfig, Grid, UnsupportedModel, __version__, config_to_hf

NAMES = FAMILIES["llama"].names
CHANGED = (0, 18)  # see Versions
# Releases that load a folder with its own code, from a local path too; `make interop-transformers` tries them.
TRANSFORMERS = ("4.57.6", "5.8.0", "5.23.0")
EMBEDDINGS = (0, 20)
AUTO_MAP = {
    "AutoConfig": "modeling_flatq.FlatqHubConfig",
    "AutoModelForCausalLM": "modeling_flatq.FlatqHubForCausalLM",
}


def hub_module(stem: str) -> str:
    """``layers.3.q`` -> ``model.layers.3.self_attn.q_proj``."""
    return NAMES.to_hf(f"{stem}.weight").removesuffix(".weight")


def family_settings(config: DecoderConfig, *, codes: bool) -> dict[str, Any] | None:
    """``config.json`` of a standard checkpoint of the family; None if the family cannot express the configuration.

    Families with other names of tensors than Llama's are written as models with widths per layer, too, and so are
    experts as codes, of which transformers has no linears.
    """
    other = config.family in FAMILIES and FAMILIES[config.family].names != NAMES
    if (config.experts and codes) or (other and not config.experts):
        return None
    try:
        return config_to_hf(config)
    except UnsupportedModel:
        return None


def hub_settings(config: DecoderConfig) -> dict[str, Any]:
    """``config.json`` of a model with widths per layer."""
    return {
        "model_type": "flatq_hub",
        "architectures": ["FlatqHubForCausalLM"],
        "auto_map": AUTO_MAP,
        "decoder": config.to_dict(),
    }


def compressed_tensors_config(config: DecoderConfig, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """``quantization_config`` for compressed-tensors: one group of modules per distinct grid."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": _targets(config, grids, grid),
                "weights": {
                    "num_bits": grid.bits,
                    "type": "int",
                    "symmetric": grid.symmetric,
                    "strategy": "channel" if grid.group_size == -1 else "group",
                    "group_size": None if grid.group_size == -1 else grid.group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for number, grid in enumerate(_distinct(grids))
        },
        "ignore": [hub_module(stem) for stem in _dense(config, grids)] + ([] if "head" in grids else ["lm_head"]),
    }


@dataclass(frozen=True, slots=True)
class Versions:
    """Releases of compressed-tensors that can unpack a folder in transformers: ``since`` <= version < ``before``.

    Determined by tests with 0.15.0, 0.17.1, 0.18.0 and 0.20.0 and transformers 5.23. Since 0.18, 3-bit codes are a
    dense stream (before: ten per word), and the loader expects unpacked zeros although files contain packed ones, so
    asymmetric weights do not load. Packed embeddings were tested only with 0.20.
    """

    since: tuple[int, int] = (0, 15)
    before: tuple[int, int] | None = None

    @classmethod
    def reading(cls, grids: Iterable[Grid], *, embedding: bool = False) -> Versions | None:
        """The releases that support all of these grids, and a packed embedding; None if there is none."""
        grids = list(grids)
        dense_stream = any(grid.bits == 3 for grid in grids)
        asymmetric = not all(grid.symmetric for grid in grids)
        if asymmetric and (dense_stream or embedding):
            return None
        since = EMBEDDINGS if embedding else CHANGED if dense_stream else (0, 15)
        return cls(since, CHANGED if asymmetric else None)

    def __contains__(self, version: str) -> bool:
        release = tuple(int(part) for part in version.split(".")[:2])
        return self.since <= release and (self.before is None or release < self.before)

    def __str__(self) -> str:
        upper = "" if self.before is None else f",<{self.before[0]}.{self.before[1]}"
        return f"compressed-tensors>={self.since[0]}.{self.since[1]}{upper}"


def _targets(config: DecoderConfig, grids: Mapping[str, Grid], grid: Grid) -> list[str]:
    """Modules with the grid: a pattern for linears that have it in all layers, else full names."""
    targets = []
    for linear in LINEARS:
        stems = [f"layers.{index}.{linear}" for index in range(len(config.layers))]
        found = [stem for stem in stems if grids.get(stem) == grid]
        if len(found) == len(stems):
            leaf = hub_module(stems[0]).split(".", 3)[3]
            targets.append(rf"re:.*\.{re.escape(leaf)}$")
        else:
            targets += [hub_module(stem) for stem in found]
    return targets + [hub_module(stem) for stem in ("embed", "head") if grids.get(stem) == grid]


def gptq_config(config: DecoderConfig, grids: Mapping[str, Grid], version: int) -> dict[str, Any]:
    """``quantization_config`` for GPTQ readers; the most common grid is the default, ``dynamic`` has the exceptions."""
    rule = _distinct(grids)[0]
    dynamic: dict[str, dict[str, Any]] = {}
    for stem, grid in grids.items():
        if grid != rule:
            pattern = f"+:^{re.escape(hub_module(stem))}$"
            dynamic[pattern] = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}
    for stem in _dense(config, grids):
        dynamic[f"-:^{re.escape(hub_module(stem))}$"] = {}
    kind = "gptq" if version == 1 else "gptq_v2"
    described: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": rule.bits,
        "group_size": rule.group_size,
        "sym": rule.symmetric,
        "desc_act": False,
        "lm_head": False,
        "format": kind,
        "checkpoint_format": kind,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"flatq:{__version__}"]},
    }
    if dynamic:
        described["dynamic"] = dynamic
    everywhere = [
        linear for linear in LINEARS if all(f"layers.{i}.{linear}" in grids for i in range(len(config.layers)))
    ]
    if len(everywhere) < len(LINEARS):
        # optimum does not support patterns, only a list of the quantized linears of a block.
        names = [hub_module(f"layers.0.{linear}").split(".", 3)[3] for linear in everywhere]
        described["modules_in_block_to_quantize"] = [[name] for name in names]
    return described


def _distinct(grids: Mapping[str, Grid]) -> list[Grid]:
    """Distinct grids, the most common first."""
    counts: dict[Grid, int] = {}
    for grid in grids.values():
        counts[grid] = counts.get(grid, 0) + 1
    return sorted(counts, key=lambda grid: -counts[grid])


def _dense(config: DecoderConfig, grids: Mapping[str, Grid]) -> list[str]:
    """Stems of the unquantized linears of the layers."""
    stems = [f"layers.{index}.{linear}" for index in range(len(config.layers)) for linear in LINEARS]
    return [stem for stem in stems if stem not in grids]
