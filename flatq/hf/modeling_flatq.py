"""flatq's decoder as a transformers model: config, cache, ``generate``, strict loading.

The forward pass is that of ``model.decoder``. ``DecoderForCausalLM`` converts an attention mask and a ``DynamicCache``
to its arguments and wraps the logits. ``FlatqHubForCausalLM`` registers the same modules under the names of the Hugging
Face hub (``model.layers.0.self_attn.q_proj``), by which loaders of quantized checkpoints find them.

This file is copied into exported folders together with the modules of ``flatq.model`` that it imports, so that
``trust_remote_code=True`` loads the folder without an installation of flatq. It may import only torch, transformers and
those.

Value heads may be narrower than key heads and differ between layers; a ``DynamicCache`` supports both because it grows
by concatenation. Left out: static caches, 4-d masks, ``inputs_embeds``, and a cache that drops positions outside the
sliding window (the window is applied in the mask; all positions are kept).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flatq.model.config import DecoderConfig
from flatq.model.decoder import Decoder, DecoderLayer, RMSNorm, capped

# Some transformers copy only what this file imports.
from flatq.model.dims import LayerDims  # noqa: F401
from flatq.model.experts import Router  # noqa: F401
from flatq.model.rope import Rope  # noqa: F401


class FlatqHubConfig(PretrainedConfig):  # type: ignore[misc]
    """A decoder's widths and switches as a ``config.json``.

    Args:
        decoder: ``DecoderConfig.to_dict()``.
    """

    model_type = "flatq_hub"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        decoder: dict[str, Any] | None = None,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **others: Any,
    ) -> None:
        self.decoder = decoder or {}
        self.use_cache = use_cache
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(**others)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> FlatqHubConfig:
        """Itself: transformers would otherwise take the key ``decoder`` for a nested text model."""
        return self

    @property
    def decoder_config(self) -> DecoderConfig:
        """The widths and switches as the decoder's own type.

        Raises:
            ValueError: a field of ``decoder`` is missing or unknown.
        """
        try:
            return DecoderConfig.from_dict(self.decoder)
        except (KeyError, TypeError) as fault:
            raise ValueError(f"config.json: `decoder` is invalid ({fault}); export again") from fault

    # Standard names of transformers; read-only, because the values are stored in ``decoder``.
    vocab_size = property(lambda self: self.decoder["vocab"])
    hidden_size = property(lambda self: self.decoder["d_model"])
    num_hidden_layers = property(lambda self: len(self.decoder["layers"]))
    num_attention_heads = property(lambda self: self.decoder["layers"][0]["heads"])
    num_key_value_heads = property(lambda self: self.decoder["layers"][0]["kv_heads"])
    head_dim = property(lambda self: self.decoder["layers"][0]["d_qk"])
    intermediate_size = property(lambda self: max(dims["d_ff"] for dims in self.decoder["layers"]))
    max_position_embeddings = property(lambda self: self.decoder["max_positions"])


class DecoderForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Base class of the causal language models; ``body`` is the decoder."""

    config_class: ClassVar[type[FlatqHubConfig]] = FlatqHubConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    loading_error: ClassVar[type[Exception]] = ValueError

    @property
    def body(self) -> Decoder:
        """Embedding, layers and final norm."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load strictly and return a model in evaluation mode, or (model, info) with ``output_loading_info``.

        By default transformers only logs missing tensors and leaves them randomly initialized.

        Raises:
            ValueError: (with flatq installed: ``ArtifactError``) tensors are missing, have wrong shapes or are unknown;
                lists them.
        """
        options["ignore_mismatched_sizes"] = True  # all faults are reported together below
        model, found = super().from_pretrained(name_or_path, *args, output_loading_info=True, **options)
        faults = loading_faults(found)
        if faults:
            raise cls.loading_error(f"{name_or_path}: the weights do not fit config.json: {'; '.join(faults)}")
        model.eval()
        return (model, found) if output_loading_info else model

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What ``generate`` gives to ``forward``, without what only the models of transformers 4 take."""
        # transformers looks for the name `kwargs` and then takes the arguments of `forward` for allowed.
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in prepared.items() if name not in ("cache_position", "inputs_embeds")}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the cache for the next call.

        Args:
            input_ids: int64 [b, s].
            attention_mask: [b, t], 0 at padding (left or right); positions count real tokens only.
            past_key_values: a cache that grows (``DynamicCache``) with the keys and values of past positions.
            use_cache: create a cache if none is given.
            labels: int64 [b, s], shifted inside; -100 is ignored by the loss.
            logits_to_keep: number of last positions to return (0: all), or an index tensor.
            return_dict: False returns a plain tuple.
        """
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        valid = _valid(attention_mask, input_ids, past)
        hidden = self.body.hidden(input_ids, valid=valid, cache=past_key_values, past=past)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head, hidden = self.get_output_embeddings(), hidden[:, kept]
        logits = F.linear(hidden, self.get_input_embeddings().weight) if head is None else head(hidden)
        logits = capped(logits, self.body.config.logit_cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output if return_dict else output.to_tuple()


def _valid(mask: Tensor | None, tokens: Tensor, past: int) -> Tensor | None:
    """The attention mask, or None if nothing is masked, which is faster."""
    if mask is None:
        return None
    wanted = (tokens.shape[0], past + tokens.shape[1])
    if tuple(mask.shape) != wanted:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected [batch, past + new] = {wanted}. Give a 2-d mask "
            "that covers the cached positions too, and a cache that grows (DynamicCache)"
        )
    return None if bool(mask.all()) else mask


def loading_faults(found: Mapping[str, Any]) -> list[str]:
    """The problems in transformers' ``output_loading_info``, a short message per tensor."""
    wrong = {str(entry[0]): entry[1:] for entry in found.get("mismatched_keys", ())}
    missing = sorted(set(found.get("missing_keys", ())) - set(wrong))
    return [
        *(f"{name} is missing" for name in missing),
        *(f"{name} has shape {tuple(there)} instead of {tuple(here)}" for name, (there, here) in sorted(wrong.items())),
        *(f"{name} is not part of the model" for name in sorted(found.get("unexpected_keys", ()))),
        *(str(message) for message in found.get("error_msgs", ())),
    ]


HUB_PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "router": "mlp.gate",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}


class HubLayer(DecoderLayer):
    """A decoder layer whose submodules have the names of hub checkpoints; the forward pass is inherited."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__(config, index)
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in list(self._modules):
            if name in HUB_PATHS:
                branch, _, leaf = HUB_PATHS[name].rpartition(".")
                self.get_submodule(branch).add_module(leaf, self._modules.pop(name))

    def __getattr__(self, name: str) -> Any:
        """``self.q`` is ``self.self_attn.q_proj``, also after a loader has replaced that module."""
        return self.get_submodule(HUB_PATHS[name]) if name in HUB_PATHS else super().__getattr__(name)


class HubDecoder(Decoder):
    """A decoder without LM head, with the module names of the hub."""

    _pp_plan = _tp_plan = None  # transformers reads the parallel plans of a base model, optimum reads every attribute

    def __init__(self, config: DecoderConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.d_model)
        self.layers = nn.ModuleList(HubLayer(config, index) for index in range(len(config.layers)))
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def __getattr__(self, name: str) -> Any:
        """``self.embed`` is ``self.embed_tokens``."""
        return super().__getattr__("embed_tokens" if name == "embed" else name)


class FlatqHubForCausalLM(DecoderForCausalLM):
    """A compressed decoder with the hub's names; dense, or packed codes for the quantizers of transformers."""

    base_model_prefix = "model"
    _no_split_modules = ("HubLayer",)

    def __init__(self, config: FlatqHubConfig) -> None:
        super().__init__(config)
        decoder = config.decoder_config
        self.model = HubDecoder(decoder)
        if not decoder.tied_head:
            self.lm_head = nn.Linear(decoder.d_model, decoder.vocab, bias=False)
        self.post_init()

    @property
    def body(self) -> Decoder:
        """Embedding, layers and final norm."""
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """The untied head; None if the head is tied to the embedding."""
        return None if self.model.config.tied_head else self.lm_head
