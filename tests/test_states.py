"""Hidden states on disk: what is kept, what memory they take, and how a batch is sized."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from flatq.calibration.states import (
    BATCH_TOKENS,
    LARGE,
    HiddenStates,
    activation_bytes,
    batch_tokens,
    embedded,
    pieces,
    stored_as,
)
from flatq.errors import RecipeError
from flatq.machine.memory import rss_bytes
from flatq.model.grid import Grid, round_to_nearest
from flatq.plan.forecast import working_bytes, working_set
from flatq.recipe.grammar import Recipe
from tests.models import tiny_config


def test_pages_that_were_given_back_are_no_resident_memory_and_hold_what_they_held(tmp_path: Path) -> None:
    feed = HiddenStates(tmp_path / "feed", (64, 256, 1024))  # 64 MiB
    before = psutil.Process().memory_info().rss
    for batch in feed.batches():
        feed.states[batch] = 3
    grown = psutil.Process().memory_info().rss - before
    assert grown < 40 << 20, "a batch of 8192 tokens is 32 MiB, and is gone when the next one comes"
    assert float(feed.states.sum(dtype=torch.float64)) == 3 * feed.states.numel()


def test_bfloat16_states_take_half_the_disk_and_keep_eight_bits(tmp_path: Path) -> None:
    feed = HiddenStates(tmp_path / "feed", (4, 8, 32), torch.bfloat16)
    x = torch.randn(4, 8, 32)
    feed.states[:] = x
    assert (tmp_path / "feed").stat().st_size == 2 * x.numel()
    torch.testing.assert_close(feed.states.float(), x, rtol=2**-8, atol=0)


def test_a_text_is_cut_into_shorter_rows_from_as_many_samples_as_there_are() -> None:
    text = torch.arange(3 * 10).view(3, 10)  # three samples of ten tokens
    assert pieces(text, 4, 12).tolist() == [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]
    assert pieces(text, 4, 18)[3].tolist() == [4, 5, 6, 7], "then what follows, in the same order"
    assert pieces(text, 4, 1000).shape == (6, 4), "no row goes over the end of a sample"
    assert torch.equal(pieces(text, 1000, 20), text[:2]), "rows are never longer than the samples"
    assert pieces(text, 4, 1).shape == (1, 4), "one row at least"


@pytest.mark.parametrize(
    ("wanted", "tokens", "dtype"),
    [
        ("float32", LARGE, torch.float32),
        ("bfloat16", 1, torch.bfloat16),
        ("auto", LARGE // 4096 - 1, torch.float32),
        ("auto", LARGE // 4096, torch.bfloat16),
    ],
)
def test_only_large_states_are_bfloat16_by_themselves(wanted: str, tokens: int, dtype: torch.dtype) -> None:
    assert stored_as(wanted, tokens, 1024) == dtype


def test_a_quantized_embedding_decodes_only_the_rows_it_is_asked_for() -> None:
    table = torch.randn(50, 32)
    codes = round_to_nearest(table, Grid(8, 16))
    tokens = torch.tensor([[3, 3], [49, 0]])
    assert torch.equal(embedded(tokens, codes), codes.dequantize()[tokens])
    assert torch.equal(embedded(tokens, table.bfloat16()), table.bfloat16().float()[tokens])


def test_a_batch_is_as_large_as_its_room_and_never_empty() -> None:
    config = tiny_config()
    one = activation_bytes(config)
    assert batch_tokens(config, 10 * one) == 10
    assert batch_tokens(config, 1) == 1
    assert batch_tokens(config, 1 << 60) == BATCH_TOKENS


def test_a_budget_makes_batches_smaller_and_one_that_cannot_hold_is_refused() -> None:
    config = tiny_config(d_ff=(3072, 3072))
    recipe = Recipe.parse(
        "version: 1\nmodel: some/model\nstages: [{flat: {keep_ratio: 0.5}}]\n"
        "calibration: {dataset: wikitext2, seq_len: 256}\nevaluation: {seq_len: 64}"
    )
    need = rss_bytes() + max(working_bytes(config, recipe).values())
    assert working_set(config, recipe, None) == working_set(config, recipe, 1 << 40)
    assert working_set(config, recipe, need - (10 << 20)) < working_set(config, recipe, None)
    with pytest.raises(RecipeError, match=r"--memory: 0\.00 GB is too little"):
        working_set(config, recipe, 10**6)
