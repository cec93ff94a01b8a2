"""Small mutations of a Python file: one operator, constant or call is changed."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip

# Calls that mutants leave alone: what they do shows only in several processes, on a terminal or when the disk is full.
UNSEEN = re.compile(r"^(distributed\.\w+|log\.\w+|advance|progress|require_space|block\.together|warnings\.\w+)$")


@dataclass(frozen=True)
class Mutant:
    """A file with one change.

    Attributes:
        function: dotted name of the function or class that holds it.
        lines: of what is changed.
        body: lines of the function.
        change: before and after, each cut at 70 characters.
        number: counts the file's mutants from 0.
        original: text of the file.
    """

    file: str
    function: str
    lines: range
    body: range
    change: str
    number: int
    original: str = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.file}:{self.lines.start} {self.function}: {self.change}"

    @property
    def text(self) -> str:
        """The whole file with the change, without its comments."""
        tree = ast.parse(self.original)
        _, _, changed, put = next(islice(all_changes(tree), self.number, None))
        put(changed)
        return ast.unparse(ast.fix_missing_locations(tree))


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What could stand in place of an expression or statement."""
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.BinOp) and type(changed.op) in BINARY:
        changed.op = BINARY[type(changed.op)]()
        yield changed
    elif isinstance(changed, ast.Compare) and type(changed.ops[0]) in COMPARED:
        changed.ops[0] = COMPARED[type(changed.ops[0])]()
        yield changed
    elif isinstance(changed, ast.BoolOp):
        changed.op = ast.Or() if isinstance(changed.op, ast.And) else ast.And()
        yield changed
    elif isinstance(changed, ast.UnaryOp) and isinstance(changed.op, ast.Not):
        yield changed.operand
    elif isinstance(changed, ast.Constant) and type(changed.value) in (int, float, bool):
        value = changed.value
        changed.value = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2
        yield changed
    elif isinstance(changed, ast.IfExp):
        yield changed.body
        yield changed.orelse
    elif isinstance(changed, ast.Expr) and isinstance(changed.value, ast.Call):
        yield ast.copy_location(ast.Pass(), node)
    elif (
        isinstance(changed, ast.Call)
        and isinstance(changed.func, ast.Name)
        and changed.func.id.islower()
        and changed.args
    ):
        yield changed.args[0]


class Places(ast.NodeVisitor):
    """Every place of a module that can be changed: (functions around it, node, how to put another in its place)."""

    def __init__(self) -> None:
        self.found: list[tuple[tuple[ast.FunctionDef | ast.ClassDef, ...], ast.AST, Callable[[ast.AST], None]]] = []
        self.around: list[ast.FunctionDef | ast.ClassDef] = []

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.AnnAssign | ast.Import | ast.ImportFrom):
            return
        inside = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.around.append(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
                continue
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST) and not unseen(child):
                    self.note(node, name, index if isinstance(value, list) else None, child)
                    self.visit(child)
        if inside:
            self.around.pop()

    def note(self, parent: ast.AST, name: str, index: int | None, child: ast.AST) -> None:
        def put(node: ast.AST) -> None:
            if index is None:
                setattr(parent, name, node)
            else:
                getattr(parent, name)[index] = node

        if self.around:
            self.found.append((tuple(self.around), child, put))


def unseen(node: ast.AST) -> bool:
    """Whether no mutant is made of it: of some calls, and of ``strict=True``, which can only raise."""
    call = node.value if isinstance(node, ast.Expr) else node
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    return isinstance(call, ast.Call) and bool(UNSEEN.match(ast.unparse(call.func)))


def lines(node: ast.AST) -> range:
    first = getattr(node, "lineno", 0)
    return range(first, (getattr(node, "end_lineno", None) or first) + 1)


Put = Callable[[ast.AST], None]


def all_changes(tree: ast.Module) -> Iterator[tuple[tuple[ast.FunctionDef | ast.ClassDef, ...], ast.AST, ast.AST, Put]]:
    """Functions around a place, what stands there, what could stand there, and how to put it there."""
    places = Places()
    places.visit(tree)
    for around, node, put in places.found:
        for changed in changes(node):
            yield around, node, changed, put


def mutants(file: str, text: str) -> list[Mutant]:
    """All of one file, in the order of its lines."""
    found = []
    for number, (around, node, changed, _) in enumerate(all_changes(ast.parse(text))):
        before, after = (" ".join(ast.unparse(each).split())[:70] for each in (node, changed))
        function = ".".join(each.name for each in around)
        found.append(Mutant(file, function, lines(node), lines(around[-1]), f"{before} -> {after}", number, text))
    return found
