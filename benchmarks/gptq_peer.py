"""GPTQModel quantizes a folder; run by ``gptq.py`` in the environment that ``make interop-gptq`` makes.

    .venv-gptq/bin/python benchmarks/gptq_peer.py FOLDER TEXTS.json OUT '{"bits": 4, "group_size": 32, "sym": true}'

Imports nothing of flatq. The last line of its output is JSON: what it took to quantize, and by which versions.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer, GPTQModel 7.7.0 dies on two cores
from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]


def main(folder: str, texts: str, out: str, settings: str) -> None:
    with open(texts, encoding="utf-8") as file:
        samples = json.load(file)
    model = GPTQModel.load(folder, QuantizeConfig(**json.loads(settings)))
    started, busy = time.monotonic(), time.process_time()
    model.quantize(samples, batch_size=1)
    wall, spent = time.monotonic() - started, time.process_time() - busy
    took = {"seconds": round(wall, 1), "cpu_seconds": round(spent, 1)}
    model.save(out)
    print(json.dumps(took | {"versions": {name: version(name) for name in ("gptqmodel", "torch")}}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
