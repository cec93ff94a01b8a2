"""The commands ``init``, ``sweep`` and ``front``; as in ``flatq.cli``, torch is imported inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatq.errors import RecipeError
from flatq.files import write_atomically


def initial(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or package:NAME/FILE.", show_default=False)],
    size: Annotated[str | None, typer.Option(help="Bytes of the exported file at most, such as 60MB.")] = None,
    to: Annotated[
        str | None, typer.Option(help="Name of an installed exporter; default: the first that runs here.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Recipe file to write; must not exist. Default: MODEL.yaml.")
    ] = None,
) -> None:
    """Write a commented recipe for a model, fitted to this machine and a size; it runs unchanged.

    Of a hub id only the configuration and the tokenizer are downloaded.
    """
    from flatq.plan.initial import file_name, initial_recipe

    file = out or Path(file_name(model, size, to))
    if file.exists():
        raise RecipeError(f"--out {file}: exists; choose another file")
    write_atomically(file, initial_recipe(model, limit=size, to=to, file=str(file)).encode())
    print(file)
