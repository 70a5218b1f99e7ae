"""Reads the YAML of settings: every value stays the text that the file has, and errors name the line.

YAML 1.1 reads ``007`` as 7, ``0123`` as 83, ``12:30`` as 750 and ``no`` as false. Which of them is meant depends on the
type of the setting, so the settings convert the text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import UserError, reason
from .files import read_text

MAX_DEPTH = 8
TAG = "tag:yaml.org,2002:"
QUOTES = "put text with special characters in single quotes"
WINDOWS_PATHS = "in double quotes a backslash starts an escape: write paths in single quotes or with /"
REMEDIES = {
    r"character '\t'": "a tab is not allowed here: use spaces",
    "escape": WINDOWS_PATHS,
    "that cannot start": f"text cannot start with this character: {QUOTES}",
    "mapping values are not allowed": f"a second ': ' in this line, or a wrong indentation: {QUOTES}",
    "expected ':'": f"this line has no 'key: value': {QUOTES}",
    "undefined alias": f"text cannot start with *: {QUOTES}",
    "expected alphabetic": f"text cannot start with * or &: {QUOTES}",
    "end of stream": "the quotes are not closed",
    "stream end": "the brackets are not closed",
    "another document": "a second document starts here: keep only one",
}
"""What to do about problems that PyYAML reports, by a part of its message."""
BEGINS_EARLIER = ("end of stream", "stream end", "expected ':'")
"""Problems that PyYAML notices later than at the line to mend."""
_CONTROL = r"[\x00-\x1f\x7f-\xa0\u2028\u2029]"
LOST_BACKSLASH = re.compile(rf"[A-Za-z]:.*{_CONTROL}|[A-Za-z]: |[^ ]*{_CONTROL}[^ ]*$", re.DOTALL)
"""A Windows path (or text without spaces) in which double quotes turned a backslash and a letter into a character."""


def read_yaml(path: Path, what: str) -> Any:
    """Read a file as :func:`parse_yaml` does. ``what``: its name in errors. Raises :class:`UserError`."""
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {path} is not UTF-8 text: save it as UTF-8") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The lists, mappings, texts and ``None`` (``null``, ``~`` or nothing) of a YAML document.

    Raises :class:`UserError` with ``source`` and the line for invalid YAML, repeated keys, tags, nesting deeper than
    :data:`MAX_DEPTH`, and aliases of nested values, which could multiply without end.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except _Refused as error:
        raise UserError(f"{source}, line {error.line}: {error}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{source}, line {line}: it has the character {chr(error.character)!r}: remove it") from error
    except yaml.MarkedYAMLError as error:
        problem = error.problem or ""
        mark = error.context_mark if any(part in problem for part in BEGINS_EARLIER) else error.problem_mark
        remedy = next((sentence for part, sentence in REMEDIES.items() if part in problem), f"{problem}: {QUOTES}")
        raise UserError(f"{source}, line {mark.line + 1 if mark else 1} is not valid YAML: {remedy}") from error


class _Refused(Exception):
    """Valid YAML that is not accepted, and its line."""

    def __init__(self, node: Any, reason: str) -> None:
        super().__init__(reason)
        self.line: int = node.start_mark.line + 1


class _Loader(yaml.SafeLoader):
    """Resolves only null and merge keys (``<<``), and refuses every other tag."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        f"{TAG}{name}": getattr(yaml.SafeLoader, f"construct_yaml_{name}") for name in ("null", "str", "seq", "map")
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            return self._checked_alias(event, super().compose_node(parent, index), index)
        if self._depth == MAX_DEPTH:
            raise _Refused(event, f"more than {MAX_DEPTH} levels of nesting: settings need at most 3")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _checked_alias(self, event: Any, node: Any, index: Any) -> Any:
        is_merge = isinstance(index, yaml.ScalarNode) and index.tag == f"{TAG}merge"
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not is_merge and not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise _Refused(event, f"*{event.anchor} must stand for text or a list of texts, or follow '<<:'")
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if anchor and not node.value:
            raise _Refused(node, f"text cannot start with &: {QUOTES}")
        if node.style == '"' and LOST_BACKSLASH.match(node.value):
            raise _Refused(node, WINDOWS_PATHS)
        try:  # JSON writes an emoji as two escapes
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise _Refused(node, "half of an emoji (an unpaired surrogate): remove it") from error
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(key, "a list or mapping cannot be a key: write 'key: value'")
            if key.value in lines:
                raise _Refused(key, f"{key.value!r} is also in line {lines[key.value]}: keep one of them")
            lines[key.value] = key.start_mark.line + 1
        return node

    def refuse(self, node: yaml.Node) -> Any:
        """Refuse a tag: ``!x`` would lose the text behind it, ``!!int`` its digits."""
        raise _Refused(node, f"tags such as {node.tag.replace(TAG, '!!')} are not supported: {QUOTES}")


_Loader.yaml_constructors[None] = _Loader.refuse
for _name, _text in (("null", "~|null|"), ("merge", "<<")):
    _Loader.add_implicit_resolver(f"{TAG}{_name}", re.compile(f"^(?:{_text})$"), ["~", "n", "", "<"])
