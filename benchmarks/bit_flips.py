"""One flipped bit in a finished run, and what each command then does: refuse it by the file's name, or not notice.

    python benchmarks/bit_flips.py RUN --trials 600
    python benchmarks/bit_flips.py RUN --trials 120 --no-digests     the artifact alone, used without comparing digests

Each trial flips a random bit of a random file of the artifact or of an export in a copy of RUN, asks one command, and
puts the bit back. The commands take turns. A command that answers is compared with its answer for the whole files.
Without digests only the artifact is used, because the runtimes of exports may end the process at a damaged file.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from typer.testing import CliRunner

import flatq
from flatq.cli import app
from flatq.errors import FlatqError

OUTCOMES = ("refused, file named", "refused, not named", "same answer", "other answer")
TOKENS = torch.arange(16)[None]
Answer = tuple[bool, str]  # whether it was refused; what was said or made


def main() -> None:
    parser = argparse.ArgumentParser(description="Flip bits of a finished run and see what notices.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-digests", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flatq-flips-") as work:
        run = Path(shutil.copytree(options.run, Path(work) / "run"))
        counts = flipped(run, options.trials, random.Random(options.seed), check=not options.no_digests)
    print(table(counts))


def flipped(run: Path, trials: int, chooser: random.Random, *, check: bool = True) -> dict[str, Counter[str]]:
    """Outcomes by command."""
    parts = [run / "artifact", *(sorted((run / "exports").iterdir()) if check else [])]
    asked = [(part, name, ask) for part in parts for name, ask in commands(run, part, check).items()]
    whole = {(part, name): ask() for part, name, ask in asked}
    refused = [f"{part} {name}: {said}" for (part, name), (no, said) in whole.items() if no]
    if refused:
        raise SystemExit("\n".join(refused))
    counts: dict[str, Counter[str]] = {}
    for trial in range(trials):
        part, name, ask = asked[trial % len(asked)]
        file = chooser.choice(sorted(path for path in part.rglob("*") if path.is_file()))
        with one_bit(file, chooser.randrange(8 * file.stat().st_size)):
            no, said = ask()
        outcome = OUTCOMES[(0 if file.name in said else 1) if no else 2 + (said != whole[part, name][1])]
        counts.setdefault(f"{name}, {'artifact' if part.name == 'artifact' else 'export'}", Counter())[outcome] += 1
    return counts


@contextmanager
def one_bit(file: Path, bit: int) -> Iterator[None]:
    """A file with one bit flipped, and as it was afterwards."""
    whole = file.read_bytes()
    content = bytearray(whole)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


def commands(run: Path, part: Path, check: bool) -> dict[str, Callable[[], Answer]]:
    """What can be asked of an artifact or an export, by name."""
    unchecked = [] if check else ["--no-digests"]
    out, recipe = run.with_name("new"), run / "recipe.yaml"
    asked: dict[str, list[str | Path]] = {
        "generate": ["generate", part, "-p", "The", "--new-tokens", "4", *unchecked],
        "eval": ["eval", part, "--tokens", "64", *unchecked],
    }
    if check:
        asked |= {"verify": ["verify", part], "run": ["run", recipe, "--out", run]}
    if part.name != "artifact":
        asked["bench"] = ["bench", part, "--prompt", "2", "--new-tokens", "2", "--repeats", "1"]
        return {name: partial(shown, words, None) for name, words in asked.items()}
    asked["export"] = ["export", part, "--format", "safetensors", "--out", out, "--no-verify", *unchecked]
    found = {name: partial(shown, words, out) for name, words in asked.items()}
    return {**found, "load": partial(loaded, part, check)}


def shown(words: list[str | Path], out: Path | None) -> Answer:
    """What a command says, and for one that writes a folder the digest of it; a traceback is not an answer."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    answer = CliRunner().invoke(app, ["--quiet", *map(str, words)])
    if answer.exit_code:
        return True, answer.stderr if isinstance(answer.exception, SystemExit) else repr(answer.exception)
    if out is None or not out.exists():
        return False, "" if words[0] == "bench" else answer.stdout  # seconds differ
    content = b"".join(path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file())
    return False, hashlib.sha256(content).hexdigest()


def loaded(part: Path, check: bool) -> Answer:
    """Logits of the model as transformers runs it."""
    try:
        with torch.no_grad():
            return False, str(flatq.load(part, check=check)(TOKENS).logits.tolist())
    except FlatqError as error:
        return True, str(error)


def table(counts: dict[str, Counter[str]]) -> str:
    """A row for each command."""
    rows = [["command", "trials", *OUTCOMES], ["---"] * (2 + len(OUTCOMES))]
    total: Counter[str] = Counter()
    for name, found in sorted(counts.items()):
        rows.append([name, str(found.total()), *(str(found[outcome]) for outcome in OUTCOMES)])
        total += found
    rows.append(["all", str(total.total()), *(str(total[outcome]) for outcome in OUTCOMES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
