"""Open a graph in onnxruntime and detect if it does not run on the requested provider.

If CUDA is not available, onnxruntime uses the CPU with a warning, and single nodes can be assigned to the CPU silently.
Both are detected here: the session's providers are compared with the request, and its assignment of nodes is read. An
attention node on the CPU would write into a copy of the cache, so such a session is rejected.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from flatq.export import ExportError

logger = logging.getLogger(__name__)
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SPIN_MICROSECONDS = "100"  # as fast as without a limit (measured, docs/log/)
LEVELS: Mapping[str, tuple[Any, tuple[str, ...]]] = {  # of graph optimizations: the level, and disabled optimizers
    "all": (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ()),
    "extended": (ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, ()),
    "basic": (ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, ()),
    "disabled": (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ()),
    "all without ConstantFolding": (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ("ConstantFolding",)),
}
DEFAULT_LEVEL = "all"
WORK = frozenset(  # operators with significant cost; shape computations may run on the CPU
    {
        "Attention",
        "FusedMatMul",
        "GatherBlockQuantized",
        "Gemm",
        "GroupQueryAttention",
        "MatMul",
        "MatMulNBits",
        "RMSNormalization",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "Softmax",
        "ScatterND",
    }
)


@dataclass(frozen=True, slots=True)
class Session:
    """An open session.

    Attributes:
        wanted: the provider that should run all nodes.
        fallbacks: number of nodes in ``WORK`` that another provider runs, by provider and operator.
        replays: whether steps can be captured as CUDA graphs; every run must then give a graph id.
    """

    ort: Any
    wanted: str
    fallbacks: Mapping[str, Mapping[str, int]]
    replays: bool = False

    @property
    def provider(self) -> str:
        """The provider that runs the nodes, with the exceptions."""
        moved = [
            f"{provider} runs " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            for provider, kinds in self.fallbacks.items()
        ]
        return f"{self.wanted} (but {'; '.join(moved)})" if moved else self.wanted


def open_session(
    path: Path,
    *,
    provider: str = "auto",
    threads: int = 0,
    exact: bool = False,
    codes: bool = True,
    replay: bool = False,
    level: str = DEFAULT_LEVEL,
) -> Session:
    """Load a graph.

    Args:
        path: the graph's file.
        provider: ``auto`` is CUDA if it is available and supports the graph.
        threads: 0 is one per physical core.
        exact: compute in full float32: no int8 activations in MatMulNBits, no TensorFloat-32.
        codes: whether there are MatMulNBits nodes.
        replay: use CUDA graphs for steps if all nodes run on CUDA.
        level: of graph optimizations, one of ``LEVELS``.

    Raises:
        ExportError: the file cannot be loaded, or CUDA was requested and is not available.
    """
    wanted = _choose(provider)
    output = _preloaded() if wanted == CUDA else ""
    options, switched_off = session_options(threads, level)
    source: str | bytes = str(path)
    if exact and codes:
        source = _with_float_activations(path)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session, replays = _loaded(source, options, switched_off, wanted, exact, replay and wanted == CUDA)
    except Exception as problem:  # onnxruntime's exceptions have no other common base class
        raise ExportError(f"{path}: onnxruntime {ort.__version__} cannot load it: {problem}") from problem
    if wanted not in session.get_providers():
        if provider == "cuda":
            raise ExportError(_no_cuda(f"its libraries could not be loaded ({output or 'no device?'})"))
        wanted = CPU
    moved = _elsewhere(session, wanted)
    if wanted == CUDA and any("GroupQueryAttention" in kinds for kinds in moved.values()):
        why = f"{path}: CUDA supports GroupQueryAttention only in float16"
        if provider == "cuda":
            raise ExportError(f"{why}; export with target: cuda or activations: fp16, or use provider cpu")
        logger.warning("%s; running on the CPU", why)
        return open_session(path, provider="cpu", threads=threads, exact=exact, codes=codes, level=level)
    return Session(session, wanted, moved, replays and wanted == CUDA)


@cache
def _preloaded() -> str:
    """Load the CUDA libraries that pip has installed; returns onnxruntime's output, empty on success.

    Without this, only a process that has imported torch finds them.
    """
    output = io.StringIO()
    with redirect_stdout(output):
        ort.preload_dlls()
    return " ".join(output.getvalue().split())


def session_options(threads: int, level: str = DEFAULT_LEVEL) -> tuple[Any, tuple[str, ...]]:
    """Options of a session, and the optimizers that are disabled."""
    options = ort.SessionOptions()
    options.graph_optimization_level, switched_off = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # the warnings are about the optional input; errors are raised
    # Spinning threads start faster with the next node, but take CPU time from other threads.
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options, switched_off


def _loaded(
    source: str | bytes, options: Any, switched_off: tuple[str, ...], wanted: str, exact: bool, replay: bool
) -> tuple[Any, bool]:
    """The session, and whether it supports CUDA graphs, which need all nodes on CUDA."""
    providers: list[Any] = [CPU]
    if wanted == CUDA:
        settings = {"enable_cuda_graph": str(int(replay)), "use_tf32": str(int(not exact))}
        providers.insert(0, (CUDA, {**settings, "arena_extend_strategy": "kSameAsRequested"}))
    try:
        without = {"disabled_optimizers": list(switched_off)} if switched_off else {}
        return ort.InferenceSession(source, options, providers=providers, **without), replay
    except Exception as problem:
        if not (replay and "graph capture" in str(problem)):
            raise
        return _loaded(source, options, switched_off, wanted, exact, replay=False)


def available() -> tuple[str, ...]:
    """The providers of this build of onnxruntime, by their names for ``open_session``."""
    return ("cpu", "cuda") if CUDA in ort.get_available_providers() else ("cpu",)


def _choose(provider: str) -> str:
    present = ort.get_available_providers()
    if provider not in ("auto", "cpu", "cuda"):
        raise ExportError(f"onnx: provider {provider!r} is unknown; use auto, cpu or cuda")
    if provider == "cuda" and CUDA not in present:
        raise ExportError(_no_cuda(f"this build of onnxruntime has {', '.join(present)}"))
    return CUDA if provider != "cpu" and CUDA in present else CPU


def _no_cuda(why: str) -> str:
    return f"onnx: provider cuda is not available: {why}; install flatq[gpu] or use provider cpu"


def _with_float_activations(path: Path) -> bytes:
    """The graph with accuracy level 0 for every MatMulNBits; external weights stay in their file."""
    model = onnx.load(path, load_external_data=False)
    _set_float_activations(model.graph)
    serialized: bytes = model.SerializeToString()
    return serialized


def _set_float_activations(graph: Any) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
            if attribute.HasField("g"):
                _set_float_activations(attribute.g)


def _elsewhere(session: Any, wanted: str) -> dict[str, Counter[str]]:
    """Nodes in ``WORK`` that another provider than ``wanted`` runs: provider -> operator -> count."""
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        kinds = Counter(node.op_type for node in part.get_nodes() if node.op_type in WORK)
        if part.ep_name != wanted and kinds:
            found.setdefault(part.ep_name, Counter()).update(kinds)
    return found
