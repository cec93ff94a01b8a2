"""Chats written out by a model's chat template, which is somebody else's program.

transformers runs templates in a sandbox of jinja2 that keeps them from files and code, but not from looping forever or
from allocating all memory. So a template runs in a forked process with a limit of memory, and a process that does not
answer is killed. Where processes cannot be forked (Windows) it runs without these limits.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from flatq.files import from_json

SECONDS = 10.0  # for one chat; a usual template takes a millisecond
MEMORY = 512 << 20  # bytes, beyond those of this process
LONGEST = 10 << 20  # bytes of one written chat


class TemplateRefuses(Exception):
    """A chat template raised an error or was ended; the message is one line."""


def written_out(tokenizer: Any, chats: Sequence[Sequence[dict[str, Any]]], **settings: Any) -> Iterator[str]:
    """The text of each chat.

    Args:
        tokenizer: with a chat template.
        chats: lists of messages with role and content.
        settings: further arguments of ``apply_chat_template``.

    Raises:
        TemplateRefuses: the template raises, takes longer than ``SECONDS`` or more than ``MEMORY`` for a chat, or
            writes more than ``LONGEST``.
    """
    if not hasattr(os, "fork"):
        for chat in chats:
            yield _words(_applied(tokenizer, chat, settings))
        return
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child runs no code that needs the other threads
        child = os.fork()
    if child == 0:
        _answer_and_end(tokenizer, chats, settings, reading, writing)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb", buffering=0) as answers:
            read = bytearray()
            for _ in chats:
                yield _words(from_json(_line(answers, read).decode()))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _words(answer: dict[str, str]) -> str:
    if "fault" in answer:
        raise TemplateRefuses(answer["fault"])
    return answer["text"]


def _applied(tokenizer: Any, chat: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, str]:
    try:
        text = str(tokenizer.apply_chat_template(list(chat), tokenize=False, **settings))
        if len(text) > LONGEST:
            return {"fault": f"it writes more than {LONGEST >> 20} MB"}
        return {"text": text}
    except MemoryError:
        return {"fault": f"it needs more than {MEMORY >> 20} MB of memory"}
    except RecursionError:
        return {"fault": "it calls itself too deeply"}
    except Exception as refused:  # a template may raise any exception
        return {"fault": " ".join(str(refused).split())[:300] or type(refused).__name__}


def _line(answers: BinaryIO, read: bytearray) -> bytes:
    """The child's next answer, or one that says that it gave none in time; ``read`` keeps what follows it."""
    until = time.monotonic() + SECONDS
    while b"\n" not in read:
        ready, _, _ = select.select([answers], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return json.dumps({"fault": f"it did not end within {SECONDS:g} seconds"}).encode()
        part = answers.read(1 << 16)
        if not part:
            return json.dumps({"fault": "it ended the process that ran it"}).encode()
        read += part
    line, _, rest = read.partition(b"\n")
    read[:] = rest
    return bytes(line)


def _answer_and_end(
    tokenizer: Any, chats: Sequence[Sequence[dict[str, Any]]], settings: dict[str, Any], reading: int, writing: int
) -> None:
    """The child's side; does not return."""
    try:
        os.close(reading)
        _limit_memory()
        with os.fdopen(writing, "wb", buffering=0) as answers:
            for chat in chats:
                answers.write(json.dumps(_applied(tokenizer, chat, settings)).encode() + b"\n")
    finally:
        os._exit(0)


def _limit_memory() -> None:
    import resource

    statm = "/proc/self/statm"
    if os.path.exists(statm):
        with open(statm) as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
