"""Chat templates: where they stand, whether they parse, and what they reach for. Nothing is ever rendered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from moesurgery.checkpoint.filenames import TOKENIZER_CONFIG
from moesurgery.errors import CheckpointError
from moesurgery.validate.context import Context

if TYPE_CHECKING:
    from jinja2 import nodes

MAX_TEMPLATE = 2 << 20
_DUNDER = re.compile(r"__\w+__")
_UNDERSCORES = re.compile(r"__|^_+$")
_LOADS = ("Include", "Import", "FromImport", "Extends")


@dataclass(frozen=True)
class Template:
    """One chat template. `place` says where in `file` it stands."""

    file: str
    place: str
    text: str

    @cached_property
    def parsed(self) -> nodes.Template | str:
        """The syntax tree, or what is wrong with the template."""
        import jinja2
        from jinja2 import ext

        if len(self.text) > MAX_TEMPLATE:
            return f"is {len(self.text):,} characters long, too long for a template"
        # `{% generation %}` marks the assistant's words for training: transformers' own extension.
        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.text)
        environment = jinja2.Environment(extensions=[ext.loopcontrols])
        try:
            return environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            return f"is no template: line {error.lineno}: {error.message}"
        except (RecursionError, ValueError, MemoryError) as error:
            return f"is no template: {type(error).__name__}"

    def problems(self) -> Iterator[str]:
        """Yield what the template reads that no chat template needs."""
        from jinja2 import nodes

        if isinstance(self.parsed, str):
            return
        try:
            for node in _every(self.parsed):
                if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
                    yield f"reads the attribute {node.attr!r}"
                elif isinstance(node, nodes.Getitem) and _builds_a_name(node.arg):
                    yield "reads an item whose hidden name it puts together"
                elif isinstance(node, nodes.Filter) and node.name in ("attr", "map", "selectattr", "rejectattr"):
                    yield from _through_filter(node)
                elif isinstance(node, nodes.Const) and isinstance(node.value, str) and _DUNDER.fullmatch(node.value):
                    yield f"holds the name {node.value!r}"
                elif type(node).__name__ in _LOADS:
                    yield f"loads another template ({type(node).__name__.lower()})"
        except RecursionError:
            yield "is nested too deeply to be read"


def _every(tree: nodes.Node) -> Iterator[nodes.Node]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.iter_child_nodes())


def _builds_a_name(node: nodes.Node) -> bool:
    """Whether an expression builds a name from parts with underscores: `'__cl' ~ 'ass__'`."""
    from jinja2 import nodes

    if isinstance(node, nodes.Const):
        return False
    texts = (part.value for part in node.find_all(nodes.Const) if isinstance(part.value, str))
    return any(_UNDERSCORES.search(text) for text in texts)


def _through_filter(node: nodes.Filter) -> Iterator[str]:
    """A filter that takes the name of an attribute: the name must be there to be read, and be a plain one."""
    from jinja2 import nodes

    named = [pair.value for pair in node.kwargs if pair.key in ("attribute", "name")]
    names = named if node.name == "map" else [*node.args[:1], *named]
    for name in names:
        if not isinstance(name, nodes.Const):
            yield "reads an attribute whose name it puts together"
        elif any(part.startswith("_") for part in str(name.value).split(".")):
            yield f"reads the attribute {name.value!r}"


def chat_templates(subject: Context) -> list[Template]:
    """Find every chat template of a checkpoint, in files of its own and in the tokenizer's config."""
    templates = []
    for file, size in subject.files.items():
        if file.endswith(".jinja") and size <= MAX_TEMPLATE:
            try:
                text = subject.source.read(file, 0, size).decode("utf-8", "replace")
            except CheckpointError:
                continue  # S11 says so
            templates.append(Template(file, "the template", text))
    for file in (TOKENIZER_CONFIG, "chat_template.json", "processor_config.json"):
        config = subject.object_or_none(file) or {}
        value = config.get("chat_template")
        if isinstance(value, str):
            templates.append(Template(file, "chat_template", value))
        elif isinstance(value, list):
            for i, entry in enumerate(value):
                named = entry.get("template") if isinstance(entry, dict) else None
                if isinstance(named, str):
                    templates.append(Template(file, f"chat_template[{i}]", named))
        elif isinstance(value, dict):
            templates += [Template(file, f"chat_template.{k}", v) for k, v in value.items() if isinstance(v, str)]
    return templates
