"""The quality tables of ``docs/results.md``, from ``results/quality.json``: nobody copies a number by hand.

One table per calibration setting, a row per method, a column per share removed. Rows that exchange a single part of a
method (their label holds ``key=value``) and rows with GPTQ on top stay in ``results/quality.md``, which has everything.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import quality_tables as tables


def markdown(results: Mapping[str, tables.Result]) -> str:
    """One table per calibration setting in which a share was removed."""
    panels: dict[tuple[Any, ...], list[tables.Group]] = {}
    for group in tables.grouped(results.values()):
        first = group[0]
        if not first["gptq"] and "=" not in first["label"] and tables.damage(group) is not None:
            panels.setdefault(tables.corpus(first), []).append(group)
    return "\n".join(_table(groups) for groups in panels.values())


def _table(groups: Sequence[tables.Group]) -> str:
    first = next(row for row in groups[0] if row["damage"] is not None)
    keeps = sorted({group[0]["keep_ratio"] for group in groups}, reverse=True)
    cells = {(group[0]["label"], group[0]["keep_ratio"]): group for group in groups}
    references = tables.references_of(groups)

    def mean(label: str, keep: float) -> float:
        found = tables.damage(cells[label, keep]) if (label, keep) in cells else None
        return float("inf") if found is None else found

    def cell(label: str, keep: float) -> str:
        if (label, keep) not in cells:
            return ""
        group = cells[label, keep]
        paper = tables.damage(references.get(tables.setting(group[0]), []))
        return _spread(group) + (f" ({mean(label, keep) / paper:.2f})" if paper else "")

    labels = sorted(dict.fromkeys(label for label, _ in cells), key=lambda label: [mean(label, k) for k in keeps])
    lines = [
        f"{first['tokens']:,} calibration tokens of {tables.text(first)}, {first['score_tokens']:,} held-out tokens "
        f"in rows of {first['score_seq_len']}, dense perplexity {first['dense_perplexity']:.2f}:\n",
        "| damage | " + " | ".join(f"{1 - keep:.0%} removed" for keep in keeps) + " |",
        "|---|" + "---:|" * len(keeps),
        *(f"| {label} | " + " | ".join(cell(label, keep) for keep in keeps) + " |" for label in labels),
    ]
    return "\n".join(lines) + "\n"


def _spread(group: tables.Group) -> str:
    """``0.400 ± 0.012``: mean and sample deviation over the seeds, the mean alone where there is one."""
    values = [row["damage"] for row in group if row["damage"] is not None]
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"
