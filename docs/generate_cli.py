"""Writes ``docs/cli.md`` from the verbs of ``flatq.cli``: docstrings, arguments and options, as in ``--help``.

    python docs/generate_cli.py            write it
    python docs/generate_cli.py --check    write nothing; exit code 1 if it is stale

The functions' annotations are read, and not what typer makes of them: typer's own help differs between its versions.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from flatq.cli import app

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """# Command line

Generated from what `flatq --help` shows by `python docs/generate_cli.py`; do not edit it. Everything that changes a
number is in the [recipe](writing-a-recipe.md); options are paths, the device and verbosity.

Exit codes: 0 done, 2 the recipe or what it names is wrong, 3 a stage failed, 130 interrupted.
"""


def page() -> str:
    """The whole page."""
    shared = app.registered_callback.callback if app.registered_callback else None
    parts = [INTRODUCTION, _section("flatq", shared, "flatq [OPTIONS] VERB")]
    for command in app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "").replace("_", "-")
        parts.append(_section(f"flatq {name}", command.callback, None))
    return "\n".join(parts)


def _section(title: str, function: Callable[..., Any] | None, usage: str | None) -> str:
    assert function is not None
    hints = get_type_hints(function, include_extras=True)
    arguments, options = [], []
    for name, parameter in inspect.signature(function).parameters.items():
        info = next(part for part in get_args(hints[name]) if isinstance(part, ArgumentInfo | OptionInfo))
        required = parameter.default is inspect.Parameter.empty
        if isinstance(info, ArgumentInfo):
            shown = name.upper() + ("..." if "list" in str(hints[name]) else "")
            arguments.append((shown if required else f"[{shown}]", info, parameter))
        else:
            options.append((_option(name, info, hints[name]), info, parameter))
    usage = usage or " ".join([title, *(name for name, _, _ in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## {title}", "", inspect.getdoc(function) or "", "", "```text", usage, "```", ""]
    if arguments or options:
        lines += ["| | meaning | default |", "|---|---|---|"]
        lines += [
            f"| `{shown}` | {info.help} | {_default(parameter)} |" for shown, info, parameter in arguments + options
        ]
        lines.append("")
    return "\n".join(lines)


def _option(name: str, info: Any, hint: Any) -> str:
    named = [info.default, *(info.param_decls or ())]  # in Annotated, typer takes the first spelling for a default
    spellings = sorted((text for text in named if str(text).startswith("-")), key=len) or [
        f"--{name.replace('_', '-')}"
    ]
    kind = str(get_args(hint)[0])
    flag = kind == str(bool) or info.count
    value = (
        "" if flag else " N" if "int" in kind else " X" if "float" in kind else " PATH" if "Path" in kind else " TEXT"
    )
    return ", ".join(spellings) + value


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "required"
    unset = parameter.default is None or isinstance(parameter.default, bool)
    return "" if unset else f"`{parameter.default}`"


def main() -> None:
    """Write the page, or check it."""
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text() != page():
            sys.exit(f"{PAGE.name} is stale; run python docs/generate_cli.py")
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
