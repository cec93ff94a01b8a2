"""Figures of the report, as SVG that uses the page's light or dark colours.

matplotlib draws with placeholder colours, which are then replaced by CSS variables of the page. Text is not converted
to paths, so it uses the page's font. pyplot is not used, so there is no global state and no display.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from flatq.report.schema import Report

COLOURS = {  # placeholder -> CSS variable
    "#0a0b01": "var(--ink)",
    "#0a0b02": "var(--quiet)",
    "#0a0b03": "var(--line)",
    "#0a0b04": "var(--result)",
    "#0a0b05": "var(--baseline)",
    "#0a0b06": "var(--s1)",
    "#0a0b07": "var(--s2)",
    "#0a0b08": "var(--s3)",
    "#0a0b09": "var(--s4)",
    "#0a0b0a": "var(--s5)",
    "#0a0b0b": "var(--s6)",
    "#0a0b0c": "var(--s7)",
}
INK, QUIET, LINE, RESULT, DENSE, *SERIES = COLOURS
BAR_COLOURS = {"baseline": DENSE, "dense weights": DENSE, "quantized": SERIES[1], "same_bytes": SERIES[1]}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flatq",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def rank_profile(report: Report) -> str:
    """Widths of value heads and MLP in each layer, dense and kept."""
    with matplotlib.rc_context(STYLE):
        figure, (heads, mlp) = new_panels(1, 2, height=2.7)
        for axes, width, title in ((heads, "d_v", "Value head width d_v"), (mlp, "d_ff", "MLP width d_ff")):
            where = [layer.index for layer in report.layers]
            axes.bar(where, [getattr(layer.dense, width) for layer in report.layers], 0.82, color=DENSE, alpha=0.35)
            axes.bar(where, [getattr(layer.dims, width) for layer in report.layers], 0.82, color=RESULT)
            axes.set_title(title)
            _by_layer(axes)
        heads.legend(["dense", "kept"], loc="upper left", ncols=2, bbox_to_anchor=(0.48, 1.18))
        return as_svg(figure)


def narrowing_costs(report: Report) -> str:
    """Estimated cost of removing dimensions, a line for each layer, with a point at what was removed."""
    layers = [layer for layer in report.layers if layer.curves]
    if not layers:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, panels = new_panels(1, 2, height=3.0)
        for axes, part, width, title in zip(
            panels, ("value", "mlp"), ("d_v", "d_ff"), ("Value heads", "MLP channels"), strict=True
        ):
            for layer in layers:
                x, y = zip(*layer.curves[part], strict=True)
                axes.plot(x, y, color=RESULT, lw=0.9, alpha=0.25 + 0.6 * layer.index / len(report.layers))
                removed = 1 - getattr(layer.dims, width) / getattr(layer.dense, width)
                axes.plot(*_nearest(layer.curves[part], removed), "o", color=SERIES[1], ms=3)
            axes.set_title(f"{title}: estimated cost")
            axes.set_xlabel("fraction removed", loc="right")
            axes.set_yscale("symlog", linthresh=max(1e-12, 1e-4 * max(p[1] for e in layers for p in e.curves[part])))
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return as_svg(figure)


def layer_errors(report: Report) -> str:
    """Relative errors by layer, of narrowing (FLAT) and of rounding (GPTQ)."""
    with matplotlib.rc_context(STYLE):
        narrowing = [name for name in ("value", "mlp") if any(name in layer.errors for layer in report.layers)]
        others = {name for layer in report.layers for name in layer.errors} - {"value", "mlp"}
        order = ("q", "k", "v", "o", "gate", "up", "down")
        rounding = [name for name in order if name in others] + sorted(others - set(order))
        groups = [(names, title) for names, title in ((narrowing, "Narrowing"), (rounding, "Rounding")) if names]
        if not groups:
            return ""
        figure, panels = new_panels(1, len(groups), height=2.9)
        for axes, (names, title) in zip(panels, groups, strict=True):
            for place, name in enumerate(names):
                points = [(layer.index, layer.errors[name]) for layer in report.layers if name in layer.errors]
                x, y = zip(*points, strict=True)
                colour, late = SERIES[place % len(SERIES)], place >= 4
                axes.plot(x, y, color=colour, lw=1.6, marker="o", ms=2.6, ls="--" if late else "-", label=name)
            axes.set_title(f"{title}: relative error")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
            axes.set_ylim(bottom=0)
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.17), ncols=7, handlelength=1.4, columnspacing=0.9)
            _by_layer(axes)
        return as_svg(figure)


def size_and_speed(report: Report) -> str:
    """Bars of the baseline and of each export: bytes, tokens per second, memory."""
    weights = [("dense weights", report.baseline.bytes / 1e6, None)] if report.baseline else []
    weights += [(export.name, export.bytes / 1e6, None) for export in report.exports]
    if not report.exports:
        weights += [("artifact", report.result.bytes / 1e6, None)]
    weights += [(baseline.name, baseline.bytes / 1e6, None) for baseline in report.baselines]
    panels: list[tuple[str, list[Any]]] = [("Size on disk, MB", weights)]
    if report.bench:
        decode = [(e.name, e.decode_tokens_per_second) for e in report.bench]
        prefill = [(e.name, e.prefill_tokens_per_second) for e in report.bench]
        panels += [
            ("Decode, tokens/s", [(name, s.median, (s.low, s.high)) for name, s in decode]),
            ("Prefill, tokens/s", [(name, s.median, (s.low, s.high)) for name, s in prefill]),
            ("Peak memory, MB", [(e.name, e.peak_rss_bytes / 1e6, None) for e in report.bench]),
        ]
    with matplotlib.rc_context(STYLE):
        rows, columns = (len(panels) + 1) // 2, min(2, len(panels))
        tallest = max(len(bars) for _, bars in panels)
        figure, grid = new_panels(rows, columns, height=rows * (0.62 + 0.3 * tallest))
        for axes, (title, bars) in zip(grid, panels, strict=True):
            _bars(axes, title, bars)
        return as_svg(figure)


def quality_by_text(report: Report) -> str:
    """Damage on each text, of the artifact and of each export in its runtime; texts of other kinds first."""
    models = [("artifact", report.quality), *((baseline.name, baseline.quality) for baseline in report.baselines)]
    models += [(export.name, export.quality) for export in report.exports if export.quality]
    texts = sorted(report.quality, key=lambda text: text.calibrated)
    thick = 0.8 / len(models)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_panels(1, 1, height=0.9 + len(texts) * (0.25 + 0.26 * len(models)))
        for place, (name, measured) in enumerate(models):
            found = {text.text: text for text in measured}
            rows = [(row, found[text.text]) for row, text in enumerate(texts) if text.text in found]
            where = [row - 0.4 + thick * (place + 0.5) for row, _ in rows]
            colour = RESULT if place == 0 else SERIES[place % len(SERIES)]
            axes.barh(where, [text.damage for _, text in rows], 0.9 * thick, color=colour, label=name)
            for y, (_, text) in zip(where, rows, strict=True):
                span = 2 * (text.damage_stderr or 0)
                axes.plot([text.damage - span, text.damage + span], [y, y], color=INK, lw=1.1, marker="|", ms=5)
                axes.annotate(
                    f"{text.damage:+.3f}",
                    (max(text.damage + span, 0), y),
                    (5, 0),
                    textcoords="offset points",
                    va="center",
                )
        kinds = [f"{text.text}\n{'kind calibrated on' if text.calibrated else 'not calibrated on'}" for text in texts]
        axes.set_yticks(range(len(texts)), kinds)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(texts) - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.axvline(0, color=QUIET, lw=0.8)
        axes.set_title("Damage on each text, nats per token")
        axes.grid(visible=False, axis="y")
        if len(models) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=6)
        return as_svg(figure)


def kl_by_position(report: Report) -> str:
    """KL from the dense model along the rows of each text: does it grow with the context?"""
    texts = [text for text in report.quality if len(text.kl_by_position) > 1]
    if not texts:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_panels(1, 1, height=2.7)
        for place, text in enumerate(texts):
            length, parts = text.tokens // text.rows, len(text.kl_by_position)
            x = [length * (part + 0.5) / parts for part in range(parts)]
            colour = SERIES[place % len(SERIES)]
            axes.plot(x, text.kl_by_position, color=colour, lw=1.6, marker="o", ms=3, label=text.text)
        axes.set_title("KL from the dense model by position, nats")
        axes.set_xlabel("position in the row", loc="right")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.17), ncols=6)
        return as_svg(figure)


def _bars(axes: Any, title: str, bars: list[Any]) -> None:
    """Horizontal bars with their value at the end and the range as a thin line."""
    widest = max(max(value, *(span or ())) if span else value for _, value, span in bars)
    for row, (name, value, span) in enumerate(bars):
        axes.barh(row, value, 0.6, color=BAR_COLOURS.get(name, RESULT))
        if span:
            axes.plot(span, [row, row], color=INK, lw=1.1, solid_capstyle="butt", marker="|", ms=5)
        end = max(value, span[1]) if span else value
        axes.text(end + 0.015 * widest, row, f"{value:,.0f}" if value >= 100 else f"{value:.3g}", va="center")
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlim(0, widest * 1.17)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_title(title)
    axes.grid(visible=False)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _nearest(points: list[tuple[float, float]], x: float) -> tuple[float, float]:
    return min(points, key=lambda point: abs(point[0] - x))


def _by_layer(axes: Any) -> None:
    axes.set_xlabel("layer", loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)


def new_panels(rows: int, columns: int, *, height: float) -> tuple[Figure, list[Any]]:
    """A figure with panels side by side or below each other, row by row."""
    figure = Figure(figsize=(10, height), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.08))
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element with the page's colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for drawn, shown in COLOURS.items():
        text = text.replace(drawn, shown)
    opening, rest = text.split(">", 1)
    view = opening[opening.index("viewBox") :].split('"')[1]
    return f'<svg viewBox="{view}" xmlns:xlink="http://www.w3.org/1999/xlink" role="img">{rest}'
