"""The doctor names what is there, and how to mend what is not."""

from __future__ import annotations

import importlib.util
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from flatq import doctor


def test_every_part_has_its_line(tmp_path: Path) -> None:
    lines = doctor.doctor(tmp_path)
    for part in ("flatq ", "torch ", "processor: ", "bfloat16: ", "CUDA", "onnxruntime ", "exporter onnx", "memory: "):
        assert any(part in line for line in lines), part
    assert any(str(tmp_path) in line for line in lines)


def test_a_plug_in_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("mine", "no_such_package:Exporter", "flatq.exporters")
    monkeypatch.setattr(doctor, "entry_points", lambda group: [broken])
    assert doctor._exporters() == [
        "! exporter mine: no_such_package:Exporter cannot be imported: No module named 'no_such_package'; "
        "reinstall its package"
    ]


def test_a_missing_runtime_comes_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'flatq[cpu]'" in doctor._onnxruntime(None)


@pytest.mark.parametrize(("free", "warns"), [(0, True), (3_999_999_999, True), (4_000_000_000, False)])
def test_little_free_space_is_a_warning(free: int, warns: bool) -> None:
    assert doctor._free("memory", free, 8_000_000_000, "use less").startswith("!") == warns
