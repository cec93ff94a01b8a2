"""A description of this machine, one line per property; paste it into bug reports.

Nothing is loaded or measured: versions, devices, instruction sets, runtimes, plug-ins, free memory and disk space.
A line that starts with ``!`` states a problem and how to fix it.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from importlib.metadata import entry_points
from pathlib import Path

import psutil
import torch

from flatq.export.protocols import GROUP
from flatq.machine.environment import version_of
from flatq.report.schema import Environment
from flatq.units import size

SCARCE = 4_000_000_000  # bytes; a quickstart run takes about 3 GB of memory and less of disk


def doctor(folder: Path | None = None) -> list[str]:
    """Describe the machine.

    Args:
        folder: where runs would be written; the current folder if None.
    """
    found = Environment.collect()
    return [
        f"flatq {found.flatq} on Python {found.python}, {found.platform}",
        f"torch {found.torch}, transformers {version_of('transformers')}",
        f"processor: {found.cpu}, {found.cores} cores, {torch.get_num_threads()} torch threads",
        _bf16(),
        _cuda(),
        _onnxruntime(found.onnxruntime),
        *_exporters(),
        _free("memory", psutil.virtual_memory().available, found.memory_bytes, "use fewer or shorter samples"),
        _disk(folder or Path.cwd()),
    ]


def _bf16() -> str:
    """Whether forward passes in bfloat16 are faster than in float32 on this processor."""
    flags = _cpu_flags()
    if "amx_bf16" in flags:
        return "bfloat16: AMX tiles, several times as fast as float32"
    if "avx512_bf16" in flags:
        return "bfloat16: AVX-512 instructions"
    return f"bfloat16: emulated, so float32 is used (torch sees {torch.backends.cpu.get_cpu_capability()})"


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without it"
        return f"CUDA: no device ({built})"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    listed = ", ".join(f"{device.name} with {size(device.total_memory)}" for device in devices)
    return f"CUDA {torch.version.cuda}: {listed}"


def _onnxruntime(version: str | None) -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return "! onnxruntime is not installed, so ONNX exports cannot be verified: pip install 'flatq[cpu]'"
    providers = importlib.import_module("onnxruntime").get_available_providers()
    return f"onnxruntime {version or 'of unknown version'}: {', '.join(providers)}"


def _exporters() -> list[str]:
    """One line per exporter plug-in; those that cannot be imported with the reason."""
    lines = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            entry.load()
        except (ImportError, AttributeError) as broken:
            lines.append(f"! exporter {entry.name}: {entry.value} cannot be imported: {broken}; reinstall its package")
        else:
            package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
            lines.append(f"exporter {entry.name}: {entry.value}{package}")
    return lines or ["! no exporter is installed: reinstall flatq, its own exporters come with it"]


def _disk(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return _free(f"disk at {folder}", usage.free, usage.total, "choose another folder with --out")


def _free(what: str, free: int, total: int, remedy: str) -> str:
    line = f"{what}: {size(free)} free of {size(total)}"
    return line if free >= SCARCE else f"! {line}: {remedy}"
