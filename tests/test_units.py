"""Sizes are read as people write them, and numbers are written for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatq.errors import RecipeError
from flatq.recipe.blocks import FlatSpec
from flatq.sweep.commands import memory_of
from flatq.units import number, parse_size, seconds, size, size_at_least, speed, times


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("90MB", 90_000_000),
        ("1.5GB", 1_500_000_000),
        ("6GiB", 6 << 30),
        ("1.5 GiB", 3 << 29),
        ("512mib", 512 << 20),
        ("7000", 7000),
        ("2k", 2000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0MB", "6 GBs", "1e9", "six", "8Mbit", "9" * 400 + ".5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write it as 90MB, 1\.5GB or 6GiB"):
        parse_size(text)
    with pytest.raises(RecipeError, match=r"--memory: .*write it as 90MB"):
        memory_of(text)


def test_the_recipe_reads_the_same_units_as_the_command_line() -> None:
    assert FlatSpec.model_validate({"size": "6GiB"}).size == "6GiB"
    assert memory_of("6GiB") == parse_size("6GiB")
    assert memory_of(None) is None


@given(st.integers(1, 10**13))
def test_a_size_that_was_rounded_up_is_large_enough_and_hardly_larger(count: int) -> None:
    assert count <= parse_size(size_at_least(count)) <= count * 1.001 + 2


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (135e6, "135 MB"), (16e9, "16 GB"), (2e12, "2 TB")]
)
def test_bytes_are_written_for_people(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (0.34, "340 ms"),
        (12.06, "12.1 s"),
        (99.96, "1 min 39 s"),
        (432.4, "7 min 12 s"),
        (3600, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (2 * 86400 - 1, "47 h 59 min"),
        (2_552_460, "30 days"),
    ],
)
def test_seconds_are_written_for_people(duration: float, text: str) -> None:
    assert seconds(duration) == text


def test_speeds_numbers_and_ratios_are_written_for_people() -> None:
    assert [speed(1234.5), speed(72.44)] == ["1,234 tokens/s", "72.4 tokens/s"]
    assert [number(12345.6), number(0.123456)] == ["12,346", "0.1235"]
    assert [times(3.1, "faster", "slower"), times(0.5, "faster", "slower")] == ["3.10 x faster", "2.00 x slower"]
