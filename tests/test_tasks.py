"""Tasks of lm-eval through every kind of model, offline; skipped where lm-eval is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flatq.artifact import Artifact
from flatq.errors import RecipeError
from flatq.evaluate import tasks
from flatq.evaluate.subjects import Subject, subjects_of
from flatq.evaluate.tasks import SUITES, known_results, run_tasks, task_table, tasks_of, tasks_wanted, values_of
from flatq.export.generate import DecoderRunner
from flatq.recipe.grammar import Recipe
from flatq.report.render import read_report
from tests.conftest import ONNX, MakeRecipe, flatq
from tests.test_tokens import opened

DATA = Path(__file__).parent / "data" / "tasks"
TASK = "tiny_choice"


def test_a_suite_is_its_tasks_and_names_are_added_to_it() -> None:
    wanted = tasks_wanted(["my_task", "piqa"], "flat-paper")
    assert len(SUITES["flat-paper"]) == 11
    assert wanted == SUITES["flat-paper"] | {"my_task": None}
    assert wanted["mmlu"] == 5


@pytest.mark.parametrize(("names", "suite"), [([], None), (["piqa"], "paper")])
def test_no_task_and_no_such_suite_are_refused(names: list[str], suite: str | None) -> None:
    with pytest.raises(RecipeError, match="flat-paper"):
        tasks_wanted(names, suite)


def test_without_lm_eval_one_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    shown = flatq("eval", tmp_path, "--tasks", "piqa")
    assert shown.exit_code == 2
    assert shown.stderr.strip() == (
        "--tasks: the package lm-eval is not installed; install it with `pip install 'flatq[eval]'`"
    )


def test_metrics_are_read_with_their_standard_errors() -> None:
    raw = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "em_stderr,strict": "N/A"}
    acc, em = values_of(raw)
    assert (acc.metric, acc.value, acc.stderr) == ("acc", 0.5, 0.1)
    assert (em.metric, em.value, em.stderr) == ("em (strict)", 1.0, None)


# ---- with lm-eval -----------------------------------------------------------------------------------------------


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval, offline, with the test's data in the current folder."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'flatq[eval]')")
    monkeypatch.chdir(DATA)


@pytest.fixture
def model_of(lm_eval: None) -> Any:
    """Makes the lm-eval model of a subject; closes its runner afterwards."""
    from flatq.evaluate.harness import HarnessModel

    runners = []

    def make(subject: Subject, context: int = 64) -> Any:
        runners.append(subject.open())
        wishes: dict[str, Any] = {"prefix": subject.prefix, "ends": subject.ends, "context": context}
        return HarnessModel(runners[-1], subject.tokenizer(), vocab=subject.vocab, **wishes)

    yield make
    for runner in runners:
        runner.close()


def questions() -> list[tuple[str, str]]:
    """Every (context, continuation) of the task file."""
    documents = [json.loads(line) for line in (DATA / "questions.jsonl").read_text().splitlines()]
    return [(document["question"], f" {choice}") for document in documents for choice in document["choices"]]


def asked(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@pytest.mark.slow
def test_the_suite_s_tasks_are_in_lm_eval_s_registry(lm_eval: None) -> None:
    tasks.task_manager(list(SUITES["flat-paper"]), DATA)


def test_an_unknown_task_is_refused_with_the_nearest_names(lm_eval: None) -> None:
    with pytest.raises(RecipeError, match=r"--tasks tiny_choise: .* did you mean tiny_choice"):
        tasks.task_manager(["tiny_choise"], DATA)


def test_loglikelihoods_are_those_of_a_direct_computation(model_of: Any, exported_run: tuple[Path, Path]) -> None:
    artifact = Artifact.open(exported_run[1])
    [subject], _ = subjects_of(str(exported_run[1]), dense=False)
    found = model_of(subject).loglikelihood([asked(*pair) for pair in questions()], disable_tqdm=True)
    runner, tokenizer = DecoderRunner(artifact), subject.tokenizer()
    for (context, continuation), (logprob, greedy) in zip(questions(), found, strict=True):
        ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        logits = torch.from_numpy(runner.logits(np.array([ids]))[0]).double()
        each = torch.log_softmax(logits, -1)[range(start - 1, len(ids) - 1), ids[start:]]
        assert logprob == pytest.approx(float(each.sum()), abs=1e-4)
        assert greedy == (logits[start - 1 : -1].argmax(-1).tolist() == ids[start:])


def test_a_text_begins_as_the_tokenizer_begins_it(lm_eval: None) -> None:
    from flatq.evaluate.harness import HarnessModel

    runner: Any = None
    model = HarnessModel(runner, opened, vocab=999, context=9, prefix=900, ends=frozenset())
    assert model.tok_encode("1 2") == [900, 901, 1, 2]
    assert model.tok_encode("900 901 1") == [900, 901, 1], "the text brings them itself"
    assert model.tok_encode("1 2", add_special_tokens=False) == [1, 2]


def test_a_rolling_likelihood_is_the_whole_text_s_after_the_prefix(
    model_of: Any, exported_run: tuple[Path, Path]
) -> None:
    [subject], _ = subjects_of(str(exported_run[1]), dense=False)
    text = "The bird sings over the river. A slow stone walks under the light."
    [found] = model_of(subject).loglikelihood_rolling([asked(text)])
    ids = subject.tokenizer()(text, add_special_tokens=False)["input_ids"]
    shown = np.array([[subject.prefix, *ids[:-1]]])
    logits = torch.from_numpy(DecoderRunner(Artifact.open(exported_run[1])).logits(shown)[0]).double()
    assert found == pytest.approx(float(torch.log_softmax(logits, -1)[range(len(ids)), ids].sum()), abs=1e-3)


def test_a_rolling_likelihood_in_windows_scores_each_token_once(lm_eval: None, exported_run: tuple[Path, Path]) -> None:
    from flatq.evaluate.harness import HarnessModel

    [subject], _ = subjects_of(str(exported_run[1]), dense=False)
    runner: Any = SimpleNamespace(logits=lambda tokens, valid: np.zeros((*tokens.shape, 320), np.float32))
    model = HarnessModel(runner, subject.tokenizer(), vocab=320, context=5, prefix=subject.prefix, ends=subject.ends)
    text = "The bird sings over the river. A slow stone walks under the light."
    count = len(subject.tokenizer()(text, add_special_tokens=False)["input_ids"])
    assert count > 10
    assert model.loglikelihood_rolling([asked(text)]) == pytest.approx([-count * np.log(320)])


def test_greedy_texts_do_not_depend_on_what_else_is_asked(model_of: Any, exported_run: tuple[Path, Path]) -> None:
    [subject], _ = subjects_of(str(exported_run[1]), dense=False)
    model = model_of(subject)
    prompts = [("The bird", {"max_gen_toks": 12}), ("A slow river", {"until": ["e"], "max_gen_toks": 12})]
    prompts += [("Stone", {"until": "e", "max_gen_toks": 12}), ("The light", {"max_gen_toks": 12})]
    together = model.generate_until([asked(*prompt) for prompt in prompts])
    assert together == [model.generate_until([asked(*prompt)])[0] for prompt in prompts]
    assert "e" not in together[1] + together[2]
    assert any(together)


def test_sampling_is_refused(model_of: Any, exported_run: tuple[Path, Path]) -> None:
    [subject], _ = subjects_of(str(exported_run[1]), dense=False)
    with pytest.raises(RecipeError, match="sampling"):
        model_of(subject).generate_until([asked("a", {"do_sample": True})])


def test_artifact_and_fp32_onnx_choose_alike(model_of: Any, exported_run: tuple[Path, Path]) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    requests = [asked(*pair) for pair in questions()]
    scores = []
    for path in (exported_run[1], exported_run[1] / "exports" / "fp32"):
        [subject], _ = subjects_of(str(path), dense=False)
        scores.append([logprob for logprob, _ in model_of(subject).loglikelihood(requests, disable_tqdm=True)])
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)


def test_a_local_task_runs_through_dense_artifact_and_onnx(
    lm_eval: None, exported_run: tuple[Path, Path], tmp_path: Path
) -> None:
    both, beside = subjects_of(str(exported_run[1]))
    [onnx], of_export = subjects_of(str(exported_run[1] / "exports" / "fp32"), dense=False)
    assert beside == of_export == exported_run[1] / "tasks"
    results = run_tasks([*both, onnx], {TASK: None}, tmp_path, folder=DATA)
    dense, artifact, exported = results
    assert [result.subject for result in results] == ["dense", "artifact", "fp32"]
    assert artifact.values == exported.values
    assert dense.samples == 6
    assert [value.metric for value in dense.values] == ["acc", "acc_norm"]
    assert all(value.stderr is not None for value in dense.values)
    assert known_results(tmp_path) == {result.subject: [result] for result in results}


def test_gguf_runs_the_task_too(lm_eval: None, exported_run: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make llamacpp)")
    made = flatq("export", exported_run[1], "--out", tmp_path / "gguf", "--format", "gguf", "-o", "precision=f32")
    assert made.exit_code == 0, made.stderr
    [gguf], _ = subjects_of(str(tmp_path / "gguf"), dense=False)
    [artifact], _ = subjects_of(str(exported_run[1]), dense=False)
    first, second = run_tasks([artifact, gguf], {TASK: None}, tmp_path / "out", folder=DATA)
    assert first.values == second.values


def test_a_finished_task_is_not_run_again(
    lm_eval: None, exported_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [subject], _ = subjects_of(str(exported_run[1]), dense=False)
    first = run_tasks([subject], {TASK: None}, tmp_path, folder=DATA, limit=2)
    assert first[0].samples == 2

    def never(*_: Any) -> Any:
        raise AssertionError("it was run again")

    monkeypatch.setattr(tasks, "_one", never)
    assert run_tasks([subject], {TASK: None}, tmp_path, folder=DATA, limit=2) == first
    with pytest.raises(AssertionError, match="run again"):
        run_tasks([subject], {TASK: None}, tmp_path, folder=DATA, limit=3)


def test_the_command_line_shows_dense_and_compressed_side_by_side(
    lm_eval: None, exported_run: tuple[Path, Path], tmp_path: Path
) -> None:
    places = ["--include-path", DATA, "--out", tmp_path]
    shown = flatq("eval", exported_run[1], "--tasks", TASK, "--limit", "4", *places)
    assert shown.exit_code == 0, shown.stderr
    assert all(word in shown.stdout for word in ("dense", "artifact", "difference", "acc_norm", "±"))
    results = [result for group in known_results(tmp_path).values() for result in group]
    assert task_table(sorted(results, key=lambda result: result.subject != "dense")) in shown.stdout


def test_a_recipe_s_tasks_are_in_its_report(lm_eval: None, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    scored = {"tokens": 256, "seq_len": 64, "tasks": [TASK], "task_folder": str(DATA)}
    recipe = make_recipe(evaluation=scored, exports=ONNX[2:], bench=None)
    assert flatq("run", recipe, "--out", tmp_path / "out").exit_code == 0
    report = read_report(tmp_path / "out" / "report.json")
    assert [(result.task, result.subject) for result in report.tasks] == [
        (TASK, subject) for subject in ("dense", "artifact", "fp32")
    ]
    assert report.tasks[1].values == report.tasks[2].values
    assert known_results(tmp_path / "out" / "tasks").keys() == {"dense", "artifact", "fp32"}
    assert f"| {TASK} | acc_norm |" in (tmp_path / "out" / "report.md").read_text()
    assert "acc_norm" in (tmp_path / "out" / "report.html").read_text()


def test_an_unknown_task_of_a_recipe_is_refused_before_work(
    lm_eval: None, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    scored = {"tokens": 256, "seq_len": 64, "tasks": ["tiny_choise"], "task_folder": str(DATA)}
    shown = flatq("run", make_recipe(evaluation=scored), "--out", tmp_path / "out")
    assert shown.exit_code == 2
    assert "did you mean tiny_choice" in shown.stderr


def test_check_says_that_tasks_need_lm_eval(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    recipe = make_recipe(evaluation={"tokens": 256, "seq_len": 64, "tasks": ["flat-paper"]})
    assert "evaluation.tasks: the package lm-eval is not installed" in flatq("check", recipe).stdout
    refused = flatq("run", recipe, "--out", tmp_path / "out")
    assert (refused.exit_code, "pip install 'flatq[eval]'" in refused.stderr) == (2, True)


def test_a_suite_in_a_recipe_is_its_tasks() -> None:
    recipe = Recipe.parse(
        "version: 1\nmodel: a\nexports: [{onnx: {}}]\nevaluation: {tasks: [flat-paper, mine], task_limit: 5}\n"
    )
    [found] = tasks_of(recipe)
    assert (found.tasks, found.limit) == (SUITES["flat-paper"] | {"mine": None}, 5)
    assert "mmlu" in tasks_wanted([], "flat-paper")


def test_a_limit_without_tasks_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"evaluation.task_limit: only read with `tasks`"):
        Recipe.parse("version: 1\nmodel: a\nevaluation: {task_limit: 5}\n")


def test_a_pretrained_model_runs_alone(lm_eval: None, tiny_model: Path, tmp_path: Path) -> None:
    subjects, _ = subjects_of(str(tiny_model))
    assert [subject.name for subject in subjects] == ["dense"]
    assert run_tasks(subjects, {TASK: None}, tmp_path, folder=DATA)[0].samples == 6
