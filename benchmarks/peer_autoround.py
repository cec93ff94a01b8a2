"""AutoRound quantizes a folder; run by ``peers.py`` in the environment that ``make peer-autoround`` makes.

    .venv-autoround/bin/python benchmarks/peer_autoround.py FOLDER ROWS.json OUT.safetensors '{"bits": 4, "sym": true}'

Imports nothing of flatq. Settings are those of ``AutoRound``; what is not among them is its default (200 steps for each
block, batches of 8 rows). OUT holds the linears of all layers, dequantized to float32, by their names in transformers.
The last line of its output is JSON: what it took to quantize, and by which versions.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import torch
from auto_round import AutoRound  # type: ignore[import-not-found]
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, rows: str, out: str, settings: str) -> None:
    with open(rows, encoding="utf-8") as file:
        tokens = torch.tensor(json.load(file))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name}
    given = {"dataset": [row[None] for row in tokens], "nsamples": len(tokens), "seqlen": tokens.shape[1]}
    started, busy = time.monotonic(), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rounding = AutoRound(model, tokenizer, device_map="cpu", **given, **json.loads(settings))
    rounded, _ = rounding.quantize()
    took = {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(time.process_time() - busy, 1)}
    state = {name: value for name, value in rounded.state_dict().items() if name.removesuffix(".weight") in names}
    save_file({name: value.float().contiguous() for name, value in state.items()}, out)
    print(json.dumps(took | {"versions": {name: version(name) for name in ("auto-round", "torch")}}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
