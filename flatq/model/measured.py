"""What was measured to work for each family: the table of ``docs/families.md``, which ``flatq ls families`` sums up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flatq.files import read_json

TABLE = Path(__file__).with_name("measured.json")
Cell = float | str  # largest difference of a logit, "yes", or why not


def lines() -> Iterator[str]:
    """One line per row of the table: parity with transformers, and the exports that work."""
    table = read_json(TABLE, dict[str, dict[str, Cell]], "install flatq again")
    width = max(map(len, table))
    for name, row in table.items():
        exports = [column for column in row if column.startswith(("onnx", "gguf", "safetensors"))]
        works = [column for column in exports if isinstance(row[column], float)]
        missing = [column for column in exports if column not in works]
        lacking = f", without {', '.join(missing)}" if missing else ""
        yield f"{name:{width}}  logits within {row['parity']:.0e} of transformers; {len(works)} exports{lacking}"
