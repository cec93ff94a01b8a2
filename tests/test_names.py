"""Names of linears, written and read."""

from __future__ import annotations

import pytest

from flatq.model.names import Stem, stems_of
from tests.models import tiny_config


def test_every_linear_of_a_model_is_read_back_from_its_name() -> None:
    config = tiny_config(d_v=(8, 16), d_ff=(64, 96))
    assert [str(Stem.of(name)) for name in stems_of(config)] == stems_of(config)
    assert Stem.of("layers.0.v").shape(config) == (2 * 8, 64)
    assert Stem.of("layers.1.down.weight").shape(config) == (64, 96)


@pytest.mark.parametrize(
    "name", ["embed", "head.weight", "norm.weight", "layers.0", "layers.0.q_norm.weight", "layers.x.q"]
)
def test_what_is_no_linear_of_a_layer_is_none_or_an_error(name: str) -> None:
    assert Stem.parse(name) is None
    with pytest.raises(ValueError, match="names no linear of a layer"):
        Stem.of(name)
