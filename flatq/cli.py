"""The command line; each command is a few lines that call the library.

Everything that affects results is in the recipe; the options are only paths, device, resuming and verbosity. torch is
imported inside the commands that need it, so that ``--help``, ``check --help`` and ``schema`` are fast.

Exit codes: 0 success, 2 the recipe or something that it refers to is wrong, 3 a stage failed, 130 interrupted.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text
from typer.core import TyperGroup

import flatq
from flatq.errors import FlatqError, RecipeError
from flatq.sweep import commands

INTERRUPTED = 130
GARBAGE = 50_000  # new objects between two collections: importing torch makes many and frees none


class Verbs(TyperGroup):
    """The group of commands; prints errors of flatq on stderr and sets the exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run a command."""
        gc.set_threshold(GARBAGE)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows ? for what it does not have
                stream.reconfigure(errors="replace")
        stderr = Console(stderr=True, soft_wrap=True)
        try:
            return super().invoke(ctx)
        except FlatqError as error:
            if ctx.params.get("debug"):
                stderr.print_exception()
            stderr.print(Text(str(error), style="red"))
            raise typer.Exit(error.exit_code) from error
        except OSError as failed:  # a full disk, no permission, a folder that vanished
            if ctx.params.get("debug"):
                stderr.print_exception()
            what = f"{failed.filename}: " if failed.filename else ""
            stderr.print(
                Text(f"{what}{failed.strerror or failed}; nothing else was wrong: fix that and run again", "red")
            )
            raise typer.Exit(FlatqError.exit_code) from failed
        except KeyboardInterrupt as interrupt:
            stderr.print("interrupted; run the same command again to resume")
            raise typer.Exit(INTERRUPTED) from interrupt


app = typer.Typer(cls=Verbs, no_args_is_help=True, pretty_exceptions_show_locals=False, add_completion=False)

app.command(name="init")(commands.initial)
app.command()(commands.sweep)
app.command()(commands.front)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, as in recipes/.", show_default=False)]
Device = commands.Device
Measured = Annotated[Path | None, typer.Option(help="Folder that keeps measurements, for several runs.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not verify exports; the report states it.")]
PlanSpeed = Annotated[bool, typer.Option("--speed", help="Measure this CPU (once) and predict how fast exports are.")]
NoDigests = Annotated[bool, typer.Option("--no-digests", help="Do not compare files with their digests.")]
Provider = Annotated[str, typer.Option(help="Device of the runtime: auto, cpu or cuda.")]


def show_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        print(f"flatq {flatq.__version__}")
        raise typer.Exit


@app.callback()
def settings(
    verbose: Annotated[
        int, typer.Option("-v", "--verbose", count=True, help="More log output; twice for details.")
    ] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress large language models after training: FLAT low-rank, GPTQ, export to ONNX, GGUF and safetensors.

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
        typer.Option("--forecast", help="Predict time and memory first, and report them with the measurements."),
    ] = False,
    memory: commands.Memory = None,
    measurements: Measured = None,
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

    asked: dict[str, Any] = {"memory": commands.memory_of(memory), "predict": forecast, "verify": not no_verify}
    asked |= {"measurements": measurements, "fresh": fresh, "check": not no_digests}
    done = run_recipe(checked, out, device=device, **asked)
    if done is not None:
        print(done)
    distributed.leave()


@app.command()
def check(recipe: RecipeFile) -> None:
    """Describe a recipe, or list all errors in it; for a local model config.json and tokenizer are read."""
    from flatq.recipe.grammar import Recipe

    checked = Recipe.load(recipe)
    from flatq.plan.preview import check as described

    print("\n".join(described(checked)))


@app.command()
def plan(recipe: RecipeFile, device: Device = "auto", speed: PlanSpeed = False, measurements: Measured = None) -> None:
    """Predict parameters, file sizes, memory and a rough time; reads the model's shapes, not its weights."""
    from flatq.recipe.grammar import Recipe

    checked = Recipe.load(recipe)
    from flatq.plan.preview import plan as planned

    print(planned(checked, device=device, speed=speed, measurements=measurements))


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
    """Export a finished artifact to another format, and verify the export."""
    from flatq import verbs

    options = verbs.parse_options(option or [])
    written = verbs.export(artifact, out, format, options, verify=not no_verify, check=not no_digests)
    print("\n".join(str(path) for path in written))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Artifact, export or run folder.", show_default=False)],
) -> None:
    """Read every file and compare it with its digest; lists files that are damaged, missing or unexpected.

    Exit code 3 if there are such files. Other commands also compare digests, but skip files verified before.
    """
    from flatq.integrity import verified

    print("\n".join(verified(path)))


@app.command()
def bench(
    paths: Annotated[list[Path], typer.Argument(help="Export folders, measured in turn.", show_default=False)],
    against: Annotated[
        list[Path] | None, typer.Option(help="Folder with an ONNX decoder of another program; repeatable.")
    ] = None,
    provider: Provider = "auto",
    prompt: Annotated[list[int] | None, typer.Option(min=1, help="Prompt length in tokens [128]; repeatable.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Generated tokens.")] = 64,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size [1]; repeatable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements; the median is reported.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 is the runtime's default.")] = 0,
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
        typer.Option(help="wikitext2, c4, alpaca, python-docs or text; default: the texts of the run."),
    ] = None,
    path: Annotated[Path | None, typer.Option(help="A .txt or .jsonl file, as the text.")] = None,
    field: Annotated[str | None, typer.Option(help="Key of the text in a .jsonl file [text].")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens per text [8192, for an export 2048].")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens in a sequence [512].")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, separated by commas.")] = None,
    suite: Annotated[str | None, typer.Option(help="A list of tasks: flat-paper.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First documents of each task; default: all.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with local task files.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for task results; default: tasks/ next to the model.")
    ] = None,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Do not evaluate the dense model.")] = False,
    provider: Provider = "auto",
    no_digests: NoDigests = False,
) -> None:
    """Measure perplexity and divergence from the dense model on held-out text; exports in their runtime.

    With --tasks: tasks of lm-eval, for the model and the dense model; results of finished tasks are reused.
    """
    if tasks is not None or suite is not None:
        from flatq import verbs

        names = [name for name in (tasks or "").split(",") if name]
        places: dict[str, Any] = {"folder": include_path, "out": out, "dense": not no_dense, "provider": provider}
        print(verbs.evaluate_tasks(model, names, suite=suite, limit=limit, check=not no_digests, **places))
        return
    from flatq.pipeline.evaluate import evaluate as lines

    asked: dict[str, Any] = {"dataset": dataset, "path": path, "field": field, "tokens": tokens, "seq_len": seq_len}
    print("\n".join(lines(model, check=not no_digests, **asked)))


@app.command()
def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Run, artifact or export folders, or models of other programs.", show_default=False),
    ],
    figure: Annotated[Path | None, typer.Option(help="Write a figure of quality against bytes, .svg or .png.")] = None,
) -> None:
    """Compare models: bytes, quality per text, tasks and speed, from existing measurements."""
    from flatq import verbs

    print(verbs.compare(paths, figure))


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="Artifact, run or export folder.", show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.", show_default=False)],
    new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampling.")] = 42,
    chat: Annotated[bool, typer.Option("--chat", help="Use the prompt as a user message of a chat.")] = False,
    provider: Provider = "auto",
    no_digests: NoDigests = False,
) -> None:
    """Generate text with a compressed model."""
    from flatq import verbs

    sampling: dict[str, Any] = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed, "chat": chat}
    for piece in verbs.generate(path, prompt, provider=provider, check=not no_digests, **sampling):
        print(piece, end="", flush=True)
    print()


@app.command(name="ls")
def list_recipes(
    folder: Annotated[Path, typer.Argument(help="Folder with .yaml files, or the word families.")] = Path("recipes"),
) -> None:
    """List the recipes in a folder, or the families of models and what was measured to work for them."""
    if folder == Path("families") and not folder.exists():
        from flatq.model.measured import lines

        print("\n".join(lines()))
        return
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise RecipeError(f"{folder}: has no .yaml file; give a folder with recipes")
    width = max(len(str(file)) for file in files)
    for file in files:
        print(f"{file!s:{width}}  {summary(file)}")


@app.command()
def doctor() -> None:
    """Describe this machine: versions, devices, runtimes, exporters, memory."""
    from flatq.doctor import doctor as lines

    print("\n".join(lines()))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from flatq.recipe.grammar import json_schema

    print(json.dumps(json_schema(), indent=2))


def summary(file: Path) -> str:
    """A recipe in one line, or its first error."""
    from flatq.recipe.grammar import Recipe

    try:
        recipe = Recipe.load(file)
    except RecipeError as error:
        return f"not usable: {error.problems[0]}"
    flat = [f"flat {recipe.flat.budget}"] if recipe.flat else []
    gptq = [f"gptq {recipe.gptq.bits} bit, groups of {recipe.gptq.group_size}"] if recipe.gptq else []
    stages = flat + gptq if recipe.budget is None else [f"budget: {recipe.budget.words}"]
    exports = [f"to {', '.join(export.name for export in recipe.exports)}"] if recipe.exports else []
    return f"{recipe.model.path}: {'; '.join(stages + exports)}"
