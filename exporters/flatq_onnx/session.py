"""Opening a graph in onnxruntime so that it runs where it was asked to run, and saying so if it does not.

onnxruntime answers a wish for CUDA that it cannot fulfil with a warning and the CPU, and moves single nodes to the
CPU without a word. Both are found out here: providers are compared after loading, and the session's record of
which node went where is read. An attention node that went to the CPU would get copies of the cache and lose what it
writes there, so such a session is not used.
"""

from __future__ import annotations

import io
import logging
import tempfile
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
SPIN_MICROSECONDS = "100"  # as quick as without a limit, measured (docs/log/)
LEVELS: Mapping[str, tuple[Any, tuple[str, ...]]] = {  # of graph optimizations: the level, and what is switched off
    "all": (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ()),
    "extended": (ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, ()),
    "basic": (ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, ()),
    "disabled": (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ()),
    "all without ConstantFolding": (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ("ConstantFolding",)),
}
DEFAULT_LEVEL = "all"
WORK = frozenset(  # the operators that take the time; a few shape computations may sit on the CPU by right
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
        "TensorScatter",
    }
)


@dataclass(frozen=True, slots=True)
class Session:
    """An open session.

    Attributes:
        wanted: the provider that was to run everything.
        fallbacks: working nodes that another provider got, how many of each operator, by provider.
        replays: whether a step can be recorded as a CUDA graph; every run must then say which one it is.
    """

    ort: Any
    wanted: str
    fallbacks: Mapping[str, Mapping[str, int]]
    replays: bool = False

    @property
    def provider(self) -> str:
        """What really runs the nodes, with the exceptions."""
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
        provider: ``auto`` is CUDA where there is one that can compute the graph.
        threads: 0 is one per physical core.
        exact: compute with float32 as it is: no int8 activations in MatMulNBits, no TensorFloat-32.
        codes: whether there are MatMulNBits nodes.
        replay: on CUDA, record steps as CUDA graphs if all nodes are there.
        level: of graph optimizations, one of ``LEVELS``.

    Raises:
        ExportError: the file cannot be loaded, or CUDA was asked for and cannot be had.
    """
    wanted = _choose(provider)
    said = _preloaded() if wanted == CUDA else ""
    options, switched_off = _options(threads, level)
    source: str | bytes = str(path)
    if exact and codes:
        source = _with_float_activations(path)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session, replays = _loaded(source, options, switched_off, wanted, exact, replay and wanted == CUDA)
    except Exception as problem:  # onnxruntime's own exceptions have no common type but this
        raise ExportError(f"{path}: onnxruntime {ort.__version__} cannot load it: {problem}") from problem
    if wanted not in session.get_providers():
        if provider == "cuda":
            raise ExportError(_no_cuda(f"its libraries could not be loaded ({said or 'no device?'})"))
        wanted = CPU
    moved = _elsewhere(session, wanted)
    if wanted == CUDA and any("GroupQueryAttention" in kinds for kinds in moved.values()):
        why = f"{path}: CUDA has no GroupQueryAttention for this graph, only one for float16"
        if provider == "cuda":
            raise ExportError(f"{why}; export with target: cuda or activations: fp16, or use provider cpu")
        logger.warning("%s; running on the CPU", why)
        return open_session(path, provider="cpu", threads=threads, exact=exact, codes=codes, level=level)
    return Session(session, wanted, moved, replays and wanted == CUDA)


@cache
def _preloaded() -> str:
    """Load CUDA's libraries from where pip puts them; what onnxruntime says of it, which is nothing if all is well.

    A process that has not imported torch would only look where the system keeps its libraries.
    """
    said = io.StringIO()
    with redirect_stdout(said):
        ort.preload_dlls()
    return " ".join(said.getvalue().split())


def _options(threads: int, level: str) -> tuple[Any, tuple[str, ...]]:
    """Options of a session, and the optimizers that it leaves out."""
    options = ort.SessionOptions()
    options.graph_optimization_level, switched_off = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # warnings speak of our optional input; errors are raised
    # A thread that spins while it waits is quicker at the next node, but takes a core from whoever has work.
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options, switched_off


def _loaded(
    source: str | bytes, options: Any, switched_off: tuple[str, ...], wanted: str, exact: bool, replay: bool
) -> tuple[Any, bool]:
    """The session, and whether it can record; a graph with nodes elsewhere cannot, and is loaded without."""
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
    """The providers that this build of onnxruntime has, as ``open_session`` calls them."""
    return ("cpu", "cuda") if CUDA in ort.get_available_providers() else ("cpu",)


def _choose(provider: str) -> str:
    present = ort.get_available_providers()
    if provider not in ("auto", "cpu", "cuda"):
        raise ExportError(f"onnx: provider {provider!r} is unknown; use auto, cpu or cuda")
    if provider == "cuda" and CUDA not in present:
        raise ExportError(_no_cuda(f"this build of onnxruntime has {', '.join(present)}"))
    return CUDA if provider != "cpu" and CUDA in present else CPU


def _no_cuda(why: str) -> str:
    return f"onnx: provider cuda was asked for but cannot be had: {why}; install flatq[gpu] or use provider cpu"


def _with_float_activations(path: Path) -> bytes:
    """The graph with every MatMulNBits at accuracy level 0; weights in a file of their own stay there."""
    if path.suffix == ".ort":
        with tempfile.TemporaryDirectory() as folder:
            from flatq_onnx.writing import convert  # imports onnx_ir, which the other uses of a session do without

            plain = Path(folder) / "model.onnx"
            convert(path, plain, "ONNX")
            return _with_float_activations(plain)
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
                attribute.g.name = attribute.g.name or f"{node.name}.{attribute.name}"  # an .ort file has no such names
                _set_float_activations(attribute.g)


def _elsewhere(session: Any, wanted: str) -> dict[str, Counter[str]]:
    """Working nodes that ``wanted`` did not get: provider -> operator -> how many."""
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        kinds = Counter(node.op_type for node in part.get_nodes() if node.op_type in WORK)
        if part.ep_name != wanted and kinds:
            found.setdefault(part.ep_name, Counter()).update(kinds)
    return found
