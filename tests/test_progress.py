"""A bar on a terminal, a few log lines elsewhere."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from flatq.machine.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("total", "lines"), [(0, 0), (1, 1), (3, 3), (10, 10), (1000, 10)])
def test_without_a_terminal_there_is_one_line_each_tenth(
    total: int, lines: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "flatq")
    with progress("compress", total) as advance:
        for _ in range(total):
            advance()
    assert len(caplog.messages) == lines
    assert capfd.readouterr().err == ""
    if lines:
        assert caplog.messages[-1].startswith(f"compress: {total} of {total} (100 %)")


def test_many_steps_at_once_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flatq")
    with progress("compress", 100) as advance:
        advance(75)
        advance(4)
    assert len(caplog.messages) == 1
    assert "75 of 100" in caplog.messages[0]


def test_on_a_terminal_there_is_a_bar_and_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flatq")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("compress", 4) as advance:
        advance(4)
    assert "compress" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()
    assert caplog.messages == []


def test_an_error_inside_passes_through() -> None:
    with pytest.raises(ValueError, match="stop"), progress("compress", 4):
        raise ValueError("stop")
