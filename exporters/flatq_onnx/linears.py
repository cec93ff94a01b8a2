"""Linear layers: MatMulNBits for quantized weights, MatMul for others.

Linears with the same input (q, k, v; gate, up) are stacked into one node if they have the same grid, or are all
unquantized, because one large product is faster than several small ones. The standard representation of a quantized
model, DequantizeLinear before MatMul, is not used: onnxruntime recognises only one of its forms and otherwise
dequantizes the weight on every call, which is eleven times slower.

Axes: b batch, s new positions, n out_features, k in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flatq.export import DecoderConfig, Grid, QuantizedWeight, dense
from flatq_onnx.builder import FLOAT, FLOAT16, MICROSOFT, UINT8, Builder, Dims, ints
from flatq_onnx.tensors import Blocks, pack_codes, pack_scales, pack_zeros, stack_rows, widen_heads

Read = Callable[[str], Tensor | QuantizedWeight]
TOKENS: tuple[int | str, ...] = ("batch_size", "sequence")


@dataclass(frozen=True, slots=True)
class Part:
    """One linear, alone or stacked with others.

    Attributes:
        heads: if not 0, its rows are heads of equal width, each padded with zero rows to ``rows / heads``.
    """

    stem: str
    rows: int
    columns: int
    bias: bool = False
    heads: int = 0

    @classmethod
    def of(cls, config: DecoderConfig, index: int, linear: str) -> Part:
        """A linear of a layer, without padding."""
        rows, columns = config.layers[index].shape(linear, config.d_model)
        return cls(f"layers.{index}.{linear}", rows, columns, config.has_bias(linear))


class Linears:
    """Builds linears, embedding and head.

    Args:
        grids: grids of the linears that become MatMulNBits; the others are dequantized if necessary.
        read: reads a tensor by its name.
        accuracy_level: of MatMulNBits.
        standard_lookup: look up rows of a quantized embedding with standard operators only.
        decode_on_load: no MatMulNBits; constant folding decodes the codes when the graph is loaded.
    """

    def __init__(
        self,
        builder: Builder,
        grids: Mapping[str, Grid],
        read: Read,
        accuracy_level: int,
        *,
        standard_lookup: bool = False,
        decode_on_load: bool = False,
    ) -> None:
        self.builder, self.grids, self.accuracy_level = builder, grids, accuracy_level
        self.standard_lookup, self.decode_on_load = standard_lookup, decode_on_load
        self.read = read
        self._latest: tuple[tuple[Part, ...], Tensor | QuantizedWeight] | None = None
        self._made_on_loading: dict[str, Any] = {}

    def can_stack(self, parts: Sequence[Part]) -> bool:
        """Whether the parts can be stacked in one node."""
        return len({self.grids.get(part.stem) for part in parts}) == 1 and len({part.bias for part in parts}) == 1

    def stacked(self, x: Any, parts: Sequence[Part], lead: Dims = TOKENS) -> Any:
        """All parts in one node: [b, s, k] -> [b, s, sum of n]."""
        parts = tuple(parts)
        first, rows = parts[0], sum(part.rows for part in parts)
        name = "_".join([first.stem, *(part.stem.rpartition(".")[2] for part in parts[1:])])
        bias = self._bias(name, parts, rows) if first.bias else None
        grid = self.grids.get(first.stem)
        if grid is not None:
            return self._n_bits(x, name, parts, Blocks.of(grid, rows, first.columns), bias, lead)

        def transposed() -> NDArray[Any]:
            return np.ascontiguousarray(dense(self._weight(parts)).numpy().T)

        weight = self.builder.weight(f"{name}.weight", (first.columns, rows), transposed)
        product = self.builder.op("MatMul", [x, weight], [*lead, rows])
        return product if bias is None else self.builder.op("Add", [product, bias], [*lead, rows])

    def project(self, x: Any, parts: Sequence[Part], lead: Dims = TOKENS) -> list[Any]:
        """Each part's output, from one node if they can be stacked."""
        if len(parts) == 1 or not self.can_stack(parts):
            return [self.stacked(x, [part], lead) for part in parts]
        return self.split(self.stacked(x, parts, lead), [part.rows for part in parts], lead)

    def split(self, x: Any, sizes: Sequence[int], lead: Dims = TOKENS) -> list[Any]:
        """Consecutive columns of ``x``."""
        sections = self.builder.constant("split." + "_".join(map(str, sizes)), ints(*sizes))
        return self.builder.ops("Split", [x, sections], [[*lead, size] for size in sizes], axis=-1)

    def router(self, config: DecoderConfig, index: int) -> Any:
        """The weight of a layer's router, float32 [k, experts]."""
        name = f"layers.{index}.router.weight"

        def transposed() -> NDArray[Any]:
            return np.ascontiguousarray(dense(self.read(name)).numpy().T)

        return self.builder.weight(name, (config.d_model, config.experts), transposed, FLOAT)

    def embed(self, tokens: Any, config: DecoderConfig) -> Any:
        """Rows of the embedding, int64 [b, s] -> [b, s, m]."""
        part = Part("embed", config.vocab, config.d_model)
        grid = self.grids.get("embed")
        if grid is None:
            table = self._plain_table(part)
            return self.builder.op("Gather", [table, tokens], [*TOKENS, part.columns], axis=0)
        blocks = Blocks.of(grid, part.rows, part.columns, lookup=True)
        if self.standard_lookup:
            return self._looked_up(tokens, part, blocks)
        codes, scales, *zeros = self._packed("embed", (part,), blocks)
        filled, axis = blocks.count * blocks.block, 2
        if zeros:  # zeros are supported only for a table with two axes
            flat = blocks.codes_shape[1] * blocks.codes_shape[2]
            shape = self.builder.constant("shape.table", ints(-1, flat))
            codes, axis = self.builder.op("Reshape", [codes, shape], [part.rows, flat], dtype=UINT8), 1
        else:  # the codes have the shape of the head's: in another shape onnxruntime would keep a second copy
            shape = self.builder.constant("shape.scales", ints(*blocks.scales_shape, 1))
            scales = self.builder.op("Reshape", [scales, shape], [*blocks.scales_shape, 1])
        rows = self.builder.op(
            "GatherBlockQuantized",
            [codes, tokens, scales, *zeros],
            [*TOKENS, filled] if zeros else [*TOKENS, blocks.count, blocks.block],
            domain=MICROSOFT,
            bits=blocks.bits,
            block_size=blocks.block,
            gather_axis=0,
            quantize_axis=axis,
        )
        if not zeros:
            joined = self.builder.constant(f"shape.{filled}", ints(0, 0, filled))
            rows = self.builder.op("Reshape", [rows, joined], [*TOKENS, filled])
        return self._first(rows, filled, part.columns, TOKENS)

    def _first(self, x: Any, stored: int, wanted: int, lead: Dims) -> Any:
        """The first of the last axis, without those that pad the last block, [..., stored] -> [..., wanted]."""
        if stored == wanted:
            return x
        limits = [self.builder.constant(f"const.{value}", ints(value)) for value in (0, wanted, len(lead))]
        return self.builder.op("Slice", [x, *limits], [*lead, wanted])

    def _looked_up(self, tokens: Any, part: Part, blocks: Blocks) -> Any:
        """Rows of a quantized table with standard operators, for builds of onnxruntime without GatherBlockQuantized."""
        rows = []
        for value in self._packed("embed", (part,), blocks):
            shape: Dims = [*TOKENS, *value.shape[1:]]
            rows.append(self.builder.op("Gather", [value, tokens], shape, dtype=value.dtype, axis=0))
        return self._decoded(rows, blocks, TOKENS)

    def _decoded(self, packed: Sequence[Any], blocks: Blocks, lead: Dims) -> Any:
        """Weights with standard operators, [..., k].

        Args:
            packed: codes [..., B, bytes], scales [..., B], and zeros [..., bytes] of an asymmetric grid.
            blocks: the layout.
            lead: the axes in front.
        """
        build, (codes, scales, *zeros) = self.builder, packed
        blocked: Dims = [*lead, blocks.count, blocks.block]
        values = self._unpacked(codes, blocks.bits, blocked, len(lead))
        if zeros:
            held = blocks.zeros_shape[1] * 8 // blocks.bits
            points = self._unpacked(zeros[0], blocks.bits, [*lead, held], len(lead))
            shift = self._column(self._first(points, held, blocks.count, lead), [*lead, blocks.count, 1])
        else:
            half = np.array(1 << (blocks.bits - 1), build.float_type.numpy())
            shift = build.constant(f"scalar.{half.dtype}.{half}", half)
        values = build.op("Sub", [values, shift], blocked)
        values = build.op("Mul", [values, self._column(scales, [*lead, blocks.count, 1])], blocked)
        filled = blocks.count * blocks.block
        joined = build.constant(f"shape.{len(lead)}_{filled}", ints(*[0] * len(lead), filled))
        return self._first(build.op("Reshape", [values, joined], [*lead, filled]), filled, blocks.columns, lead)

    def _unpacked(self, packed: Any, bits: int, shape: Dims, kept: int) -> Any:
        """Codes as numbers, uint8 [..., bytes] -> float ``shape``, whose first ``kept`` axes may be of any size."""
        build, last = self.builder, self.builder.constant("const.-1", ints(-1))
        if bits < 8:
            inside: Dims = [*shape[:-1], int(shape[-1]) * bits // 8]
            mask, parts = build.constant(f"mask.{bits}", np.array((1 << bits) - 1, np.uint8)), list[Any]()
            for first in range(0, 8, bits):  # least significant bits first
                by = build.constant(f"shift.{first}", np.array(first, np.uint8))
                part = build.op("BitShift", [packed, by], inside, dtype=UINT8, direction="RIGHT") if first else packed
                part = build.op("BitwiseAnd", [part, mask], inside, dtype=UINT8)
                parts.append(build.op("Unsqueeze", [part, last], [*inside, 1], dtype=UINT8))
            joined = build.op("Concat", parts, [*inside, len(parts)], dtype=UINT8, axis=-1)
            sizes = [0] * kept + [int(size) for size in shape[kept:]]
            wanted = build.constant("shape." + "_".join(map(str, sizes)), ints(*sizes))
            packed = build.op("Reshape", [joined, wanted], shape, dtype=UINT8)
        return build.op("Cast", [packed], shape, to=build.float_type)

    def _column(self, x: Any, shape: Dims) -> Any:
        """With one more axis of size 1 at the end."""
        return self.builder.op("Unsqueeze", [x, self.builder.constant("const.-1", ints(-1))], shape)

    def head(self, x: Any, config: DecoderConfig, lead: Dims) -> Any:
        """Logits, [b, s, m] -> [b, s, vocab]; a tied head uses the embedding's tensors."""
        if not config.tied_head:
            return self.stacked(x, [Part("head", config.vocab, config.d_model)], lead)
        part = Part("embed", config.vocab, config.d_model)
        grid = self.grids.get("embed")
        if grid is not None:
            blocks = Blocks.of(grid, part.rows, part.columns, lookup=True)
            return self._n_bits(x, "embed", (part,), blocks, None, lead)
        table = self.builder.op("Transpose", [self._plain_table(part)], [part.columns, part.rows], perm=[1, 0])
        return self.builder.op("MatMul", [x, table], [*lead, part.rows])

    def vector(self, name: str, width: int) -> Any:
        """A norm's weight as an initializer, [width]."""
        return self.builder.weight(name, (width,), lambda: dense(self.read(name)).numpy())

    def _plain_table(self, part: Part) -> Any:
        return self.builder.weight(
            f"{part.stem}.weight", (part.rows, part.columns), lambda: dense(self._weight((part,))).numpy()
        )

    def _n_bits(self, x: Any, name: str, parts: tuple[Part, ...], blocks: Blocks, bias: Any, lead: Dims) -> Any:
        codes, scales, *zeros = self._packed(name, parts, blocks)
        if self.decode_on_load:
            weight = self._decoded((codes, scales, *zeros), blocks, [blocks.rows])
            weight = self.builder.op("Transpose", [weight], [blocks.columns, blocks.rows], perm=[1, 0])
            product = self.builder.op("MatMul", [x, weight], [*lead, blocks.rows])
            return product if bias is None else self.builder.op("Add", [product, bias], [*lead, blocks.rows])
        inputs = [x, codes, scales, zeros[0] if zeros else None, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return self.builder.op(
            "MatMulNBits",
            inputs,
            [*lead, blocks.rows],
            domain=MICROSOFT,
            K=blocks.columns,
            N=blocks.rows,
            bits=blocks.bits,
            block_size=blocks.block,
            accuracy_level=self.accuracy_level,
        )

    def _packed(self, name: str, parts: tuple[Part, ...], blocks: Blocks) -> list[Any]:
        """Initializers of a quantized matrix: codes, scales, and zeros if it is asymmetric."""

        def made(pack: Callable[[QuantizedWeight, Blocks], NDArray[Any]]) -> Callable[[], NDArray[Any]]:
            def make() -> NDArray[Any]:
                weight = self._weight(parts)
                assert isinstance(weight, QuantizedWeight)
                return pack(weight, blocks)

            return make

        return self._initializers(name, blocks, [made(pack) for pack in (pack_codes, pack_scales, pack_zeros)])

    def packed_experts(
        self, name: str, blocks: Blocks, weight: Callable[[], QuantizedWeight], experts: int
    ) -> list[Any]:
        """Codes, scales and zeros (None if symmetric) with experts as first axis.

        Args:
            blocks: layout of the rows of all experts.
            weight: reads these rows.
        """

        def made(pack: Callable[[QuantizedWeight, Blocks], NDArray[Any]]) -> Callable[[], NDArray[Any]]:
            return lambda: pack(weight(), blocks).reshape(experts, blocks.rows // experts, -1)

        packs = [made(pack) for pack in (pack_codes, pack_scales, pack_zeros)]
        codes, scales, *zeros = self._initializers(name, blocks, packs, experts)
        return [codes, scales, zeros[0] if zeros else None]

    def _initializers(
        self, name: str, blocks: Blocks, packs: Sequence[Callable[[], NDArray[Any]]], experts: int = 0
    ) -> list[Any]:
        def shaped(shape: tuple[int, ...]) -> tuple[int, ...]:
            return (experts, shape[0] // experts, prod(shape[1:])) if experts else shape

        codes, scales, zeros = packs
        stored = (f"{name}.codes", shaped(blocks.codes_shape), codes, UINT8)
        scaled = (f"{name}.scales", shaped(blocks.scales_shape), scales)
        if self.builder.float_type == FLOAT16 or not blocks.folds:
            values = [self.builder.weight(*stored), self.builder.weight(*scaled)]
        else:
            values = [self._on_loading(*stored), self._on_loading(*scaled, FLOAT16)]
        if blocks.has_zeros:
            values.append(self.builder.weight(f"{name}.zeros", shaped(blocks.zeros_shape), zeros, UINT8))
        return values

    def _on_loading(self, name: str, shape: tuple[int, ...], make: Callable[[], NDArray[Any]], dtype: Any) -> Any:
        """A tensor that onnxruntime computes from a flat initializer when it loads the model (constant folding).

        Scales are stored as float16 and converted by a Cast. Without constant folding they are not constant, and then
        the codes must not be constant either: MatMulNBits would prepack them without scales and return zeros or NaN.
        So the codes also pass through a node that only constant folding removes. The Reshape before the Cast prevents
        another optimization, which crashes in onnxruntime 1.28 and older.
        """
        if name not in self._made_on_loading:
            flat = self.builder.weight(name, (prod(shape),), lambda: make().reshape(-1), dtype)
            sizes = self.builder.constant("shape." + "_".join(map(str, shape)), ints(*shape))
            value = self.builder.op("Reshape", [flat, sizes], shape, dtype=dtype)
            if dtype == FLOAT16:
                value = self.builder.op("Cast", [value], shape, to=FLOAT)
            self._made_on_loading[name] = value
        return self._made_on_loading[name]

    def _bias(self, name: str, parts: tuple[Part, ...], rows: int) -> Any:
        def make() -> NDArray[Any]:
            vectors = [self._shaped(part, dense(self.read(f"{part.stem}.bias"))) for part in parts]
            return dense(stack_rows(vectors)).numpy()

        return self.builder.weight(f"{name}.bias", (rows,), make)

    def _weight(self, parts: tuple[Part, ...]) -> Tensor | QuantizedWeight:
        """The stacked matrix; the last one is cached because codes, scales and zeros are requested separately."""
        if self._latest is None or self._latest[0] != parts:
            matrices = []
            for part in parts:
                matrix = self.read(f"{part.stem}.weight")
                matrices.append(self._shaped(part, matrix if part.stem in self.grids else dense(matrix)))
            self._latest = parts, stack_rows(matrices)
        return self._latest[1]

    @staticmethod
    def _shaped(part: Part, matrix: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
        if part.heads:
            matrix = widen_heads(matrix, part.heads, part.rows // part.heads)
        return matrix
