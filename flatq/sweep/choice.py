"""What follows from the points of a sweep: Pareto fronts, whether narrowing pays, and the point for a limit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flatq.errors import RecipeError
from flatq.sweep.points import Point
from flatq.units import parse_size, size, speed

SAME_BYTES = 1.01  # a file at most 1 % larger counts as not larger
LIMITS = ("size", "tokens_per_second", "prefill_tokens_per_second", "max_damage")


@dataclass(frozen=True)
class Wish:
    """A condition of ``--pick``.

    Attributes:
        key: one of ``LIMITS``.
        limit: bytes, tokens per second or nats.
        text: as it was given.
    """

    key: str
    limit: float
    text: str

    def value(self, point: Point) -> float | None:
        """The measure that is limited; None if it was not measured."""
        return {
            "size": point.bytes,
            "tokens_per_second": point.decode,
            "prefill_tokens_per_second": point.prefill,
            "max_damage": point.damage,
        }[self.key]

    @property
    def at_most(self) -> bool:
        """Whether the limit is an upper one."""
        return self.key in ("size", "max_damage")

    def holds(self, point: Point) -> bool:
        """Whether a point satisfies it; a measure that is missing does not."""
        value = self.value(point)
        return value is not None and (value <= self.limit if self.at_most else value >= self.limit)

    def shown(self, value: float) -> str:
        """A value with its unit."""
        if self.key == "size":
            return size(value)
        return f"{value:.3f} nats" if self.key == "max_damage" else speed(value)


def wishes_of(given: Sequence[str]) -> list[Wish]:
    """Parse ``["size=90MB", "tokens_per_second=250"]``.

    Raises:
        RecipeError: lists everything that is wrong.
    """
    found, problems = list[Wish](), list[str]()
    for text in given:
        key, _, value = (part.strip() for part in text.partition("="))
        try:
            if key not in LIMITS:
                raise ValueError(f"{key!r} is not known; allowed: {', '.join(LIMITS)}")
            found.append(Wish(key, parse_size(value) if key == "size" else _positive(value), text))
        except ValueError as error:
            problems.append(f"--pick {text}: {error}")
    if problems:
        raise RecipeError(problems)
    return found


def _positive(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or float(text) == 0:
        raise ValueError(f"{text!r} is not allowed; a number above 0")
    return float(text)


def picked(points: Sequence[Point], wishes: Sequence[Wish]) -> Point:
    """The point with the least KL divergence that satisfies all conditions; of equal ones the smallest.

    With ``max_damage`` and without ``size`` it is the smallest point: the quality is then the limit.

    Raises:
        RecipeError: there is none; with the nearest value of each condition.
    """
    known = [point for point in points if point.kl is not None and point.bytes is not None]
    fitting = [point for point in known if all(wish.holds(point) for wish in wishes)]
    keys = [wish.key for wish in wishes]
    if fitting:
        by_size = "max_damage" in keys and "size" not in keys
        return min(fitting, key=lambda point: _order(point) if not by_size else _order(point)[::-1])
    raise RecipeError([_nearest(wish, known) for wish in wishes if not any(map(wish.holds, known))] or [_apart(wishes)])


def _order(point: Point) -> tuple[float, float]:
    assert point.kl is not None
    assert point.bytes is not None
    return point.kl, point.bytes


def _nearest(wish: Wish, points: Sequence[Point]) -> str:
    found = [(value, point) for point in points if (value := wish.value(point)) is not None]
    if not found:
        way = "add a `bench` block to the recipe" if "tokens" in wish.key else "see the errors in the table"
        return f"--pick {wish.text}: no point has a measure of it; {way}"
    value, point = (min if wish.at_most else max)(found, key=lambda pair: pair[0])
    return f"--pick {wish.text}: no point reaches it; the nearest is {point.label} with {wish.shown(value)}"


def _apart(wishes: Sequence[Wish]) -> str:
    listed = " and ".join(wish.text for wish in wishes)
    return f"--pick: no point satisfies {listed} together, although each alone is possible; relax one of them"


def front(points: Sequence[Point], cost: Callable[[Point], float | None]) -> list[Point]:
    """The points that no other point beats in both cost and KL divergence, cheapest first.

    Args:
        points: of a sweep; those without a measure are left out.
        cost: less is better.
    """
    known = [
        (found, point.kl, point) for point in points if (found := cost(point)) is not None and point.kl is not None
    ]
    best, kept = float("inf"), list[Point]()
    for _, kl, point in sorted(known, key=lambda entry: entry[:2]):
        if kl < best:
            best = kl
            kept.append(point)
    return kept


def by_bytes(point: Point) -> float | None:
    """Cost of a point in bytes."""
    return point.bytes


def by_decode(point: Point) -> float | None:
    """Cost of a point in seconds per decoded token."""
    return None if not point.decode else 1 / point.decode


def by_prefill(point: Point) -> float | None:
    """Cost of a point in seconds per token of a prompt."""
    return None if not point.prefill else 1 / point.prefill


def verdicts(points: Sequence[Point]) -> list[str]:
    """Plain sentences: where quantization alone is better than narrowing and quantizing, for bytes and for speed."""
    stacked = [point for point in points if point.kind == "stacked" and point.kl is not None]
    alone = [point for point in points if point.kind == "quantized" and point.kl is not None]
    if not stacked:
        return []
    if not alone:
        return ["No quantization alone was run, so whether narrowing pays is not known."]
    rows = (
        ("bytes", "small", "larger", by_bytes, lambda point: size(point.bytes or 0)),
        ("decoding", "fast", "slower", by_decode, lambda point: speed(point.decode or 0)),
        ("prefill", "fast", "slower", by_prefill, lambda point: speed(point.prefill or 0)),
    )
    return [words for row in rows if (words := _verdict(stacked, alone, *row))]


def _verdict(
    stacked: Sequence[Point],
    alone: Sequence[Point],
    what: str,
    good: str,
    worse: str,
    cost: Callable[[Point], float | None],
    shown: Callable[[Point], str],
) -> str:
    """One sentence; empty if the cost was not measured.

    Each narrowed and quantized model is compared with the quantizations alone that do not cost more.
    """
    judged = [(point, price) for point in stacked if (price := cost(point)) is not None]
    others = [(point, price) for point in alone if (price := cost(point)) is not None]
    if not judged or not others:
        return ""
    pairs = [(point, [other for other, its in others if its <= SAME_BYTES * price]) for point, price in judged]
    compared = [(point, min(some, key=_order)) for point, some in pairs if some]
    if not compared:
        nearest = min(judged, key=lambda pair: -pair[1])[0]
        return (
            f"For {what}: not known, because no quantization alone of this sweep is as {good} as {nearest.name} "
            f"({shown(nearest)})." + (" Add some with fewer bits or larger groups." if good == "small" else "")
        )
    beaten = [(point, best) for point, best in compared if _order(best)[0] <= _order(point)[0]]
    models = (
        f"the {len(compared)} narrowed and quantized models"
        if len(compared) > 1
        else "the narrowed and quantized model"
    )
    open_ones = len(judged) - len(compared)
    rest = f" For {open_ones} more there is no quantization alone that is as {good}." if open_ones else ""
    if not beaten:
        return (
            f"For {what}: narrowing pays. Each quantization alone that is not {worse} loses more than {models} that "
            f"it was compared with.{rest}"
        )
    some = f"{len(beaten)} of " if len(compared) > 1 else ""
    worst, best = max(beaten, key=lambda pair: _order(pair[0])[0] - _order(pair[1])[0])
    return (
        f"For {what}: quantization alone is better than {some}{models} that it was compared with. "
        f"{best.name} ({shown(best)}, KL {best.kl:.3f}) is not {worse} than {worst.name} ({shown(worst)}, KL "
        f"{worst.kl:.3f}) and loses less.{rest}"
    )
