"""The transformers face of a flatq artifact: ``AutoModelForCausalLM`` loads it, ``generate`` runs it.

The modules are those of ``Decoder`` under their own names, so the tensors of a checkpoint are called
as in the artifact, quantized ones ``X.codes``, ``X.scale``, ``X.zero``. The forward pass, the cache and strict
loading are in ``modeling_flatq``; a missing, misshapen or unknown tensor is an ``ArtifactError`` that names it.

This is the reference implementation, decoded to dense matrices on first use; the exporters deploy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from flatq.artifact import Artifact
from flatq.errors import ArtifactError
from flatq.hf.modeling_flatq import DecoderForCausalLM, FlatqHubConfig, FlatqHubForCausalLM
from flatq.hf.quantized_linear import quantized_like
from flatq.model.decoder import Decoder, DecoderConfig
from flatq.model.grid import Grid


class FlatqConfig(FlatqHubConfig):
    """``config.json`` of an artifact: the decoder's widths and switches, and the grid of each quantized module.

    Args:
        decoder: ``DecoderConfig.to_dict()``.
        grids: stem (``layers.0.q``, ``embed``) -> ``bits``, ``group_size``, ``symmetric``.
        others: token ids and transformers' own keys.
    """

    model_type = "flatq"

    def __init__(
        self, decoder: dict[str, Any] | None = None, grids: dict[str, dict[str, Any]] | None = None, **others: Any
    ) -> None:
        self.grids = grids or {}
        super().__init__(decoder, **others)

    @classmethod
    def of(cls, config: DecoderConfig, grids: Mapping[str, Grid] | None = None, **others: Any) -> FlatqConfig:
        """From the core's own values."""
        return cls(config.to_dict(), {stem: asdict(grid) for stem, grid in (grids or {}).items()}, **others)

    @property
    def decoder_grids(self) -> dict[str, Grid]:
        """The grids as the core's own type."""
        return {stem: Grid(**grid) for stem, grid in self.grids.items()}


def build_decoder(config: DecoderConfig, grids: Mapping[str, Grid]) -> Decoder:
    """A decoder with empty weights whose modules named in ``grids`` hold codes.

    Raises:
        ArtifactError: a grid names no linear or embedding of this decoder.
    """
    decoder = Decoder(config)
    for stem, grid in grids.items():
        parent, _, name = stem.rpartition(".")
        try:
            owner = decoder.get_submodule(parent)
            setattr(owner, name, quantized_like(getattr(owner, name), grid))
        except (AttributeError, TypeError) as fault:
            raise ArtifactError(
                f"config.json: grids[{stem!r}] names no linear or embedding of this model; "
                "expected names like 'layers.0.q', 'embed' or (untied) 'head'"
            ) from fault
    return decoder


class FlatqForCausalLM(DecoderForCausalLM):
    """An artifact as a model that generates."""

    config_class = FlatqConfig
    _no_split_modules = ("DecoderLayer",)
    loading_error = ArtifactError

    def __init__(self, config: FlatqConfig) -> None:
        super().__init__(config)
        decoder = build_decoder(config.decoder_config, config.decoder_grids)
        for name, child in decoder.named_children():
            self.add_module(name, child)
        # Not registered as a module itself: its children are ours already, under the names of the artifact.
        self.__dict__["_decoder"] = decoder
        self.post_init()

    @property
    def body(self) -> Decoder:
        """Embedding, layers and final norm."""
        decoder: Decoder = self.__dict__["_decoder"]
        return decoder

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, dense or quantized."""
        return self.body.embed

    def get_output_embeddings(self) -> nn.Module | None:
        """The untied head, dense or quantized; None when the embedding serves as head."""
        return self.body.head


def load(
    root: Path | str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    check: bool = True,
) -> FlatqForCausalLM:
    """A finished artifact (or a run folder that holds one) as a model that generates.

    Args:
        root: the folder.
        dtype: what to compute in; ``auto`` takes the artifact's. Codes and scales are stored as they are.
        device: where to put it.
        check: compare every file with its digest first, see ``Artifact.open``.

    Raises:
        ArtifactError: the folder is no artifact, a file is damaged, or a tensor is missing or misshapen.
    """
    root = Artifact.open(root, check=check).root
    try:
        model: FlatqForCausalLM = FlatqForCausalLM.from_pretrained(root, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as fault:
        raise ArtifactError(f"{root}: a file is missing or damaged ({fault}); run the recipe with --fresh") from fault
    model.to(device)
    return model


def register() -> None:
    """Make the auto classes know artifacts and the folders of the safetensors exporter."""
    for config, model in ((FlatqConfig, FlatqForCausalLM), (FlatqHubConfig, FlatqHubForCausalLM)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


register()
