"""YAML for recipes: line numbers for everything, and none of YAML 1.1's surprises.

PyYAML's own loader reads `1e-3` as text, `1:30` as 90, `010` as 8, `no` as false, and lets a repeated key
win silently. Here scalars follow the YAML 1.2 core schema, the surprises are errors that say what to write
instead, and anchors have a budget. Only PyYAML's parser is used, never its constructors.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from moesurgery.checkpoint.source_address import nearest_path
from moesurgery.errors import RecipeError
from moesurgery.escape import one_line

MAX_BYTES = 2_000_000
_MAX_DEPTH = 40
MAX_NODES = 50_000  # of all documents of a text, repeated anchors counted each time
MAX_MISTAKES = 200  # no more are looked for
SHOWN_MISTAKES = 50

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRAPS = (
    (re.compile(r"(?i)yes|no|on|off|y|n"), "YAML readers disagree on it: write true or false, or quote it"),
    (re.compile(r"[-+]?0[0-9_]+"), "a leading zero means octal to some readers: drop it, or quote it"),
    (re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"), "some readers take it for base 60: quote it"),
    (re.compile(r"[-+]?0[xob][0-9a-fA-F_]+"), "write the number in decimal, or quote it"),
    (re.compile(r"[-+]?[0-9]+(_[0-9]+)+(\.[0-9_]*)?"), "write the number without underscores, or quote it"),
)


class TooManyMistakes(Exception):  # noqa: N818 - says that reading goes no further
    """What is wrong is known well enough."""


class Mistakes(list[tuple[int, str]]):
    """Lines, and what is wrong there. Raises TooManyMistakes beyond MAX_MISTAKES: a text could hold a million."""

    def append(self, mistake: tuple[int, str]) -> None:
        super().append(mistake)
        if len(self) > MAX_MISTAKES:
            raise TooManyMistakes

    def text(self, origin: str) -> str:
        """Return a line for each, in the order of lines."""
        lines = [f"{origin}:{line}: {one_line(message, 1000)}" for line, message in sorted(set(self))]
        more = len(lines) - SHOWN_MISTAKES
        if more > 0:
            lines[SHOWN_MISTAKES:] = [f"{origin}: and {'many' if len(self) > MAX_MISTAKES else more} more mistakes"]
        return "\n".join(lines)


@dataclass
class Document:
    """A parsed document: plain Python data, the line of every value, and what was wrong.

    `shared` are the paths of values that an alias repeats elsewhere. `repeated` has the lines of keys that are
    given again with such a value: some recipes hold their anchors so. It is wrong wherever a key means anything.
    """

    value: Any = None
    lines: dict[tuple[Any, ...], int] = field(default_factory=dict)
    problems: Mistakes = field(default_factory=Mistakes)
    shared: set[tuple[Any, ...]] = field(default_factory=set)
    repeated: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def twice(self, path: tuple[Any, ...], line: int) -> tuple[int, str]:
        """Return what is wrong with a key that is given again."""
        return line, f"the key {path[-1]!r} is given twice (first on line {self.lines[path]})"

    def line(self, path: tuple[Any, ...]) -> int:
        """Return the line of the value at `path`, or of the nearest thing around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    @cached_property
    def holders(self) -> set[tuple[Any, ...]]:
        """The paths at or above a shared value."""
        return {path[:length] for path in self.shared for length in range(len(path) + 1)}


def recipe_text(path: str | Path) -> str:
    """Return what a recipe file holds. Raises RecipeError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        near = nearest_path(Path(path))
        raise RecipeError(
            f"{path} cannot be read: {reason}",
            f"did you mean {near}?" if near else "`moesurgery recipes ls` lists the recipes that ship",
        ) from None


def parse(text: str) -> Document:
    """Parse YAML; never raises for what the text contains, but lists it under `problems` with line numbers."""
    documents = parse_all(text)
    documents[0].problems.extend(documents[0].twice(path, line) for path, line in documents[0].repeated.items())
    if len(documents) > 1:
        line = documents[1].line(())
        documents[0].problems.append((line, "is not YAML of one document: a second one begins here"))
    return documents[0]


def parse_all(text: str) -> list[Document]:
    """Parse YAML of any number of documents, at least one: see `parse`."""
    documents: list[Document] = []

    def failed(line: int, message: str) -> list[Document]:
        return [*documents, Document(problems=Mistakes([(line, message)]))]

    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return failed(1, f"is larger than {MAX_BYTES:,} bytes")
    budget = _Budget()
    try:
        for node in yaml.compose_all(text, Loader=_Loader):
            documents.append(Document())
            if node is not None:
                documents[-1].value = _Builder(documents[-1], node, budget).build(node, (), 0)
    except TooManyMistakes:
        return documents
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        return failed(mark.line + 1 if mark else 1, f"is not YAML: {what}")
    except yaml.YAMLError as error:
        return failed(1, f"is not YAML: {str(error).splitlines()[0]}")
    except (RecursionError, ValueError) as error:
        return failed(1, f"is not YAML: {'nested too deeply' if isinstance(error, RecursionError) else error}")
    return documents or [Document()]


class _Loader(yaml.SafeLoader):
    """PyYAML's composer, with a bound on what it composes: it takes minutes for a text of a few megabytes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.nodes += 1
        self.depth += 1
        if self.nodes > MAX_NODES or self.depth > _MAX_DEPTH:
            what = "is nested too deeply" if self.depth > _MAX_DEPTH else f"has more than {MAX_NODES:,} values"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=self.get_mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


@dataclass
class _Budget:
    """How many values were built, in all documents of a text."""

    nodes: int = 0


class _Builder:
    def __init__(self, document: Document, root: yaml.Node, budget: _Budget) -> None:
        self.document = document
        self.aliased = _aliased(root)
        self.budget = budget
        self.open: set[int] = set()
        self.seen: dict[int, tuple[Any, ...]] = {}

    def build(self, node: yaml.Node, path: tuple[Any, ...], depth: int) -> Any:
        line = node.start_mark.line + 1
        self.document.lines.setdefault(path, line)
        self.note(node, path)
        self.budget.nodes += 1
        if self.budget.nodes > MAX_NODES:
            if self.budget.nodes == MAX_NODES + 1:
                self.problem(line, "has too many values (anchors repeated?)")
            return None
        if depth > _MAX_DEPTH or id(node) in self.open:
            self.problem(line, "is nested too deeply" if depth > _MAX_DEPTH else "an anchor contains itself")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, line)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                self.plain_tag(node, "tag:yaml.org,2002:seq", line)
                return [self.build(child, (*path, i), depth + 1) for i, child in enumerate(node.value)]
            self.plain_tag(node, "tag:yaml.org,2002:map", line)
            return self.mapping(node, path, depth)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: yaml.Node, path: tuple[Any, ...], depth: int) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                self.merge(result, value_node, path, depth)
        own: set[Any] = set()  # a mapping's own keys count before those that it merges in
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(line, "a key must be a word or a number")
                continue
            if _is_merge(key_node):
                continue
            key = self.scalar(key_node, line)
            here = (*path, key)
            if key in own:
                if id(value_node) in self.aliased:
                    self.document.repeated.setdefault(here, line)
                    self.note(value_node, here)
                else:
                    self.document.problems.append(self.document.twice(here, line))
                continue
            own.add(key)
            result[key] = self.build(value_node, here, depth + 1)
            self.document.lines[here] = line
        return result

    def merge(self, result: dict[Any, Any], node: yaml.Node, path: tuple[Any, ...], depth: int) -> None:
        """Add what a merge key names, `<<: *anchor` or a list of such; of two, the first counts."""
        for other in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(other, yaml.MappingNode):
                self.problem(other.start_mark.line + 1, "a merge key (<<) takes a mapping: <<: *anchor")
                continue
            held = self.build(other, path, depth + 1)
            for key, value in held.items() if isinstance(held, dict) else ():
                result.setdefault(key, value)

    def note(self, node: yaml.Node, path: tuple[Any, ...]) -> None:
        """Remember where a value stands first, and that it is shared where it stands again."""
        if id(node) in self.seen:
            self.document.shared.add(self.seen[id(node)])
        self.seen.setdefault(id(node), path)

    def scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        text: str = node.value
        if node.style in ("'", '"', "|", ">") or (node.tag == "tag:yaml.org,2002:str" and node.style):
            self.plain_tag(node, "tag:yaml.org,2002:str", line)
            return text
        if node.tag not in _IMPLICIT_TAGS:
            self.problem(line, f"the tag {node.tag} is not supported")
            return None
        return self.resolve(text, line)

    def resolve(self, text: str, line: int) -> Any:
        if text in _NULL:
            return None
        if text in _BOOL:
            return _BOOL[text]
        if len(text) > 400:
            return text
        for pattern, advice in _TRAPS:
            if pattern.fullmatch(text):
                self.problem(line, f"{text} is ambiguous: {advice}")
                return text
        if _INT.fullmatch(text):
            return int(text)
        if text.lower() in _SPECIAL_FLOAT:
            return _SPECIAL_FLOAT[text.lower()]
        if _FLOAT.fullmatch(text):
            return float(text)
        return text

    def plain_tag(self, node: yaml.Node, expected: str, line: int) -> None:
        if node.tag != expected:
            self.problem(line, f"the tag {node.tag} is not supported")

    def problem(self, line: int, message: str) -> None:
        self.document.problems.append((line, message))


def _is_merge(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.value == "<<" and not key.style


def _aliased(root: yaml.Node) -> set[int]:
    """Return the ids of nodes that stand in more than one place."""
    count: Counter[int] = Counter()
    queue = [root]
    while queue:
        node = queue.pop()
        count[id(node)] += 1
        if count[id(node)] == 1 and not isinstance(node, yaml.ScalarNode):
            for child in node.value:
                queue += child if isinstance(child, tuple) else [child]
    return {key for key, number in count.items() if number > 1}


_IMPLICIT_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")
)


def parse_text(text: str) -> Any:
    """Read one value, as on a command line. Raises ValueError."""
    document = parse(text)
    if document.problems:
        raise ValueError(document.problems[0][1])
    return document.value
