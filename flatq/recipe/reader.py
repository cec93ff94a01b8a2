"""Read a small YAML file, keep the line number of every value, and reject ambiguous constructs.

YAML 1.1, which PyYAML implements, turns ``no`` into false and ``010`` into eight, and reads ``1e-3`` as text. Here
plain scalars follow the core schema of YAML 1.2 without hexadecimal and octal numbers: ``null``, ``true``, ``false``,
decimal numbers. Everything else is text, and the recipe's models report a wrong type.

Left out on purpose: anchors and aliases (a few lines can expand to gigabytes), tags (they construct objects), merge
keys, several documents in one file. A duplicate key is an error, not a silent overwrite.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

DEEPEST = 20
Place = tuple[str | int, ...]

_CORE = {
    "null": re.compile(r"(null|Null|NULL|~|)"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)"),
    "int": re.compile(r"[-+]?[0-9]{1,18}"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
}


@dataclass(slots=True)
class Document:
    """A file's content as plain Python values.

    Attributes:
        value: None, bool, int, float, str, list or dict with str keys.
        lines: line of each place, counted from 1; a place is the path of keys and indices from the root.
        duplicates: line and place of each key that occurs a second time.
    """

    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    duplicates: list[tuple[int, Place]] = field(default_factory=list)

    def line(self, place: Place) -> int:
        """Line of a place, or of the closest enclosing place that is in the file."""
        return next((self.lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in self.lines), 1)


class Unreadable(Exception):
    """The text is not valid YAML or uses an unsupported construct; ``line`` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        super().__init__(message)


class _Loader(yaml.SafeLoader):
    """PyYAML's parser; stops at the first anchor, alias, tag or too deep level, before any object is constructed."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise Unreadable(line, "anchors and aliases (& and *) are not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            raise Unreadable(line, f"tags are not allowed, found {event.tag!r}; leave it out, quote text instead")
        if self.depth >= DEEPEST:
            raise Unreadable(line, f"nested deeper than {DEEPEST} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read(text: str) -> Document:
    """Parse one document.

    Raises:
        Unreadable: bad syntax, or an unsupported construct.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Unreadable(mark.line + 1 if mark else 1, f"not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(line, f"not valid YAML: character {error.character!r} is not allowed") from error
    except (ValueError, OverflowError) as error:  # PyYAML lets them through for absurd escapes and version numbers
        raise Unreadable(1, f"not valid YAML: {error}") from error
    document = Document()
    if node is not None:
        document.value = _value(node, (), document)
    return document


def _value(node: yaml.Node, place: Place, document: Document) -> Any:
    document.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*place, index), document) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, place, document)
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return _scalar(node.value, plain=plain, line=node.start_mark.line + 1)


def _mapping(node: yaml.MappingNode, place: Place, document: Document) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise Unreadable(line, "a list or mapping cannot be a key; write a plain word before the colon")
        key = _scalar(key_node.value, plain=False, line=line)
        inside = (*place, key)
        if key in mapping:
            document.duplicates.append((line, inside))
            continue
        document.lines[inside] = line
        mapping[key] = _value(value_node, inside, document)
    return mapping


def _scalar(text: str, *, plain: bool, line: int) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unreadable(line, f"{text!r:.60} holds half a character; write the whole one") from error
    if not plain:
        return text
    kind = next((kind for kind, pattern in _CORE.items() if pattern.fullmatch(text)), "text")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text)
    if kind == "float" and math.isfinite(number := float(text)):
        return number
    return text
