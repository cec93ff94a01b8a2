"""The quality harness's rows as a table and a plot: means over calibration seeds, with their range."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from quality_grid import BASELINES, REFERENCE

from flatq.files import write_atomically

SCHEMA_VERSION = 1
Result = Mapping[str, Any]
Group = list[Result]  # rows that differ in nothing but the calibration seed

NOTE = """Damage is `ln(perplexity / dense perplexity)` on held-out text; mean over the calibration seeds, with the
range where there are several. *Kept* is the share of the decoder's parameters that was reached, *of paper* the damage
divided by that of the paper's method with IPRS at the same setting, *time* the seconds to compress (importance, plan
and walk; loading and scoring not counted) and, where one version of the code measured both, their multiple of the
paper's with IPRS.
"""


def one_line(result: Result) -> str:
    """A row for the log."""
    settings = f"{result['label']}{' + gptq' if result['gptq'] else ''}, keep {result['keep_ratio']}, "
    settings += f"{result['tokens']} tokens of {text(result)}, seed {result['seed']}"
    if "damage" not in result:
        return settings
    if result["damage"] is None:
        return f"{settings}: refused: {result['refused']}"
    return (
        f"{settings}: damage {result['damage']:.4f} (ppl {result['perplexity']:.2f}, dense "
        f"{result['dense_perplexity']:.2f}), share {result['share']:.4f}, {result['compress_seconds']:.1f} s"
    )


def write(results: Mapping[str, Result], out: Path) -> None:
    """The table and the plot beside the JSON file ``out``."""
    groups = grouped(results.values())
    write_atomically(out.with_suffix(".md"), markdown(groups).encode())
    if any(damage(group) is not None and not group[0]["gptq"] for group in groups):
        write_atomically(out.with_suffix(".svg"), plot(groups).encode())


def grouped(results: Iterable[Result]) -> list[Group]:
    """Rows that differ in nothing but the seed, together."""
    groups: dict[tuple[Any, ...], Group] = {}
    for result in results:
        groups.setdefault((setting(result), result["label"], bool(result["gptq"])), []).append(result)
    return list(groups.values())


def setting(result: Result) -> tuple[Any, ...]:
    """What rows must share to be compared."""
    return (*corpus(result), result["keep_ratio"])


def corpus(result: Result) -> tuple[Any, ...]:
    """What all rows of one panel share."""
    names = ("model", "text", "score_text", "tokens", "seq_len", "score_tokens", "score_seq_len", "precision")
    return tuple(result[name] for name in names)


def damage(group: Group) -> float | None:
    """Mean over the seeds; None if no row was had."""
    values = [row["damage"] for row in group if row["damage"] is not None]
    return statistics.mean(values) if values else None


def _seconds(group: Group) -> float | None:
    values = [row["compress_seconds"] for row in group if row["damage"] is not None]
    return statistics.median(values) if values else None


def text(result: Result) -> str:
    """Names of the texts, without digests."""
    seen, judged = (result[name].split("@")[0] for name in ("text", "score_text"))
    return seen if seen == judged else f"{seen}, scored on {judged}"


def markdown(groups: Sequence[Group]) -> str:
    """All tables: one per calibration setting, and one for GPTQ where it was measured."""
    panels: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        panels.setdefault(corpus(group[0]), []).append(group)
    parts = ["# Quality", NOTE]
    for members in panels.values():
        first = members[0][0]
        parts.append(f"## {first['tokens']:,} calibration tokens of {text(first)}\n")
        parts.append(_panel_note(members))
        parts.append(_damage_table([group for group in members if not group[0]["gptq"]]))
        if any(group[0]["gptq"] for group in members):
            parts.append("### With GPTQ on top\n\nAlone, the sum of both alone, and both together.\n")
            parts.append(_gptq_table(members))
    return "\n".join(parts)


def _panel_note(members: Sequence[Group]) -> str:
    first = members[0][0]
    dense = next((row["dense_perplexity"] for group in members for row in group if row["damage"] is not None), None)
    codes = {row["code"] for group in members for row in group}
    note = f"Model {first['model']}, sequences of {first['seq_len']}; scored on {first['score_tokens']:,} tokens in "
    note += f"rows of {first['score_seq_len']}" + (f"; dense perplexity {dense:.3f}." if dense else ".")
    return note + ("" if len(codes) == 1 else f" **Rows of {len(codes)} versions of the code.**") + "\n"


def references_of(members: Iterable[Group]) -> dict[tuple[Any, ...], Group]:
    """The paper's rows by setting; where there are several, the one without further options."""
    papers = [group for group in members if (group[0]["method"], group[0]["allocation"]) == REFERENCE]
    papers.sort(key=lambda group: len(group[0]["options"]), reverse=True)
    return {setting(group[0]): group for group in papers if not group[0]["gptq"]}


def _damage_table(members: Sequence[Group]) -> str:
    lines = ["| method | wanted | kept | perplexity | damage | of paper | time, s | seeds |", "|---|" + "---:|" * 7]
    references = references_of(members)
    for group in sorted(members, key=lambda group: (-group[0]["keep_ratio"], group[0]["method"] in BASELINES)):
        first, mean = group[0], damage(group)
        if mean is None:
            lines.append(f"| {first['label']} | {first['keep_ratio']:.0%} | refused: {_refused(first)} | | | | | |")
            continue
        paper = references.get(setting(first), [])
        good = [row for row in group if row["damage"] is not None]
        lines.append(
            f"| {first['label']} | {first['keep_ratio']:.0%} | {statistics.mean(r['share'] for r in good):.2%} "
            f"| {statistics.mean(r['perplexity'] for r in good):.2f} | {_spread([r['damage'] for r in good])} "
            f"| {_ratio(mean, damage(paper))} "
            f"| {_seconds(group):.1f}{_times(group, paper)} | {len(good)} |"
        )
    return "\n".join(lines) + "\n"


def _refused(row: Result) -> str:
    return " ".join(str(row["refused"]).split()).replace("|", "/")[:160]


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def _ratio(value: float, reference: float | None) -> str:
    return f"{value / reference:.2f}" if reference else ""


def _times(group: Group, reference: Group) -> str:
    """Empty for rows of different code: they are of different days, when a machine is not the same either."""
    value, other = _seconds(group), _seconds(reference)
    comparable = len({row["code"] for row in [*group, *reference]}) == 1
    return f" ({value / other:.2f} x)" if comparable and value and other else ""


def _gptq_table(members: Sequence[Group]) -> str:
    lines = ["| method | wanted | flat | gptq | sum | both | both - sum |", "|---|" + "---:|" * 6]
    alone = next((damage(g) for g in members if g[0]["method"] == "none"), None)
    plain = {(g[0]["label"], g[0]["keep_ratio"]): damage(g) for g in members if not g[0]["gptq"]}
    for group in members:
        label, keep = group[0]["label"], group[0]["keep_ratio"]
        flat, both = plain.get((label, keep)), damage(group)
        if not group[0]["gptq"] or group[0]["method"] == "none" or flat is None or both is None or alone is None:
            continue
        total = flat + alone
        lines.append(
            f"| {label} | {keep:.0%} | {flat:.4f} | {alone:.4f} | {total:.4f} | {both:.4f} | {both - total:+.4f} |"
        )
    return "\n".join(lines) + "\n"


def plot(groups: Sequence[Group]) -> str:
    """Damage over the share removed, a panel per calibration setting, a line per method; an SVG file's text."""
    shown = [group for group in groups if not group[0]["gptq"] and damage(group) is not None]
    panels: dict[tuple[Any, ...], dict[str, list[Group]]] = {}
    for group in shown:
        panels.setdefault(corpus(group[0]), {}).setdefault(group[0]["label"], []).append(group)
    colours = [matplotlib.colormaps["tab10"](number) for number in range(10)]
    labels = list(dict.fromkeys(group[0]["label"] for group in shown))
    with matplotlib.rc_context({"svg.hashsalt": "flatq", "font.size": 9}):
        figure = Figure(figsize=(4.6 * len(panels) + 1.6, 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for panel, lines in zip(axes, panels.values(), strict=True):
            for label, members in lines.items():
                _line(panel, label, members, colours[labels.index(label) % len(colours)])
            first = next(iter(lines.values()))[0][0]
            panel.set_title(f"{first['tokens']:,} tokens of {text(first)}", loc="left")
            panel.set_xlabel("decoder parameters removed")
            panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            panel.set_yscale("symlog", linthresh=0.1)
            panel.grid(alpha=0.3)
        axes[0].set_ylabel("damage, ln(ppl / dense)")
        handles = {line.get_label(): line for panel in axes for line in panel.get_lines() if line.get_label()[0] != "_"}
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _line(panel: Any, label: str, members: Sequence[Group], colour: Any) -> None:
    points = []
    for group in members:
        good = [row for row in group if row["damage"] is not None]
        values = [row["damage"] for row in good]
        points.append((1 - statistics.mean(row["share"] for row in good), statistics.mean(values), values))
    points.sort(key=lambda point: point[0])
    baseline = members[0][0]["method"] in BASELINES
    x, y = [point[0] for point in points], [point[1] for point in points]
    panel.plot(x, y, marker="o", ms=3, lw=1.4, ls="--" if baseline else "-", color=colour, label=label)
    for where, _, values in points:
        panel.plot([where, where], [min(values), max(values)], color=colour, lw=1, label="_range")
