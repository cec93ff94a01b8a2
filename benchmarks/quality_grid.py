"""What the quality harness measures: one ``Row`` per model to be made, named by everything that changes its number.

A row is a variant (a method with its allocation and options, or a baseline), a share to keep, calibration text, score
text and, if wanted, GPTQ on top. The values of ``method`` and ``allocation``, and the levers, are read from the
recipe's grammar (``FlatSpec``): whatever the recipe can say is measured, with no second list to keep in step.

Left out of a row's identity: the code that made it. Code changes daily while a method is tuned, and most changes do
not touch most rows; the harness keeps the digest of the code beside the result and says which rows are of older code.

Nothing here imports torch: listing a grid takes a blink.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from flatq.errors import RecipeError
from flatq.recipe.blocks import CalibrationSpec, Dataset, EvaluationSpec, FlatSpec, GptqSpec

BASELINES = ("truncation", "magnitude", "svd", "svd-llm", "slicegpt")
GPTQ = GptqSpec(bits=4, group_size=32)
REFERENCE = ("paper", "iprs")  # what every other row is compared with
NOT_LEVERS = {"keep_ratio", "method", "allocation"}


@dataclass(frozen=True)
class Variant:
    """A way to compress: ``method`` of the flat stage, a baseline's name, or ``none`` (GPTQ alone).

    ``allocation`` None is the method's own.
    """

    method: str
    allocation: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_flat(self) -> bool:
        """Whether it is a ``flat`` stage of a recipe."""
        return self.method not in (*BASELINES, "none")

    @property
    def label(self) -> str:
        """Name in tables and plots, e.g. ``paper iprs`` or ``svd``."""
        options = [f"{key}={value}" for key, value in self.options.items()]
        return " ".join([self.method, *([self.allocation] if self.allocation else []), *options])

    def flat(self, keep_ratio: float) -> FlatSpec:
        """The stage as a recipe would state it.

        Raises:
            ValidationError: the recipe's grammar refuses this combination.
        """
        allocation = {"allocation": self.allocation} if self.allocation else {}
        return FlatSpec.model_validate({"method": self.method, "keep_ratio": keep_ratio, **allocation, **self.options})


@dataclass(frozen=True)
class Row:
    """One measurement."""

    variant: Variant
    keep_ratio: float
    calibration: CalibrationSpec
    evaluation: EvaluationSpec
    gptq: bool = False

    def settings(self, model: str) -> dict[str, Any]:
        """Everything that names the row, JSON-ready. Files count by content, not by place."""
        seen, judged = self.calibration, self.evaluation
        text = text_identity(str(seen.dataset), seen.path)
        return {
            "model": model,
            "method": self.variant.method,
            "allocation": self.variant.allocation,
            "options": dict(self.variant.options),
            "keep_ratio": self.keep_ratio,
            "text": text,
            "samples": seen.samples,
            "seq_len": seen.seq_len,
            "tokens": seen.samples * seen.seq_len,
            "seed": seen.seed,
            "precision": seen.precision,
            "score_text": text_identity(str(judged.dataset), judged.path) if judged.dataset != "held-out" else text,
            "score_tokens": judged.tokens,
            "score_seq_len": judged.seq_len,
            "gptq": {"bits": GPTQ.bits, "group_size": GPTQ.group_size} if self.gptq else None,
        }


def key_of(settings: Mapping[str, Any]) -> str:
    """Short digest of a row's settings; the order of the keys does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def text_identity(dataset: str, path: str | None) -> str:
    """A data set's name, or a file's name with the start of its SHA-256.

    Raises:
        RecipeError: the file cannot be read.
    """
    if path is None:
        return dataset
    file = Path(path)
    try:
        return f"{file.name}@{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        named = ", ".join(name for name in typing.get_args(Dataset) if name != "text")
        raise RecipeError(
            f"--text {path}: cannot be read ({error.strerror}); allowed: {named}, or a .txt or .jsonl file"
        ) from error


def corpus(text: str) -> dict[str, str]:
    """``dataset`` and ``path`` of a ``--text`` argument: the name of a data set, or else a file."""
    named = set(typing.get_args(Dataset)) - {"text"}
    return {"dataset": text} if text in named else {"dataset": "text", "path": text}


def choices(name: str) -> list[Any]:
    """The values that a field of ``FlatSpec`` may take, if they can be listed: those of a Literal, or a switch's.

    A field that may also be null lists its other values only. Anything else (numbers, text) gives an empty list.
    """
    return list(_listed(FlatSpec.model_fields[name].annotation))


def _listed(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Literal:
        yield from typing.get_args(annotation)
    elif annotation is bool:
        yield from (False, True)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _listed(part)


def variants(*, levers: bool = False, options: Mapping[str, Any] | None = None) -> list[Variant]:
    """Every method with every allocation, then the baselines.

    Args:
        levers: add each part of the flat stage exchanged by itself, for each method with its own allocation.
        options: fields of ``FlatSpec`` that all flat variants get.
    """
    given = dict(options or {})
    flat = [Variant(m, a, given) for m in choices("method") for a in choices("allocation")]
    if levers:
        flat += [
            Variant(method, None, {**given, name: value})
            for method in choices("method")
            for name in FlatSpec.model_fields
            if name not in NOT_LEVERS | set(given)
            for value in choices(name)
            if value != _own_choice(method, name)
        ]
    return flat + [Variant(name) for name in BASELINES]


def _own_choice(method: str, name: str) -> Any:
    """What a method does where the recipe leaves a field alone."""
    spec = FlatSpec.model_validate({"method": method, "keep_ratio": 0.8})
    return getattr(spec.parts, name, FlatSpec.model_fields[name].default)


def rows(
    chosen: Sequence[Variant],
    *,
    texts: Iterable[str],
    score_text: str | None,
    keep_ratios: Sequence[float],
    tokens: Sequence[int],
    seeds: Sequence[int],
    seq_len: int = 1024,
    score_tokens: int = 8192,
    score_seq_len: int = 512,
    gptq: bool = False,
) -> Iterator[Row]:
    """The grid, rows of the same calibration tokens side by side so that they are drawn once."""
    judged = EvaluationSpec.model_validate(
        {
            **(corpus(score_text) if score_text else {"dataset": "held-out"}),
            "tokens": score_tokens,
            "seq_len": score_seq_len,
        }
    )
    for text in texts:
        for amount in tokens:
            for seed in seeds:
                seen = CalibrationSpec.model_validate(
                    {**corpus(text), "samples": max(1, amount // seq_len), "seq_len": seq_len, "seed": seed}
                )
                if gptq:
                    yield Row(Variant("none"), 1.0, seen, judged, gptq=True)
                for keep in keep_ratios:
                    for variant in chosen:
                        yield Row(variant, keep, seen, judged)
                        if gptq and variant.is_flat:
                            yield Row(variant, keep, seen, judged, gptq=True)


def refusal(variant: Variant) -> str | None:
    """Why the recipe's grammar has no such variant; None where it has."""
    if not variant.is_flat:
        return None
    try:
        variant.flat(0.8)
    except ValidationError as error:
        return "; ".join(problem["msg"] for problem in error.errors())
    return None
