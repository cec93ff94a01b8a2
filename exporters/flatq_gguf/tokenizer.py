"""A Hugging Face ``tokenizer.json`` as GGUF metadata.

llama.cpp has its own tokenizer: the file contains the tokens, their types, merges or scores, and the name of a built-in
pre-tokenizer (``pre_tokenizers.py``). Unsupported tokenizers raise an error; ``flatq run`` checks this before it
computes anything, if the model has a tokenizer.

Byte-level BPE becomes model ``gpt2``. BPE with byte fallback (Llama 2, Mistral) becomes ``llama``, for which llama.cpp
merges the adjacent pair with the highest score; the score of a token is the negated rank of its merge.
Left out: WordPiece and Unigram, which no supported family has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatq.export import Artifact, ExportError, read_json
from flatq_gguf.pre_tokenizers import known_names, name_of, steps_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
AGAIN = "run the recipe again with --fresh"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Everything under ``tokenizer.`` in a GGUF file.

    Attributes:
        model: ``gpt2`` or ``llama``.
        pre: name of the pre-tokenizer; None for ``llama``, which has none.
        tokens: one token per row of the embedding.
        types: NORMAL and so on, per token.
        merges: ``left right``, by rank; empty for ``llama``.
        scores: per token; empty for ``gpt2``.
        ids: ``bos``, ``eos``, ``unknown``, ``padding``, if the model has them; further end tokens as ``eot``, ``eom``.
        flags: ``add_bos_token`` and so on.
        chat_templates: by name.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]
    flags: dict[str, bool]
    chat_templates: dict[str, str]


def read_vocabulary(artifact: Artifact, size: int, pre: str | None) -> Vocabulary | None:
    """The tokenizer of an artifact; None if there is none.

    Args:
        artifact: the exported artifact.
        size: rows of the embedding; rows beyond the tokenizer's vocabulary are marked unused.
        pre: name of the pre-tokenizer given by the user.

    Raises:
        ExportError: GGUF does not support the tokenizer, or its pre-tokenizer is not recognized.
    """
    root, settings = artifact.root, artifact.settings
    path = root / FILE
    if not path.exists():
        return None
    described = read_json(path, dict[str, Any], AGAIN, error=ExportError)
    bare = _opened(path)
    if problems := objections(described, size, pre):
        raise ExportError("\n".join(f"{path}: {problem}" for problem in problems))
    beside = root / "tokenizer_config.json"
    config = read_json(beside, dict[str, Any], AGAIN, error=ExportError) if beside.exists() else {}
    tokens, types = _pieces(described, size)
    ids = _ids({token: index for index, token in enumerate(tokens)}, config, settings, described["model"])
    adds_bos, adds_eos = _frame(bare, ids)
    flags = {"add_bos_token": adds_bos, "add_eos_token": adds_eos}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    templates = artifact.chat_templates()
    if described["model"].get("byte_fallback"):
        if ids.get("unknown") is not None:
            types[ids["unknown"]] = UNKNOWN
        flags["add_space_prefix"] = _prefixes_space(described)
        scores = _scores(tokens, types, described["model"]["merges"])
        return Vocabulary("llama", None, tokens, types, [], scores, ids, flags, templates)
    flags["add_space_prefix"] = False
    return Vocabulary("gpt2", pre or name_of(described), tokens, types, merges, [], ids, flags, templates)


def objections(described: Mapping[str, Any], size: int, pre: str | None) -> list[str]:
    """Reasons why llama.cpp does not support this tokenizer, each with a remedy.

    Args:
        described: a parsed ``tokenizer.json``.
        size: rows of the embedding.
        pre: name of the pre-tokenizer given by the user.
    """
    model = described["model"]
    if model.get("type") != "BPE":
        return [f"tokenizers of type {model.get('type')} are not supported, only BPE; export to onnx or safetensors"]
    found = []
    beyond = [entry for entry in _entries(described) if entry[1] >= size]
    if beyond:
        piece, index, _ = beyond[0]
        found.append(
            f"token {piece!r} has id {index}, but the embedding has {size} rows; the tokenizer belongs to another model"
        )
    if not model.get("byte_fallback") and pre is None and name_of(described) is None:
        kinds = " + ".join(step["type"] for step in steps_of(described.get("pre_tokenizer"))) or "none"
        found.append(
            f"llama.cpp's name for this pre-tokenizer ({kinds}) is not known; known: {', '.join(known_names())}. Look "
            "it up in existing GGUF files of the model (key tokenizer.ggml.pre) and set the option pre_tokenizer"
        )
    return found


def _entries(described: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Every token with its id and type."""
    entries = [(piece, index, NORMAL) for piece, index in described["model"]["vocab"].items()]
    added = described.get("added_tokens", [])
    return entries + [(e["content"], e["id"], CONTROL if e["special"] else USER_DEFINED) for e in added]


def _pieces(described: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    for piece, index, kind in _entries(described):
        tokens[index], types[index] = piece, kind
    if described["model"].get("byte_fallback"):
        for index, piece in enumerate(tokens):
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                types[index] = BYTE
    return tokens, types


def _ids(
    number: dict[str, int], config: dict[str, Any], settings: dict[str, Any], model: dict[str, Any]
) -> dict[str, int]:
    """Ids of the special tokens, from the tokenizer, else from the model's settings."""
    found = {}
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")):
        piece = config.get(key)
        piece = piece.get("content") if isinstance(piece, dict) else piece
        index = number.get(piece) if piece is not None else None
        if index is None and name == "unknown":
            index = number.get(model.get("unk_token") or "")
        if index is None:
            stated = settings.get(f"{key}_id")
            index = stated[0] if isinstance(stated, list) else stated
        if index is not None:
            found[name] = int(index)
    ends = settings.get("eos_token_id")
    further = [int(end) for end in ends if end != found.get("eos")] if isinstance(ends, list) else []
    # llama.cpp stops at each of these three tokens.
    return found | dict(zip(("eot", "eom"), further, strict=False))


def lost_ends(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> list[int]:
    """End tokens of the model for which the file has no key: llama.cpp knows three."""
    ends = settings.get("eos_token_id")
    stops = {vocabulary.ids.get(name) for name in ("eos", "eot", "eom")}
    return [end for end in ends if end not in stops] if isinstance(ends, list) else []


def _opened(path: Path) -> Tokenizer:
    """The tokenizer, opened by the tokenizers library, which validates the file.

    Raises:
        ExportError: the library cannot open it.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as damaged:  # the library raises the base class itself
        raise ExportError(f"{path}: is damaged ({damaged}); {AGAIN}") from damaged


def _frame(bare: Tokenizer, ids: dict[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer adds bos and eos to a text, found by encoding one."""
    framed = bare.encode("a").ids
    starts = bool(framed) and framed[0] == ids.get("bos")
    return starts, len(framed) > 1 and framed[-1] == ids.get("eos")


def _prefixes_space(described: Mapping[str, Any]) -> bool:
    parts = [described.get("normalizer"), *steps_of(described.get("pre_tokenizer"))]
    flat = [step for part in parts if part for step in part.get("normalizers", [part])]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in flat
    )


def _scores(tokens: list[str], types: list[int], merges: list[Any]) -> list[float]:
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault(left + right, index)
    last = len(merges)
    return [float(-rank.get(piece, last)) if kind == NORMAL else 0.0 for piece, kind in zip(tokens, types, strict=True)]
