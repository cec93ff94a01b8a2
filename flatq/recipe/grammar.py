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
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
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
from flatq.recipe.blocks import (
    BenchSpec,
    CalibrationSpec,
    EvaluationSpec,
    ExportSpec,
    FlatSpec,
    GptqSpec,
    ModelSpec,
    Spec,
)
from flatq.recipe.messages import explain, shown, written
from flatq.recipe.reader import Document, Place, Unreadable, read
from flatq.recipe.rules import broken_rules

LARGEST_FILE = 1_000_000  # bytes


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
        "verify": options.get("verify", True),
        "options": {k: options[k] for k in options if k not in ("name", "verify")},
    }


def _as_written(export: ExportSpec) -> dict[str, Any]:
    """Inverse of ``_export``; a default is left out, so that the digests of older recipes stay as they were."""
    unverified = {} if export.verify else {"verify": False}
    return {export.format: {"name": export.name, **unverified, **export.options}}


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
Evaluation = Annotated[
    tuple[EvaluationSpec, ...],
    BeforeValidator(
        lambda v: v if isinstance(v, list | tuple) else [v],
        json_schema_input_type=EvaluationSpec | Annotated[list[EvaluationSpec], Field(min_length=1)],
    ),
    Field(strict=False, min_length=1),
]
OneFormat = Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]
Export = Annotated[
    ExportSpec,
    BeforeValidator(_export, json_schema_input_type=OneFormat),
    PlainSerializer(_as_written),
]


class Recipe(Spec):
    """What to do with which model."""

    version: Literal[1]
    """Version of this grammar."""
    model: ModelEntry
    """The pretrained model: its path, or a mapping with path, revision and dtype."""
    calibration: CalibrationSpec = CalibrationSpec(dataset="wikitext2")
    """The text whose activations decide what is kept."""
    evaluation: Evaluation = (EvaluationSpec(),)
    """The text on which perplexity is measured, or a list of texts; reports state the first one first."""
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = ()
    """What is done to the model, in this order: flat, gptq, or both."""
    exports: Annotated[tuple[Export, ...], Field(strict=False)] = ()
    """The formats to write."""
    bench: BenchSpec | None = None
    """What to measure; null measures nothing."""
    baselines: Annotated[tuple[Literal["dense", "quantized", "same_bytes"], ...], Field(strict=False)] = ("dense",)
    """What the result is compared with. dense is the model before, and always measured; quantized is the same model at
    the recipe's bits without narrowing; same_bytes is that with fewer bits or larger groups, about as large as the
    result. Each of the last two takes about as long as the compression itself."""
    stop_above: Annotated[float, Field(gt=0, strict=False)] | None = 1.0
    """Nats lost per token on any text of the evaluation beyond which the run stops before its exports; null goes on."""

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
        if not isinstance(
            value.get("evaluation"), list
        ):  # a single block is the list of it, and stands in the file alone
            wrong = [(at[:1] + at[2:] if at[:2] == ("evaluation", 0) else at, sentence) for at, sentence in wrong]
        # Rules ran only if all else was right: judge them anew. They also judge the names of exports, in their place.
        ruled = [("exports", "name"), ("exports", "verify")]
        wrong = [fault for fault in wrong if fault[0] and (fault[0][0], *fault[0][2:]) not in ruled]
        wrong += broken_rules(value)
    return None, wrong


def json_schema() -> dict[str, Any]:
    """JSON Schema of the file as it is written, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
