"""The scripts that judge the tests and the demo are judged, too."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.demo_band import main, newest, outside
from tests.mutants import Mutant, changes, mutants
from tests.mutations import CANDIDATES, EQUIVALENT, FAULTS, KEYS, ROOT, TARGETS, all_mutants, chosen_tests, place_of
from tests.trials import NOTE, Reached, traced

GOOD: dict[str, Any] = {
    "baseline": {"perplexity": 9.31, "decoder_parameters": 1000},
    "result": {"perplexity": 10.61, "decoder_parameters": 899},
    "exports": [
        {"name": "onnx", "verify": {"exact": {"kl": 1e-6, "top1": 1.0}, "deployed": {"kl": 0.004, "top1": 0.96}}}
    ],
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_every_fault_still_fits_into_the_code_and_leaves_it_readable(fault: Any) -> None:
    _, text = place_of(fault)
    assert fault.new in text
    ast.parse(text)


def test_every_target_has_mutants_that_differ_from_the_file() -> None:
    everything = all_mutants()
    assert tuple(everything) == TARGETS
    for pattern, found in everything.items():
        assert len(found) >= 10, pattern
        for mutant in found[::10]:
            assert mutant.text != ast.unparse(ast.parse(mutant.original)), mutant.name


def test_every_mutant_that_is_left_out_as_equivalent_could_be_made() -> None:
    for file, function, change in EQUIVALENT:
        made = [(each.function, each.change) for each in mutants(file, (ROOT / file).read_text())]
        assert (function, change) in made


def test_the_tests_that_may_notice_are_there() -> None:
    named = [test for tests in CANDIDATES for test in tests if test.startswith("tests/")]
    for test in [*named, *(test for fault in FAULTS for test in fault.tests)]:
        file, _, function = test.partition("::")
        assert f"def {function.partition('[')[0]}" in (ROOT / file).read_text()


def reached(*lines: int, seconds: float = 1.0, late: bool = False, file: str = "a.py") -> Reached:
    return Reached(seconds, late, {(file, line) for line in lines})


def test_a_mutant_is_judged_by_the_tests_that_run_its_line_those_about_little_else_first() -> None:
    mutant = Mutant("a.py", "f", range(5, 6), range(3, 9), "x -> y", 0, "\n" * 4 + "x = spec.refit")
    some = {"broad": reached(*range(9)), "slow": reached(5, seconds=9.0), "quick": reached(5)}
    some |= {"late": reached(5, late=True)}
    others = {"beside": reached(4), "elsewhere": reached(5, file="b.py")}
    assert chosen_tests(mutant, {**some, **others}) == ["quick", "slow", "broad", "late"]
    assert chosen_tests(mutant, others) == ["beside"]
    assert chosen_tests(mutant, {"beside": reached(20)}) == []
    assert chosen_tests(mutant, {"a": reached(5, seconds=29.0), "b": reached(5, seconds=29.5)}) == ["a"]
    assert chosen_tests(mutant, {"a": reached(5, seconds=99.0)}) == ["a"]
    late = {f"{number}": reached(5, seconds=number, late=True) for number in range(5)}
    assert chosen_tests(mutant, {"a": reached(5, seconds=99.0), **late}) == ["a", "0", "1", "2"]


def test_the_case_of_a_key_in_the_changed_lines_comes_first_and_takes_no_time_from_others() -> None:
    mutant = Mutant("a.py", "f", range(5, 6), range(3, 9), "x -> y", 0, "\n" * 4 + "x = spec.refit")
    refit, ridge = (f"{KEYS}[flat.{key}]" for key in ("refit", "ridge"))
    some = {ridge: reached(5), "a": reached(5, seconds=28.0), refit: reached(*range(9), seconds=30.0)}
    assert chosen_tests(mutant, some) == [refit, ridge, "a"]


def test_a_test_is_chosen_for_what_its_fixture_ran_for_it_and_others() -> None:
    mutant = Mutant("a.py", "f", range(5, 6), range(3, 9), "x -> y", 0, "")
    given = Reached(2.0, False, set(), {("a.py", line) for line in range(20)})
    assert chosen_tests(mutant, {"itself": reached(5), "given": given}) == ["given", "itself"]


def test_a_traced_file_tells_which_lines_it_runs() -> None:
    text = "def f(x=1):\n    if x:\n        return (\n            1\n        )\n    for _ in ():\n        x = 2\n"
    ran: set[int] = set()
    inside: dict[str, Any] = {NOTE: lambda file, first, last: ran.update(range(first, last + 1))}
    exec(traced("a.py", text), inside)
    assert ran == set(), "what stands outside of functions is not traced"
    assert inside["f"]() == 1
    assert ran == {1, 2, 3, 4, 5}
    ran.clear()
    assert inside["f"](0) is None
    assert ran == {1, 2, 6}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("a + b", ["a - b"]),
        ("a < b", ["a <= b"]),
        ("a and b", ["a or b"]),
        ("not a", ["a"]),
        ("3", ["4"]),
        ("0.5", ["1.0"]),
        ("True", ["False"]),
        ("a if b else c", ["a", "c"]),
        ("shrunk(gram, 0.1)", ["gram"]),
        ("'text'", []),
    ],
)
def test_a_mutation_changes_one_operator_constant_or_call(code: str, expected: list[str]) -> None:
    assert [ast.unparse(node) for node in changes(ast.parse(code, mode="eval").body)] == expected


def test_a_call_whose_result_is_not_used_is_dropped() -> None:
    assert [ast.unparse(node) for node in changes(ast.parse("stage.apply(block)").body[0])] == ["pass"]


def test_numbers_in_their_bands_are_not_objected_to(tmp_path: Path) -> None:
    assert not list(outside(GOOD))
    (tmp_path / "report.json").write_text(json.dumps(GOOD))
    assert main([str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("baseline", "perplexity"), 11.0, r"baseline\.perplexity is 11.0000"),
        (("result", "perplexity"), 8.0, r"result\.perplexity is 8.0000"),
        (("result", "perplexity"), 14.9, r"ln\(result"),
        (("result", "decoder_parameters"), 990, "share of the decoder's parameters"),
        (("exports",), [], "there is no export"),
        (("exports", 0, "verify"), None, "onnx was not verified"),
        (("exports", 0, "verify", "deployed", "kl"), 0.2, "KL divergence of 0.2"),
        (("exports", 0, "verify", "deployed", "kl"), float("nan"), "KL divergence of nan"),
        (("exports", 0, "verify", "deployed", "top1"), 0.5, "agrees on 50.0%"),
    ],
)
def test_a_number_outside_its_band_is_named_and_ends_with_1(
    place: tuple[Any, ...], value: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = copy.deepcopy(GOOD)
    inner: Any = report
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main([str(tmp_path)]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_the_newest_run_of_the_demo_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run `make demo` first"):
        newest(tmp_path)
    folder = tmp_path / "smollm2-135m-flat10-int4-0123"
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    assert newest(tmp_path) == newest(folder) == folder / "report.json"
