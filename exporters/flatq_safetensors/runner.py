"""Runner for exported folders in transformers, loaded with the auto class.

transformers loads GPTQ folders only with GPTQModel, whose kernels need a C++ compiler. So these, and compressed-tensors
folders without a suitable release of that package, are dequantized here by the definition of the format, and the dense
weights are loaded into the same model class; ``provider`` states which method was used.
"""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from flatq.export import (
    INDEX,
    ExportError,
    FloatArray,
    Grid,
    IntArray,
    loading_faults,
    read_json,
    register_with_transformers,
    require_positions,
)
from flatq_safetensors.configs import Versions
from flatq_safetensors.packing import GptqLinear, dequantize_gptq, unpack_compressed

PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
)


AGAIN = "export the model again"


class Config(BaseModel):
    """The part of ``config.json`` that is read here."""

    quantization_config: dict[str, Any] | None = None


class Index(BaseModel):
    """``model.safetensors.index.json``: the file of each tensor."""

    weight_map: dict[str, str]


class TransformersRunner:
    """Satisfies ``flatq.export.Runner``; computes in float32."""

    def __init__(self, folder: Path, *, provider: str = "auto", threads: int = 0) -> None:
        self.root, self.device = folder, _device(provider)
        if threads:
            torch.set_num_threads(threads)
        self.model, how = load_strictly(folder)
        self.model.to(self.device).eval()
        self.provider = f"transformers on {self.device}{how}"
        self._cache: Any = None

    @torch.inference_mode()
    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        """See ``flatq.export.Runner.logits``."""
        self._allow(tokens.shape[1])
        mask = None if valid is None else self._tensor(valid)
        return _array(self.model(self._tensor(tokens), attention_mask=mask, use_cache=False).logits)

    @torch.inference_mode()
    def start(self, tokens: IntArray, capacity: int) -> FloatArray:
        """See ``flatq.export.Runner.start``; the cache grows, ``capacity`` is only compared with the model's limit."""
        self._allow(capacity)
        self._cache = DynamicCache()
        return self._advance(self._tensor(tokens))

    @torch.inference_mode()
    def step(self, tokens: IntArray) -> FloatArray:
        """See ``flatq.export.Runner.step``."""
        if self._cache is None:
            raise ExportError("step: was called before start; call start first")
        return self._advance(self._tensor(tokens)[:, None])

    def close(self) -> None:
        """Free the model."""
        self.model = self._cache = None

    def _allow(self, positions: int) -> None:
        require_positions(str(self.root), positions, self.model.config.max_position_embeddings)

    def _advance(self, tokens: Tensor) -> FloatArray:
        return _array(self.model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1])

    def _tensor(self, array: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def load_strictly(folder: Path) -> tuple[Any, str]:
    """The folder's model in float32, and a remark if its weights were dequantized by flatq.

    Raises:
        ExportError: a tensor is missing, has a wrong shape or is unknown (transformers would only log it).
    """
    register_with_transformers()  # so that the auto classes know folders with widths per layer
    described = read_json(folder / "config.json", Config, AGAIN, error=ExportError).quantization_config
    try:
        how = "" if described is None or _reads(described) else f" ({described['quant_method']} decoded by flatq)"
        if described is not None and how:
            model, faults = _from_state(folder, decoded_state(folder, described))
        else:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with all other faults
                local_files_only=True,
            )
            faults = loading_faults(found)
    except ExportError:
        raise
    except Exception as fault:  # the libraries raise various exceptions for damaged files
        raise ExportError(f"{folder}: transformers cannot load what was written: {fault}; {AGAIN}") from fault
    if faults:
        raise ExportError(f"{folder}: the weights do not fit config.json: {'; '.join(faults)}")
    return model, how


def _reads(described: dict[str, Any]) -> bool:
    """Whether transformers can unpack the folder with the installed packages."""
    if described["quant_method"] != "compressed-tensors" or not importlib.util.find_spec("compressed_tensors"):
        return False
    groups = described["config_groups"].values()
    embedding = any(target.endswith("embed_tokens") for group in groups for target in group["targets"])
    readers = Versions.reading(map(_grid_of, groups), embedding=embedding)
    return readers is not None and version("compressed-tensors") in readers


def _from_state(folder: Path, state: dict[str, Tensor]) -> tuple[Any, list[str]]:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if getattr(config, "tie_word_embeddings", False):
        shapes.pop("lm_head.weight", None)
    faults = loading_faults(
        {
            "missing_keys": shapes.keys() - state.keys(),
            "unexpected_keys": state.keys() - shapes.keys(),
            "mismatched_keys": [
                (name, state[name].shape, shapes[name])
                for name in shapes.keys() & state.keys()
                if state[name].shape != shapes[name]
            ],
        }
    )
    if not faults:
        model.load_state_dict(state, strict=False)  # names were compared above; a tied head is not among them
    return model, faults


def decoded_state(folder: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a packed folder, with quantized modules dequantized to float32.

    Args:
        folder: written by ``SafetensorsExporter.write``.
        described: its ``quantization_config``.
    """
    state = _read_all(folder)
    gptq = described["quant_method"] == "gptq"
    mark, decode = ("qweight", _decoded_gptq) if gptq else ("weight_packed", _decoded_compressed)
    for module in [name.removesuffix(f".{mark}") for name in state if name.endswith(f".{mark}")]:
        packed = {part: state.pop(f"{module}.{part}") for part in PARTS if f"{module}.{part}" in state}
        try:
            state[f"{module}.weight"] = decode(module, packed, described)
        except KeyError as missing:
            raise ExportError(f"{folder}: {module}.{missing.args[0]} is missing; export again") from missing
        except (ValueError, IndexError, RuntimeError) as fault:
            raise ExportError(f"{folder}: {module}: its parts do not fit each other ({fault}); export again") from fault
    return state


def _decoded_gptq(module: str, packed: dict[str, Tensor], described: dict[str, Any]) -> Tensor:
    linear = GptqLinear(packed["qweight"], packed["qzeros"], packed["scales"], packed["g_idx"])
    return dequantize_gptq(linear, gptq_grid(module, described), version=2 if described["format"] == "gptq_v2" else 1)


def _decoded_compressed(module: str, packed: dict[str, Tensor], described: dict[str, Any]) -> Tensor:
    return unpack_compressed(packed, compressed_grid(module, described)).dequantize()


def gptq_grid(module: str, described: dict[str, Any]) -> Grid:
    """The grid that a GPTQ configuration gives to a module."""
    rule = {key: described[key] for key in ("bits", "group_size", "sym")}
    for pattern, exception in described.get("dynamic", {}).items():
        if pattern.startswith("+:") and re.match(pattern.removeprefix("+:"), module):
            rule |= exception
    return Grid(rule["bits"], rule["group_size"], rule["sym"])


def compressed_grid(module: str, described: dict[str, Any]) -> Grid:
    """The grid that a compressed-tensors configuration gives to a module.

    Raises:
        ExportError: no group of modules claims it.
    """
    for group in described["config_groups"].values():
        for target in group["targets"]:
            pattern = target.removeprefix("re:") if target.startswith("re:") else re.escape(target) + "$"
            if re.match(pattern, module):
                return _grid_of(group)
    raise ExportError(f"{module}: is quantized, but no config_group of config.json contains it")


def _grid_of(group: dict[str, Any]) -> Grid:
    weights = group["weights"]
    size = -1 if weights["strategy"] == "channel" else weights["group_size"]
    return Grid(weights["num_bits"], size, weights["symmetric"])


def _read_all(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX
    mapped = read_json(index, Index, AGAIN, error=ExportError).weight_map if index.exists() else {}
    files = set(mapped.values()) or {"model.safetensors"}
    state: dict[str, Tensor] = {}
    for file in sorted(files):
        state |= load_file(folder / file)
    return state


def _device(provider: str) -> str:
    if provider == "cuda" and not torch.cuda.is_available():
        raise ExportError("safetensors: provider cuda is not available: torch finds no CUDA device; use cpu or auto")
    return "cuda" if provider == "cuda" or (provider == "auto" and torch.cuda.is_available()) else "cpu"


def _array(logits: Tensor) -> FloatArray:
    array: FloatArray = logits.float().cpu().numpy()
    return array
