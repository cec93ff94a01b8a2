"""Memory use of this process, as the operating system reports it.

On Linux the peak is ``VmHWM`` and not ``getrusage``'s ``ru_maxrss``: the latter survives ``exec``, so a small child
process of a large parent would report the parent's peak.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import psutil


def rss_bytes() -> int:
    """Current resident memory (RSS)."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since it started its program."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int:
    """Peak memory that torch reserved on all NVIDIA devices together since ``forget_peak``; 0 without a device.

    Reserved memory may be unused by torch, but is not available to other programs on the device.
    """
    torch = _torch_on_gpus()
    return 0 if torch is None else sum(map(torch.cuda.max_memory_reserved, range(torch.cuda.device_count())))


def forget_peak() -> bool:
    """Reset the peaks; False where the system cannot do that for resident memory (all but Linux)."""
    if (torch := _torch_on_gpus()) is not None:
        torch.cuda.empty_cache()
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    switch = Path("/proc/self/clear_refs")
    if not switch.exists():
        return False
    switch.write_text("5")
    return True


def give_back() -> bool:
    """Return freed heap memory to the system (``malloc_trim``); False where the C library has no such call.

    The heap keeps free blocks between blocks in use: after a phase that is half a gigabyte on SmolLM2.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return bool(trim is not None and trim(0))


def device_memory_bytes(pid: int) -> int | None:
    """Memory that a process holds on all NVIDIA devices; None if it cannot be measured (it is never estimated).

    NVML counts the allocations of all libraries. Without NVML (package ``nvidia-ml-py``), it is what torch has reserved
    in this process.
    """
    held = _nvml_bytes(pid)
    if held is None and pid == os.getpid():
        held = peak_device_bytes() or None
    return held


def _torch_on_gpus() -> Any:
    """The torch module, if this process has already used it on an NVIDIA device."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _nvml_bytes(pid: int) -> int | None:
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        found = [
            process.usedGpuMemory
            for index in range(nvml.nvmlDeviceGetCount())
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index))
            if process.pid == pid and process.usedGpuMemory is not None
        ]
        nvml.nvmlShutdown()
    except nvml.NVMLError:
        return None  # no driver, or one that does not report it
    return sum(found) if found else None
