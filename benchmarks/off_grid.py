r"""Which 4-bit grid? Symmetric or asymmetric groups, on weights that no quantizer has rounded before.

    python benchmarks/off_grid.py --text wikipedia=FILE          # resumable; writes the table of the results page

SmolLM2 comes here from a file in Q4_1: 4 bits, asymmetric groups of 32. Asymmetric 4 bits can hit its values, which
no other model grants. So its weights are taken off that grid without a change of the function: the gains of the norms
are multiplied into the columns of q, k, v, gate and up, and a factor between 0.7 and 1.4 is moved for each channel
from v to o and from up to down. Then all linears are rounded by GPTQ, the embedding and the head not, on the
quickstart's 64 x 256 tokens that the model writes, and scored on texts that were not calibrated on.
"""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import calibration_text as ct
import peers
import torch
import typer
from gptq import First
from results_page import write_table
from torch import Tensor

from flatq.model.grid import Grid
from flatq.model.names import matrix_shape, stems_of

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results/off_grid.jsonl", HERE / "results/tables/17-off-grid.json"
GRIDS = [Grid(4, 32), Grid(4, 64, False), Grid(4, 32, False), Grid(4, 64)]
NORMS = {"q": "attention_norm", "k": "attention_norm", "v": "attention_norm", "gate": "mlp_norm", "up": "mlp_norm"}


@dataclass(frozen=True)
class OffGrid(First):
    """A model whose function is the same and whose weights lie on no grid."""

    def tensor(self, name: str) -> Tensor:
        """As the model has it, with gains and factors moved; float32."""
        tensor = super().tensor(name).float()
        if not name.startswith("layers."):
            return tensor
        _, number, *rest = name.split(".")
        part = rest[0]
        if part in NORMS.values():
            return torch.ones_like(tensor)
        if part in NORMS:
            tensor = tensor * super().tensor(f"layers.{number}.{NORMS[part]}.weight").float()
        dims = self.config.layers[int(number)]
        generator = torch.Generator().manual_seed(int(number))
        value, inner = (
            torch.empty(size).uniform_(math.log(0.7), math.log(1.4), generator=generator).exp()
            for size in (dims.kv_heads * dims.d_v, dims.d_ff)
        )
        if part in ("v", "up"):
            return tensor / (value if part == "v" else inner)[:, None]
        if part == "o":
            return tensor * value.view(dims.kv_heads, 1, dims.d_v).expand(-1, dims.group, -1).flatten()
        return tensor * inner if part == "down" else tensor


class Bench(peers.Bench):
    """The same bench with such a model."""

    kind = OffGrid


def table(found: dict[tuple[str, bool], dict[str, Any]], bytes_: dict[str, int]) -> dict[str, Any]:
    """The results, for ``results_page.py``."""
    dense = {off: found["dense", off]["perplexity"] for off in (True, False)}
    rows = []
    for name, size in bytes_.items():
        means = list[str]()
        for off in (False, True):
            there = found[name, off]["perplexity"] if (name, off) in found else {}
            lost = [math.log(value / dense[off][text]) for text, value in there.items()]
            means.append(f"{sum(lost) / len(lost):.3f}" if lost else "-")
        rows.append([name, round(size / 1e6, 1), *means])
    shown = ", ".join(f"{text} {value:.2f}" for text, value in dense[True].items())
    return {
        "section": "Quality by calibration text, and by method",
        "title": "Symmetric or asymmetric groups in 4 bits",
        "note": "SmolLM2, all linears rounded by GPTQ, calibrated on 64 x 256 tokens of self; mean damage on texts not "
        f"calibrated on, {ct.ROWS} rows of {ct.LENGTH} tokens each; dense perplexity: {shown}. The weights come from a "
        "file in asymmetric groups of 32 with 4 bits; *off its grid*: gains of the norms and random factors of "
        "channels are moved between the weights, which leaves the function as it is.",
        "columns": ["", "linears, MB", "as they come", "off their grid"],
        "machine": "AMD EPYC, one of 2 cores, shared with other work",
        "command": "python benchmarks/off_grid.py --text wikipedia=FILE",
        "rows": rows,
    }


def main(
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE, or NAME=FILE,FILE; may be repeated.")] = None,
    model: Annotated[str, typer.Option(help="Folder, hub id, .gguf file or package:DIST/FILE.")] = ct.SMOLLM2,
    out: Annotated[Path, typer.Option(help="Results, JSON lines.")] = RESULTS,
) -> None:
    """Measure what is not in ``--out`` yet, then write the table."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("flatq").setLevel(logging.WARNING)
    peers.WORK.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, bool], dict[str, Any]] = {(line["grid"], line["off"]): line for line in ct.lines(out)}
    benches = {off: kind(model, 0, text or [], None) for off, kind in ((True, Bench), (False, peers.Bench))}
    for off, bench in benches.items():
        if ("dense", off) not in found:
            found["dense", off] = {"grid": "dense", "off": off, "perplexity": bench.lab.judge(bench.source)}
            ct._add(out, found["dense", off])
    names = {f"groups of {grid.group_size}, {'' if grid.symmetric else 'a'}symmetric": grid for grid in GRIDS}
    for off, bench in benches.items():
        for name, grid in names.items():
            if (name, off) not in found:
                made, took = bench.ours(asdict(grid))
                found[name, off] = {"grid": name, "off": off, **took, "perplexity": bench.lab.judge(made)}
                ct._add(out, found[name, off])
    config = benches[True].source.config
    shapes = [matrix_shape(config, stem) for stem in stems_of(config)]
    bytes_ = {name: sum(grid.stored_bytes(*shape) for shape in shapes) for name, grid in names.items()}
    write_table(TABLE, **table(found, bytes_))
    print(TABLE)


if __name__ == "__main__":
    typer.run(main)
