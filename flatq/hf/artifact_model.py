"""A flatq artifact as a transformers model: ``AutoModelForCausalLM`` loads it, ``generate`` runs it.

The modules are those of ``Decoder``, so the state dict has the names of the artifact; a quantized weight is
``X.codes``, ``X.scale``, ``X.zero``. The forward pass, the cache and strict loading are in ``modeling_flatq``; a
missing tensor, a wrong shape or an unknown tensor raises an ``ArtifactError`` with its name.

This is the reference implementation, which dequantizes weights on first use; exports are meant for deployment.
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

from flatq.artifact import MANIFEST, Artifact
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
        """From a ``DecoderConfig`` and grids."""
        return cls(config.to_dict(), {stem: asdict(grid) for stem, grid in (grids or {}).items()}, **others)

    @property
    def decoder_grids(self) -> dict[str, Grid]:
        """The grids as ``Grid`` objects."""
        return {stem: Grid(**grid) for stem, grid in self.grids.items()}


def build_decoder(config: DecoderConfig, grids: Mapping[str, Grid]) -> Decoder:
    """An uninitialized decoder in which the modules named in ``grids`` are quantized modules.

    Raises:
        ArtifactError: a grid does not belong to a linear or embedding of this decoder.
    """
    decoder = Decoder(config)
    for stem, grid in grids.items():
        parent, _, name = stem.rpartition(".")
        try:
            owner = decoder.get_submodule(parent)
            setattr(owner, name, quantized_like(getattr(owner, name), grid))
        except (AttributeError, TypeError) as fault:
            raise ArtifactError(
                f"config.json: grids[{stem!r}] is no linear or embedding of this model; "
                "expected names like 'layers.0.q', 'embed' or (untied) 'head'"
            ) from fault
    return decoder


class FlatqForCausalLM(DecoderForCausalLM):
    """An artifact as a causal language model."""

    config_class = FlatqConfig
    _no_split_modules = ("DecoderLayer",)
    loading_error = ArtifactError

    def __init__(self, config: FlatqConfig) -> None:
        super().__init__(config)
        decoder = build_decoder(config.decoder_config, config.decoder_grids)
        for name, child in decoder.named_children():
            self.add_module(name, child)
        # Not registered as a submodule: its children already are, under the names of the artifact.
        self.__dict__["_decoder"] = decoder
        self.post_init()

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, check: bool = True, **options: Any) -> Any:
        """See ``DecoderForCausalLM.from_pretrained``; the files of an artifact are compared with their digests first.

        Raises:
            ArtifactError: a file is damaged or missing, or tensors are missing, unknown or of a wrong shape.
        """
        if check and (Path(str(name_or_path)) / MANIFEST).is_file():
            Artifact.open(name_or_path)
        return super().from_pretrained(name_or_path, *args, **options)

    @property
    def body(self) -> Decoder:
        """Embedding, layers and final norm."""
        decoder: Decoder = self.__dict__["_decoder"]
        return decoder

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, dense or quantized."""
        return self.body.embed

    def get_output_embeddings(self) -> nn.Module | None:
        """The untied head, dense or quantized; None if the head is tied to the embedding."""
        return self.body.head


def load(
    root: Path | str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    check: bool = True,
) -> FlatqForCausalLM:
    """Load a finished artifact as a causal language model.

    Args:
        root: folder of the artifact, or a run folder that contains one.
        dtype: data type for computation; ``auto`` is the artifact's. Codes and scales keep their stored types.
        device: device of the model.
        check: compare every file with its digest first, see ``Artifact.open``.

    Raises:
        ArtifactError: the folder is no artifact, a file is damaged, or a tensor is missing or has a wrong shape.
    """
    root = Artifact.open(root, check=check).root
    try:
        model: FlatqForCausalLM = FlatqForCausalLM.from_pretrained(
            root, dtype=dtype, local_files_only=True, check=False
        )
    except (OSError, ValueError, SafetensorError) as fault:
        raise ArtifactError(f"{root}: a file is missing or damaged ({fault}); run the recipe with --fresh") from fault
    model.to(device)
    return model


def register() -> None:
    """Register artifacts and the folders of the safetensors exporter with the auto classes of transformers."""
    for config, model in ((FlatqConfig, FlatqForCausalLM), (FlatqHubConfig, FlatqHubForCausalLM)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


register()
