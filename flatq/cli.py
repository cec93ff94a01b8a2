"""The command line: each verb is a few lines that call the library.

What changes a number is in the recipe; here are only places, the device, resuming and how much is said. torch is
imported inside the verbs that compute, so that ``--help``, ``check --help`` and ``schema`` answer at once.

Exit codes: 0 done, 2 the recipe or what it names is wrong, 3 a stage failed, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text
from typer.core import TyperGroup

import flatq
from flatq.errors import FlatqError, RecipeError

INTERRUPTED = 130


class Verbs(TyperGroup):
    """All verbs; turns what flatq raises into a paragraph on stderr and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the verb that was asked for."""
        stderr = Console(stderr=True, soft_wrap=True)
        try:
            return super().invoke(ctx)
        except FlatqError as error:
            if ctx.params.get("debug"):
                stderr.print_exception()
            stderr.print(Text(str(error), style="red"))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            stderr.print("interrupted; the same command goes on from here")
            raise typer.Exit(INTERRUPTED) from interrupt


app = typer.Typer(cls=Verbs, no_args_is_help=True, pretty_exceptions_show_locals=False, add_completion=False)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, as in recipes/.", show_default=False)]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:N or mps.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Write exports unverified; the report says so.")]
NoDigests = Annotated[
    bool, typer.Option("--no-digests", help="Use the files without comparing them with their digests.")
]
Provider = Annotated[str, typer.Option(help="Where the runtime computes: auto, cpu or cuda.")]


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        print(f"flatq {flatq.__version__}")
        raise typer.Exit


@app.callback()
def settings(
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="Say more; twice for details.")] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say only what went wrong.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a large language model small and fast without training it.

    Start with: flatq check recipes/smollm2-135m-flat10-int4.yaml
    """
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=verbose > 0, markup=False)
    logging.basicConfig(
        level=logging.WARNING if verbose < 2 else logging.INFO, handlers=[handler], format="%(message)s"
    )
    logging.getLogger("flatq").setLevel(level)


@app.command()
def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/RECIPE-DIGEST if not given.")] = None,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
    forecast: Annotated[
        bool,
        typer.Option("--forecast", help="Estimate time and memory first, and report them beside what was measured."),
    ] = False,
    memory: Annotated[str | None, typer.Option(help="RAM to stay below, as in 6GB; batches are made to fit.")] = None,
    no_verify: NoVerify = False,
    no_digests: NoDigests = False,
) -> None:
    """Compress, export, verify and measure a model; resumes where an earlier run stopped.

    Several processes share the calibration: torchrun --nproc-per-node N -m flatq run RECIPE
    """
    from flatq.recipe.grammar import Recipe

    checked = Recipe.load(recipe)
    from flatq.machine import distributed
    from flatq.pipeline.run import run as run_recipe

    asked: dict[str, Any] = {"memory": memory_of(memory), "predict": forecast, "verify": not no_verify}
    done = run_recipe(checked, out, device=device, fresh=fresh, check=not no_digests, **asked)
    if done is not None:
        print(done)
    distributed.leave()


@app.command()
def check(recipe: RecipeFile) -> None:
    """Explain a recipe, or list everything that is wrong with it; of a local model its config.json is read."""
    from flatq.recipe.grammar import Recipe

    checked = Recipe.load(recipe)
    from flatq import verbs

    print("\n".join(verbs.check(checked)))


@app.command()
def plan(recipe: RecipeFile, device: Device = "auto") -> None:
    """Predict parameters, file sizes, memory and a rough time; reads the model's shapes, not its weights."""
    from flatq.recipe.grammar import Recipe

    checked = Recipe.load(recipe)
    from flatq import verbs

    print(verbs.plan(checked, device=device))


@app.command()
def export(
    artifact: Annotated[Path, typer.Argument(help="A run folder or its artifact folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.", show_default=False)],
    format: Annotated[str, typer.Option(help="Name of an installed exporter.", show_default=False)],
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="KEY=VALUE for the exporter; repeatable.")
    ] = None,
    no_verify: NoVerify = False,
    no_digests: NoDigests = False,
) -> None:
    """Write one more format of a finished artifact, and verify it."""
    options = parse_options(option or [])
    from flatq import verbs

    written = verbs.export(artifact, out, format, options, verify=not no_verify, check=not no_digests)
    print("\n".join(str(path) for path in written))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Artifact, export or run folder.", show_default=False)],
) -> None:
    """Read every file and compare it with its digest; names those that are damaged, missing or unexpected.

    Exit code 3 if there are such files. Other verbs compare, too, but do not read again what was right before.
    """
    from flatq.integrity import verified

    print("\n".join(verified(path)))


@app.command()
def bench(
    paths: Annotated[list[Path], typer.Argument(help="Export folders, measured in turn.", show_default=False)],
    against: Annotated[
        list[Path] | None, typer.Option(help="Folder with another program's ONNX decoder; repeatable.")
    ] = None,
    provider: Provider = "auto",
    prompt: Annotated[list[int] | None, typer.Option(min=1, help="Tokens read at once [128]; repeatable.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated one by one.")] = 64,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences side by side [1]; repeatable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements, of which the median counts.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 lets the runtime choose.")] = 0,
    no_digests: NoDigests = False,
) -> None:
    """Measure tokens per second, first-token latency, load time and memory of exports."""
    from flatq import verbs

    pairs = [(length, rows) for rows in batch or [1] for length in prompt or [128]]
    loads = [{"prompt": length, "new_tokens": new_tokens, "batch": rows} for length, rows in pairs]
    settings: dict[str, Any] = {"provider": provider, "repeats": repeats, "threads": threads}
    print(verbs.bench_exports(paths, against or [], loads, check=not no_digests, **settings))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Artifact, export, or a model as in a recipe.", show_default=False)],
    dataset: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, alpaca, python-docs or text; the run's own texts if not given."),
    ] = None,
    path: Annotated[Path | None, typer.Option(help="A .txt or .jsonl file of yours, as the text.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of each text [8192, for an export 2048].")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens in a sequence [512].")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval instead, separated by commas.")] = None,
    suite: Annotated[str | None, typer.Option(help="A list of tasks: flat-paper.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First documents of each task; all if not given.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for task results; tasks/ beside the model.")] = None,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Leave out the model before compression.")] = False,
    provider: Provider = "auto",
    no_digests: NoDigests = False,
) -> None:
    """Measure perplexity and divergence from the dense model on held-out text; an export in its own runtime.

    With --tasks: tasks of lm-eval, beside the dense model; finished tasks are kept.
    """
    if tasks is not None or suite is not None:
        from flatq import verbs

        names = [name for name in (tasks or "").split(",") if name]
        places: dict[str, Any] = {"folder": include_path, "out": out, "dense": not no_dense, "provider": provider}
        print(verbs.evaluate_tasks(model, names, suite=suite, limit=limit, check=not no_digests, **places))
        return
    from flatq.pipeline.evaluate import evaluate as lines

    asked: dict[str, Any] = {"dataset": dataset, "path": path, "tokens": tokens, "seq_len": seq_len}
    print("\n".join(lines(model, check=not no_digests, **asked)))


@app.command()
def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Run, artifact or export folders, or foreign models.", show_default=False),
    ],
    figure: Annotated[Path | None, typer.Option(help="Write quality against bytes as .svg or .png.")] = None,
) -> None:
    """Put models side by side: bytes, quality per text, tasks and speed, as far as they were measured."""
    from flatq import verbs

    print(verbs.compare(paths, figure))


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="Artifact, run or export folder.", show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.", show_default=False)],
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 42,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message, to be answered.")] = False,
    provider: Provider = "auto",
    no_digests: NoDigests = False,
) -> None:
    """Let a compressed model write."""
    from flatq import verbs

    sampling: dict[str, Any] = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed, "chat": chat}
    for piece in verbs.generate(path, prompt, provider=provider, check=not no_digests, **sampling):
        print(piece, end="", flush=True)
    print()


@app.command(name="ls")
def list_recipes(
    folder: Annotated[Path, typer.Argument(help="Where to look for .yaml files.")] = Path("recipes"),
) -> None:
    """List the recipes in a folder."""
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise RecipeError(f"{folder}: holds no .yaml file; give the folder that your recipes are in")
    width = max(len(str(file)) for file in files)
    for file in files:
        print(f"{file!s:{width}}  {summary(file)}")


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, devices, runtimes, exporters, memory."""
    from flatq.doctor import doctor as lines

    print("\n".join(lines()))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from flatq.recipe.grammar import json_schema

    print(json.dumps(json_schema(), indent=2))


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


def summary(file: Path) -> str:
    """A recipe in one line, or the first thing that is wrong with it."""
    from flatq.recipe.grammar import Recipe

    try:
        recipe = Recipe.load(file)
    except RecipeError as error:
        return f"not usable: {error.problems[0]}"
    flat = [f"flat {recipe.flat.budget}"] if recipe.flat else []
    gptq = [f"gptq {recipe.gptq.bits} bit, groups of {recipe.gptq.group_size}"] if recipe.gptq else []
    exports = [f"to {', '.join(export.name for export in recipe.exports)}"] if recipe.exports else []
    return f"{recipe.model.path}: {'; '.join(flat + gptq + exports)}"


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """``["precision=int4", "opset=23"]`` as exporter options, values read as in a recipe.

    Raises:
        RecipeError: an entry is not ``KEY=VALUE``, or a key comes twice.
    """
    from flatq.recipe.reader import Unreadable, read

    options: dict[str, Any] = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        if not key or not equals or key in options:
            raise RecipeError(f"--option {entry}: {'given twice' if key in options else 'write it as KEY=VALUE'}")
        try:
            options[key] = read(value).value
        except Unreadable as error:
            raise RecipeError(f"--option {entry}: {error}") from error
    return options
