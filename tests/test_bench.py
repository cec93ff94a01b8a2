"""Each runner is measured alone, in turns, and a failure in its process reaches the caller."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flatq.errors import ExportError, RecipeError
from flatq.export.bench import BenchResult, Load, OpenRunner, Spread, bench_side_by_side, serve
from flatq.machine.memory import device_memory_bytes, peak_rss_bytes, rss_bytes

if TYPE_CHECKING:
    from flatq.export.protocols import FloatArray, IntArray

LOAD = Load(prompt=16, new_tokens=6, batch=2, vocab=50)


class Timed:
    """A runner whose prompt takes 40 ms, whose steps take ``step_seconds``, and that notes when it is used."""

    provider = "test"

    def __init__(self, step_seconds: float, megabytes: int, diary: Path | None, name: str) -> None:
        self.step_seconds, self.diary, self.name = step_seconds, diary, name
        self.weights = np.ones(megabytes << 20, dtype=np.uint8)

    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        raise NotImplementedError

    def start(self, tokens: IntArray, capacity: int) -> FloatArray:
        assert tokens.shape == (2, 16)
        assert tokens.max() < 50
        assert capacity == 22
        if self.diary is not None:
            with self.diary.open("a") as diary:
                diary.write(self.name)
        time.sleep(0.04)
        return np.eye(50, dtype=np.float32)[tokens[:, -1]]

    def step(self, tokens: IntArray) -> FloatArray:
        assert tokens.shape == (2,)
        time.sleep(self.step_seconds)
        return np.eye(50, dtype=np.float32)[tokens]

    def close(self) -> None:
        pass


def open_timed(step_seconds: float = 0.01, megabytes: int = 1, diary: Path | None = None, name: str = "A") -> Timed:
    return Timed(step_seconds, megabytes, diary, name)


def open_nothing() -> None:
    return None


def open_broken() -> Timed:
    raise OSError("no such graph")


def open_killed() -> Timed:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[BenchResult], str]:
    diary = tmp_path_factory.mktemp("bench") / "diary"
    openers = {
        "slow": partial(open_timed, 0.02, 200, diary, "A"),
        "fast": partial(open_timed, 0.01, 1, diary, "B"),
    }
    return bench_side_by_side(openers, LOAD, repeats=3, threads=1), diary.read_text()


def test_times_are_those_of_the_runner(pair: tuple[list[BenchResult], str]) -> None:
    (slow, fast), _ = pair
    assert (slow.name, fast.name) == ("slow", "fast")
    assert slow.first_token_seconds.low >= 0.04
    assert slow.prefill_tokens_per_second.high <= 2 * 16 / 0.04
    assert slow.decode_tokens_per_second.high <= 2 / 0.02
    assert fast.decode_tokens_per_second.median > 1.2 * slow.decode_tokens_per_second.median
    assert slow.provider == "test"
    assert slow.load_seconds > 0
    assert slow.device_memory_bytes is None


def test_runners_take_turns_and_the_warm_up_is_not_counted(pair: tuple[list[BenchResult], str]) -> None:
    (slow, _), diary = pair
    assert diary == "ABBAABBA"  # a warm-up each, then three repeats
    assert slow.repeats == 3


def test_memory_is_each_runners_own(pair: tuple[list[BenchResult], str]) -> None:
    (slow, fast), _ = pair
    assert slow.peak_rss_bytes - slow.rss_before_bytes > 195 << 20
    assert fast.peak_rss_bytes - fast.rss_before_bytes < 100 << 20


class Orders:
    """The child's end of a pipe, without a child."""

    def __init__(self, *orders: str) -> None:
        self.orders, self.answers = list(orders), list[tuple[bool, object]]()

    def recv(self) -> str:
        if not self.orders:
            raise EOFError
        return self.orders.pop(0)

    def send(self, answer: tuple[bool, object]) -> None:
        self.answers.append(answer)


@pytest.mark.parametrize(
    ("opener", "message"), [(open_nothing, "no runtime for this format"), (open_broken, "OSError: no such graph")]
)
def test_a_failure_is_answered_with_its_cause(opener: OpenRunner, message: str) -> None:
    pipe, before = Orders("open"), signal.getsignal(signal.SIGINT)
    try:
        serve(pipe, opener, LOAD)  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, before)
    [(failed, answer)] = pipe.answers
    assert failed
    assert message in str(answer)


def test_a_process_that_dies_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(ExportError, match=r"bench of bad: .* exit code -9 during 'open' \(it was killed"):
        bench_side_by_side({"bad": open_killed}, Load(prompt=16, new_tokens=6, batch=2, vocab=50), repeats=1)


def test_all_impossible_numbers_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        bench_side_by_side({}, Load(prompt=0, new_tokens=1, batch=0, vocab=0), repeats=0)
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize(("values", "spread"), [([3.0], Spread(3, 3, 3)), ([4.0, 1.0, 2.0], Spread(2, 1, 4))])
def test_a_spread_is_the_median_and_the_range(values: list[float], spread: Spread) -> None:
    assert Spread.of(values) == spread


def test_the_peak_is_at_least_what_is_held_now() -> None:
    assert peak_rss_bytes() >= 0.9 * rss_bytes() > 0
    assert device_memory_bytes(1) is None  # no process of ours
