"""How large keys and values become, and who asks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flatq.artifact import RANGES, Artifact
from flatq.calibration.cache_ranges import cache_ranges
from flatq.errors import NumericsError
from flatq.model.decoder import DecoderConfig, GrowingCache
from flatq.model.weights import load_decoder
from flatq.report.render import read_report
from flatq_onnx.check import too_old_for_int8
from tests.conftest import GPTQ, MakeRecipe, digests, flatq
from tests.models import RandomWeights, tiny_config

INT8 = {"onnx": {"name": "small", "cache_type": "int8"}}
CONFIGS = {
    "plain": tiny_config(d_v=(16, 11)),
    "biases": tiny_config(d_v=(5, 16), qkv_bias=True),
    "qk_norm": tiny_config(kv_heads=4, qk_norm=True),
    "qk_norm after the rope": tiny_config(kv_heads=4, qk_norm=True, norm_after_rope=True),
}


def drawn(config: DecoderConfig, rows: int, length: int) -> torch.Tensor:
    return torch.randint(config.vocab, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_key_or_value_is_larger_at_any_position_and_some_are_as_large(config: DecoderConfig) -> None:
    weights, tokens = RandomWeights(config), drawn(config, 6, 20)
    ranges = cache_ranges(weights, tokens, precision="float32")
    cache = GrowingCache()
    decoder = load_decoder(weights)
    decoder(tokens, cache=cache)
    for index, dims in enumerate(config.layers):
        keys, values = (part.abs().amax((0, 2)) for part in cache.layers[index])
        longest = ranges[f"layers.{index}.key"]
        assert longest.shape == (dims.kv_heads, dims.d_qk)
        assert ranges[f"layers.{index}.value"].shape == (dims.kv_heads, dims.d_v)
        torch.testing.assert_close(values, ranges[f"layers.{index}.value"])
        assert bool((keys <= longest * (1 + 1e-5)).all())
        assert bool((keys >= longest / 2).any())
        # A pair turns as a whole, unless gains that follow the rotation differ within it.
        gains = decoder.layers[index].k_norm.weight.abs() if config.norm_after_rope else torch.ones(dims.d_qk)
        pairs = torch.hypot(*(cache.layers[index][0] / gains).chunk(2, -1)).amax((0, 2))
        torch.testing.assert_close(pairs.repeat(1, 2) * gains, longest)


def test_ranges_do_not_depend_on_where_a_text_stands() -> None:
    """Repeated, a text stands at later positions, too: its keys are turned further and no longer."""
    config = tiny_config(d_v=(16,), d_ff=(32,))
    weights, tokens = RandomWeights(config), drawn(config, 1, 12)
    here = cache_ranges(weights, tokens, precision="float32")
    moved = cache_ranges(weights, tokens.repeat(1, 5), precision="float32")
    for name, largest in here.items():
        torch.testing.assert_close(moved[name], largest)


def test_what_is_not_finite_is_named() -> None:
    weights = RandomWeights(tiny_config())
    weights.tensors["layers.1.v.weight"][3, 5] = torch.nan
    with pytest.raises(NumericsError, match=r"layers\.1\.value: is not finite"):
        cache_ranges(weights, drawn(weights.config, 1, 4))


@pytest.mark.skipif(bool(too_old_for_int8()), reason=too_old_for_int8())
def test_a_run_measures_them_if_an_export_asks_and_an_export_later_finds_the_same(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    asked, later = tmp_path / "asked", tmp_path / "later"
    assert flatq("run", make_recipe("asked", stages=[GPTQ], exports=[INT8]), "--out", asked).exit_code == 0
    report = read_report(asked / "report.json")
    assert "cache-ranges" in report.timing
    (export,) = report.exports
    assert export.verify is not None
    assert flatq("run", make_recipe("later", stages=[GPTQ]), "--out", later).exit_code == 0
    assert not (later / "artifact" / RANGES).exists()
    shown = flatq("export", later, "--format", "onnx", "--out", tmp_path / "small", "-o", "cache_type=int8")
    assert shown.exit_code == 0, shown.stderr
    assert (later / "artifact" / RANGES).read_bytes() == (asked / "artifact" / RANGES).read_bytes()
    graphs = [root / "model.onnx" for root in (asked / "exports" / "small", tmp_path / "small")]
    assert len({path.stat().st_size for path in graphs}) == 1
    Artifact.open(later).verify()
    before = digests(later)
    assert (
        flatq("export", later, "--format", "onnx", "--out", tmp_path / "again", "-o", "cache_type=int8").exit_code == 0
    )
    assert digests(later) == before
