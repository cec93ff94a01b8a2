"""Runs scripts in Node, which may start Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""


def in_node(script: Path, *arguments: str | Path | dict[str, Any]) -> Any:
    """The JSON that a script prints; arguments that are no text or path are given as JSON."""
    given = [json.dumps(each) if isinstance(each, dict) else each for each in arguments]
    ran = subprocess.run(
        ["node", script, *given],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "CHROMIUM": CHROMIUM},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)
