"""What a family of models is: the names of its tensors, and how its config.json sets the decoder's switches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flatq.model.config import DecoderConfig
from flatq.model.folds import Fold

# (flatq, Hugging Face, GGUF)
ENDS = (
    ("embed", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
)
INSIDE = (
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("q", "self_attn.q_proj", "attn_q"),
    ("k", "self_attn.k_proj", "attn_k"),
    ("v", "self_attn.v_proj", "attn_v"),
    ("o", "self_attn.o_proj", "attn_output"),
    ("q_norm", "self_attn.q_norm", "attn_q_norm"),
    ("k_norm", "self_attn.k_norm", "attn_k_norm"),
    ("attention_post_norm", "post_self_attn_layernorm", "post_attention_norm"),
    ("mlp_norm", "post_attention_layernorm", "ffn_norm"),
    ("mlp_post_norm", "post_mlp_layernorm", "post_ffw_norm"),
    ("router", "mlp.gate", "ffn_gate_inp"),
    ("gate", "mlp.gate_proj", "ffn_gate"),
    ("up", "mlp.up_proj", "ffn_up"),
    ("down", "mlp.down_proj", "ffn_down"),
)


# Families whose post_attention_layernorm is a norm of attention's output, as its name says.
POST_NORMED = (
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("attention_post_norm", "post_attention_layernorm", "post_attention_norm"),
    ("mlp_norm", "pre_feedforward_layernorm", "ffn_norm"),
    ("mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
    *(row for row in INSIDE if not row[0].startswith(("attention_", "mlp_"))),
)
LONG_NORM_NAMES = tuple(
    (ours, hub.replace(".q_norm", ".query_layernorm").replace(".k_norm", ".key_layernorm"), gguf)
    for ours, hub, gguf in INSIDE
)
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


def fused(*linears: str) -> tuple[tuple[str, str, str], ...]:
    """``INSIDE`` for families that store these linears as rows of one matrix, in the order of the table."""
    return tuple(
        (ours, hub.replace(f".{ours}_proj", f".{FUSED[ours]}_proj"), gguf) if ours in linears else (ours, hub, gguf)
        for ours, hub, gguf in INSIDE
    )


def with_experts(path: str, gate: str, up: str, down: str) -> tuple[tuple[str, str, str], ...]:
    """``INSIDE`` for families whose MLPs are mixtures of experts; ``*`` is the number of an expert.

    Args:
        path: of router and experts in a layer.
        gate: name of the linear in an expert.
        up: as ``gate``.
        down: as ``gate``.
    """
    linears = zip(("gate", "up", "down"), (gate, up, down), strict=True)
    return (
        *(row for row in INSIDE if row[0] not in ("router", "gate", "up", "down")),
        ("router", f"{path}.gate", "ffn_gate_inp"),
        *((ours, f"{path}.experts.*.{hub}", f"ffn_{ours}_exps") for ours, hub in linears),
    )


# Names of activations in config.json.
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class Names:
    """Tensor names of a family; every row is (flatq, Hugging Face, GGUF)."""

    ends: tuple[tuple[str, str, str], ...] = ENDS
    inside: tuple[tuple[str, str, str], ...] = INSIDE

    def to_hf(self, name: str) -> str:
        """``layers.3.q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
        return self._translate(name, 0, 1)

    def from_hf(self, name: str) -> str | None:
        """Inverse of ``to_hf``; None for a tensor that flatq's decoder does not have, the first of fused ones."""
        return self._find(name, 1, 0)

    def all_from_hf(self, name: str) -> tuple[str, ...]:
        """Every tensor whose rows are in this one, in their order: one, or several fused ones, or none."""
        first = self.from_hf(name)
        if first is None or not first.startswith("layers."):
            return () if first is None else (first,)
        _, index, inside = first.split(".", 2)
        stem, _, kind = inside.rpartition(".")
        hub = next(row[1] for row in self.inside if row[0] == stem)
        return tuple(f"layers.{index}.{row[0]}.{kind}" for row in self.inside if row[1] == hub)

    def to_gguf(self, name: str) -> str:
        """``layers.3.q.weight`` -> ``blk.3.attn_q.weight``."""
        return self._translate(name, 0, 2)

    def from_gguf(self, name: str) -> str | None:
        """Inverse of ``to_gguf``; None for a tensor that flatq's decoder does not have."""
        return self._find(name, 2, 0)

    def _translate(self, name: str, source: int, target: int) -> str:
        found = self._find(name, source, target)
        if found is None:
            raise KeyError(name)
        return found

    def _find(self, name: str, source: int, target: int) -> str | None:
        prefixes = ("layers.", "model.layers.", "blk.")
        stem, _, kind = name.rpartition(".")
        index = ""
        table = self.ends
        if stem.startswith(prefixes[source]):
            index, _, stem = stem.removeprefix(prefixes[source]).partition(".")
            table = self.inside
        row = next((row for row in table if row[source] == stem), None)
        if row is None or kind not in ("weight", "bias"):
            return None
        if table is self.ends:
            return f"{row[target]}.{kind}"
        return f"{prefixes[target]}{index}.{row[target]}.{kind}" if index.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table.

    Attributes:
        architecture: name of the class in transformers.
        switches: fields of ``DecoderConfig``; a string is the key of config.json that sets it.
        window: which layers ``sliding_window`` applies to, unless ``layer_types`` lists them: ``never``; ``always`` =
            all; ``by_layer`` = from ``max_window_layers`` on, if ``use_sliding_window``; ``alternating`` = all but
            every ``full_every``-th, or ``sliding_window_pattern``-th.
        local_theta: key of the rope base of layers with a window, if they have another one and no rope scaling.
        skips_rope: ``no_rope_layers`` or ``no_rope_layer_interval`` say which layers rotate nothing.
        activations: names in config.json and in ``DecoderConfig``.
        defaults: values of keys that published configurations leave out.
        required: keys that have no safe default in this family; null is allowed.
        folds: changes of weights while they are read from a Hugging Face folder.
        interleaved: rotary pairs are neighbouring rows of q and k.
        ntk_alpha: a rope of type ``dynamic`` with ``alpha`` has a larger base, for every length.
        partial: ``partial_rotary_factor`` applies; elsewhere it must be 1.
        plain: with its folds the model is one of another family, ``llama`` if possible, and is written as such.
        adjust: change of the configuration that the folds need.
        knows: keys that other families may not have, see ``unexpected``.
        expert_width: key of the MLP width of one expert; empty without a mixture of experts.
        gguf: the architecture's name in GGUF files; empty if they are not read.
        gguf_permuted: GGUF stores rows of q and k with rotary pairs interleaved instead of in halves.
        gguf_folds: changes of weights while they are read from a GGUF file.
    """

    model_type: str
    architecture: str
    switches: Mapping[str, str | bool]
    window: Literal["never", "always", "by_layer", "alternating"] = "never"
    gguf: str = ""
    gguf_permuted: bool = False
    required: tuple[str, ...] = ()
    names: Names = field(default_factory=Names)
    full_every: int = 0
    local_theta: str | None = None
    skips_rope: bool = False
    activations: Mapping[str, str] = field(default_factory=lambda: ACTIVATIONS)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()
    interleaved: bool = False
    ntk_alpha: bool = False
    partial: bool = False
    plain: bool = False
    adjust: Callable[[DecoderConfig, Mapping[str, Any]], DecoderConfig] | None = None
    knows: tuple[str, ...] = ()
    gguf_folds: tuple[Fold, ...] = ()
    expert_width: str = ""
