"""Choose the torch device; a requested device is never silently replaced by another one."""

from __future__ import annotations

import torch
from torch import Tensor

from flatq.errors import RecipeError
from flatq.machine import distributed


def solver_of(device: str) -> str:
    """The device for linear solves: ``device`` itself, or the CPU for MPS, which has no float64."""
    return "cpu" if device.startswith("mps") else device


def exact(x: Tensor) -> Tensor:
    """``x`` in float64; on the CPU if its device has no float64 (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def gpu_names() -> list[str]:
    """Names of the NVIDIA devices that torch can use."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def resolve_device(wanted: str) -> str:
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` as a torch device that exists.

    With several processes on one machine, each uses the GPU of its local rank.

    Raises:
        RecipeError: the device is unknown or not available.
    """
    count = torch.cuda.device_count()
    if wanted == "auto":
        wanted = "cuda" if count else "cpu"
    if wanted == "cuda" and count and distributed.launched():
        if distributed.local_size() > count:
            raise RecipeError(
                f"torchrun: {distributed.local_size()} processes on {count} GPU{'s' * (count > 1)}; "
                f"start {count} here at most (--nproc-per-node {count}), or give --device cpu"
            )
        wanted = f"cuda:{distributed.local_rank()}"
    if wanted == "cpu" or (wanted == "mps" and torch.backends.mps.is_available()):
        return wanted
    kind, _, number = wanted.partition(":")
    if kind == "cuda" and count and (not number or (number.isdigit() and int(number) < count)):
        return wanted
    have = [
        "cpu",
        *(f"cuda:{index}" for index in range(count)),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    raise RecipeError(f"--device {wanted}: not on this machine; it has {', '.join(have)} (auto takes the best)")
