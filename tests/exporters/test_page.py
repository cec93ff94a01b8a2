"""The page "Writing an exporter" works as it stands: its packages run whole recipes, with a runtime and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeRecipe, flatq
from tests.plug_ins import examples, installed

BENCH = {"prompt": 4, "new_tokens": 2, "repeats": 1, "threads": 1}
DOWN = {"flat": {"keep_ratio": 0.8, "rank_multiple": 4, "width_multiple": 16}}


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path) -> Iterator[None]:
    with installed(tmp_path / "site"):
        yield


def finished(recipe: Path, out: Path, *options: str) -> dict[str, Any]:
    """The report of a run."""
    shown = flatq("run", recipe, "--out", out, *options)
    assert shown.exit_code == 0, shown.stderr
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_the_page_has_two_packages() -> None:
    assert list(examples()) == [
        "plain_exporter/__init__.py",
        "plain_exporter: pyproject.toml",
        "my_exporter/__init__.py",
        "my_exporter/runner.py",
        "my_exporter: pyproject.toml",
    ]


def test_a_recipe_with_both_is_written_verified_and_measured(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    exports = [{"plain": {"half": True}}, {"my": {}}]
    out = tmp_path / "out"
    report = finished(make_recipe(stages=[DOWN], exports=exports, bench=BENCH), out)
    plain, mine = report["exports"]
    assert plain["verify"] is None
    assert plain["unverified"] == "the format has no runtime that flatq can open"
    assert mine["verify"]["exact"]["provider"] == "numpy on the CPU"
    assert mine["verify"]["exact"]["max_abs"] <= mine["verify"]["limit"]
    assert [entry["name"] for entry in report["bench"]] == ["baseline", "my"]
    assert {"README.md", "export.json", "weights.npz"} < {path.name for path in (out / "exports" / "plain").iterdir()}
    page = (out / "report.html").read_text()
    assert '<small class="unverified">not verified</small>' in page
    assert "plain: not verified: the format has no runtime" in page


def test_plan_asks_the_plug_ins(make_recipe: MakeRecipe) -> None:
    shown = flatq("plan", make_recipe(stages=[DOWN], exports=[{"plain": {}}, {"my": {}}]))
    assert shown.exit_code == 0, shown.stderr
    assert "export plain" in shown.stdout
    assert "export my" in shown.stdout


def test_without_its_runtime_a_run_is_refused_before_work_or_writes_unverified(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import my_exporter  # type: ignore[import-not-found]

    monkeypatch.setattr(my_exporter, "RUNTIME", {"not_there_at_all": ("not-there", "pip install not-there")})
    monkeypatch.setattr(
        my_exporter.MyExporter, "missing", lambda self, options, opening=True: absent(my_exporter) if opening else []
    )
    recipe = make_recipe(stages=[DOWN], exports=[{"my": {}}], bench=BENCH)
    refused = flatq("run", recipe, "--out", tmp_path / "refused")
    assert refused.exit_code == 2
    assert "exports.my: cannot be verified: the package not-there is not installed" in refused.stderr
    assert "pip install not-there" in refused.stderr
    assert not (tmp_path / "refused" / "artifact").exists()
    report = finished(recipe, tmp_path / "out", "--no-verify")
    assert report["exports"][0]["unverified"] == "verification was disabled"
    assert report["bench"] == []
    assert (tmp_path / "out" / "exports" / "my" / "weights.npz").exists()


def absent(module: Any) -> list[str]:
    from flatq.export import absent_packages

    return absent_packages(module.RUNTIME)
