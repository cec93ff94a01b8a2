"""Small mutations of a Python file: one operator, constant or call is changed."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
        text: of the whole file with the change, without its comments.
    """

    file: str
    function: str
    lines: range
    body: range
    change: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.lines.start} {self.function}: {self.change}"


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
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases", "type_params"):
                continue
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST) and not unseen(child):
                    self.note(node, field, index if isinstance(value, list) else None, child)
                    self.visit(child)
        if inside:
            self.around.pop()

    def note(self, parent: ast.AST, field: str, index: int | None, child: ast.AST) -> None:
        def put(node: ast.AST) -> None:
            if index is None:
                setattr(parent, field, node)
            else:
                getattr(parent, field)[index] = node

        if self.around:
            self.found.append((tuple(self.around), child, put))


def unseen(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and bool(UNSEEN.match(ast.unparse(call.func)))


def lines(node: ast.AST) -> range:
    first = getattr(node, "lineno", 0)
    return range(first, (getattr(node, "end_lineno", None) or first) + 1)


def mutants(file: str, text: str) -> list[Mutant]:
    """All of one file, in the order of its lines."""
    tree = ast.parse(text)
    places = Places()
    places.visit(tree)
    found = []
    for around, node, put in places.found:
        for changed in changes(node):
            before, after = (" ".join(ast.unparse(each).split())[:70] for each in (node, changed))
            put(changed)
            function, whole = ".".join(each.name for each in around), ast.unparse(ast.fix_missing_locations(tree))
            found.append(Mutant(file, function, lines(node), lines(around[-1]), f"{before} -> {after}", whole))
            put(node)
    return found
