"""What every installed exporter must keep, third-party ones included.

For one of them: ``pytest tests/exporters/test_contract.py -k NAME``.

The two exporters of the page "Writing an exporter" stand for third-party ones. An exporter may object to a model here
(the case is then skipped with its words), but flatq's own may not, and its runtime may be missing.
"""

from __future__ import annotations

import pickle
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from flatq.artifact import Artifact
from flatq.errors import ArtifactError, ExportError, FlatqError
from flatq.export.deliver import deliver
from flatq.export.folder import DESCRIPTION
from flatq.export.planned import PlannedExport, has_runtime
from flatq.export.protocols import GROUP, Exported, Exporter, FloatArray, Runner, exporter_named
from flatq.export.verify import EXACT_SHARE
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from tests.conftest import digests, flatq
from tests.exporters.conftest import reference_logits, some_tokens
from tests.models import SWITCHES, tiny_artifact, tiny_config
from tests.plug_ins import installed

OURS = {"gguf", "onnx", "safetensors"}
ON_THE_PAGE = {"plain", "my"}
NAMES = sorted({entry.name for entry in entry_points(group=GROUP)} | ON_THE_PAGE)
GRID = Grid(4, 32)
SIZE_TOLERANCE = 0.02
PROMPT, TOKENS = 5, 9


@dataclass(frozen=True)
class Case:
    """A kind of model: query heads per key-value head, head tied to the embedding, codes in the layers, family."""

    group: int
    tied: bool
    quantized: bool
    family: str = "llama"

    @property
    def config(self) -> DecoderConfig:
        """Different widths in every layer; multiples of 32, because some formats have blocks of 32."""
        kv_heads = 4 // self.group
        if self.family != "llama":
            switches = {"tied_head": self.tied, **SWITCHES[self.family]}
            widths = {"d_v": (32, 16, 16, 32), "d_ff": (96, 64, 32, 64), "d_model": 128, "d_qk": 32}
            return tiny_config(kv_heads=kv_heads, family=self.family, **widths, **switches)
        return tiny_config(kv_heads=kv_heads, d_qk=32, d_v=(32, 16), d_ff=(96, 64), tied_head=self.tied)

    def __str__(self) -> str:
        attention = "mha" if self.group == 1 else "gqa"
        return f"{self.family}-{attention}-{'tied' if self.tied else 'untied'}-{'codes' if self.quantized else 'plain'}"


CASES = [Case(group, tied, quantized) for group in (1, 2) for tied in (True, False) for quantized in (True, False)]
CASES += [Case(2, True, quantized, family) for family in SWITCHES for quantized in (True, False)]
USUAL = Case(2, True, True)
each_exporter = pytest.mark.parametrize("name", NAMES)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed(tmp_path_factory.mktemp("site")):
        yield


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Case, Artifact]:
    root = tmp_path_factory.mktemp("artifacts")
    return {case: tiny_artifact(root / str(case), case.config, grid=GRID if case.quantized else None) for case in CASES}


def options_for(exporter: Exporter, artifact: Artifact, name: str) -> BaseModel:
    """The defaults; for a model without codes those that the exporter writes the baseline with."""
    options = exporter.Options()
    if not artifact.grids:
        options = exporter.dense(options) or options
    if problems := exporter.check(artifact.config, artifact.grids, options):
        assert name not in OURS, problems
        pytest.skip(f"{name} objects: {problems[0]}")
    if absent := exporter.missing(options, opening=False):
        pytest.skip(f"{name} cannot write here: {absent[0]}")
    return options


def write(name: str, artifact: Artifact, out: Path) -> tuple[Exporter, BaseModel, Exported]:
    exporter = exporter_named(name)
    options = options_for(exporter, artifact, name)
    out.mkdir(parents=True)
    return exporter, options, exporter.write(artifact, out, options)


def opened(name: str, artifact: Artifact, out: Path) -> tuple[Runner, Exported]:
    """The export in its runtime, without approximations."""
    exporter = exporter_named(name)
    item = PlannedExport(name, name, exporter, options_for(exporter, artifact, name))
    if not has_runtime(item):
        missing = exporter.missing(item.options)
        pytest.skip(f"{name} has no runtime here: {missing[0] if missing else 'the format has none'}")
    _, options, exported = write(name, artifact, out)
    runner = exporter.open(exported.root, options, provider="cpu", threads=1, exact=True)
    assert runner is not None, "providers names a device, so open must return a runner"
    return runner, exported


def spread(logits: FloatArray) -> float:
    return float(logits.std(-1).mean())


def divergence(reference: FloatArray, got: FloatArray) -> float:
    """Mean KL(reference || got) in nats."""

    def log_shares(logits: FloatArray) -> NDArray[np.float64]:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    here, there = log_shares(reference), log_shares(got)
    return float((np.exp(here) * (here - there)).sum(-1).mean())


@each_exporter
def test_options_have_defaults_forbid_unknown_keys_and_survive_json(name: str) -> None:
    exporter = exporter_named(name)
    options = exporter.Options()
    assert exporter.Options.model_json_schema()["type"] == "object"
    assert "verify" not in exporter.Options.model_fields, "the key verify of an entry belongs to flatq"
    with pytest.raises(ValidationError):
        exporter.Options(no_such_option=1)
    assert exporter.Options(**options.model_dump(mode="json")) == options  # export.json is read back so


@each_exporter
def test_answers_have_the_types_that_the_core_relies_on(name: str, artifacts: Mapping[Case, Artifact]) -> None:
    exporter, artifact = exporter_named(name), artifacts[USUAL]
    options = exporter.Options()
    for said in (
        exporter.check(artifact.config, artifact.grids, options),
        exporter.missing(options),
        exporter.missing(options, opening=False),
    ):
        assert all(isinstance(words, str) and words for words in said)
    assert isinstance(exporter.bytes(artifact.config, artifact.grids, options), int)
    assert isinstance(exporter.needs_cache_ranges(options), bool)
    assert set(exporter.providers()) <= {"cpu", "cuda"}
    assert set(exporter.missing(options, opening=False)) <= set(exporter.missing(options))
    assert isinstance(exporter.dense(options), exporter.Options | None)
    assert type(pickle.loads(pickle.dumps(exporter))) is type(exporter)  # bench sends it to another process


@each_case
@each_exporter
def test_write_leaves_the_listed_files_and_nothing_else(
    name: str, case: Case, artifacts: Mapping[Case, Artifact], tmp_path: Path
) -> None:
    _, _, exported = write(name, artifacts[case], tmp_path / "out")
    assert exported.root == tmp_path / "out"
    assert sorted(exported.files) == sorted(path for path in exported.root.rglob("*") if path.is_file())
    assert exported.files
    assert not [path for path in exported.root.rglob("*") if path.name.endswith((".partial", ".growing", ".tmp"))]
    assert exported.bytes == sum(path.stat().st_size for path in exported.files)


@each_exporter
def test_writing_twice_gives_the_same_bytes(name: str, artifacts: Mapping[Case, Artifact], tmp_path: Path) -> None:
    first, second = (write(name, artifacts[USUAL], tmp_path / place)[2] for place in ("first", "second"))
    assert digests(first.root) == digests(second.root)


@each_exporter
def test_what_it_is_given_stays_as_it_was(name: str, artifacts: Mapping[Case, Artifact], tmp_path: Path) -> None:
    before = digests(artifacts[USUAL].root)
    write(name, artifacts[USUAL], tmp_path / "out")
    assert digests(artifacts[USUAL].root) == before


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, Artifact]:
    """Large enough that configuration and code beside the weights do not count; with codes, and without."""
    root = tmp_path_factory.mktemp("large")
    config = tiny_config(d_model=512, d_qk=64, d_v=(64, 32), d_ff=(2048, 1536), vocab=1024)
    return {coded: tiny_artifact(root / str(coded), config, grid=GRID if coded else None) for coded in (True, False)}


@pytest.mark.parametrize("coded", [True, False], ids=["codes", "plain"])
@each_exporter
def test_the_forecast_of_the_size_is_right(
    name: str, coded: bool, large: Mapping[bool, Artifact], tmp_path: Path
) -> None:
    artifact = large[coded]
    exporter, options, exported = write(name, artifact, tmp_path / "out")
    forecast = exporter.bytes(artifact.config, artifact.grids, options, itemsize=4)
    assert forecast == pytest.approx(exported.bytes, rel=SIZE_TOLERANCE)


@each_case
@each_exporter
def test_the_runtime_gives_the_logits_of_the_artifact(
    name: str, case: Case, artifacts: Mapping[Case, Artifact], tmp_path: Path
) -> None:
    artifact = artifacts[case]
    runner, exported = opened(name, artifact, tmp_path / "out")
    tokens = some_tokens(artifact.config, 2, TOKENS)
    with closing(runner):
        got, reference = runner.logits(tokens), reference_logits(artifact, tokens)
        assert runner.provider
    assert got.shape == reference.shape
    if exported.rounding_kl:
        assert divergence(reference, got) <= exported.rounding_kl
    else:
        assert np.abs(got - reference).max() <= EXACT_SHARE * spread(reference)


@each_case
@each_exporter
def test_tokens_one_by_one_give_the_logits_of_reading_them_at_once(
    name: str, case: Case, artifacts: Mapping[Case, Artifact], tmp_path: Path
) -> None:
    artifact = artifacts[case]
    runner, _ = opened(name, artifact, tmp_path / "out")
    tokens = some_tokens(artifact.config, 2, TOKENS)
    with closing(runner):
        at_once = runner.logits(tokens)
        for _ in range(2):  # start forgets what was read before
            steps = [runner.start(tokens[:, :PROMPT], TOKENS)]
            steps += [runner.step(tokens[:, position]) for position in range(PROMPT, TOKENS)]
            difference = np.abs(np.stack(steps, 1) - at_once[:, PROMPT - 1 :])
            assert difference.max() <= EXACT_SHARE * spread(at_once)


@each_exporter
def test_a_failed_write_leaves_nothing(
    name: str, artifacts: Mapping[Case, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, artifact = exporter_named(name), artifacts[USUAL]
    item = PlannedExport(name, name, exporter, options_for(exporter, artifact, name), verify=False)
    reads, read = [], Artifact._read

    def failing(self: Artifact, tensor: str) -> Any:
        reads.append(tensor)
        if len(reads) > 8:
            raise ArtifactError("the disk is gone")
        return read(self, tensor)

    monkeypatch.setattr(Artifact, "_read", failing)
    with pytest.raises(FlatqError, match="the disk is gone"):
        deliver(item, artifact, tmp_path / "exports" / "mine", None)
    assert list((tmp_path / "exports").iterdir()) == []


@each_exporter
def test_an_unverified_export_is_written_whole(name: str, artifacts: Mapping[Case, Artifact], tmp_path: Path) -> None:
    exporter, artifact = exporter_named(name), artifacts[USUAL]
    item = PlannedExport(name, name, exporter, options_for(exporter, artifact, name), verify=False)
    report = deliver(item, artifact, tmp_path / "mine", None)
    assert report["verify"] is None
    assert report["unverified"] == "verification was disabled"
    assert {*report["files"], DESCRIPTION} == set(digests(tmp_path / "mine"))


@each_exporter
def test_a_moved_export_is_whole(name: str, exported_run: tuple[Path, Path], tmp_path: Path) -> None:
    """Copied elsewhere, without its artifact and its dense model, it is verified, writes text, and is measured."""
    exporter = exporter_named(name)
    shutil.copytree(exported_run[1] / "artifact", tmp_path / "artifact")
    artifact = Artifact.open(tmp_path / "artifact")
    artifact.manifest["recipe"] = ""
    options = exporter.Options()
    if exporter.check(artifact.config, artifact.grids, options):  # groups that the format does not have
        options = exporter.dense(options) or options
    item = PlannedExport(name, name, exporter, options, verify=False)
    deliver(item, artifact, tmp_path / "first", None)
    shutil.copytree(tmp_path / "first", tmp_path / "elsewhere" / "mine")
    shutil.rmtree(tmp_path / "artifact")
    shutil.rmtree(tmp_path / "first")
    moved = tmp_path / "elsewhere" / "mine"
    (block,) = re.findall(r"```sh\n(.*?)```", (moved / "README.md").read_text(), re.DOTALL) or [""]
    stated = [shlex.split(line.replace("FOLDER", str(moved)))[1:] for line in block.splitlines()]
    assert name == "safetensors" or [words[0] for words in stated] == ["verify", "generate", "bench", "eval"]
    assert flatq("verify", moved).exit_code == 0
    if not has_runtime(item):
        pytest.skip(f"no runtime for {name} is installed")
    text = tmp_path / "text.txt"
    text.write_text("the bright river " * 60)
    for command in (
        *stated[:2],  # the others take longer
        ("generate", moved, "--prompt", "the bright river", "--new-tokens", "3"),
        ("bench", moved, "--prompt", "4", "--new-tokens", "2", "--repeats", "1"),
        ("eval", moved, "--path", text, "--tokens", "64", "--seq-len", "16"),
    ):
        shown = flatq(*command)
        assert shown.exit_code == 0, (command, shown.stderr)
    assert re.search(r"text: perplexity \d", shown.stdout)


@each_exporter
def test_beyond_its_positions_a_runner_stops(name: str, artifacts: Mapping[Case, Artifact], tmp_path: Path) -> None:
    exporter, artifact = exporter_named(name), artifacts[USUAL]
    item = PlannedExport(name, name, exporter, options_for(exporter, artifact, name), verify=False)
    if name not in OURS or not has_runtime(item):
        pytest.skip("has no runtime, or one that is not ours")
    deliver(item, artifact, tmp_path / "mine", None)
    most = artifact.config.max_positions
    runner = exporter.open(tmp_path / "mine", item.options, provider="cpu")
    assert runner is not None
    with closing(runner):
        assert runner.start(some_tokens(artifact.config, 1, 4), most).shape == (1, artifact.config.vocab)
        for ask in (
            lambda: runner.start(some_tokens(artifact.config, 1, 4), most + 1),
            lambda: runner.logits(some_tokens(artifact.config, 1, most + 1)),
        ):
            with pytest.raises(ExportError, match=f"{most + 1} positions are more than its context length of {most}"):
                ask()
