"""The commands ``init``, ``sweep`` and ``front``; as in ``flatq.cli``, torch is imported inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flatq.errors import RecipeError


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
    from flatq.files import write_atomically
    from flatq.plan.initial import file_name, initial_recipe

    file = out or Path(file_name(model, size, to))
    if file.exists():
        raise RecipeError(f"--out {file}: exists; choose another file")
    write_atomically(file, initial_recipe(model, limit=size, to=to, file=str(file)).encode())
    print(file)


RecipeFile = Annotated[Path, typer.Argument(help="The base recipe.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder; runs/RECIPE-sweep-DIGEST if not given.")]
Pick = Annotated[
    list[str] | None,
    typer.Option(
        help="Write the recipe of the best point that satisfies size=90MB, tokens_per_second=250, "
        "prefill_tokens_per_second=900 or max_damage=0.1 to picked.yaml; repeatable."
    ),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:N or mps.")]
Memory = Annotated[str | None, typer.Option(help="Limit of RAM, such as 6GB; sets the batch sizes.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not verify exports; the reports state it.")]
NoQuantized = Annotated[
    bool, typer.Option("--no-quantized", help="Do not add runs that only quantize, for comparison.")
]


def sweep(
    recipe: RecipeFile,
    grid: Annotated[
        list[str], typer.Option(help="KEY=VALUE,VALUE with a key such as gptq.bits; repeatable.", show_default=False)
    ],
    out: Out = None,
    pick: Pick = None,
    device: Device = "auto",
    memory: Memory = None,
    no_quantized: NoQuantized = False,
    no_verify: NoVerify = False,
) -> None:
    """Run every combination of a grid; the dense model is measured once. The same command resumes.

    Writes a table (sweep.md), a page with the trade-off between quality, size and speed (sweep.html) and sweep.json.
    """
    from flatq.recipe.grammar import Recipe

    base = Recipe.load(recipe)
    from flatq.sweep.grid import axes_of, combinations

    axes = axes_of(grid)
    run_all(base, axes, combinations(base, axes, alone=not no_quantized), out, pick, device, memory, no_verify)


def front(
    recipe: RecipeFile,
    size: Annotated[str, typer.Option(help="Sizes of the file, such as 50MB..120MB.", show_default=False)],
    points: Annotated[int, typer.Option(help="Number of sizes.")] = 8,
    out: Out = None,
    pick: Pick = None,
    device: Device = "auto",
    memory: Memory = None,
    no_quantized: NoQuantized = False,
    no_verify: NoVerify = False,
) -> None:
    """Run a recipe at several sizes; at each the budget chooses widths and bits. A sweep over budget.size.

    Keys of the recipe's stages that a budget chooses, such as keep_ratio and bits, are not used.
    """
    from flatq.recipe.grammar import Recipe

    base = Recipe.load(recipe)
    from flatq.sweep.front import sizes_of, with_budget
    from flatq.sweep.grid import combinations

    axis = sizes_of(size, points)
    limited = with_budget(base, axis.values[0])
    found = combinations(limited, [axis], alone=not no_quantized)
    run_all(limited, [axis], found, out, pick, device, memory, no_verify)


def run_all(
    base: Any,
    axes: Any,
    points: Any,
    out: Path | None,
    pick: list[str] | None,
    device: str,
    memory: str | None,
    no_verify: bool,
) -> None:
    """Run the combinations of a sweep or a front and print its folder."""
    from flatq.sweep.choice import wishes_of

    wishes = wishes_of(pick or [])
    from flatq.sweep.running import sweep as run_sweep

    settings: dict[str, Any] = {"device": device, "memory": memory_of(memory), "verify": not no_verify}
    print(run_sweep(base, axes, points, out, wishes=wishes, **settings))


def memory_of(text: str | None) -> int | None:
    """The value of ``--memory`` in bytes.

    Raises:
        RecipeError: it is not a size.
    """
    from flatq.units import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise RecipeError(f"--memory: {error}") from error
