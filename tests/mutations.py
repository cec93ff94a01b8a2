"""Do the tests notice a fault? Faults put in by hand, and a sample of small mutations.

    python -m tests.mutations --hand                   every fault of ``FAULTS``; fails if one survives
    python -m tests.mutations --sample 12 --seed 0     mutants of ``TARGETS``; fails if less than 85 % are caught
    python -m tests.mutations --list                   how many mutants there are in each file

A fault is applied to a copy of the package in a temporary folder, and the tests that should notice run there. First
they run on the unchanged copy: where they fail without a fault, nothing is learnt, and that is an error.

torch is imported once. Every run of tests is a fork of this process, so it needs a system that can fork.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAST = 0.85
SECONDS = 240  # of one run of tests, after which a mutant counts as caught: it hangs
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # pytest itself is imported before it starts
PARTS, WIRING = "tests/test_wiring_parts.py", "tests/test_wiring.py"
KEYS = f"{WIRING}::test_a_key_changes_what_it_is_about"


@dataclass(frozen=True)
class Fault:
    """One line that is wrong.

    Attributes:
        what: in words.
        old: text that occurs once in the package.
        new: what stands there instead.
        tests: arguments of pytest: the tests that should notice.
    """

    what: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = [
    Fault("clip_search ignored", "clip_search=spec.clip_search", "clip_search=True", (f"{KEYS}[gptq.clip_search]",)),
    Fault("act_order ignored", "act_order=spec.act_order", "act_order=True", (f"{KEYS}[gptq.act_order]",)),
    Fault(
        "drift correction measured and not applied",
        "down.weight.double() + self.parts.correction * found",
        "down.weight.double() + 0 * self.parts.correction * found",
        (f"{KEYS}[flat.correction]",),
    ),
    Fault(
        "shrinkage 0 in the MLP",
        'down, gram = layer.down.weight, shrunk(grams["inner"].mean(), self.parts.shrinkage)',
        'down, gram = layer.down.weight, shrunk(grams["inner"].mean(), 0)',
        (f"{KEYS}[flat.shrinkage]",),
    ),
    Fault(
        "measured curves thrown away",
        'elif allocation == "curves" and curves:',
        'elif allocation == "curves" and not curves:',
        (
            f"{PARTS}::test_a_plan_is_spent_on_curves_weighed_with_the_measured_fisher_information",
            f"{KEYS}[flat.allocation]",
        ),
    ),
    Fault(
        "curves without the Fisher information",
        "error_curves(source, job.tokens.calibration, fisher, folder.work",
        "error_curves(source, job.tokens.calibration, None, folder.work",
        (f"{PARTS}::test_a_plan_is_spent_on_curves_weighed_with_the_measured_fisher_information",),
    ),
    Fault(
        "the MLP weighted with attention's Fisher information",
        "len(HALVES) * block.index + HALVES.index(block.half)",
        "len(HALVES) * block.index",
        (f"{PARTS}::test_attention_s_fisher_information_does_not_choose_channels",),
    ),
    Fault(
        "gradients not cut to three medians",
        "cut = gradient * (longest / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)",
        "cut = gradient",
        (f"{PARTS}::test_a_long_gradient_counts_as_three_median_ones",),
    ),
    Fault(
        "gradients cut to thirty medians",
        "LONGEST = 3.0",
        "LONGEST = 30.0",
        (f"{PARTS}::test_a_long_gradient_counts_as_three_median_ones",),
    ),
    Fault(
        "steps chosen by cost, not by cost per byte",
        "max(cost / saved, least)",
        "max(cost, least)",
        (f"{PARTS}::test_steps_are_bought_by_cost_per_saving",),
    ),
    Fault(
        "refit switched off",
        "if self.parts.refit else narrowed.o",
        "if False else narrowed.o",
        (f"{KEYS}[flat.refit]",),
    ),
    Fault(
        "the PCA value basis in the default method",
        'values=self.values or ("pca" if paper else "output")',
        'values=self.values or "pca"',
        (
            f"{KEYS}[flat.values]",
            f"{KEYS}[flat.method]",
            f"{WIRING}::test_the_default_method_is_made_of_these_parts",
        ),
    ),
    Fault(
        "PCA whatever the recipe says",
        'if self.parts.values == "pca":',
        'if self.parts.values != "":',
        (f"{KEYS}[flat.values]",),
    ),
    Fault(
        "leverage in place of elimination",
        'if self.parts.channels == "leverage":',
        'if self.parts.channels != "":',
        (f"{KEYS}[flat.channels]",),
    ),
    Fault(
        "the result's perplexity is the baseline's",
        "model_quality(dense, artifact, tokens.judged)",
        "model_quality(dense, source, tokens.judged)",
        (f"{WIRING}::test_the_reported_perplexities_are_those_of_the_dense_model_and_of_the_artifact",),
    ),
    Fault("damping ignored", "damping=spec.damping", "damping=0.01", (f"{KEYS}[gptq.damping]",)),
    Fault(
        "width_multiple ignored",
        "else spec.rank_multiple, spec.width_multiple)",
        "else spec.rank_multiple, 32)",
        (f"{KEYS}[flat.width_multiple]",),
    ),
    Fault(
        "the share of the correction ignored",
        "self.parts.correction * found",
        "(self.parts.correction > 0) * found",
        (f"{KEYS}[flat.correction]",),
    ),
    Fault(
        "bits chosen without the Fisher information",
        "bit_errors(source, job.tokens.calibration, spec, fisher, folder.work",
        "bit_errors(source, job.tokens.calibration, spec, None, folder.work",
        (f"{PARTS}::test_bits_are_chosen_by_errors_weighed_with_the_measured_fisher_information",),
    ),
]

# Where mutants are made, and the tests that should notice, the quickest first.
FLAT = [PARTS, WIRING, "-k", "flat or fisher or curve or plan or step or calibration"]
QUANT = ["tests/test_gptq_stage.py", WIRING, PARTS, "-k", "gptq or test_gptq_stage or bits"]
STORY = [WIRING, PARTS, "-k", "flat or gptq or perplexit or eval or model or bits or plan or onnx or exports"]
TARGETS = {
    "flatq/compress/stage.py": FLAT,
    "flatq/compress/plan.py": FLAT,
    "flatq/quantize/stage.py": QUANT,
    "flatq/plan/decide.py": STORY,
    "flatq/stages.py": STORY,
    "flatq/pipeline/*.py": STORY,
}

# Mutants that change nothing that a test of one process could see, with the reason. Key: file, function, mutation.
EQUIVALENT: dict[tuple[str, str, str], str] = {}

# Calls that mutants leave alone: what they do shows only in several processes, on a terminal or when the disk is full.
UNSEEN = re.compile(r"^(distributed\.\w+|log\.\w+|advance|progress|require_space|block\.together|warnings\.\w+)$")


@dataclass(frozen=True)
class Mutant:
    """A file with one change."""

    file: str
    function: str
    line: int
    change: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.change}"


BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What could stand in place of an expression or statement."""
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.BinOp) and type(changed.op) in BINARY:
        changed.op = BINARY[type(changed.op)]()
        yield changed
    elif isinstance(changed, ast.Compare) and type(changed.ops[0]) in COMPARED:
        changed.ops[0] = COMPARED[type(changed.ops[0])]()
        yield changed
    elif isinstance(changed, ast.BoolOp):
        changed.op = ast.Or() if isinstance(changed.op, ast.And) else ast.And()
        yield changed
    elif isinstance(changed, ast.UnaryOp) and isinstance(changed.op, ast.Not):
        yield changed.operand
    elif isinstance(changed, ast.Constant) and type(changed.value) in (int, float, bool):
        value = changed.value
        changed.value = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2
        yield changed
    elif isinstance(changed, ast.IfExp):
        yield changed.body
        yield changed.orelse
    elif isinstance(changed, ast.Expr) and isinstance(changed.value, ast.Call):
        yield ast.copy_location(ast.Pass(), node)
    elif (
        isinstance(changed, ast.Call)
        and isinstance(changed.func, ast.Name)
        and changed.func.id.islower()
        and changed.args
    ):
        yield changed.args[0]


class Places(ast.NodeVisitor):
    """Every place of a module that can be changed: (function, path to the node's parent field)."""

    def __init__(self) -> None:
        self.found: list[tuple[str, ast.AST, Callable[[ast.AST], None], ast.AST]] = []
        self.function: list[str] = []

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.AnnAssign | ast.Import | ast.ImportFrom):
            return
        inside = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if inside:
            self.function.append(node.name)  # type: ignore[attr-defined]
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases", "type_params"):
                continue
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST) and not unseen(child):
                    self.note(node, field, index if isinstance(value, list) else None, child)
                    self.visit(child)
        if inside:
            self.function.pop()

    def note(self, parent: ast.AST, field: str, index: int | None, child: ast.AST) -> None:
        def put(node: ast.AST) -> None:
            if index is None:
                setattr(parent, field, node)
            else:
                getattr(parent, field)[index] = node

        if self.function:
            self.found.append((".".join(self.function), child, put, child))


def unseen(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and bool(UNSEEN.match(ast.unparse(call.func)))


def mutants(file: str) -> list[Mutant]:
    """All of one file, in the order of its lines."""
    tree = ast.parse((ROOT / file).read_text())
    places = Places()
    places.visit(tree)
    found = []
    for function, node, put, _ in places.found:
        for changed in changes(node):
            before, after = (" ".join(ast.unparse(each).split())[:70] for each in (node, changed))
            put(changed)
            found.append(
                Mutant(
                    file,
                    function,
                    getattr(node, "lineno", 0),
                    f"{before} -> {after}",
                    ast.unparse(ast.fix_missing_locations(tree)),
                )
            )
            put(node)
    return [each for each in found if (file, each.function, each.change) not in EQUIVALENT]


def all_mutants() -> dict[str, list[Mutant]]:
    """By pattern of ``TARGETS``; a pattern that matches nothing is an error."""
    found = {}
    for pattern in TARGETS:
        files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
        if not files:
            raise SystemExit(f"{pattern}: no such file; mend TARGETS in {Path(__file__).name}")
        found[pattern] = [each for file in files for each in mutants(file)]
    return found


def copied(place: Path) -> Path:
    """The package, its exporters and its tests."""
    skip = shutil.ignore_patterns("__pycache__", "golden", "interop")
    for name in ("flatq", "exporters", "tests", "recipes"):
        shutil.copytree(ROOT / name, place / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def place_of(fault: Fault) -> tuple[str, str]:
    """File that holds the old text, and its text with the fault."""
    files = [path for path in sorted((ROOT / "flatq").rglob("*.py")) if fault.old in path.read_text()]
    if len(files) != 1 or files[0].read_text().count(fault.old) != 1:
        raise SystemExit(
            f"{fault.what}: {fault.old!r} has to occur once in flatq/; mend FAULTS in {Path(__file__).name}"
        )
    return str(files[0].relative_to(ROOT)), files[0].read_text().replace(fault.old, fault.new)


def import_once() -> None:
    """What every fork needs and no fault touches."""
    import datasets  # noqa: F401
    import onnxruntime  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    import typer.testing  # noqa: F401

    torch.set_num_threads(1)


class Trial:
    """A run of tests on a copy with one file replaced (or none)."""

    def __init__(self, tests: Sequence[str], file: str | None = None, text: str = "") -> None:
        self.place, self.began = copied(Path(tempfile.mkdtemp(prefix="flatq-mutant-"))), time.monotonic()
        if file is not None:
            (self.place / file).write_text(text)
        self.child = os.fork()
        if self.child == 0:
            run_tests(self.place, tests)

    def verdict(self) -> str | None:
        """What noticed the fault, empty if nothing did, None while the tests run."""
        late = time.monotonic() - self.began > SECONDS
        if late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child, signal.SIGKILL)  # and all that it has started
        done, status = os.waitpid(self.child, 0 if late else os.WNOHANG)
        if not done:
            return None
        shown = (self.place / "shown").read_text() if (self.place / "shown").exists() else ""
        shutil.rmtree(self.place, ignore_errors=True)
        code = os.waitstatus_to_exitcode(status)
        failed = re.search(r"^(?:FAILED|ERROR) (\S+::\S*)", shown, re.MULTILINE)
        if late or code == 0:
            return f"no end after {SECONDS} s" if late else ""
        return failed[1] if failed else f"exit code {code}: {shown.strip()[-300:]}"


def verdicts(trials: Sequence[tuple[Sequence[str], str | None, str]], jobs: int) -> list[str]:
    """What noticed each fault, so many at a time; see ``Trial``."""
    found, running, started = [""] * len(trials), dict[int, Trial](), 0
    while started < len(trials) or running:
        if started < len(trials) and len(running) < jobs:
            running[started] = Trial(*trials[started])
            started += 1
            continue
        for number in [number for number, trial in running.items()]:
            said = running[number].verdict()
            if said is not None:
                found[number] = said
                del running[number]
                print(f"{number + 1} of {len(trials)}: {said or 'nothing noticed'}", file=sys.stderr, flush=True)
        time.sleep(0.05)
    return found


def run_tests(place: Path, tests: Sequence[str]) -> None:
    """The child's side; does not return."""
    code = 99
    try:
        shown = os.open(place / "shown", os.O_CREAT | os.O_WRONLY)
        os.dup2(shown, 1)
        os.dup2(shown, 2)
        os.setpgid(0, 0)
        os.chdir(place)
        sys.path[:] = [
            str(place),
            str(place / "exporters"),
            *(each for each in sys.path if Path(each or ".").resolve() != ROOT),
        ]
        os.environ["PYTHONPATH"] = f"{place}{os.pathsep}{place / 'exporters'}"
        for module in [name for name in sys.modules if name.split(".")[0] in ("tests", "flatq")]:
            del sys.modules[module]
        import pytest

        temporary = place / "pytest"
        code = int(
            pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", *QUIET, f"--basetemp={temporary}", *tests])
        )
        import flatq

        if not str(flatq.__file__).startswith(str(place)):
            code = 98
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def must_pass(suites: Sequence[Sequence[str]], jobs: int) -> None:
    """An end if the tests fail on what they should pass."""
    for said in verdicts([(tests, None, "") for tests in suites], jobs):
        if said:
            raise SystemExit(f"the tests fail without a fault: {said}")


def by_hand(jobs: int) -> int:
    """Every fault; the table of who caught what."""
    trials = [(fault.tests, *place_of(fault)) for fault in FAULTS]
    must_pass([sorted({test for fault in FAULTS for test in fault.tests})], jobs)
    found = verdicts(trials, jobs)
    for fault, test in zip(FAULTS, found, strict=True):
        print(f"| {fault.what} | {test or 'SURVIVED'} |")
    return int(not all(found))


def by_chance(count: int, seed: int, jobs: int) -> int:
    """A sample of mutants, each as likely as any other."""
    everything = [(TARGETS[pattern], mutant) for pattern, some in all_mutants().items() for mutant in some]
    chosen = random.Random(seed).sample(everything, min(count, len(everything)))
    must_pass(sorted({tuple(tests) for tests, _ in chosen}), jobs)
    found = verdicts([(tests, mutant.file, mutant.text) for tests, mutant in chosen], jobs)
    for (_, mutant), test in zip(chosen, found, strict=True):
        print(f"{f'caught   {mutant.name}   by {test}' if test else f'SURVIVED {mutant.name}'}")
    caught = sum(map(bool, found))
    print(f"{caught} of {len(chosen)} mutants caught, {caught / len(chosen):.0%} (at least {LEAST:.0%} are needed)")
    return int(caught < LEAST * len(chosen))


def main() -> int:
    asked = argparse.ArgumentParser(prog="python -m tests.mutations", description=(__doc__ or "").split("\n")[0])
    what = asked.add_mutually_exclusive_group(required=True)
    what.add_argument("--hand", action="store_true", help="the faults put in by hand")
    what.add_argument("--sample", type=int, metavar="N", help="so many mutants, drawn by chance")
    what.add_argument("--list", action="store_true", help="count mutants")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs of tests side by side")
    given = asked.parse_args()
    if given.list:
        for pattern, some in all_mutants().items():
            print(f"{len(some):4d} {pattern}")
        return 0
    import_once()
    with tempfile.TemporaryDirectory(prefix="flatq-structured-") as kept:
        os.environ.setdefault("FLATQ_STRUCTURED", kept)
        return by_hand(given.jobs) if given.hand else by_chance(given.sample, given.seed, given.jobs)


if __name__ == "__main__":
    sys.exit(main())
