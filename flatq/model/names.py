"""Names of linears: ``layers.3.q`` is the query projection of layer 3; ``embed`` and ``head`` are outside layers."""

from __future__ import annotations

from dataclasses import dataclass

from flatq.model.decoder import DecoderConfig
from flatq.model.dims import LINEARS

TABLES = ("embed", "head")


@dataclass(frozen=True, slots=True)
class Stem:
    """A linear of a layer; ``str`` gives its name, without the ``.weight`` or ``.bias`` of its tensors."""

    layer: int
    linear: str

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.linear}"

    @classmethod
    def parse(cls, name: str) -> Stem | None:
        """Parse ``layers.3.q`` or ``layers.3.q.weight``; None if it is not a linear of a layer (``embed``, norms)."""
        parts = name.split(".")
        if len(parts) < 3 or parts[0] != "layers" or not parts[1].isdecimal() or parts[2] not in LINEARS:
            return None
        return cls(int(parts[1]), parts[2])

    @classmethod
    def of(cls, name: str) -> Stem:
        """As ``parse``, for a name that must be a linear of a layer.

        Raises:
            ValueError: it is not.
        """
        found = cls.parse(name)
        if found is None:
            raise ValueError(f"{name!r} names no linear of a layer; those are layers.N.{{{','.join(LINEARS)}}}")
        return found

    def shape(self, config: DecoderConfig) -> tuple[int, int]:
        """Weight shape (out_features, in_features)."""
        return config.layers[self.layer].shape(self.linear, config.d_model)


def matrix_shape(config: DecoderConfig, stem: str) -> tuple[int, int]:
    """Weight shape (out_features, in_features) of a linear or a table, by stem."""
    return (config.vocab, config.d_model) if stem in TABLES else Stem.of(stem).shape(config)


def stems_of(config: DecoderConfig) -> list[str]:
    """Names of all linears of all layers."""
    return [str(Stem(index, name)) for index in range(len(config.layers)) for name in LINEARS]
