import hashlib
import lzma
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatq.errors import ExportError
from flatq.model.grid import Grid, QuantizedWeight, round_to_nearest
from flatq.recipe.blocks import GroupSize
from flatq_safetensors.packing import (
    GptqLinear,
    dequantize_gptq,
    pack_compressed,
    pack_gptq,
    pack_rows,
    unpack_compressed,
    unpack_gptq,
    unpack_rows,
    words,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "gptq_v1.safetensors.xz"
BITS = (2, 3, 4, 8)
CASES = [
    f"b{bits}_g{group}_{kind}_{order}"
    for bits in BITS
    for group in (32, 64, -1)
    for kind in ("sym", "asym")
    for order in (("seq",) if group == -1 else ("seq", "act"))
]


@cache
def golden() -> dict[str, Tensor]:
    """What AutoGPTQ 0.7.1 packed."""
    return safetensors.torch.load(lzma.decompress(GOLDEN.read_bytes()))


def golden_case(case: str) -> tuple[QuantizedWeight, GptqLinear, bytes]:
    """Input, AutoGPTQ's output, and the digest of the decoded weight."""
    bits, group, kind, _ = case.split("_")[0][1:], case.split("_")[1][1:], *case.split("_")[2:]
    part = {name.removeprefix(case + "."): tensor for name, tensor in golden().items() if name.startswith(case + ".")}
    grid = Grid(int(bits), int(group), kind == "sym")
    weight = QuantizedWeight(part["codes"], part["scales"].T.contiguous(), part["zeros"], grid)
    packed = GptqLinear(part["qweight"], part["qzeros"], part["scales"], part["g_idx"])
    return weight, packed, part["dequant_sha256"].numpy().tobytes()


def random_weight(grid: Grid, rows: int = 64, columns: int = 64, seed: int = 0) -> QuantizedWeight:
    return round_to_nearest(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), grid)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("codes", "scale", "zero"))


def test_the_golden_file_has_the_forty_cases() -> None:
    assert sorted({name.split(".")[0] for name in golden()}) == sorted(CASES)
    assert len(CASES) == 40


@pytest.mark.parametrize("case", CASES)
def test_gptq_packing_is_autogptqs_byte_for_byte(case: str) -> None:
    weight, expected, _ = golden_case(case)
    made = pack_gptq(weight, version=1, g_idx=expected.g_idx)
    for part, tensor in expected.tensors.items():
        assert made.tensors[part].dtype == tensor.dtype
        assert torch.equal(made.tensors[part], tensor), part


@pytest.mark.parametrize("case", CASES)
def test_autogptqs_bytes_decode_to_autogptqs_weights_exactly(case: str) -> None:
    weight, packed, digest = golden_case(case)
    decoded = dequantize_gptq(packed, weight.grid, version=1)
    assert hashlib.sha256(decoded.contiguous().numpy().tobytes()).digest() == digest


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), count=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_unpacking_undoes_packing(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, words(count, bits))
    assert torch.equal(unpack_rows(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("extreme", ["all zero", "all ones"])
def test_extreme_codes_survive_the_sign_bit(bits: int, extreme: str) -> None:
    codes = torch.full((3, 64), 0 if extreme == "all zero" else 2**bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 64), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [*get_args(GroupSize)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_all_layouts_hold_the_same_weight(bits: int, group: int, symmetric: bool) -> None:
    weight = random_weight(Grid(bits, group, symmetric), columns=max(64, 2 * group))
    weight = QuantizedWeight(weight.codes, weight.scale, weight.zero.clamp(min=1), weight.grid)
    for version in (1, 2):
        packed = pack_gptq(weight, version=version)
        assert same(unpack_gptq(packed, weight.grid, version=version), weight)
        assert torch.equal(dequantize_gptq(packed, weight.grid, version=version), weight.dequantize())
    assert same(unpack_compressed(pack_compressed(weight), weight.grid), weight)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 48])
def test_compressed_tensors_itself_packs_the_same_bytes(bits: int, symmetric: bool, columns: int) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = random_weight(Grid(bits, 16, symmetric), columns=columns)
    packed, middle = pack_compressed(weight), weight.grid.middle
    signed = (weight.codes.to(torch.int16) - middle).to(torch.int8)
    assert torch.equal(packed["weight_packed"], library.pack_to_int32(signed, bits))
    if not symmetric:
        zeros = (weight.zero.to(torch.int16) - middle).to(torch.int8)
        assert torch.equal(packed["weight_zero_point"], library.pack_to_int32(zeros, bits, packed_dim=0))


def one_sided_weight() -> QuantizedWeight:
    """Row 5 has a group without a negative weight: its asymmetric zero is 0."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    w[5, :32] = w[5, :32].abs()
    weight = round_to_nearest(w, Grid(4, 32, symmetric=False))
    assert weight.zero[5, 0] == 0
    assert int((weight.zero == 0).sum()) == 1
    return weight


def test_version_1_refuses_a_zero_of_0_and_names_the_way_out() -> None:
    with pytest.raises(ExportError, match=r"layers\.0\.q: 1 groups have zero 0.*gptq_v2 or compressed-tensors"):
        pack_gptq(one_sided_weight(), version=1, name="layers.0.q")


def test_version_2_stores_a_zero_of_0_and_leaves_its_neighbours_alone() -> None:
    weight = one_sided_weight()
    packed = pack_gptq(weight, version=2)
    assert torch.equal(unpack_rows(packed.qzeros, 4, 64).T, weight.zero)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_symmetric_group_of_one_sign_is_not_clipped(sign: int) -> None:
    w = sign * torch.rand(64, 64, generator=torch.Generator().manual_seed(4))
    weight = round_to_nearest(w, Grid(4, 32))
    decoded = dequantize_gptq(pack_gptq(weight, version=1), weight.grid, version=1)
    # one step, because the outermost code on the positive side is half a step short of the range
    assert bool(((decoded - w).abs() <= 1.001 * weight.scale.float().max()).all())
    assert float(decoded.abs().max()) > 0.9
