"""Read YAML and JSON documents that a user wrote or downloaded: bounded in size, depth and aliases.

Both formats can ask for far more memory than they have bytes: YAML by aliases of aliases, which double with
every line, and both by thousands of nested brackets. The bounds are looked at before anything is built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from bevperception.errors import BevError, ConfigError
from bevperception.names import read_file

MOST_YAML_BYTES = 256 * 1024
MOST_JSON_BYTES = 64 * 1024 * 1024
MOST_DEPTH = 32
MOST_NODES = 50_000
"""Values and keys of a YAML document, with each alias counted as all that it stands for."""

_SCALARS = (str, int, float, bool, type(None))
_STANDARD_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which plain YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_STANDARD_TAG}merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict, set)):
                raise _problem("a key must be a single word or number", key_node.start_mark)
            if key in seen:
                raise _problem(f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            # The constructors of PyYAML trust that a value looks like what its tag or form promises.
            kind = node.tag.removeprefix(_STANDARD_TAG)
            raise _problem(f"this is no {kind} that can be read", node.start_mark) from None


class RefusedError(yaml.MarkedYAMLError):
    """YAML that is not read, whatever it holds: too large, too deep, or with tags."""


def _problem(message: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, message, mark)


def _refused(message: str, mark: Any) -> RefusedError:
    return RefusedError(None, None, message, mark)


def parse_yaml(text: str, name: str, error: type[BevError] = ConfigError) -> Any:
    """Plain values of a YAML text: dictionaries, lists, text, numbers, dates.

    Args:
        text: one document.
        name: what a message calls it, for example ``plan x.yaml``.
        error: raised for a mistake.

    Raises:
        BevError: of the kind asked for, when it is not YAML, gives a key twice or is out of bounds.
    """
    try:
        check_yaml_bounds(text)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as found:
        raise error(f"{name} is not valid YAML: {_place(found)}") from None


def check_yaml_bounds(text: str) -> None:
    """Refuse YAML that would become much larger than it looks, or other things than plain values.

    Nothing of it is built.

    Raises:
        RefusedError: it is too long or too deep, its aliases stand for too much or for themselves, or a tag
            such as ``!!set`` says what a value is to become.
        yaml.YAMLError: it is not YAML.
    """
    if len(text) > MOST_YAML_BYTES:
        raise _refused(f"more than {MOST_YAML_BYTES} characters", None)
    nodes = 0
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and nodes before it
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise _refused(f"the alias *{event.anchor} stands for something it is in", event.start_mark)
            nodes += sizes.get(str(event.anchor), 0)
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            tag: str = getattr(event, "tag", None) or ""
            if tag.startswith(_STANDARD_TAG):
                kind = tag.removeprefix(_STANDARD_TAG)
                raise _refused(f"the tag !!{kind} is not read: write the plain value", event.start_mark)
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, nodes - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        if len(open_nodes) > MOST_DEPTH:
            raise _refused(f"more than {MOST_DEPTH} levels inside each other", event.start_mark)
        if nodes > MOST_NODES:
            raise _refused(f"more than {MOST_NODES} values, aliases written out", event.start_mark)


def read_yaml(path: Path, name: str) -> Any:
    """Plain values of a YAML file; see :func:`parse_yaml`.

    Args:
        path: file.
        name: what a message calls it.

    Raises:
        ConfigError: for a mistake, also when it is missing, no regular file, or no UTF-8 text.
    """
    return parse_yaml(read_text(path, name, MOST_YAML_BYTES, ConfigError), name)


def read_json(
    path: Path, name: str, error: type[BevError] = ConfigError, most_bytes: int = MOST_JSON_BYTES
) -> Any:
    """Plain values of a JSON file.

    Args:
        path: file.
        name: what a message calls it.
        error: raised for a mistake.
        most_bytes: larger files are refused.

    Raises:
        BevError: of the kind asked for, when it is missing, no regular file, too large, no JSON, or too deep.
    """
    return parse_json(read_text(path, name, most_bytes, error), name, error)


def parse_json(text: str, name: str, error: type[BevError] = ConfigError) -> Any:
    """Plain values of a JSON text; the arguments are those of :func:`parse_yaml`.

    Raises:
        BevError: of the kind asked for, when it is no JSON or too deep.
    """
    deep = error(f"{name} is not valid JSON: more than {MOST_DEPTH} levels inside each other")
    try:
        found = json.loads(text)
    except ValueError as problem:
        raise error(f"{name} is not valid JSON: {problem}") from None
    except RecursionError:
        raise deep from None
    level = [found]
    for _ in range(MOST_DEPTH + 1):
        parts = [value.values() if isinstance(value, dict) else value for value in level]
        level = [item for part in parts if not isinstance(part, _SCALARS) for item in part]
        if not level:
            return found
    raise deep


def read_text(path: Path, name: str, most_bytes: int, error: type[BevError] = ConfigError) -> str:
    """UTF-8 text of a regular file of a bounded size.

    Raises:
        BevError: of the kind asked for.
    """
    content = read_file(path, most_bytes, name, error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise error(f"{name} is not UTF-8 text") from None


def _place(mistake: yaml.YAMLError) -> str:
    mark = getattr(mistake, "problem_mark", None)
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return place + " ".join(str(getattr(mistake, "problem", None) or mistake).split())
