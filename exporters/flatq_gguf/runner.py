"""Runner for GGUF files in llama.cpp, through the C API of llama-cpp-python.

The high-level class of that package supports a single conversation; here the rows of a batch are sequences of one
context, and the logits of every position are needed. A context is created for each prompt, with its capacity.

Built natively on a CPU with AMX, some releases of llama-cpp-python crash on every quantized file, so on such builds the
file is first loaded in a child process, and a crash becomes an error. llama.cpp's log is captured instead of printed,
for error messages and for the sizes of its caches.

Axes: b rows, s positions of a prompt.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from flatq.export import ExportError, FloatArray, IntArray, require_positions
from flatq_gguf.exact import is_float32, write_float32
from flatq_gguf.files import model_files

F32 = 0  # ggml_type
ALL_LAYERS = 1 << 16
TOKENS_AT_ONCE = 512
KEPT_LINES = 2000
LOG: list[str] = []  # llama.cpp has one log per process
REBUILD = "`make llamacpp` builds llama-cpp-python without AMX"


def _keep(level: int, text: bytes, data: Any) -> None:
    del level, data
    LOG.append(text.decode("utf-8", "replace"))
    del LOG[:-KEPT_LINES]


_CALLBACK = llama_cpp.llama_log_callback(_keep)  # llama.cpp holds a bare pointer to it


def keep_log() -> int:
    """Capture llama.cpp's log in ``LOG``; returns its current length."""
    llama_cpp.llama_log_set(_CALLBACK, ctypes.c_void_p(0))
    return len(LOG)


def available() -> tuple[str, ...]:
    """The providers of this build of llama.cpp, as for ``LlamaCppRunner``."""
    return ("cpu", "cuda") if llama_cpp.llama_supports_gpu_offload() else ("cpu",)


class LlamaCppRunner:
    """An open GGUF file; satisfies ``flatq.export.Runner``.

    Args:
        root: export folder.
        provider: ``auto``, ``cpu`` or ``cuda``.
        threads: 0 is one per CPU.
        exact: run a float32 copy of the file, with a float32 cache and plain attention.

    Raises:
        ExportError: the folder has no GGUF file, or llama.cpp cannot load it.
    """

    def __init__(self, root: Path, *, provider: str = "auto", threads: int = 0, exact: bool = False) -> None:
        self.root = root
        self.vocab = 0
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._length = 0
        self._copies: Path | None = None
        files = model_files(root)
        if not files:
            raise ExportError(f"{root}: has no .gguf file; export the model again")
        keep_log()
        llama_cpp.llama_backend_init()
        can_offload = bool(llama_cpp.llama_supports_gpu_offload())
        if provider == "cuda" and not can_offload:
            raise ExportError(
                "gguf: provider cuda is not available: this llama-cpp-python is built for the CPU; build it with "
                'CMAKE_ARGS="-DGGML_CUDA=ON", or use cpu or auto'
            )
        self._device = "gpu" if can_offload and provider != "cpu" else "cpu"
        self._exact = exact
        self._threads = threads or os.cpu_count() or 1
        file = files[0]
        if exact and not is_float32(files):
            self._copies = Path(tempfile.mkdtemp(prefix=".float32-", dir=root))
            file = self._copies / "model.gguf"
            write_float32(files, file)
        elif "AMX_INT8 = 1" in llama_cpp.llama_print_system_info().decode():
            _survives(root)
        self._load(file)

    def _load(self, file: Path) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = ALL_LAYERS if self._device == "gpu" else 0
        seen = len(LOG)
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        if not self._model:
            self.close()
            raise ExportError(f"{file}: llama.cpp cannot load it: {last_lines(seen)}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    @property
    def provider(self) -> str:
        """llama.cpp and its device."""
        return f"llama.cpp {self._device} (llama-cpp-python {llama_cpp.__version__})"

    @property
    def log(self) -> str:
        """The last lines that llama.cpp logged in this process."""
        return "".join(LOG)

    def logits(self, tokens: IntArray, valid: IntArray | None = None) -> FloatArray:
        """Logits of every position without a past, [b, s] -> [b, s, vocab]; 0 at padding (left or right)."""
        self._allow(tokens.shape[1])
        mask = np.ones_like(tokens, bool) if valid is None else np.asarray(valid) > 0
        self._begin(*tokens.shape)
        found = np.zeros((*tokens.shape, self.vocab), np.float32)
        for row in range(tokens.shape[0]):
            places = np.flatnonzero(mask[row])
            for start in range(0, len(places), TOKENS_AT_ONCE):
                part = places[start : start + TOKENS_AT_ONCE]
                positions = np.arange(start, start + len(part))
                found[row, part] = self._decode(tokens[row, part], positions, np.full(len(part), row), every=True)
        return found

    def start(self, tokens: IntArray, capacity: int) -> FloatArray:
        """Reset the cache, prefill it with a prompt, return the last logits, [b, s] -> [b, vocab]."""
        batch, length = tokens.shape
        if capacity < length:
            raise ExportError(f"gguf: capacity {capacity} is less than the prompt's {length} tokens")
        self._allow(capacity)
        self._begin(batch, capacity)
        self._length = length
        last = np.empty((batch, self.vocab), np.float32)
        for row in range(batch):
            for begin in range(0, length, TOKENS_AT_ONCE):
                part = tokens[row, begin : begin + TOKENS_AT_ONCE]
                positions = np.arange(begin, begin + len(part))
                last[row] = self._decode(part, positions, np.full(len(part), row), every=False)[0]
        return last

    def step(self, tokens: IntArray) -> FloatArray:
        """Append one token per row to the cache, [b] -> [b, vocab]."""
        if self._context is None:
            raise ExportError("gguf: step was called before start; call start first")
        positions = np.full(len(tokens), self._length)
        self._length += 1
        return self._decode(tokens, positions, np.arange(len(tokens)), every=True)

    def close(self) -> None:
        """Free the context, the model and the float32 copy."""
        self._drop_context()
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._model = None
        if self._copies is not None:
            shutil.rmtree(self._copies, ignore_errors=True)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without bos and eos; special tokens are recognized."""
        data, vocab = text.encode(), llama_cpp.llama_model_get_vocab(self._model)
        buffer = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, len(buffer), False, True)
        if count < 0:
            raise ExportError(f"gguf: llama.cpp could not tokenize {text[:40]!r}: {last_lines()}")
        return list(buffer[:count])

    def _allow(self, positions: int) -> None:
        require_positions(f"{self.root}", positions, llama_cpp.llama_model_n_ctx_train(self._model))

    def _begin(self, rows: int, capacity: int) -> None:
        self._drop_context()
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = rows
        parameters.n_ctx = rows * (-(-capacity // 256) * 256)
        parameters.n_batch = parameters.n_ubatch = max(TOKENS_AT_ONCE, rows)
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.no_perf = True
        if self._exact:
            parameters.type_k = parameters.type_v = F32
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        seen = len(LOG)
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            self._context = None
            raise ExportError(
                f"gguf: llama.cpp cannot create a context of {rows} x {capacity} positions: {last_lines(seen)}"
            )
        self._batch = llama_cpp.llama_batch_init(max(TOKENS_AT_ONCE, rows), 0, 1)

    def _drop_context(self) -> None:
        if self._context is not None:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
        self._context = None

    def _decode(self, tokens: IntArray, positions: IntArray, rows: IntArray, *, every: bool) -> FloatArray:
        """Logits of all given tokens [n, vocab], or of the last one [1, vocab]."""
        batch, count = self._batch, len(tokens)
        batch.n_tokens = count
        for index in range(count):
            batch.token[index], batch.pos[index] = int(tokens[index]), int(positions[index])
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, int(rows[index])
            batch.logits[index] = every or index == count - 1
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise ExportError(f"gguf: llama.cpp failed with code {code} on {count} tokens: {last_lines()}")
        outputs = count if every else 1
        pointer = llama_cpp.llama_get_logits(self._context)
        found: Any = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (outputs, self.vocab))
        return found.copy()


def last_lines(mark: int = 0) -> str:
    """The last error lines that llama.cpp logged since ``mark``, or its last lines."""
    lines = [line.strip() for line in "".join(LOG[mark:] or LOG).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return "; ".join((errors or lines)[-3:]) or "it gave no reason"


def _survives(root: Path) -> None:
    """Load the model in a child process and compute one token.

    Raises:
        ExportError: the child process failed.
    """
    probe = (
        "import sys, numpy, pathlib, llama_cpp; from flatq_gguf import runner; "
        "llama_cpp.llama_print_system_info = lambda: b''; "
        "runner.LlamaCppRunner(pathlib.Path(sys.argv[1]), provider='cpu').start(numpy.zeros((1, 4), int), 4)"
    )
    ended = subprocess.run([sys.executable, "-c", probe, str(root)], capture_output=True, text=True, check=False)
    if ended.returncode:
        message = ended.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ExportError(
            f"{root}: llama.cpp fails on this file here (exit code {ended.returncode}: {message[0]}). This build uses "
            f"AMX, with which some releases crash on every quantized file; {REBUILD}"
        )
