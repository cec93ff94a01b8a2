"""Text that the dense model writes itself: calibration text of the kind that the model knows, without a download.

What is kept of a model is decided by the text that it is shown, and text of one kind damages all other kinds. A model's
own text, drawn at temperature 1 from all that it says, is the one text that every model comes with. Half of the rows
are documents, written from the token that texts begin with; where there is a chat template the other half are chats of
which the model writes both sides. A text that ends before its row does is followed by the next one.

All rows of a batch are written side by side, a position at a time. A position is either prescribed (an opening) or
drawn, and each row has random numbers of its own. The same seed gives the same text on the same machine; where sums are
rounded in another order (other threads, another device), a text may go another way.

A finished batch is a file in the run folder, so that a killed run writes nothing twice.

Left out: top-k and top-p (they cut off what calibration should see), and weights that do not fit into memory together:
a text takes a pass over all of them for every position.

Axes: b rows of a batch, s positions, kv key/value heads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from flatq.artifact import save_shard
from flatq.errors import NumericsError, RecipeError
from flatq.machine.precision import resolved
from flatq.machine.progress import progress
from flatq.model.decoder import Decoder, DecoderConfig
from flatq.model.dims import LayerDims
from flatq.model.weights import Weights, load_decoder

log = logging.getLogger(__name__)
SIDE_BY_SIDE = 64  # rows: the weights are read once for all of them
MARK = "\N{REPLACEMENT CHARACTER}content\N{REPLACEMENT CHARACTER}"
FIXED_DATE = "01 Jan 2025"  # some templates state today's date, which would give another text every day


Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing that is written: a prescribed opening, then drawn ids until one of ``ends``.

    ``replaces_end`` says that the opening begins with the end of the turn before it, so that the drawn end is left out.
    """

    opening: tuple[int, ...]
    ends: frozenset[int]
    replaces_end: bool = False


Script = tuple[Turn, ...]  # the turns of one text, in order; after the last one it begins again


def document_script(tokenizer: Any, ends: frozenset[int]) -> Script:
    """A document: the begin token, then text until an end token.

    Args:
        tokenizer: the model's.
        ends: ids at which the model stops, as its settings state them.

    Raises:
        RecipeError: the tokenizer has no token that texts begin or end with.
    """
    begin = begin_token(tokenizer)
    return (Turn((begin,), ends | {begin}),)


def begin_token(tokenizer: Any) -> int:
    """Id of the token that texts begin with: begin-of-text, else end-of-text.

    Raises:
        RecipeError: there is neither.
    """
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise RecipeError(
        "dataset self: this model's tokenizer has neither a begin-of-text nor an end-of-text token, so there is "
        "nothing to begin a text with; use another dataset"
    )


def chat_script(tokenizer: Any, ends: frozenset[int]) -> Script | None:
    """A question and its answer, as the chat template writes them; None where there is no template to follow.

    The template is filled with a mark in place of the user's words. What stands before the mark opens the user's turn,
    what stands behind it ends that turn and opens the answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True, date_string=FIXED_DATE
    )
    before, found, after = text.partition(MARK)
    asked, answered = _ids(tokenizer, before), _ids(tokenizer, after)
    if not found or not asked or not answered:
        return None  # a template that does not repeat what the user says, or has no turns
    return (Turn(asked, ends | {answered[0]}), Turn(answered, ends | {answered[0]}, replaces_end=True))


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class FixedCache:
    """Keys and values of a known number of positions; a step writes its own and copies nothing."""

    def __init__(
        self,
        config: DecoderConfig,
        rows: int,
        positions: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def empty(dims: LayerDims, width: int) -> Tensor:
            return torch.empty(rows, dims.kv_heads, positions, width, device=device, dtype=dtype)

        self._keys = [empty(dims, dims.d_qk) for dims in config.layers]
        self._values = [empty(dims, dims.d_v) for dims in config.layers]
        self.past = 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See ``decoder.Cache.update``; the caller moves ``past`` on after the last layer."""
        until = self.past + keys.shape[2]
        self._keys[layer_idx][:, :, self.past : until] = keys
        self._values[layer_idx][:, :, self.past : until] = values
        return self._keys[layer_idx][:, :, :until], self._values[layer_idx][:, :, :until]


class Row:
    """One row while it is written: its ids so far, and what is prescribed next."""

    def __init__(self, script: Script) -> None:
        self._script, self._turn = script, 0
        self.ids: list[int] = []
        self.queue = list(script[0].opening)

    def take(self, count: int) -> list[int]:
        """The next ``count`` prescribed ids."""
        taken, self.queue = self.queue[:count], self.queue[count:]
        self.ids += taken
        return taken

    def draw(self, token: int) -> int:
        """Take a drawn id; at the end of a turn the next opening is prescribed, and may replace the end."""
        turn = self._script[self._turn]
        if token in turn.ends:
            self._turn = (self._turn + 1) % len(self._script)
            following = self._script[self._turn]
            self.queue = list(following.opening)
            if following.replaces_end or self.queue[0] == token:
                return self.take(1)[0]
        self.ids.append(token)
        return token


@torch.inference_mode()
def write_rows(
    decoder: Decoder, scripts: Sequence[Script], chances: Tensor, on_position: Advance | None = None
) -> Tensor:
    """Let the model write rows side by side.

    Args:
        decoder: the whole model, in float32 or bfloat16.
        scripts: of each row.
        chances: float64 [b, s] in [0, 1): the random number behind each drawn id.
        on_position: called with how many positions were added.

    Returns:
        int64 [b, s].

    Raises:
        NumericsError: logits are not finite.
    """
    rows, length = [Row(script) for script in scripts], chances.shape[1]
    device, dtype = decoder.embed.weight.device, decoder.embed.weight.dtype
    cache = FixedCache(decoder.config, len(rows), length, device=device, dtype=dtype)
    drawn = [0] * len(rows)
    while cache.past < length:
        count = max(1, min(min(len(row.queue) for row in rows), length - cache.past))
        tokens = [row.take(count) if row.queue else [row.draw(drawn[i])] for i, row in enumerate(rows)]
        hidden = decoder.hidden(torch.tensor(tokens, device=device), cache=cache, past=cache.past)
        cache.past += count
        if on_position is not None:
            on_position(count)
        if cache.past < length and not all(row.queue for row in rows):
            drawn = drawn_ids(decoder.logits(hidden[:, -1]).float(), chances[:, cache.past].to(device)).tolist()
    return torch.tensor([row.ids for row in rows])


def drawn_ids(logits: Tensor, chances: Tensor) -> Tensor:
    """Ids drawn from ``softmax(logits)``, one for each random number: float [b, vocab], float64 [b] -> int64 [b].

    Raises:
        NumericsError: logits are not finite.
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    total = weights.cumsum(-1, dtype=torch.float64)  # one by one in float32 the rare ids would be lost
    if not bool(torch.isfinite(total[:, -1]).all()):
        raise NumericsError(
            "dataset self: the model's logits are not finite, so it cannot write text; check the source checkpoint "
            "with `flatq check`"
        )
    found = torch.searchsorted(total, (chances * total[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1)


class DenseModel(Weights, Protocol):
    """A pretrained model with all that writing asks for; ``sources.source.Source`` is one."""

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file, by file name."""
        ...

    def tokenizer(self) -> Any:
        """Its ``PreTrainedTokenizerFast``."""
        ...

    def settings(self) -> dict[str, Any]:
        """Token ids as far as the model states them, such as ``eos_token_id``."""
        ...


@dataclass
class SelfText:
    """Writes rows of text with a model and keeps them.

    Attributes:
        source: the dense model.
        folder: where finished batches are kept.
        device: where the model is computed, all of it.
        precision: of weights and activations, as ``precision.resolved`` takes it. What is rounded to bfloat16 is the
            writer alone: the text is as likely as before, and takes a third of the time.
    """

    source: DenseModel
    folder: Path
    device: str = "cpu"
    precision: str = "auto"
    _decoder: list[Decoder] = field(default_factory=list)  # read when the first batch is missing

    def rows(self, samples: int, seq_len: int, seed: int) -> Tensor:
        """Rows that begin where texts begin; every second one is a chat where the model has a chat template.

        Args:
            samples: number of rows.
            seq_len: tokens in a row.
            seed: of all draws; a row's random numbers do not depend on ``samples``.

        Returns:
            int64 [samples, seq_len].

        Raises:
            RecipeError: the model does not fit into memory as a whole, or has no token to begin a text with.
            NumericsError: its logits are not finite.
        """
        scripts, found = self._scripts(), []
        started = time.monotonic()
        with progress("text of the model's own", samples * seq_len) as advance:
            for first in range(0, samples, SIDE_BY_SIDE):
                chosen = range(first, min(first + SIDE_BY_SIDE, samples))
                found.append(
                    self._batch([scripts[row % len(scripts)] for row in chosen], chosen, seq_len, seed, advance)
                )
        self._decoder.clear()
        log.info("wrote %d x %d tokens in %.0f s", samples, seq_len, time.monotonic() - started)
        return torch.cat(found)

    def _scripts(self) -> list[Script]:
        tokenizer = self.source.tokenizer()
        ends = stop_ids(self.source.settings(), tokenizer)
        chat = chat_script(tokenizer, ends)
        return [document_script(tokenizer, ends), *([chat] if chat else [])]

    def _batch(self, scripts: list[Script], rows: range, seq_len: int, seed: int, advance: Advance) -> Tensor:
        key: list[Any] = [self.source.digests(), [[(t.opening, sorted(t.ends)) for t in s] for s in scripts]]
        precision = resolved(self.precision, self.device)
        key += [rows.start, rows.stop, seq_len, seed, self.device.split(":")[0], precision]
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            if not self._decoder:
                dtype: torch.dtype = getattr(torch, precision)
                require_memory(self.source.config, len(scripts), seq_len, self.device, dtype)
                self._decoder.append(load_decoder(self.source, device=self.device, dtype=dtype))
            chances = torch.stack([_chances(seed, row, seq_len) for row in rows])
            written = write_rows(self._decoder[0], scripts, chances, lambda n: advance(n * len(rows)))
            self.folder.mkdir(parents=True, exist_ok=True)
            save_shard(path, {"rows": written})
        return load_file(path)["rows"]


def stop_ids(settings: dict[str, Any], tokenizer: Any) -> frozenset[int]:
    """Ids at which a model stops: what its settings state, and the tokenizer's end-of-text token."""
    stated = settings.get("eos_token_id")
    found = {*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id}
    return frozenset(int(token) for token in found if token is not None)


def writing_bytes(config: DecoderConfig, rows: int, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
    """What writing holds: the model and its cache in ``dtype``, and the logits of all rows in float32."""
    cache = rows * seq_len * sum(dims.kv_heads * (dims.d_qk + dims.d_v) for dims in config.layers)
    return dtype.itemsize * (config.parameters() + cache) + 16 * rows * config.vocab


def require_memory(
    config: DecoderConfig, rows: int, seq_len: int, device: str, dtype: torch.dtype = torch.float32
) -> None:
    """Fail before the model is read if it cannot be held as a whole.

    Raises:
        RecipeError: says what is needed, what is free, and what to calibrate on instead.
    """
    needed = writing_bytes(config, rows, seq_len, dtype)
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    if needed > free:
        raise RecipeError(
            f"dataset self: to write text the whole model is held in {str(dtype)[6:]}, {needed / 1e9:.1f} GB with its "
            f"cache, and {free / 1e9:.1f} GB are free on {device}; take dataset wikitext2, c4, python-docs or text, or "
            "a machine with more memory"
        )


def _chances(seed: int, row: int, seq_len: int) -> Tensor:
    """Random numbers of a row, float64 [s] in [0, 1)."""
    own = int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8], "big") >> 1
    return torch.rand(seq_len, dtype=torch.float64, generator=torch.Generator().manual_seed(own))
