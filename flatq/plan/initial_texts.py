"""Calibration and evaluation texts of ``flatq init``: text of the model if it fits into memory, else what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from flatq.calibration.self_text import SIDE_BY_SIDE, document_script, stop_ids, writing_bytes
from flatq.errors import RecipeError
from flatq.machine.precision import resolved
from flatq.model.decoder import DecoderConfig
from flatq.sources.source import Source

TIERS = ((256, 2048), (128, 1024), (128, 512), (64, 512), (64, 256))  # samples x tokens, most tokens first
DOCS_TOKENS = 32_768  # of python-docs for calibration; the rest is for the evaluation
FREE_SHARE = 0.8  # of the free memory that generating text may need
HUB_MIX = ({"dataset": "c4", "share": 2}, {"dataset": "wikitext2", "share": 1}, {"dataset": "alpaca", "share": 1})
JUDGED, OWN = 8192, 4096  # tokens of the evaluation on another text, and on text of the calibration's kind


@dataclass(frozen=True)
class Texts:
    """Calibration and evaluation texts, with comments."""

    why: Sequence[str]
    judged: Sequence[Mapping[str, Any]]
    dataset: str = ""
    mix: Sequence[Mapping[str, Any]] = ()
    most: int = 1 << 24  # calibration tokens that the text has


def available_texts(source: Source, device: str) -> Texts:
    """Calibration and evaluation texts that are available here."""
    config = source.config
    longest = min(512, config.max_positions)
    docs = {"dataset": "python-docs", "tokens": JUDGED, "seq_len": longest}
    own = {"dataset": "held-out", "tokens": OWN, "seq_len": min(256, longest)}
    first = "Not calibrated on: the number to look at first."
    if _writes(source, device):
        why = [
            "Text that the model generates: no download, and the least damage on texts that were not calibrated on.",
            "Your own text: {dataset: text, path: FILE.txt}, alone or as a part of a `mix`.",
        ]
        return Texts(why, [docs | {"why": first}, own | {"why": "More of the same kind."}], dataset="self")
    small = "The model does not fit into this machine's free memory to generate its text (dataset: self)."
    if source.hub_id is not None:
        why = [small, "Several kinds of text, because calibration on one kind damages the others; downloaded."]
        seen = own | {"dataset": "wikitext2", "why": "Of a kind calibrated on."}
        return Texts(why, [docs | {"why": first}, seen], mix=HUB_MIX)
    why = [small, "The Python reference: no download, but one kind of text. Your own: {dataset: text, path: FILE.txt}."]
    held = own | {"why": "Held-out part of the calibration text. Add a text of another kind: damage there is larger."}
    return Texts(why, [held], dataset="python-docs", most=DOCS_TOKENS)


def _writes(source: Source, device: str) -> bool:
    """Whether the model can generate its calibration text here."""
    needed = writing_bytes(source.config, SIDE_BY_SIDE, TIERS[-1][1], getattr(torch, resolved("auto", device)))
    cuda = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
    if needed > FREE_SHARE * free:
        return False
    tokenizer, settings = source.tokenizer(), source.settings()
    try:
        document_script(tokenizer, stop_ids(settings, tokenizer), settings.get("bos_token_id"))
    except RecipeError:  # no token to begin a text with
        return False
    return True


def possible_tiers(config: DecoderConfig, texts: Texts) -> list[tuple[int, int]]:
    """Numbers of sequences and their lengths, most tokens first, as far as the text and the model's positions allow."""
    tiers = [(samples, min(length, config.max_positions)) for samples, length in TIERS]
    return [tier for tier in tiers if tier[0] * tier[1] <= texts.most]
