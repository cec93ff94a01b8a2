"""The report says what was measured, what got worse, and opens from disk."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import ValidationError

from flatq.export.bench import BenchResult, Spread
from flatq.export.verify import Agreement, Verification
from flatq.model.decoder import LayerDims
from flatq.report.findings import findings
from flatq.report.render import read_report, write_report
from flatq.report.schema import (
    BaselineReport,
    Environment,
    ExportReport,
    HeadReport,
    LayerReport,
    Measure,
    ModelInfo,
    Report,
    TextQuality,
)

DENSE = LayerDims(heads=9, kv_heads=3, d_qk=64, d_v=64, d_ff=1536)


def layer(index: int) -> LayerReport:
    share = 0.55 + 0.4 * abs(math.sin(0.4 * index + 0.3))
    dims = LayerDims(9, 3, 64, 4 * round(16 * share), 32 * round(48 * share))
    linears = ("q", "k", "v", "o", "gate", "up", "down")
    errors = {name: 0.004 + 0.003 * place + 0.002 * math.sin(index + place) for place, name in enumerate(linears)}
    narrowing = {"value": 0.02 + 0.1 * (1 - share), "mlp": 0.03 + 0.25 * (1 - share) + 0.002 * index}
    notes = ["3 inputs of down never fired"] if index == 7 else []
    curves = {part: [(n / 8, (1 + index) * (n / 8) ** 3) for n in range(9)] for part in ("value", "mlp")}
    return LayerReport(index=index, dims=dims, dense=DENSE, errors=narrowing | errors, notes=notes, curves=curves)


def speeds(name: str, decode: float, prefill: float, rss: float) -> BenchResult:
    return BenchResult(
        name=name,
        provider="CPUExecutionProvider",
        threads=2,
        batch=1,
        prompt=128,
        new_tokens=64,
        repeats=5,
        load_seconds=0.83,
        first_token_seconds=Spread(128 / prefill, 127 / prefill, 133 / prefill),
        prefill_tokens_per_second=Spread(prefill, 0.96 * prefill, 1.02 * prefill),
        decode_tokens_per_second=Spread(decode, 0.94 * decode, 1.03 * decode),
        rss_before_bytes=251_000_000,
        peak_rss_bytes=int(rss),
        device_memory_bytes=None,
    )


def export(name: str, count: int, verified: bool = True) -> ExportReport:
    exact = Agreement("CPUExecutionProvider", 132, 2.1e-4, 2.2e-5, 1.9e-4, 1.0, 1, 3.1e-9)
    deployed = Agreement("CPUExecutionProvider", 132, 0.61, 0.07, 0.58, 0.955, 0, 6.3e-3)
    return ExportReport(
        name=name,
        files=["model.onnx", "model.onnx.data"],
        bytes=count,
        sha256={"model.onnx": "ab" * 32, "model.onnx.data": "cd" * 32},
        verify=Verification(spread=3.2, limit=0.016, exact=exact, deployed=deployed) if verified else None,
        notes=["the value cache is padded to 64 in this layout"] if "gqa" in name else [],
    )


def quality(text: str, damage: float, *, calibrated: bool, dense: float = 14.41) -> TextQuality:
    return TextQuality(
        text=text,
        calibrated=calibrated,
        rows=32,
        tokens=16352,
        baseline_perplexity=dense,
        perplexity=dense * math.exp(damage),
        damage=damage,
        damage_stderr=0.011,
        kl=0.9 * damage,
        kl_stderr=0.008,
        top1=0.83,
        top1_stderr=0.004,
    )


@pytest.fixture
def report() -> Report:
    return Report(
        model=ModelInfo(name="HuggingFaceTB/SmolLM2-135M", family="llama", d_model=576, vocab=49152, layers=30),
        recipe={
            "version": 1,
            "model": "HuggingFaceTB/SmolLM2-135M",
            "calibration": {"dataset": "wikitext2", "samples": 32, "seq_len": 512, "seed": 42},
            "stages": [{"flat": {"keep_ratio": 0.8}}, {"gptq": {"bits": 4, "group_size": 32}}],
            "exports": [{"onnx": {"attention": "reduced"}}, {"safetensors": {"format": "gptq"}}],
        },
        environment=Environment.collect(),
        baseline=Measure(
            parameters=134_515_008, decoder_parameters=106_168_320, bytes=269_030_016, perplexity=14.41,
            perplexity_tokens=16352,
        ),
        result=Measure(
            parameters=113_280_000, decoder_parameters=84_934_656, bytes=72_500_000, perplexity=21.87,
            perplexity_tokens=16352,
        ),
        quality=[
            quality("python-docs", 0.13, calibrated=True, dense=9.31),
            quality("wikitext2", math.log(21.87 / 14.41), calibrated=False),
        ],
        recipe_text="# as it was written\nversion: 1\n",
        layers=[layer(index) for index in range(30)],
        head=HeadReport(error=0.0123, notes=["head: damping was increased to 0.1"]),
        exports=[export("onnx", 74_100_000), export("onnx-gqa", 74_300_000), export("safetensors", 81_000_000, False)],
        bench=[
            speeds("baseline", 41.2, 512.0, 1.21e9),
            speeds("onnx", 96.4, 418.0, 0.52e9),
            speeds("onnx-gqa", 99.1, 431.0, 0.53e9),
        ],
        timing={"load": 1.2, "importance": 31.0, "compress": 214.5, "export": 9.1, "verify": 6.0, "bench": 71.3},
        peak_rss_bytes=1_720_000_000,
    )  # fmt: skip


class References(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def test_json_has_the_contracts_keys_and_comes_back_equal(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert set(written) == {
        "schema_version", "model", "recipe", "environment", "baseline", "result", "layers", "head", "exports",
        "bench", "timing", "memory", "device_memory", "forecast", "peak_rss_bytes", "notes", "quality",
        "recipe_text", "baselines", "tasks", "recovery",
    }  # fmt: skip
    assert {"parameters", "decoder_parameters", "bytes", "perplexity"} <= set(written["result"])
    assert {"files", "bytes", "sha256", "verify"} <= set(written["exports"][0])
    assert read_report(tmp_path / "report.json") == report
    assert not list(tmp_path.glob("*.partial"))


def test_the_page_is_one_file_that_fetches_nothing(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    references = References()
    references.feed(page)
    assert references.tags.count("svg") == 5
    assert "script" not in references.tags
    assert all(reference.startswith("#") for reference in references.found)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    assert "#0a0b" not in page  # every marker colour became one of the page's


def test_the_page_is_the_same_each_time(report: Report, tmp_path: Path) -> None:
    short = report.model_copy(update={"layers": report.layers[:2], "bench": []})
    write_report(short, tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    write_report(short, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_what_got_worse_is_said_plainly(report: Report, tmp_path: Path) -> None:
    found = findings(report)
    assert any("14.41 → 21.87" in line and "+0.417 nats" in line for line in found.costs)
    assert any(line.startswith("onnx prefill") for line in found.costs)
    assert any(line.startswith("onnx decode") for line in found.gains)
    assert any(line.startswith("safetensors: not verified") for line in found.costs)
    assert any(line.startswith("Value cache") for line in found.gains)
    write_report(report, tmp_path)
    for name in ("report.html", "report.md"):
        assert all(line in (tmp_path / name).read_text() for line in found.costs)


def test_markup_in_a_models_name_stays_text(report: Report, tmp_path: Path) -> None:
    sly = report.model_copy(update={"model": report.model.model_copy(update={"name": "<script>alert(1)</script>"})})
    write_report(sly, tmp_path)
    assert "<script>" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("missing", ["baseline", "bench", "exports", "perplexity", "everything"])
def test_what_was_not_measured_is_called_so(report: Report, tmp_path: Path, missing: str) -> None:
    empty = {"baseline": None, "bench": [], "exports": []}
    blind = {"result": report.result.model_copy(update={"perplexity": None})}
    changes = {"everything": empty | blind, "perplexity": blind}.get(missing) or {missing: empty[missing]}
    partial = report.model_copy(update={"layers": [], **changes})
    write_report(partial, tmp_path)
    assert read_report(tmp_path / "report.json") == partial
    if missing in ("baseline", "perplexity", "everything"):
        assert "not measured" in (tmp_path / "report.html").read_text()
        assert not any("Perplexity:" in line for line in findings(partial).costs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="perplexity"):
        Measure(parameters=1, decoder_parameters=1, bytes=1, perplexity=value)


def test_the_headline_is_text_that_was_not_calibrated_on(report: Report, tmp_path: Path) -> None:
    assert report.headline is not None
    assert report.headline.text == "wikitext2"
    only = report.model_copy(update={"quality": report.quality[:1]})
    assert only.headline == report.quality[0]
    assert any("text of the calibration's kind" in note for note in findings(only).notes)
    write_report(report, tmp_path)
    assert "| perplexity on wikitext2 | 14.410 | 21.870 |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("seen", "other", "warned"),
    [(0.13, 0.41, True), (0.13, 0.25, False), (0.41, 0.13, True), (0.001, 0.015, False), (-0.01, 0.1, True)],
)
def test_damage_that_differs_by_more_than_two_is_warned_of(
    report: Report, seen: float, other: float, warned: bool
) -> None:
    texts = [quality("docs", seen, calibrated=True), quality("news", other, calibrated=False)]
    said = findings(report.model_copy(update={"quality": texts})).costs
    assert any("WARNING" in line for line in said) == warned


def test_the_quality_of_exports_stands_beside_the_artifacts(report: Report, tmp_path: Path) -> None:
    worse = quality("wikitext2", 0.61, calibrated=False)
    exports = [report.exports[0].model_copy(update={"quality": [worse]}), *report.exports[1:]]
    write_report(report.model_copy(update={"exports": exports}), tmp_path)
    assert "| wikitext2, onnx | no | " in (tmp_path / "report.md").read_text()
    assert "+0.610 ± 0.011" in (tmp_path / "report.html").read_text()


def test_a_failed_export_is_in_the_report_with_its_reason(report: Report, tmp_path: Path) -> None:
    failed = ExportReport(name="gguf", files=[], bytes=0, sha256={}, verify=None, error="the disk is gone")
    write_report(report.model_copy(update={"exports": [failed]}), tmp_path)
    for file in ("report.md", "report.html"):
        text = (tmp_path / file).read_text()
        assert "FAILED" in text
        assert "the disk is gone" in text


def test_the_recipe_is_shown_as_it_was_written(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    for file in ("report.md", "report.html"):
        written, folded = (tmp_path / file).read_text().split("# as it was written", 1)[1].split("<details>", 1)
        assert "samples: 32" not in written
        assert "samples: 32" in folded


def test_the_page_fits_a_phone_and_follows_the_reader_into_the_dark(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert "<script" not in page
    for start in (match.start() for match in re.finditer("<table", page)):
        assert 'class="card scroll"' in page[:start].rsplit("<div", 1)[1], "a table scrolls in a container of its own"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (
            "quantized",
            0.2,
            "Narrowing, compared with quantization alone (3 bit, groups of 64): weights 80 MB → 72.5 MB",
        ),
        (
            "same_bytes",
            0.2,
            "Narrowing is worse at this size: quantization alone (3 bit, groups of 64) loses +0.200 nats",
        ),
        ("same_bytes", 0.9, "Narrowing is better at this size"),
    ],
)
def test_what_narrowing_bought_is_said(report: Report, name: str, damage: float, said: str) -> None:
    rival = BaselineReport(
        name=name,
        description="3 bit, groups of 64",
        parameters=134_515_008,
        bytes=80_000_000,
        decode_bytes=90_000_000,
        quality=[quality("wikitext2", damage, calibrated=False)],
    )
    found = findings(report.model_copy(update={"baselines": [rival]}))
    assert any(said in line for line in found.gains + found.costs)
