"""What this machine runs: package versions and the processor."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path


def version_of(package: str) -> str | None:
    """Installed version, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor as it calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
