"""Do the tests notice a fault? Faults put in by hand, and a sample of small mutations.

    python -m tests.mutations --hand                     every fault of ``FAULTS``; fails if one survives
    python -m tests.mutations --sample 12 --seed 0 1     mutants of ``TARGETS``; fails if less than 85 % are caught
    python -m tests.mutations --list                     how many mutants there are in each file

A fault is applied to a copy of the package in a temporary folder, and the tests that should notice run there. First
they run on the unchanged copy: where they fail without a fault, nothing is learnt, and that is an error. Of a mutant
these are the tests that ran its line on the unchanged copy.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tests.mutants import Mutant, mutants
from tests.trials import Reached, Trial, import_once, must_pass, verdicts

ROOT = Path(__file__).parents[1]
LEAST = 0.85
SECONDS = 30.0  # of CPU, of tests for one mutant
MOST_NAMED = 3  # cases of a key for one mutant, beyond these seconds
MOST_LATE = 3  # tests for one mutant that need a finished run with exports
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
        'if allocation == "curves" and curves:',
        'if allocation == "curves" and not curves:',
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
        "number = len(HALVES) * block.index + HALVES.index(block.half)",
        "number = len(HALVES) * block.index",
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
        "model_quality(dense, artifact, tokens.evaluation)",
        "model_quality(dense, source, tokens.evaluation)",
        (f"{WIRING}::test_the_reported_perplexities_are_those_of_the_dense_model_and_of_the_artifact",),
    ),
    Fault("damping ignored", "damping=spec.damping", "damping=0.01", (f"{KEYS}[gptq.damping]",)),
    Fault(
        "width_multiple ignored",
        "Multiples(rank, spec.width_multiple * config.mlp_parts)",
        "Multiples(rank, 32 * config.mlp_parts)",
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

# Where mutants are made.
TARGETS = (
    "flatq/compress/stage.py",
    "flatq/compress/plan.py",
    "flatq/quantize/stage.py",
    "flatq/plan/decide.py",
    "flatq/stages.py",
    "flatq/pipeline/*.py",
)
# The tests that may notice; each list is a run of its own, the longest first. Left out are tests that kill processes
# or measure speed, and keys that reach nothing which the others do not.
CANDIDATES: tuple[list[str], ...] = (
    [WIRING, "-k", "flat or gptq or perplexities or default or stop_above or baselines or budget"],
    ["tests/test_budget.py", "tests/test_speed_limits.py", "tests/test_recover.py"],
    [
        "tests/test_evaluate.py",
        "tests/test_quality.py",
        "tests/test_pipeline.py",
        "tests/test_embedding_and_head.py",
        "-k",
        "not at_its_block and not before_the_head and not bench_measures and not quantized_baselines",
    ],
    [
        "tests/test_run_steps.py",
        "tests/test_cache_ranges.py",
        "tests/faults/test_run_faults.py",
        "tests/test_tokenizer.py::test_a_token_without_an_embedding_is_told_and_refused_where_it_is_used",
        "tests/test_tokenizer.py::test_a_token_without_an_embedding_that_stands_in_every_text_is_refused_early",
        "tests/test_integrity.py::test_verify_names_a_damaged_file_and_so_does_a_finished_run",
    ],
    [
        PARTS,
        "tests/test_gptq_stage.py",
        "tests/laws/test_flat_laws.py",
        "tests/laws/test_budget_laws.py",
        "tests/laws/test_allocation_laws.py",
        "tests/test_bits.py",
        "tests/test_experts.py",
        "tests/test_plan.py",
    ],
)

# Mutants that change nothing that a test of one process could see, with the reason. Key: file, function, mutation.
EQUIVALENT = {
    ("flatq/quantize/stage.py", "quantized_together", "len(weights) > 1 -> len(weights) >= 1"): "a copy of one weight",
    (
        "flatq/quantize/stage.py",
        "quantized_together",
        "torch.cat([weight.T for weight in weights], 1).T if len(weights) > 1 e -> "
        "torch.cat([weight.T for weight in weights], 1).T",
    ): "a copy of one weight",
}


def all_mutants() -> dict[str, list[Mutant]]:
    """By pattern of ``TARGETS``; a pattern that matches nothing is an error."""
    found = {}
    for pattern in TARGETS:
        files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
        if not files:
            raise SystemExit(f"{pattern}: no such file; mend TARGETS in {Path(__file__).name}")
        some = [each for file in files for each in mutants(file, (ROOT / file).read_text())]
        found[pattern] = [each for each in some if (each.file, each.function, each.change) not in EQUIVALENT]
    return found


def place_of(fault: Fault) -> tuple[str, str]:
    """File that holds the old text, and its text with the fault."""
    files = [path for path in sorted((ROOT / "flatq").rglob("*.py")) if fault.old in path.read_text()]
    if len(files) != 1 or files[0].read_text().count(fault.old) != 1:
        raise SystemExit(
            f"{fault.what}: {fault.old!r} has to occur once in flatq/; mend FAULTS in {Path(__file__).name}"
        )
    return str(files[0].relative_to(ROOT)), files[0].read_text().replace(fault.old, fault.new)


def by_hand(jobs: int) -> int:
    """Every fault; the table of who caught what."""
    trials = [Trial(fault.tests, *place_of(fault)) for fault in FAULTS]
    must_pass([Trial(sorted({test for fault in FAULTS for test in fault.tests}))], jobs)
    found = verdicts(trials, jobs)
    for fault, test in zip(FAULTS, found, strict=True):
        print(f"| {fault.what} | {test or 'SURVIVED'} |")
    return int(not all(found))


def chosen_tests(mutant: Mutant, reached: Mapping[str, Reached]) -> list[str]:
    """The tests that run the changed lines (or, if none does, the function), those that are about least else first.

    First come the cases of ``test_wiring.py`` whose key stands in the changed lines, ``MOST_NAMED`` of them, then the
    others by how many lines of ``TARGETS`` they run beside those of shared fixtures, as many as take ``SECONDS``, at
    least one. Those that need a finished run with exports come last, for it has to be made first: ``MOST_LATE`` of
    them.
    """
    some: list[str] = []
    for span in (mutant.lines, mutant.body):
        wanted = {(mutant.file, line) for line in span}
        some = [test for test, each in reached.items() if wanted & (each.lines | each.shared)]
        if some:
            break
    some.sort(key=lambda test: (len(reached[test].lines), reached[test].seconds, test))
    changed = mutant.original.splitlines()[mutant.lines.start - 1 : mutant.lines.stop - 1]
    words = set(re.findall(r"\w+", "\n".join(changed)))
    named = [test for test in some if test.startswith(KEYS) and key_of(test) in words][:MOST_NAMED]
    early = [test for test in some if test not in named and not reached[test].late]
    spent = accumulate(reached[test].seconds for test in early)
    quick = [test for test, total in zip(early, spent, strict=True) if total <= SECONDS]
    late = [test for test in some if reached[test].late][:MOST_LATE]
    return named + (quick if named else quick or early[:1]) + late


def key_of(test: str) -> str:
    """``refit`` of ``...::test_a_key_changes_what_it_is_about[flat.refit]``."""
    return test.rpartition("[")[2].rstrip("]").rpartition(".")[2]


def by_chance(count: int, seeds: Sequence[int], jobs: int) -> int:
    """A sample of mutants for each seed, each mutant as likely as any other."""
    everything = [mutant for some in all_mutants().values() for mutant in some]
    files = sorted({mutant.file for mutant in everything})
    reached = must_pass([Trial(tests, trace=files) for tests in CANDIDATES], jobs)
    samples = [random.Random(seed).sample(everything, min(count, len(everything))) for seed in seeds]
    code = 0
    for seed, chosen in zip(seeds, samples, strict=True):
        tests = [chosen_tests(mutant, reached) for mutant in chosen]
        found = verdicts([Trial(some, each.file, each.text) for some, each in zip(tests, chosen, strict=True)], jobs)
        for mutant, some, test in zip(chosen, tests, found, strict=True):
            print(f"caught   {mutant.name}   by {test}" if test else f"SURVIVED {mutant.name}   of {len(some)} tests")
        caught = sum(map(bool, found))
        print(
            f"seed {seed}: {caught} of {len(chosen)} mutants caught, {caught / len(chosen):.0%}, needed are {LEAST:.0%}"
        )
        code |= caught < LEAST * len(chosen)
    return int(code)


def seed_of_targets() -> int:
    """From the text of the files: the sample is another one when they change, and the same one until then."""
    files = sorted({path for pattern in TARGETS for path in ROOT.glob(pattern)})
    return int.from_bytes(hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()[:4])


def main() -> int:
    asked = argparse.ArgumentParser(prog="python -m tests.mutations", description=(__doc__ or "").split("\n")[0])
    what = asked.add_mutually_exclusive_group(required=True)
    what.add_argument("--hand", action="store_true", help="the faults put in by hand")
    what.add_argument("--sample", type=int, metavar="N", help="so many mutants, drawn by chance")
    what.add_argument("--list", action="store_true", help="count mutants")
    asked.add_argument("--seed", type=int, nargs="+", help="of one sample or several; default: from the files' text")
    asked.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs of tests side by side")
    given = asked.parse_args()
    if given.list:
        for pattern, some in all_mutants().items():
            print(f"{len(some):4d} {pattern}")
        return 0
    import_once()
    with tempfile.TemporaryDirectory(prefix="flatq-structured-") as kept:
        os.environ.setdefault("FLATQ_STRUCTURED", kept)
        began = time.monotonic()
        code = (
            by_hand(given.jobs)
            if given.hand
            else by_chance(given.sample, given.seed or [seed_of_targets()], given.jobs)
        )
        spent = os.times()
        print(f"{time.monotonic() - began:.0f} s, {spent.children_user + spent.children_system:.0f} s of CPU")
        return code


if __name__ == "__main__":
    sys.exit(main())
