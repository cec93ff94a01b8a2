"""The model card ``README.md`` of an exported folder: how to load it, how it was created, measured quality."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from flatq.export import Artifact, Grid, __version__
from flatq_safetensors.configs import TRANSFORMERS, Versions
from flatq_safetensors.tensors import Layout

CARD = """\
---
{% if license %}license: {{ license }}
{% endif %}{% if base %}base_model: {{ base }}
{% endif %}library_name: transformers
pipeline_tag: text-generation
tags: [flatq{% if grids %}, quantized{% endif %}]
---
# {{ title }}

A {{ family }} model compressed by flatq {{ version }}, without training:
{{ parameters }} parameters in {{ layers }} layers.
{% if license %}
The base model's license, `{{ license }}`, applies to these weights too.
{% else %}
The base model's files state no license; look it up where the model came from before you share these weights.
{% endif %}
## Load it

```python
{{ load }}
```

{{ needs }}

## How it was made

Value widths per layer: {{ d_v }}. MLP widths per layer: {{ d_ff }}.
{% if grids %}
| quantized linears | bits | group size | symmetric |
|---|---|---|---|
{% for grid, count in grids %}| {{ count }} | {{ grid.bits }} | {{ grid.group_size }} | {{ grid.symmetric }} |
{% endfor %}{% endif %}{% for note in notes %}
- {{ note }}{% endfor %}
{% if recipe %}
The recipe, run with `flatq run`:

```yaml
{{ recipe }}
```
{% endif %}{% if quality %}
## Measured quality

| what | value |
|---|---|
{% for key, value in quality %}| {{ key }} | {{ value }} |
{% endfor %}{% endif %}"""

LOAD = """\
import torch
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder{trust}, dtype=torch.{dtype})
tokenizer = AutoTokenizer.from_pretrained(folder{trust})"""


def model_card(artifact: Artifact, layout: Layout, notes: Sequence[str]) -> str:
    """The card as Markdown.

    Uses ``source`` (``origin``, ``license``), ``recipe`` and ``quality`` (name -> value) of the artifact's manifest, if
    they exist.
    """
    manifest = artifact.manifest
    source = manifest.get("source", {})
    origin, license_ = source.get("origin"), source.get("license")
    base = str(origin) if origin and str(origin).count("/") == 1 and ":" not in str(origin) else None
    dims = layout.source.layers
    card = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(CARD)
    return card.render(
        title=str(origin or layout.config.family) + ", compressed",
        base=base,
        license=license_,
        family=layout.config.family,
        version=__version__,
        parameters=f"{layout.source.parameters():,}",
        layers=len(dims),
        d_v=_runs([dim.d_v for dim in dims]),
        d_ff=_runs([dim.d_ff for dim in dims]),
        load=_load(layout),
        needs=_needs(layout),
        grids=_counts(layout.grids),
        notes=notes,
        recipe=_text(manifest.get("recipe")),
        quality=sorted(manifest.get("quality", {}).items()),
    )


def _load(layout: Layout) -> str:
    trust = "" if layout.plain else ", trust_remote_code=True"
    imports = "" if layout.plain else "# with `import flatq` here, trust_remote_code is not needed\n"
    dtype = "float32" if layout.dtype.itemsize == 4 else "float16"
    return LOAD.format(imports=imports, trust=trust, dtype=dtype)


def _needs(layout: Layout) -> str:
    tried = f"{', '.join(TRANSFORMERS[:-1])} and {TRANSFORMERS[-1]}"
    code = (
        "The layers have the same widths, so no extra code is needed."
        if layout.plain
        else "The layers differ in width, so the folder contains the code of the model. It was tested with "
        f"transformers {tried}."
    )
    if not layout.grids:
        return code
    gptq = layout.options.gptq_version is not None
    readers = Versions.reading(layout.grids.values(), embedding="embed" in layout.grids)
    package = "gptqmodel optimum" if gptq else f"'{readers}'"
    return f"Needs `pip install {package}`. {code}"


def _counts(grids: Mapping[str, Grid]) -> list[tuple[Grid, int]]:
    distinct = dict.fromkeys(grids.values())
    return [(grid, sum(other == grid for other in grids.values())) for grid in distinct]


def _runs(values: Sequence[int]) -> str:
    """``64 64 48`` -> ``64 (2 layers), 48``."""
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return ", ".join(f"{value} ({count} layers)" if count > 1 else str(value) for value, count in runs)


def _text(recipe: Any) -> str:
    if not recipe:
        return ""
    return recipe.strip() if isinstance(recipe, str) else json.dumps(recipe, indent=2)
