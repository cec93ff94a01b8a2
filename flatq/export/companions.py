"""What every export folder contains besides the exporter's files: tokenizer, chat templates, settings, a README.

With them the folder can be moved to another machine and used there without its run.
"""

from __future__ import annotations

from pathlib import Path

from flatq.artifact import Artifact
from flatq.export.planned import PlannedExport, context_length
from flatq.files import write_atomically
from flatq.tokenizer import companions

README = "README.md"


def add_companions(root: Path, artifact: Artifact, item: PlannedExport) -> list[str]:
    """Add what the exporter did not write; returns in words every change of a copied file, usually none."""
    changes: list[str] = []
    missing = [path for path in companions(artifact.root) if not (root / path.relative_to(artifact.root)).exists()]
    if missing:
        _, changes = artifact.copy_companions(root, missing)
    if not (root / README).exists():
        write_atomically(root / README, readme(artifact, item).encode())
    return changes


def readme(artifact: Artifact, item: PlannedExport) -> str:
    """How to run the export, in Markdown."""
    config = artifact.config
    return f"""# {item.name}

A {config.family} model with {len(config.layers)} layers, compressed and exported by flatq as {item.format}. Options:
{_options(item)}. At most {context_length(item.options, config):,} positions.

The folder is complete: it can be moved to another machine. `export.json` has the digest of every file; `flatq verify`
compares them.

```sh
flatq verify FOLDER
flatq generate FOLDER --prompt "The sea is" --new-tokens 20
flatq bench FOLDER
flatq eval FOLDER
```

{item.exporter.usage(item.options)}"""


def _options(item: PlannedExport) -> str:
    stated = item.options.model_dump(mode="json", exclude_defaults=True)
    return ", ".join(f"{key} {value}" for key, value in stated.items()) or "defaults"
