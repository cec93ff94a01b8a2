"""Write the report of a run: ``report.json`` for programs, ``report.md`` for terminals, ``report.html`` for browsers.

The two others are rendered from the JSON alone, so they can be rendered again later. The page is a single file that
needs no network: figures are inline SVG, there is no script.

``findings`` sorts every comparison with the baseline by its sign, and the page shows costs with the same prominence as
gains.
"""

from __future__ import annotations

from pathlib import Path

import jinja2
import yaml

from flatq.evaluate.tasks import task_cells
from flatq.export.baseline import BASELINE
from flatq.files import read_json, write_atomically, write_json
from flatq.phases import FRESH
from flatq.report.findings import findings
from flatq.report.schema import Report, TextQuality
from flatq.units import number, seconds, size, speed, times, with_error


def write_report(report: Report, out_dir: Path) -> None:
    """Write ``report.md``, ``report.html`` and last ``report.json``, which marks a finished run; each atomically."""
    write_atomically(out_dir / "report.md", render(report, "report.md.j2").encode())
    write_atomically(out_dir / "report.html", render(report, "report.html.j2").encode())
    write_json(out_dir / "report.json", report.model_dump(mode="json"))


def read_report(path: Path) -> Report:
    """Read a ``report.json``.

    Raises:
        ArtifactError: it is missing, damaged, or of another version.
    """
    return read_json(path, Report, FRESH)


def qualities(report: Report) -> list[tuple[TextQuality, str]]:
    """Every measured quality with the name of its model (empty for the artifact), grouped by text."""
    found = [(text, "") for text in report.quality]
    found += [
        (text, f"{baseline.name} ({baseline.description})")
        for baseline in report.baselines
        for text in baseline.quality
    ]
    found += [(text, "before recover") for text in (report.recovery.quality if report.recovery else ())]
    found += [(text, export.name) for export in report.exports for text in export.quality]
    order = list(dict.fromkeys(text.text for text, _ in found))
    return sorted(found, key=lambda pair: order.index(pair[0].text))


def environment(*folders: Path) -> jinja2.Environment:
    """Jinja with the filters of the reports, for the templates of this folder and of others."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"size": size, "speed": speed, "seconds": seconds, "number": number, "times": times}
    found.filters["with_error"] = with_error
    return found


def render(report: Report, template: str) -> str:
    """Render a template of this folder."""
    from flatq.report import figures  # imports matplotlib, which only a finished run needs

    return (
        environment()
        .get_template(template)
        .render(
            report=report,
            findings=findings(report),
            dense=report.bench_of(BASELINE),
            error_names=list(dict.fromkeys(name for layer in report.layers for name in layer.errors)),
            recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True).rstrip(),
            qualities=qualities(report),
            tasks=task_cells(report.tasks),
            texts=lambda: figures.quality_by_text(report),
            positions=lambda: figures.kl_by_position(report),
            ranks=lambda: figures.rank_profile(report),
            costs=lambda: figures.narrowing_costs(report),
            errors=lambda: figures.layer_errors(report),
            bars=lambda: figures.size_and_speed(report),
        )
    )
