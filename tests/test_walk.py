"""The walk: every block sees what the deployed model gives it, and a broken walk goes on with the same numbers."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flatq.calibration.states as flatq_feed
import flatq.calibration.walk as flatq_walk
import flatq.machine.precision as flatq_precision
from flatq.calibration.block import Block
from flatq.calibration.importance import layer_importance
from flatq.calibration.states import Execution, HiddenStates
from flatq.calibration.walk import blocks_done, damaged_states, last_states, walk
from flatq.errors import NumericsError
from flatq.machine.precision import forward_precision, resolved
from flatq.model.decoder import locate
from flatq.model.grid import Grid, round_to_nearest
from flatq.model.weights import load_decoder
from tests.models import EXACT, RandomWeights, tiny_config

TOKENS = torch.arange(5 * 12).remainder(128).view(5, 12)
ORDER = [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
WEIGHTS = RandomWeights(tiny_config())
LAST = {"attention": "o.weight", "mlp": "down.weight"}


def ended(work: Path) -> Tensor:
    """What the last block wrote."""
    return last_states(WEIGHTS, TOKENS, work, EXACT).states


def halve(block: Block) -> None:
    """A change that every later block must notice."""
    linear = "o" if block.half == "attention" else "down"
    block.narrow(linear, getattr(block.layer, linear).weight / 2, None)


def test_blocks_come_in_the_order_of_the_forward_pass(tmp_path: Path) -> None:
    saved: list[tuple[int, str]] = []
    seen = []
    for block in walk(WEIGHTS, TOKENS, tmp_path, lambda block: saved.append((block.index, block.half))):
        seen.append((block.index, block.half))
        assert saved == seen[:-1], "a block is saved after the loop body, before the next one comes"
    assert seen == saved == ORDER
    assert blocks_done(tmp_path) == len(ORDER)


def test_an_untouched_model_walks_to_its_own_hidden_states(tmp_path: Path) -> None:
    for _ in walk(WEIGHTS, TOKENS, tmp_path, lambda _: None, execution=EXACT):
        pass
    decoder = load_decoder(WEIGHTS)
    torch.testing.assert_close(decoder.norm(ended(tmp_path)), decoder.hidden(TOKENS), rtol=1e-5, atol=1e-5)


def test_later_blocks_see_the_changed_model(tmp_path: Path) -> None:
    changed = RandomWeights(WEIGHTS.config)
    for index in range(2):
        for linear in ("o", "down"):
            changed.tensors[f"layers.{index}.{linear}.weight"] /= 2
    for block in walk(WEIGHTS, TOKENS, tmp_path, lambda _: None, execution=EXACT):
        halve(block)
    decoder = load_decoder(changed)
    torch.testing.assert_close(decoder.norm(ended(tmp_path)), decoder.hidden(TOKENS), rtol=1e-5, atol=1e-5)


def test_codes_run_as_what_they_decode_to(tmp_path: Path) -> None:
    changed = RandomWeights(WEIGHTS.config)
    codes = round_to_nearest(WEIGHTS.tensor("layers.0.up.weight"), Grid(4, 16))
    changed.tensors["layers.0.up.weight"] = codes.dequantize()
    embedding = round_to_nearest(WEIGHTS.tensor("embed.weight"), Grid(8, 32))
    changed.tensors["embed.weight"] = embedding.dequantize()
    for block in walk(WEIGHTS, TOKENS, tmp_path, lambda _: None, embed=embedding, execution=EXACT):
        if (block.index, block.half) == ORDER[1]:
            block.quantize("up", codes)
    decoder = load_decoder(changed)
    torch.testing.assert_close(decoder.norm(ended(tmp_path)), decoder.hidden(TOKENS), rtol=1e-5, atol=1e-5)


class Killed(Exception):
    """Stands for a process that ends here."""


def half_written(block: Block, out: HiddenStates) -> None:
    """In place of ``Block.advance``: some outputs are on disk when the process ends."""
    out.states[:3] = 7
    raise Killed


def interrupt(patch: pytest.MonkeyPatch, moment: str, at: int) -> None:
    """Let the walk end at a moment of block ``at``."""
    advance, write = Block.advance, flatq_walk.write_checksummed

    def advance_or_end(block: Block, out: HiddenStates) -> None:
        (half_written if (block.index, block.half) == ORDER[at] else advance)(block, out)

    def write_or_end(path: Path, value: dict[str, int]) -> None:
        if value["blocks_done"] > at:
            raise Killed
        write(path, value)

    if moment == "while advancing":
        patch.setattr(Block, "advance", advance_or_end)
    if moment == "before the state is written":
        patch.setattr(flatq_walk, "write_checksummed", write_or_end)


@pytest.mark.parametrize("moment", ["in the body", "while saving", "while advancing", "before the state is written"])
@pytest.mark.parametrize("at", range(len(ORDER)))
def test_a_walk_broken_anywhere_ends_with_the_same_bytes(
    moment: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(work: Path, ends: str = "") -> list[tuple[int, str]]:
        def save(block: Block) -> None:
            if ends == "while saving" and (block.index, block.half) == ORDER[at]:
                raise Killed

        seen = []
        for block in walk(WEIGHTS, TOKENS, work, save, execution=EXACT):
            seen.append((block.index, block.half))
            if ends == "in the body" and seen[-1] == ORDER[at]:
                raise Killed
            halve(block)
        return seen

    go(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, moment, at)
        with pytest.raises(Killed):
            go(tmp_path / "broken", moment)
    assert go(tmp_path / "broken") == ORDER[at:], "it goes on with the block it was in"
    assert torch.equal(ended(tmp_path / "broken"), ended(tmp_path / "whole"))


def test_a_finished_walk_yields_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        blocks = list(walk(WEIGHTS, TOKENS, tmp_path, lambda _: None))
    assert blocks == []


def test_a_block_is_observed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    observe = Block._observe
    monkeypatch.setattr(Block, "_observe", lambda self, x, batch: looks.append(len(x)) or observe(self, x, batch))
    for block in walk(WEIGHTS, TOKENS, tmp_path, lambda _: None):
        assert block.observe() is block.observe()
        assert set(block.grams) == ({"input", "inner", "values"} if block.half == "attention" else {"input", "inner"})
    assert looks == [5] * len(ORDER)


@pytest.mark.parametrize("most", [1, 12, 13, 24, 60, 8192])
def test_batches_cover_every_sample_once_and_change_no_sum(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grams(work: Path) -> list[Tensor]:
        blocks = walk(WEIGHTS, TOKENS, work, lambda _: None, execution=EXACT)
        return [gram.mean() for block in blocks for gram in block.observe().values()]

    expected = grams(tmp_path / "expected")
    monkeypatch.setattr(flatq_feed, "BATCH_TOKENS", most)
    feed = HiddenStates(tmp_path / "feed", (5, 12, 64))
    covered = torch.cat([torch.arange(5)[batch] for batch in feed.batches()])
    assert covered.tolist() == list(range(5))
    assert all(len(feed.states[batch]) * 12 <= max(most, 12) for batch in feed.batches())
    for gram, one in zip(grams(tmp_path / "work"), expected, strict=True):
        torch.testing.assert_close(gram, one, rtol=1e-4, atol=1e-4)


def test_a_feed_keeps_what_its_file_holds(tmp_path: Path) -> None:
    feed = HiddenStates(tmp_path / "feed", (2, 3, 4))
    feed.states[:] = torch.arange(24.0).view(2, 3, 4)
    feed.flush()
    assert torch.equal(HiddenStates(tmp_path / "feed", (2, 3, 4)).states, torch.arange(24.0).view(2, 3, 4))


@pytest.mark.parametrize("native", [True, False], ids=["posix_fallocate", "zeros"])
def test_a_feed_takes_its_place_on_disk_at_once(native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    shape = (4, 64, 256)
    HiddenStates(tmp_path / "feed", shape)
    assert (tmp_path / "feed").stat().st_size == 4 * 64 * 256 * 4
    assert (tmp_path / "feed").stat().st_blocks * 512 >= 4 * 64 * 256 * 4, "no sparse file: SIGBUS on a full disk"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            HiddenStates(tmp_path / "other", shape)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["states-1", "dense-1"])
def test_states_that_changed_since_a_killed_walk_wrote_them_are_named(tmp_path: Path, name: str) -> None:
    blocks = walk(WEIGHTS, TOKENS, tmp_path, lambda _: None, reference=True)
    assert damaged_states(tmp_path) == []
    for _ in range(4):  # the generator stops in the fourth block, so three are done
        next(blocks).observe()
    blocks.close()
    assert blocks_done(tmp_path) == 3
    assert damaged_states(tmp_path) == []
    content = bytearray((tmp_path / name).read_bytes())
    content[100] ^= 4
    (tmp_path / name).write_bytes(content)
    assert damaged_states(tmp_path) == [name]
    (tmp_path / name).unlink()
    assert damaged_states(tmp_path) == [name]


def test_outputs_that_are_no_numbers_name_the_block_and_the_sample(tmp_path: Path) -> None:
    def damage_the_last(block: Block) -> None:
        if (block.index, block.half) == ORDER[3]:
            block.feed.states[3, 2, 1] = float("nan")

    with pytest.raises(NumericsError, match="layer 1 mlp: the output for calibration sample 3 is not finite"):
        list(walk(WEIGHTS, TOKENS, tmp_path, damage_the_last))
    assert blocks_done(tmp_path) == 3


@pytest.mark.parametrize(
    ("half", "linear", "named"),
    [("attention", "v", "the output of v"), ("mlp", "up", "the input of down")],
)
def test_activations_that_are_no_numbers_name_themselves_and_the_sample(
    tmp_path: Path, half: str, linear: str, named: str
) -> None:
    block = next(block for block in walk(WEIGHTS, TOKENS, tmp_path, lambda _: None) if block.half == half)
    block.feed.states[:2] = 0  # the first samples stay numbers whatever they are multiplied with
    block.narrow(linear, torch.full_like(getattr(block.layer, linear).weight, 1e38), None)
    with pytest.raises(NumericsError, match=f"layer 0 {half}: {named} for calibration sample 2 is not finite"):
        block.observe()


def test_inputs_that_are_no_numbers_name_the_sample(tmp_path: Path) -> None:
    block = next(iter(walk(WEIGHTS, TOKENS, tmp_path, lambda _: None)))
    block.feed.states[1, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match="layer 0 attention: the input of q, k and v for calibration sample 1 is"):
        block.observe()


def test_a_second_moment_too_large_for_its_type_is_noticed(tmp_path: Path) -> None:
    block = next(iter(walk(WEIGHTS, TOKENS, tmp_path, lambda _: None)))
    block.layer.attention_norm.weight = torch.nn.Parameter(torch.full((64,), 1e25))
    for linear in ("q", "k", "v"):
        block.narrow(linear, torch.zeros_like(getattr(block.layer, linear).weight), None)
    with pytest.raises(NumericsError, match="layer 0 attention: the second moment of 'input' is not finite"):
        block.observe()


def test_the_stream_and_the_sums_stay_in_float32_where_blocks_run_in_bfloat16(tmp_path: Path) -> None:
    low = Execution("bfloat16")
    for exact, block in zip(
        walk(WEIGHTS, TOKENS, tmp_path / "a", lambda _: None, execution=EXACT),
        walk(WEIGHTS, TOKENS, tmp_path / "b", lambda _: None, execution=low, lag=True),
        strict=True,
    ):
        for name, gram in block.observe().items():
            wanted = exact.observe()[name].mean()
            assert gram.mean().dtype == torch.float32
            error = float((gram.mean() - wanted).norm() / wanted.norm())
            assert error < 0.02
            if (block.index, block.half, name) != (0, "attention", "input"):  # before all products: exact on some CPUs
                assert error > 0, "rounded, if not by much"
        assert block.drift is not None
        assert block.drift.dtype == block.layer.get_parameter(LAST[block.half]).dtype == torch.float32
    ours, theirs = ended(tmp_path / "b"), ended(tmp_path / "a")
    assert not torch.equal(ours, ours.bfloat16().float())
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_state_is_one_number(tmp_path: Path) -> None:
    assert blocks_done(tmp_path) == 0
    for done, _ in enumerate(walk(WEIGHTS, TOKENS, tmp_path, lambda _: None)):
        assert blocks_done(tmp_path) == done
    assert json.loads((tmp_path / "state.json").read_text())["blocks_done"] == 4


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_the_precision_of_matrix_products_is_put_back(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    with forward_precision(precision):
        assert torch.is_inference_mode_enabled()
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("able", [True, False])
def test_auto_asks_the_device_that_computes(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "bfloat16" if able else "float32"
    monkeypatch.setattr(flatq_precision, "_has_bfloat16", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: not able)
    assert resolved("auto", "cpu") == (wanted if torch.backends.mkldnn.is_available() else "float32")
    assert resolved("auto", "cuda:1") != wanted
    assert resolved("auto", "mps") == "float32"
    assert resolved(wanted, "mps") == wanted


def test_importance_is_the_angle_between_what_enters_and_what_leaves_a_layer(tmp_path: Path) -> None:
    decoder = load_decoder(WEIGHTS)
    before: list[Tensor] = []
    after: list[Tensor] = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda _, given, result: (before.append(given[0]), after.append(result))[0])
    decoder(TOKENS)
    cosines = [torch.nn.functional.cosine_similarity(b, a, dim=-1) for b, a in zip(before, after, strict=True)]
    expected = [float(torch.arccos(cosine).mean()) / torch.pi for cosine in cosines]
    found = layer_importance(WEIGHTS, TOKENS, tmp_path, execution=EXACT)
    assert found == pytest.approx(expected, rel=1e-4)
    assert not list(tmp_path.iterdir()), "its hidden states are gone"


def test_a_layer_that_does_nothing_has_no_importance(tmp_path: Path) -> None:
    idle = RandomWeights(WEIGHTS.config)
    for linear in ("o", "down"):
        idle.tensors[f"layers.1.{linear}.weight"].zero_()
    first, second = layer_importance(idle, TOKENS, tmp_path, execution=EXACT)
    assert first > 0.01
    assert second == pytest.approx(0, abs=1e-3)


def test_a_reference_walks_the_dense_model_whatever_becomes_of_the_blocks(tmp_path: Path) -> None:
    for block in walk(WEIGHTS, TOKENS, tmp_path, lambda _: None, execution=EXACT, reference=True):
        block.observe()
        halve(block)
    last = torch.from_file(str(tmp_path / "dense-0"), size=5 * 12 * 64, dtype=torch.float32).view(5, 12, 64)
    decoder = load_decoder(WEIGHTS)
    torch.testing.assert_close(decoder.norm(last), decoder.hidden(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lag", [False, True])
def test_drift_is_what_the_stream_lacks_seen_through_the_inner_activation(tmp_path: Path, lag: bool) -> None:
    drifts = []
    for block in walk(WEIGHTS, TOKENS, tmp_path, lambda _: None, execution=EXACT, reference=True, lag=lag):
        gram = block.observe()["inner"]
        if not lag and block.half == "attention":
            assert block.drift is None
            halve(block)
            continue
        assert block.drift is not None
        drifts.append(block.drift)
        assert block.drift.shape == (gram.total.shape[-1], 64)
        halve(block)
    assert len(drifts) == (len(ORDER) if lag else len(ORDER) // 2)
    assert not lag or drifts[0].abs().max() < 1e-3, "nothing was changed before the first block"
    assert drifts[1].abs().max() > 1e-2


def test_drift_is_measured_in_front_of_a_norm_of_the_output(tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config(post_norms=True, o_bias=True))
    dense = load_decoder(weights)
    positions, x = locate(weights.config, *TOKENS.shape), dense.embed(TOKENS)
    for block in walk(weights, TOKENS, tmp_path, lambda _: None, execution=EXACT, lag=True):
        inner = block.activations(block.feed.states.clone())["inner"].flatten(0, 1)
        linear, layer = block.layer.o if block.half == "attention" else block.layer.down, dense.layers[block.index]
        block.observe()
        wanted = layer.output(block.half, x, positions).flatten(0, 1)  # type: ignore[operator]
        assert block.drift is not None
        torch.testing.assert_close(block.drift, inner.T @ (wanted - linear(inner)), rtol=1e-3, atol=1e-3)
        x = layer.run(block.half, x, positions)  # type: ignore[operator]
        halve(block)


def test_a_block_that_lets_the_dense_model_stand_still_is_an_error(tmp_path: Path) -> None:
    blocks = walk(WEIGHTS, TOKENS, tmp_path, lambda _: None, reference=True)
    next(blocks)
    with pytest.raises(ValueError, match="layer 0 attention: not observed"):
        next(blocks)


def test_a_broken_walk_with_a_reference_ends_with_the_same_states(tmp_path: Path) -> None:
    def correct(block: Block) -> None:
        block.observe()
        assert block.drift is not None
        linear = "o" if block.half == "attention" else "down"
        block.narrow(linear, getattr(block.layer, linear).weight / 2 + block.drift.T / 1000, None)

    for block in walk(WEIGHTS, TOKENS, tmp_path / "whole", lambda _: None, lag=True):
        correct(block)
    for seen, block in enumerate(walk(WEIGHTS, TOKENS, tmp_path / "broken", lambda _: None, lag=True)):
        block.observe()
        if seen == 2:
            break  # observed, and so with dense outputs on disk, but neither changed nor finished
        correct(block)
    for block in walk(WEIGHTS, TOKENS, tmp_path / "broken", lambda _: None, lag=True):
        correct(block)
    assert torch.equal(ended(tmp_path / "whole"), ended(tmp_path / "broken"))
