"""Programs that people run ONNX folders with write what the artifact writes: greedy, one prompt and a padded batch."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flatq.artifact import Artifact
from flatq.calibration.cache_ranges import cache_ranges
from flatq.tokenizer import open_tokenizer
from flatq_onnx import OnnxExporter, OnnxOptions
from flatq_onnx.runner import OnnxRunner
from tests.interop.greedy import follow, greedy

PYTHON = os.environ.get("FLATQ_OPTIMUM_PYTHON", "")
RUN = os.environ.get("FLATQ_INTEROP_RUN", "")
NEW, LONG = 10, 24
pytestmark = [
    pytest.mark.optimum,
    pytest.mark.skipif(not PYTHON, reason="make interop-optimum sets FLATQ_OPTIMUM_PYTHON"),
]
PROMPTS = ["the bright river", "a slow bird sings under the stone of"]

OPTIMUM = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or "</s>"
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], use_io_binding=False)
found = []
for texts in json.loads(sys.argv[2]):
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert len(texts) == 1 or batch["attention_mask"][0, 0] == 0, "not padded on the left"
    rows = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=int(sys.argv[3]),
        do_sample=False, eos_token_id=None,
    )
    found.append(rows[:, batch["input_ids"].shape[1]:].tolist())
print("FOUND", json.dumps(found))
"""
GENAI = """
import json, sys, numpy, onnxruntime_genai
model = onnxruntime_genai.Model(sys.argv[1])
tokenizer = onnxruntime_genai.Tokenizer(model)
found = []
for texts in json.loads(sys.argv[2]):
    tokens = tokenizer.encode_batch(texts) if len(texts) > 1 else tokenizer.encode(texts[0])
    longest = max(len(tokenizer.encode(text)) for text in texts)
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(max_length=longest + int(sys.argv[3]), batch_size=len(texts), do_sample=False)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    found.append([numpy.array(generator.get_sequence(row))[longest:].tolist() for row in range(len(texts))])
print("FOUND", json.dumps(found))
"""

TURNS = """
import json, sys, numpy, onnxruntime_genai
model = onnxruntime_genai.Model(sys.argv[1])
first, second, new = (json.loads(text) for text in sys.argv[2:])
settings = onnxruntime_genai.GeneratorParams(model)
settings.set_search_options(max_length=len(first) + len(second) + 3 * new, do_sample=False)
generator = onnxruntime_genai.Generator(model, settings)
found = []

def write(tokens):
    generator.append_tokens(numpy.array(tokens, numpy.int32))
    before = len(generator.get_sequence(0))
    for _ in range(new):
        generator.generate_next_token()
    found.append(numpy.array(generator.get_sequence(0))[before:].tolist())

write(first)
last = int(generator.get_sequence(0)[-1])
generator.rewind_to(len(generator.get_sequence(0)) - 1)  # 0.18 appends without having read the last token
write([last, *second])
generator.rewind_to(len(first))
write(second)
generator.rewind_to(0)
write(first)
print("FOUND", json.dumps({"written": found, "counts": dict(generator.get_speculative_stats())}))
"""


@pytest.fixture
def artifact(request: pytest.FixtureRequest) -> Artifact:
    """A tiny model's, or that of the finished run whose folder FLATQ_INTEROP_RUN names."""
    return Artifact.open(Path(RUN) if RUN else request.getfixturevalue("exported_run")[1])


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize(("target", "script"), [("optimum", OPTIMUM), ("genai", GENAI)])
def test_it_writes_what_the_artifact_writes(
    artifact: Artifact, tmp_path: Path, target: str, script: str, precision: str
) -> None:
    wanted = [greedy(artifact, text, NEW) for text in PROMPTS]
    unused = set(range(3, artifact.config.vocab)).difference(*wanted)
    artifact.settings["eos_token_id"] = unused.pop()  # no row ends early
    options = OnnxOptions.model_validate({"target": target, "precision": precision, "accuracy_level": 0})
    OnnxExporter().write(artifact, tmp_path, options)
    assert generated(script, tmp_path) == [wanted[:1], wanted[1:], wanted]


@pytest.mark.parametrize("share", [True, False], ids=["one buffer", "a new cache every step"])
def test_genai_keeps_a_cache_of_int8(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    with_ranges(artifact, monkeypatch)
    chosen = {"target": "genai", "cache_type": "int8", "accuracy_level": 0}
    options = OnnxOptions.model_validate(chosen)
    artifact.settings["eos_token_id"] = artifact.config.vocab - 1
    OnnxExporter().write(artifact, tmp_path, options)
    settings = json.loads((tmp_path / "genai_config.json").read_text())
    settings["search"]["past_present_share_buffer"] = share
    (tmp_path / "genai_config.json").write_text(json.dumps(settings))
    runner = OnnxRunner(tmp_path, provider="cpu", exact=True)
    wanted = [greedy(artifact, text, NEW, runner) for text in PROMPTS]
    assert artifact.config.vocab - 1 not in wanted[0] + wanted[1], "a row ended early: choose another end"
    assert generated(GENAI, tmp_path) == [wanted[:1], wanted[1:], wanted]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ngram_size": 2},
        {"ngram_size": 3, "max_draft_tokens": 8, "precision": "fp32"},
        {"ngram_size": 2, "cache_type": "int8"},
    ],
    ids=str,
)
def test_genai_goes_on_after_more_text_and_after_going_back(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Also with n-gram speculation, of which something must be accepted and which must leave the text as it is."""
    with_ranges(artifact, monkeypatch)
    chosen = OnnxOptions.model_validate({"target": "genai", "accuracy_level": 0, **options})
    OnnxExporter().write(artifact, tmp_path, chosen)
    runner = OnnxRunner(tmp_path, provider="cpu", exact=True) if chosen.cache_type == "int8" else None
    first, second = (open_tokenizer(artifact.root)(text)["input_ids"] for text in PROMPTS)
    opening = follow(artifact, first, LONG, runner)
    after = follow(artifact, [*first, *opening, *second], LONG, runner)
    wanted = [opening, after, follow(artifact, [*first, *second], LONG, runner), opening]
    settings = json.loads((tmp_path / "genai_config.json").read_text())
    settings["model"]["eos_token_id"] = set(range(3, artifact.config.vocab)).difference(*wanted).pop()
    (tmp_path / "genai_config.json").write_text(json.dumps(settings))  # no text ends early
    found = ran_script(TURNS, tmp_path, json.dumps(first), json.dumps(second), str(LONG))
    assert found["written"] == wanted
    assert (found["counts"]["draft_tokens_accepted"] > 0) == ("ngram_size" in options)


def with_ranges(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges for a cache of int8; a finished run's own stay as they are."""
    calibration = np.random.default_rng(0).integers(artifact.config.vocab, size=(8, 32))
    ranges = cache_ranges(artifact, torch.from_numpy(calibration))
    monkeypatch.setattr(artifact, "cache_ranges", lambda: ranges)


def generated(script: str, folder: Path) -> list[list[list[int]]]:
    """Tokens that a program writes for each prompt alone, then for both in a batch."""
    found: list[list[list[int]]] = ran_script(script, folder, json.dumps([PROMPTS[:1], PROMPTS[1:], PROMPTS]), str(NEW))
    return found


def ran_script(script: str, folder: Path, *given: str) -> Any:
    """What a script says about a folder in the other environment."""
    ran = subprocess.run(
        [PYTHON, "-c", script, folder, *given],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.rpartition("FOUND")[2])
