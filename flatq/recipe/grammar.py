"""The recipe: one YAML file that holds everything that changes a number.

The blocks are in ``recipe.blocks``: a class is a block of the file, a field is a key. Models are frozen, unknown keys
are errors, and all mistakes are reported at once with their lines, before a run starts. Nothing here imports torch, so
checking a recipe is fast.

A new option is a new field of ``FlatSpec`` or ``GptqSpec``. A new stage is a class with a ``kind`` and an entry in
``Stage``. The options of an exporter are defined and checked by its ``Options`` model.

Left out: variables, includes and inheritance between files. A recipe is complete in itself.
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
from flatq.recipe.budget import BudgetSpec
from flatq.recipe.messages import explain, shown, written
from flatq.recipe.reader import Document, Place, Unreadable, read
from flatq.recipe.recovery import RecoverSpec
from flatq.recipe.rules import broken_rules, said_twice

LARGEST_FILE = 1_000_000  # bytes


def _kind(entry: Any) -> str | None:
    """The stage that an entry of ``stages`` names."""
    if isinstance(entry, FlatSpec | GptqSpec | RecoverSpec):
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
    """Inverse of ``_export``; defaults are omitted, so that the digests of older recipes do not change."""
    unverified = {} if export.verify else {"verify": False}
    return {export.format: {"name": export.name, **unverified, **export.options}}


ModelEntry = Annotated[
    ModelSpec,
    BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v, json_schema_input_type=str | ModelSpec),
]
FlatEntry = create_model("FlatEntry", __base__=Spec, flat=FlatSpec)
GptqEntry = create_model("GptqEntry", __base__=Spec, gptq=GptqSpec)
RecoverEntry = create_model("RecoverEntry", __base__=Spec, recover=RecoverSpec)
Stage = Annotated[
    Annotated[FlatSpec, BeforeValidator(_inside, json_schema_input_type=FlatEntry), Tag("flat")]
    | Annotated[GptqSpec, BeforeValidator(_inside, json_schema_input_type=GptqEntry), Tag("gptq")]
    | Annotated[RecoverSpec, BeforeValidator(_inside, json_schema_input_type=RecoverEntry), Tag("recover")],
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
    """A recipe: the model, the stages, the exports and the measurements."""

    version: Literal[1]
    """Version of this grammar."""
    model: ModelEntry
    """The pretrained model: its path, or a mapping with path, revision and dtype."""
    calibration: CalibrationSpec = CalibrationSpec(dataset="wikitext2")
    """The calibration text: its activations are the statistics that FLAT and GPTQ work on."""
    evaluation: Evaluation = (EvaluationSpec(),)
    """The text on which perplexity is measured, or a list of texts; reports lead with the first."""
    budget: BudgetSpec | None = None
    """One limit for the whole model, from which widths and bits of the stages are chosen; null leaves both to the
    stages."""
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = ()
    """The compression stages, in this order: flat, gptq, or both; then recover, a short training after them."""
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
            RecipeError: the file cannot be read, or it contains errors; one line per error.
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
            RecipeError: the text contains errors; one line per error.
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
        """The source text; empty if the recipe was built in Python."""
        return self._text

    @property
    def name(self) -> str:
        """The file name without its extension."""
        return Path(self._source).stem

    @property
    def flat(self) -> FlatSpec | None:
        """The low-rank stage."""
        return next((stage for stage in self.stages if isinstance(stage, FlatSpec)), None)

    @property
    def gptq(self) -> GptqSpec | None:
        """The quantization stage."""
        return next((stage for stage in self.stages if isinstance(stage, GptqSpec)), None)

    @property
    def recover(self) -> RecoverSpec | None:
        """The training after the walk."""
        return next((stage for stage in self.stages if isinstance(stage, RecoverSpec)), None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, each once."""
        return tuple(dict.fromkeys(name for text in self.evaluation for name in text.tasks))

    def digest(self) -> str:
        """SHA-256 of the content, hexadecimal; comments, key order and explicit defaults do not change it."""
        values = self.model_dump(mode="json", exclude={"budget"} if self.budget is None else None)  # as before the key
        content = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def problem(self, place: Place, sentence: str) -> str:
        """A line of a ``RecipeError``: file, line number, place and message."""
        return f"{self._source}:{self._document.line(place)}: {written(place)}: {sentence}"


def explain_options(recipe: Recipe, index: int, options: type[BaseModel], error: ValidationError) -> list[str]:
    """Validation errors of an exporter's ``Options`` in ``exports[index]``, as lines of a ``RecipeError``."""
    under = ("exports", index, recipe.exports[index].format)
    return [recipe.problem(place, sentence) for place, sentence in explain(error, options, under=under)]


def _validated(value: Any) -> tuple[Recipe | None, list[tuple[Place, str]]]:
    try:
        return Recipe.model_validate(value), list(said_twice(value))
    except ValidationError as error:
        wrong = explain(error, Recipe)
    if isinstance(value, dict):
        if not isinstance(value.get("evaluation"), list):  # a single block was wrapped in a list: drop its index
            wrong = [(at[:1] + at[2:] if at[:2] == ("evaluation", 0) else at, sentence) for at, sentence in wrong]
        # pydantic runs the rules only if all fields are valid, so run them here; they also check export names.
        ruled = [("exports", "name"), ("exports", "verify")]
        wrong = [fault for fault in wrong if fault[0] and (fault[0][0], *fault[0][2:]) not in ruled]
        wrong += [*broken_rules(value), *said_twice(value)]
    return None, wrong


def json_schema() -> dict[str, Any]:
    """JSON Schema of the recipe file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
