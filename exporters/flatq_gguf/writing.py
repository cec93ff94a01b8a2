"""Write the file: header and tensor table from shapes, then one tensor after another, then a rename.

The gguf package writes the bytes. Tensors are written one at a time, so memory is that of the largest table. A folder
with a ``.growing`` inside is an unfinished export.
"""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np

from flatq.export import Artifact, Exported
from flatq_gguf.files import model_files
from flatq_gguf.imatrix import importance, write_importance
from flatq_gguf.k_quants import (
    K_QUANTS,
    PROGRAM,
    Importance,
    allowed_kl,
    command,
    quantize,
    tool,
)
from flatq_gguf.metadata import context_length, describe, dimension, file_name, most_common, tokenize
from flatq_gguf.modelfile import write_modelfile
from flatq_gguf.tensors import Contents, Planned
from flatq_gguf.tokenizer import Vocabulary, lost_ends, read_vocabulary

# Allowed KL divergence, in nats, of rounding all matrices to a type: several times the values measured on SmolLM2-135M
# (F16 2e-5, BF16 1e-3, Q8_0 1e-3, Q5_0 0.1, Q4_1 0.2, Q4_0 0.37); small models are affected most.
ROUNDING_KL = {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q5_0": 0.5, "Q4_1": 1.0, "Q4_0": 1.5}

# On a CPU llama.cpp looks GELU up in a table of float16 numbers; 2e-6 was measured on Gemma 3 270M.
GELU_KL = 1e-4


def write_file(artifact: Artifact, out: Path, contents: Contents) -> Exported:
    """Write everything; see ``GgufExporter.write``."""
    planned = list(contents.planned())
    options = contents.options
    vocabulary = read_vocabulary(artifact, contents.config.vocab, options.pre_tokenizer)
    matrix = importance(artifact, contents) if options.imatrix else {}
    growing = out / ".growing"
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)
    imatrix = growing / file_name(artifact, contents, "imatrix") if matrix else None
    if imatrix is not None:
        write_importance(imatrix, matrix, artifact.manifest["tokens"]["calibration"])
    if options.precision in K_QUANTS:
        rounding = allowed_kl(options.precision)
        _write_quantized(artifact, growing, contents, vocabulary, matrix, imatrix)
    else:
        rounding = max(ROUNDING_KL[tensor.kind] for tensor in planned if not tensor.carries_codes)
        path = growing / file_name(artifact, contents, most_common(planned))
        _write_tensors(artifact, path, contents, vocabulary)
    if contents.config.activation != "silu":
        rounding = max(rounding, GELU_KL)
    files = [path.replace(out / path.name) for path in sorted(growing.iterdir())]
    growing.rmdir()
    notes = _notes(contents, planned, vocabulary, model_files(out), imatrix)
    if vocabulary is not None and (lost := lost_ends(vocabulary, artifact.settings)):
        notes.append(f"llama.cpp stops at three tokens; it does not stop at {', '.join(map(str, lost))} (token ids)")
    modelfile, note = write_modelfile(out, artifact, model_files(out), vocabulary, context_length(contents))
    return Exported(
        out,
        (*files, *modelfile),
        notes=(*notes, *note),
        details={"architecture": contents.architecture.name},
        rounding_kl=rounding,
    )


def _write_quantized(
    artifact: Artifact,
    growing: Path,
    contents: Contents,
    vocabulary: Vocabulary | None,
    matrix: Importance,
    imatrix: Path | None,
) -> None:
    """Write a K type: first in float16, then quantize with llama.cpp."""
    precision, by = contents.options.precision, tool(contents.options.quantize_with)
    assert by is not None  # ``check`` makes sure of it
    half = growing / "half"
    half.mkdir()
    _write_tensors(artifact, half / "half.gguf", contents, vocabulary)
    parts = sorted(half.iterdir())
    target = growing / file_name(artifact, contents, precision)
    target = target if len(parts) == 1 else target.with_suffix("")  # llama.cpp numbers the parts
    quantize(parts[0], target, precision, by=by, split=len(parts) > 1, matrix=matrix, imatrix=imatrix)
    shutil.rmtree(half)


def _write_tensors(artifact: Artifact, path: Path, contents: Contents, vocabulary: Vocabulary | None) -> None:
    """Write one file, or numbered parts if the tensors have more than ``split_above`` bytes."""
    import gguf

    planned, split_above = list(contents.planned()), contents.options.split_above
    split = split_above if sum(tensor.bytes for tensor in planned) > split_above else 0
    with closing(gguf.GGUFWriter(None, contents.architecture.name, split_max_size=split)) as writer:
        describe(writer, artifact, contents, most_common(planned))
        dimension(writer, contents)
        tokenize(writer, vocabulary)
        for tensor in planned:
            ggml = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, ggml)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(np.ascontiguousarray(contents.tensor(tensor, artifact)))
        writer.flush()
        for file in writer.fout:
            os.fsync(file.fileno())


def _notes(
    contents: Contents,
    planned: list[Planned],
    vocabulary: Vocabulary | None,
    files: list[Path],
    imatrix: Path | None,
) -> list[str]:
    config, written = contents.config, contents.architecture.written
    notes = [f"architecture in the file: {contents.architecture.name}"]
    if config.activation != "silu":
        notes.append("on a CPU llama.cpp reads GELU from a table of float16 numbers, so its logits differ a little")
    if any(a.d_v != b.d_v for a, b in zip(config.layers, written.layers, strict=True)):
        notes.append("value heads are padded with zeros: v, o and the V cache are as large as in the original model")
    wider = [b.d_ff - a.d_ff for a, b in zip(config.layers, written.layers, strict=True)]
    if any(wider):
        notes.append(f"{sum(wider)} zero MLP channels were added, to fill blocks or for equal widths in all layers")
    if contents.options.precision == "codes":
        notes += _uncarried(contents, planned)
    if context_length(contents) < (contents.options.context_length or config.max_positions):
        notes.append(
            f"context length {context_length(contents)}: limited to this model's sliding window, which llama.cpp does "
            "not apply"
        )
    if vocabulary is None:
        notes.append("the artifact has no tokenizer.json, so the file has no tokenizer and accepts only token ids")
    if contents.options.precision in ("f32", "f16", "bf16"):
        model, matrix = files[0].name, None if imatrix is None else imatrix.name
        target = f"{model.rsplit('-', 1)[0]}-Q4_K_M.gguf"
        notes.append(f"for K-quants: {' '.join(command(PROGRAM, model, target, 'q4_k_m', imatrix=matrix))}")
    return notes


def _uncarried(contents: Contents, planned: list[Planned]) -> list[str]:
    """Notes about matrices that are not stored as the artifact's codes, with the reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for tensor in planned:
        if tensor.source and len(tensor.shape) == 2 and not tensor.carries_codes:
            stem = tensor.source.removesuffix(".weight")
            scaled = contents.architecture.factor(tensor.source) != 1
            why = (
                "because llama.cpp multiplies the embedding of this architecture"
                if scaled
                else "because a block of 32 would span groups with two scales (in the flat stage, values: whole or "
                "rank_multiple: 32 avoids it)"
                if stem in contents.grids
                else "because they are not quantized"
            )
            found.setdefault((tensor.kind, why), []).append(stem)
    return [
        f"stored as {kind}, {why}: {stems[0]}{f' and {len(stems) - 1} more' if len(stems) > 1 else ''}"
        for (kind, why), stems in found.items()
    ]
