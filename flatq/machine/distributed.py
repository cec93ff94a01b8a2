"""Several processes on one run: ``torchrun --nproc-per-node N -m flatq run RECIPE``.

Calibration is a sum over samples, so each process takes its share of them and the sums are added up over all
processes (gloo between CPUs, NCCL between GPUs). Everything else, which is solving and writing, is done by the first
process; the others receive the finished block. That keeps one source of truth: no two processes can come to different
widths because their processors round differently.

The functions below are all that the rest of the package knows of it. Without torchrun they do nothing, and the same
code is a run of one process. All processes must see the run folder (a shared file system between machines).

A process that dies, or does not answer for ``PATIENCE``, ends the run of all with ``LostProcess``. What was finished
stays, and any other number of processes goes on from there.

Left out: splitting the solves. They are a small part of the time at realistic numbers of tokens (docs/decisions/0020).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flatq.errors import LostProcess

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # the longest solve of a large block takes minutes


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """Which process of this machine: it takes the GPU of that number."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """How many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes that torchrun started, for the enclosed work.

    Raises:
        LostProcess: they did not come.
    """
    if not launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _together():
        dist.init_process_group(backend, timeout=PATIENCE)
    if not first():
        logging.getLogger("flatq").setLevel(logging.ERROR)
    try:
        yield
    finally:
        part()


def part() -> bool:
    """End what is done together: from here each process is alone. True in the first one, which has the rest to do."""
    going_on = first()
    if dist.is_initialized():
        dist.destroy_process_group()
    return going_on


def leave() -> None:
    """End a process that torchrun started and whose work is done.

    Without the usual tidying up: in it C++ threads of a library once in a while abort the process ("terminate called
    without an active exception"), and torchrun then calls a finished run failed.
    """
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that solves and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(samples: int) -> range:
    """The samples of this process: contiguous, as even as possible, in the order of the processes."""
    rank, count = (dist.get_rank(), size()) if dist.is_initialized() else (0, 1)
    return range(samples * rank // count, samples * (rank + 1) // count)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; the result is the same in each."""
    if size() > 1:
        with _together():
            dist.all_reduce(tensor)
    return tensor


def broadcast(value: T) -> T:
    """What the first process says, in all processes; the others' own value does not matter."""
    if size() == 1:
        return value
    told: list[Any] = [value if first() else None]
    with _together():
        dist.broadcast_object_list(told)
    found: T = told[0]
    return found


def on_first(compute: Callable[[], T]) -> T:
    """What the first process computes, in all processes; the others do not compute it."""
    result: Any = compute() if first() else None
    return cast(T, broadcast(result))


def barrier() -> None:
    """Go on when all processes are here."""
    all_reduce(torch.zeros(1))


def broadcast_layer(layer: nn.Module, device: str) -> None:
    """Give all processes the first one's parameters, whatever shapes they now have."""
    if size() == 1:
        return
    shapes = broadcast({name: tuple(parameter.shape) for name, parameter in layer.named_parameters()})
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        tensor = layer.get_parameter(name).data.contiguous() if first() else torch.empty(shape, device=device)
        with _together():
            dist.broadcast(tensor, 0)
        if not first():
            layer.get_submodule(module).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as lost:  # gloo and NCCL report a closed connection as plain RuntimeErrors
        raise LostProcess(
            f"another process of this run is gone, or silent for {PATIENCE} ({str(lost).splitlines()[0]:.120}); "
            "its own message says why. Finished blocks are kept: run the same command again, with any number of "
            "processes"
        ) from lost
