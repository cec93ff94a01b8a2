"""Where to compute: what is there decides, what was asked for is never silently replaced."""

from __future__ import annotations

import torch

from flatq.errors import RecipeError


def resolve_device(wanted: str) -> str:
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` as a torch device that exists.

    Raises:
        RecipeError: the device is unknown or not there.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu" or (wanted == "mps" and torch.backends.mps.is_available()):
        return wanted
    kind, _, number = wanted.partition(":")
    count = torch.cuda.device_count()
    if kind == "cuda" and count and (not number or (number.isdigit() and int(number) < count)):
        return wanted
    have = ["cpu", *(f"cuda:{index}" for index in range(count))]
    raise RecipeError(f"--device {wanted}: not on this machine; it has {', '.join(have)} (auto takes the best)")
