"""The table and the page of a sweep: ``sweep.md`` and ``sweep.html``, rendered from the points alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from flatq.files import write_atomically
from flatq.report.figures import INK, QUIET, RESULT, SERIES, STYLE, as_svg, new_panels
from flatq.report.render import environment
from flatq.sweep.choice import by_bytes, by_decode, by_prefill, front, verdicts
from flatq.sweep.points import Point, Sweep

KINDS = {  # colour and marker of a kind of point
    "stacked": (RESULT, "o", "narrowed and quantized"),
    "quantized": (SERIES[1], "s", "quantized alone"),
    "narrowed": (SERIES[2], "^", "narrowed alone"),
    "dense": (QUIET, "D", "as the model is"),
}
LABELLED = 24  # points; more labels cover each other


def write_page(found: Sweep, root: Path) -> None:
    """Write ``sweep.md`` and ``sweep.html``; each atomically."""
    for name in ("sweep.md", "sweep.html"):
        write_atomically(root / name, rendered(found, f"{name}.j2").encode())


def rendered(found: Sweep, template: str) -> str:
    """Render a template of this folder."""
    best = {id(point) for point in front(found.done, by_bytes)}
    fastest = {id(point) for point in front(found.done, by_decode)}
    return (
        environment(Path(__file__).parent)
        .get_template(template)
        .render(
            sweep=found,
            keys=list(found.grid),
            cell=lambda point, key: _cell(point, key),
            verdicts=verdicts(found.done),
            judged=list(dict.fromkeys(text for point in found.done for text in point.judged)),
            seen=any(text.calibrated for point in found.done for text in point.quality if text.text in point.judged),
            pending=found.runs - len({point.name for point in found.points}),
            best=lambda point: id(point) in best,
            fastest=lambda point: id(point) in fastest,
            figure=lambda: trade_off(found),
            measured=any(point.decode is not None for point in found.done),
        )
    )


def _cell(point: Point, key: str) -> str:
    """The value of a key in a point; a quantization alone has none of the flat stage."""
    if key not in point.changed:
        return "no flat"
    value = point.changed[key]
    return value if isinstance(value, str) else json.dumps(value)


def trade_off(found: Sweep) -> str:
    """KL divergence against bytes, and against decoding and prefill speed if they were measured; with Pareto fronts."""
    points = [point for point in found.done if point.kl is not None]
    if not points:
        return ""
    panels: list[tuple[str, str, Any, Any]] = [("Size", "MB", by_bytes, lambda point: (point.bytes or 0) / 1e6)]
    if any(point.decode is not None for point in points):
        panels.append(("Decoding", "tokens per second", by_decode, lambda point: point.decode))
    if any(point.prefill is not None for point in points):
        panels.append(("Prefill", "tokens per second", by_prefill, lambda point: point.prefill))
    with matplotlib.rc_context(STYLE):
        figure, places = new_panels(1, len(panels), height=4.2)
        for axes, (title, unit, cost, shown) in zip(places, panels, strict=True):
            _panel(axes, [point for point in points if cost(point) is not None], cost, shown)
            axes.set_title(title)
            axes.set_xlabel(unit, loc="right")
        places[0].set_ylabel("KL from the dense model, nats")
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
        return as_svg(figure)


def _panel(axes: Any, points: Sequence[Point], cost: Any, shown: Any) -> None:
    for kind, (colour, marker, words) in KINDS.items():
        some = [point for point in points if point.kind == kind]
        if some:
            x, y = [shown(point) for point in some], [point.kl for point in some]
            axes.plot(x, y, marker, color=colour, ms=6, label=words, zorder=3)
            errors = [2 * (point.kl_stderr or 0.0) for point in some]
            axes.errorbar(x, y, errors, fmt="none", ecolor=colour, lw=0.8, alpha=0.5)
    axes.margins(x=0.12)
    best = front(points, cost)
    axes.plot([shown(point) for point in best], [point.kl for point in best], "-", color=INK, lw=0.9, label="best")
    if len(points) <= LABELLED:
        for point in points:
            place = (shown(point), point.kl)
            left = shown(point) > sum(axes.get_xlim()) / 2  # half: the name is on the side that has space
            name = axes.annotate(
                point.name,
                place,
                (-5 if left else 5, 5),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=6.5,
                color=QUIET,
            )
            name.set_in_layout(False)
    axes.set_ylim(bottom=0)
