"""Mutations of bytes and of JSON, drawn from a seed."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

from flatq.files import BLANK, CHECKSUM

NUMBERS = (0, -1, 1, 2, 7, 63, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320)
TEXTS = (
    "", " ", "a" * 5000, "../../x", "/etc/passwd", "..\\x", "\x00", "\ud83d", "é", "\u2028", "nan", "inf", "1e999",
    "!!python/object/apply:os.system [touch pwned]", "{{ 9**9 }}", "%s%n", "file:///etc/passwd", "model.safetensors",
    "true", "null", "*", "(a+)+$", "[", "\\p{L}" * 50,
)  # fmt: skip
BYTES = (b"", b"\x00", b"\xff" * 8, b"{", b"[" * 2000, b"]", b'"', b"\xef\xbb\xbf", b"NaN", b"1e999", b"&a [*a]", b": ")


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """A few changes: bits, bytes, slices removed, doubled, moved, cut, or interesting pieces put in."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 1, 2, 4, 8, 64, 1024)))
        kind = draw.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            data[at:at] = draw.choice(BYTES)
        elif kind == 5:
            del data[at:]
        else:
            width = draw.choice((1, 2, 4, 8))
            data[at : at + width] = (draw.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)) % 256**width).to_bytes(
                width, "little"
            )
    return bytes(data)


def mutated_json(content: bytes, draw: random.Random) -> bytes:
    """A value or key of a JSON document replaced, removed, doubled or moved; sometimes bytes of its text."""
    if draw.random() < 0.2:
        return mutated_bytes(content, draw)
    value = json.loads(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        value = _changed(value, draw)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutated_checksummed(content: bytes, draw: random.Random) -> bytes:
    """As ``mutated_json``, mostly with a digest that is right, so that what is behind its comparison is reached."""
    if draw.random() < 0.3:
        return mutated_json(content, draw)
    value = {key: part for key, part in json.loads(content).items() if key != CHECKSUM}
    value = _changed(value, draw)
    blank = json.dumps({**(value if isinstance(value, dict) else {"x": value}), CHECKSUM: BLANK}).encode(
        "utf-8", "surrogatepass"
    )
    head, _, tail = blank.rpartition(BLANK.encode())
    return head + hashlib.sha256(blank).hexdigest().encode() + tail


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.randrange(8)
        if kind == 0:
            return {name: part for name, part in value.items() if name != key}
        if kind == 1:
            return {**value, draw.choice(TEXTS): anything(draw)}
        if kind == 2:
            return {draw.choice((name, name, name.upper())): part for name, part in value.items()}
        return {**value, key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        kind = draw.randrange(5)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return [*value[:at], anything(draw), *value[at:]]
        return [*value[:at], _changed(value[at], draw), *value[at + 1 :]]
    return anything(draw)


def anything(draw: random.Random, depth: int = 0) -> Any:
    """A value of any JSON type."""
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind in (1, 2):
        return draw.choice(NUMBERS)
    if kind in (3, 4):
        return draw.choice(TEXTS)
    if kind == 5:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 6:
        nested: Any = 1
        for _ in range(draw.choice((3, 50, 900))):
            nested = [nested]
        return nested
    return {draw.choice(TEXTS): anything(draw, depth + 1) for _ in range(draw.randrange(3))}
