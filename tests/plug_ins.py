"""Exporters written on the page "Writing an exporter", installed as packages with real entry points."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "writing-an-exporter.md"
BLOCK = re.compile(r"^```(python|toml)\n# ([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def examples() -> dict[str, str]:
    """The page's code blocks by the file that their first line names."""
    return {where: text for _, where, text in BLOCK.findall(PAGE.read_text())}


def install(root: Path) -> None:
    """Write the page's packages below ``root``, each with the metadata that an installer would write."""
    for where, text in examples().items():
        if where.endswith(".py"):
            (root / where).parent.mkdir(parents=True, exist_ok=True)
            (root / where).write_text(text)
        else:
            package = where.split(":")[0]
            folder = root / f"{package}-1.0.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
            lines = text.replace('[project.entry-points."flatq.exporters"]', "[flatq.exporters]").replace('"', "")
            (folder / "entry_points.txt").write_text(lines)


@contextmanager
def installed(root: Path) -> Iterator[None]:
    """The page's exporters can be imported and are found by entry point; forgotten afterwards."""
    install(root)
    packages = {where.split("/")[0].split(":")[0] for where in examples()}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        yield
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]
