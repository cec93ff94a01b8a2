"""The C++ program in an export's README, compiled against onnxruntime, writes what the artifact writes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from flatq.artifact import Artifact
from flatq_onnx import OnnxExporter, OnnxOptions
from tests.interop.greedy import follow

# The only header in our registries is in a package for Unity.
PACKAGE = Path(__file__).parent / "cpp/node_modules/com.github.asus4.onnxruntime"
HEADER = next(PACKAGE.glob("Plugins/**/onnxruntime_cxx_api.h"), None)
LIBRARY = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
NEW, PROMPT = 20, [5, 6, 7, 8]  # the program writes 20 tokens
pytestmark = [
    pytest.mark.cpp,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(HEADER is None, reason="make interop-cpp installs onnxruntime's header into tests/interop/cpp"),
    pytest.mark.skipif(LIBRARY is None, reason="this onnxruntime has no library for other programs"),
]


@pytest.mark.parametrize("options", [{}, {"attention": "gqa"}, {"attention": "gqa", "left_padding": True}], ids=str)
def test_the_program_in_the_readme(exported_run: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    artifact = Artifact.open(exported_run[1] / "artifact")
    chosen = OnnxOptions.model_validate({"accuracy_level": 0, **options})
    OnnxExporter().write(artifact, tmp_path, chosen)
    code = OnnxExporter().usage(chosen).partition("```cpp\n")[2].partition("```")[0]
    (tmp_path / "run.cpp").write_text(code)
    assert HEADER is not None
    assert LIBRARY is not None
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(LIBRARY)
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "run.cpp", "-I", HEADER.parent, "-L.", "-lonnxruntime", "-orun"]
    subprocess.run(command, cwd=tmp_path, check=True)
    ran = subprocess.run(
        ["./run", *map(str, PROMPT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": "."},
    )
    assert [int(line) for line in ran.stdout.split()] == follow(artifact, PROMPT, NEW)
