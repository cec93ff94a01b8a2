"""Several processes on one run: ``torchrun --nproc-per-node N -m flatq run RECIPE``.

Calibration statistics are sums over samples, so each process computes its share of the samples and the sums are
all-reduced (gloo between CPUs, NCCL between GPUs). Rank 0 does everything else, that is solving and writing, and
broadcasts the finished block. So all processes have the same widths, even if their processors round differently.

The rest of the package uses only the functions below. Without torchrun they do nothing. All processes must have access
to the run folder (a shared file system between machines).

If a process dies or does not answer for ``PATIENCE``, all processes fail with ``LostProcess``. Finished blocks are
kept, and the run can be resumed with any number of processes.

Left out: distributed solves. They are a small part of the time at realistic numbers of tokens (docs/decisions/0020).
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
    """Whether torchrun started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """Rank of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[None]:
    """Initialise the process group for the enclosed work and destroy it afterwards.

    Raises:
        LostProcess: another process did not join.
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
    """Destroy the process group. Returns True on rank 0, which does the remaining work alone."""
    remains = first()
    if dist.is_initialized():
        dist.destroy_process_group()
    return remains


def leave() -> None:
    """Exit a process that torchrun started and that has finished its work.

    It skips interpreter shutdown: there, C++ threads of a library occasionally abort the process ("terminate called
    without an active exception"), and torchrun then reports a finished run as failed.
    """
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def size() -> int:
    """World size: the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is rank 0, the process that solves and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(samples: int) -> range:
    """The range of samples of this process: contiguous, as even as possible, ordered by rank."""
    rank, count = (dist.get_rank(), size()) if dist.is_initialized() else (0, 1)
    return range(samples * rank // count, samples * (rank + 1) // count)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if size() > 1:
        with _together():
            dist.all_reduce(tensor)
    return tensor


def broadcast(value: T) -> T:
    """Broadcast rank 0's value to all processes; the argument of other ranks is ignored."""
    if size() == 1:
        return value
    values: list[Any] = [value if first() else None]
    with _together():
        dist.broadcast_object_list(values)
    received: T = values[0]
    return received


def on_first(compute: Callable[[], T]) -> T:
    """Compute on rank 0 only and broadcast the result to all processes."""
    result: Any = compute() if first() else None
    return cast(T, broadcast(result))


def barrier() -> None:
    """Block until all processes have reached this point."""
    all_reduce(torch.zeros(1))


def broadcast_layer(layer: nn.Module, device: str) -> None:
    """Broadcast rank 0's parameters of a layer, shapes included, to all processes, in place."""
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
            f"another process of this run died or did not answer for {PATIENCE} ({str(lost).splitlines()[0]:.120}); "
            "see its error message. Finished blocks are kept: run the same command again, with any number of processes"
        ) from lost
