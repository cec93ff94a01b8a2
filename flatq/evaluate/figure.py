"""The figure of a comparison: quality against bytes. A separate module, because it imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from flatq.errors import RecipeError
from flatq.evaluate.compare import Entry

FORMATS = (".svg", ".png")


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Plot perplexity against bytes, with a panel for each text.

    Raises:
        RecipeError: the file name's extension is not supported, or no model has a perplexity.
    """
    if path.suffix not in FORMATS:
        raise RecipeError(f"--figure {path}: must end in {' or '.join(FORMATS)}")
    texts = list(dict.fromkeys(text for entry in entries for text in entry.perplexity))
    if not texts:
        raise RecipeError(f"--figure {path}: no model here has a measured perplexity, so there is nothing to draw")
    with matplotlib.rc_context({"svg.hashsalt": "flatq", "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.4 * len(texts)), layout="constrained")
        panels = figure.subplots(len(texts), 1, squeeze=False)[:, 0]
        for axes, text in zip(panels, texts, strict=True):
            points = [(e.name, e.bytes / 1e6, e.perplexity[text]) for e in entries if text in e.perplexity]
            for name, x, y in points:
                axes.plot(x, y, "o", label=name)
            axes.set_title(text, loc="left")
            axes.set_xlabel("MB")
            axes.set_ylabel("perplexity")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=7)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
