"""Tiny models with deterministic random weights, in memory and as finished artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatq.artifact import Artifact, finish, save_shard
from flatq.calibration.states import Execution
from flatq.model.config import Kind
from flatq.model.decoder import LINEARS, DecoderConfig, LayerDims, Rope
from flatq.model.grid import Grid, QuantizedWeight, round_to_nearest
from flatq.model.weights import HALVES, half_names, tensor_shapes

EXACT = Execution(precision="float32")  # no bfloat16 operands


LOCAL = Kind(Rope(theta=50.0), 6)  # a window, and another base of the rotary embedding
WINDOWS: dict[str, Any] = {"other_kinds": (LOCAL,), "kind_of": (1, 0, 1, 0)}
GEMMA: dict[str, Any] = {"activation": "gelu_tanh", "post_norms": True, **WINDOWS}
OLMO: dict[str, Any] = {"qk_norm": True, "wide_qk_norm": True, "pre_norms": False, "post_norms": True}
# Switches of the families that are more than a Llama, for models of four layers.
SWITCHES: dict[str, dict[str, Any]] = {
    "gemma": {"activation": "gelu_tanh"},
    "gemma2": {**GEMMA, "other_kinds": (Kind(Rope(), 6),), "attention_cap": 5.0, "logit_cap": 20.0},
    "gemma3_text": {**GEMMA, "qk_norm": True},
    "olmo2": {**OLMO, "tied_head": False},
    "olmo3": {**OLMO, "tied_head": False, "other_kinds": (Kind(Rope(), 6),), "kind_of": (1, 0, 1, 0)},
    "smollm3": {"other_kinds": (Kind(None),), "kind_of": (0, 0, 0, 1)},
    "qwen2": {"qkv_bias": True, "other_kinds": (Kind(Rope(), 16),), "kind_of": (0, 0, 1, 1)},
    "qwen3": {"qk_norm": True},
    "hunyuan_v1_dense": {"qk_norm": True, "norm_after_rope": True},
}


def tiny_config(
    *,
    family: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    d_qk: int = 16,
    d_v: Sequence[int] = (16, 16),
    d_ff: Sequence[int] = (96, 96),
    d_model: int = 64,
    vocab: int = 128,
    tied_head: bool = True,
    rope: Rope | None = None,
    **switches: object,
) -> DecoderConfig:
    """A decoder of ``len(d_v)`` layers whose value and MLP widths are given layer by layer."""
    layers = tuple(LayerDims(heads, kv_heads, d_qk, r, f) for r, f in zip(d_v, d_ff, strict=True))
    return DecoderConfig(
        family=family,
        d_model=d_model,
        vocab=vocab,
        layers=layers,
        rope=rope or Rope(),
        norm_eps=1e-5,
        tied_head=tied_head,
        max_positions=256,
        **switches,  # type: ignore[arg-type]
    )


class RandomWeights:
    """Weights in memory; satisfies ``flatq.model.weights.Weights``."""

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        for name, shape in tensor_shapes(config).items():
            noise = torch.randn(shape, generator=generator)
            if name.endswith("norm.weight"):
                self.tensors[name] = 1 + 0.1 * noise
            elif name.endswith(".bias"):
                self.tensors[name] = 0.1 * noise
            elif name == "embed.weight":
                self.tensors[name] = noise
            else:
                self.tensors[name] = noise * shape[-1] ** -0.5

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def tiny_artifact(
    root: Path,
    config: DecoderConfig,
    *,
    grid: Grid | None = None,
    embed_grid: Grid | None = None,
    overrides: Mapping[str, Grid] | None = None,
    seed: int = 0,
) -> Artifact:
    """A finished artifact of random weights; ``grid`` quantizes all linears of the layers, round-to-nearest."""
    weights = RandomWeights(config, seed)
    grids: dict[str, Grid] = {}
    if grid is not None:
        grids |= {f"layers.{i}.{name}": grid for i in range(len(config.layers)) for name in LINEARS}
    if embed_grid is not None:
        grids["embed"] = embed_grid
        if not config.tied_head:
            grids["head"] = embed_grid
    grids |= overrides or {}

    def stored(name: str) -> Tensor | QuantizedWeight:
        stem = name.removesuffix(".weight")
        tensor = weights.tensor(name)
        return round_to_nearest(tensor, grids[stem]) if stem in grids and name.endswith(".weight") else tensor

    partial = root.with_name(root.name + ".partial")
    partial.mkdir(parents=True)
    groups = {
        f"layer-{index:05d}-{half}.safetensors": half_names(config, index, half)
        for index in range(len(config.layers))
        for half in HALVES
    }
    inside = {name for names in groups.values() for name in names}
    groups["ends.safetensors"] = [name for name in weights.names() if name not in inside]
    for file, names in groups.items():
        save_shard(partial / file, {name: stored(name) for name in names})
    return finish(
        partial,
        root,
        config=config,
        grids=grids,
        settings={"dtype": "float32", "bos_token_id": 1, "eos_token_id": 2},
        manifest={"schema_version": 1, "recipe": ""},
        weight_files=list(groups),
    )
