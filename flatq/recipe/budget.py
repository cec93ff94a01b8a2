"""The block ``budget``: one limit that is spent on the widths and bits of the whole model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flatq.recipe.blocks import CONTEXT, Bits, GroupSize, Size, Spec

LIMITS = ("size", "decode_bytes", "memory", "max_damage")
SPEEDS = ("decode_tokens_per_second", "prefill_ms")  # limits of what an exporter predicts


class BudgetSpec(Spec):
    """One limit for the whole model, spent on widths (flat stage) and bits (gptq stage) by predicted loss."""

    size: Size | None = None
    """Limit: bytes of the files of the export, embedding and head included, such as 60MB."""
    decode_bytes: Size | None = None
    """Limit: bytes read from memory per decoded token, weights as the export stores them and KV cache together."""
    memory: Size | None = None
    """Limit: bytes of the export's files and of the KV cache at the context length."""
    max_damage: Annotated[float, Field(gt=0, le=10)] | None = None
    """Limit: nats lost per token on any text of the evaluation; the result is the smallest model that keeps it, found
    by a few walks."""
    decode_tokens_per_second: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Limit: least predicted decode speed of the export on this machine's CPU, for one text at the context length."""
    prefill_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Limit: largest predicted time of a prompt of the export on this machine's CPU, in milliseconds."""
    prompt: Annotated[int, Field(ge=1, le=131_072)] | None = None
    """Tokens of the prompt for prefill_ms; null is 128."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads for decode_tokens_per_second and prefill_ms; null is the runtime's default."""
    export: Annotated[str, Field(min_length=1)] | None = None
    """Name of the export whose files are counted; null is the first. Without exports the artifact is counted."""
    context: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Context length of the KV cache for decode_bytes, memory and decode_tokens_per_second, in tokens; null is 4096,
    for the speed 192."""
    bits: Annotated[tuple[Bits, ...], Field(strict=False, min_length=1)] = (2, 3, 4, 8)
    """Bits to choose from, as far as all exports can store them."""
    group_sizes: Annotated[tuple[GroupSize, ...], Field(strict=False, min_length=1)] = (32, 64, 128)
    """Group sizes to choose from."""

    @property
    def key(self) -> str:
        """The limit that is given: one of ``LIMITS`` and ``SPEEDS``."""
        return next(key for key in (*LIMITS, *SPEEDS) if getattr(self, key) is not None)

    @property
    def cache_context(self) -> int:
        """Context length of the KV cache, in tokens."""
        return self.context or CONTEXT

    @property
    def words(self) -> str:
        """The limit as text, for messages."""
        given = getattr(self, self.key)
        at = f" at a context of {self.cache_context:,}" if self.key in ("decode_bytes", "memory") else ""
        return {
            "size": f"files of {given}",
            "decode_bytes": f"{given} read per token{at}",
            "max_damage": f"the smallest model that loses at most {given} nats per token",
            "memory": f"{given} of weights and cache{at}",
            "decode_tokens_per_second": f"at least {given} tokens/s decoding on this CPU",
            "prefill_ms": f"at most {given} ms for a prompt on this CPU",
        }[self.key]
