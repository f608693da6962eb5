"""The YAML dialect of configs: YAML 1.2 scalars, no duplicate keys, plain values only, a line number for every key.

PyYAML follows YAML 1.1, where `1e-3` is text, `no` is false, `010` is 8 and `1:30` is 90. Here numbers are what they
look like, and only true and false are booleans. Knows nothing about what the keys mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedmira.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fedmira.config.messages import Mistakes

MAX_BYTES = 1 << 20
"""A config is written by hand; a larger file is something else."""
MAX_DEPTH = 20
MAX_KEYS = 100_000
"""Keys that a config has at most, each alias counted as what it stands for."""

_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_NULL = re.compile(r"~|null|Null|NULL|")

Lines = dict[tuple[str, ...], int]
"""The line, counted from 1, on which each key path begins."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2; keys are text, as spelt (`007`, `true`)."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 PyYAML's own attribute

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what `<<` names into `node`, and keep one of each key, the last one, as construction would."""
        super().flatten_mapping(node)
        items = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"
            items[key.value if isinstance(key, yaml.ScalarNode) else key] = (key, value)
        node.value = list(items.values())


class Dumper(yaml.SafeDumper):
    """Quotes every text that `Loader` or a YAML 1.1 reader would take for something else; never writes anchors."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent the items of a list below their key, as people write it."""
        super().increase_indent(flow, False)


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _construct_float(loader: Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _construct_bool(loader: Loader, node: yaml.ScalarNode) -> bool:
    return str(loader.construct_scalar(node)).lower() == "true"


for _class in (Loader, Dumper):
    for _tag, _pattern, _first in (
        ("bool", _BOOL, "tTfF"),
        ("int", _INT, "-+0123456789"),
        ("float", _FLOAT, "-+.0123456789"),
        ("null", _NULL, ["~", "n", "N", ""]),
        ("merge", re.compile("<<"), ["<"]),
    ):
        _anchored = re.compile(rf"^(?:{_pattern.pattern})$")
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _anchored, list(_first))
for _tag, _construct in (("bool", _construct_bool), ("int", _construct_int), ("float", _construct_float)):
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)


def read_text(path: Path, recipes: Sequence[str] = ()) -> str:
    """Return the text of the config file `path`.

    Raises:
        ConfigError: it is missing (the message offers `recipes`), unreadable, too large or not UTF-8.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if path.is_dir() or size <= MAX_BYTES else None
    except FileNotFoundError:
        offer = f" The recipes are {', '.join(recipes)}: copy one with `fedmira init RECIPE FILE`." if recipes else ""
        raise ConfigError(f"there is no config file {str(path)!r}{nearest(path.stem, recipes)}.{offer}") from None
    except IsADirectoryError:
        inside = ", ".join(sorted(item.name for item in path.glob("*.yaml"))[:5])
        raise ConfigError(
            f"{str(path)!r} is a folder; give a YAML file"
            + (f", for example one of those in it: {inside}" if inside else "")
        ) from None
    except OSError as error:
        raise ConfigError(f"the config file {str(path)!r} cannot be read: {error.strerror or error}") from error
    if data is None:
        raise ConfigError(f"{str(path)!r} has {size} bytes; a config has at most {MAX_BYTES}. Is it a data file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{str(path)!r} is not UTF-8 text (line {line}); save it as UTF-8") from None


def parse_yaml(text: str, source: str, mistakes: Mistakes) -> tuple[dict[str, Any], Lines]:
    """Return the mapping in `text` and the line of each of its key paths; duplicate keys are noted in `mistakes`.

    Raises:
        ConfigError: the text is not YAML, or not a mapping of plain values.
    """
    lines: Lines = {}
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            if node is None or node.tag == "tag:yaml.org,2002:null":
                return {}, lines
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(f"{source}: must be `key: value` lines, but is {_describe(node)}")
            _walk(node, (), lines, mistakes)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        tabs = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
        raise ConfigError(f"{source}: {where}not valid YAML: {problem}{tabs}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(
            f"{source}: nested more deeply than any config; at most {MAX_DEPTH} levels are allowed"
        ) from None
    return value, lines


def _walk(node: yaml.MappingNode, path: tuple[str, ...], lines: Lines, mistakes: Mistakes) -> None:
    """Note the line of every key below `node`, how a plain value is spelt, and every key given twice, which YAML
    forbids and PyYAML lets pass."""
    if len(path) > MAX_DEPTH:
        raise RecursionError
    here: dict[str, int] = {}
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key_node.start_mark)
        key = key_node.value
        line = key_node.start_mark.line + 1
        if key in here:
            mistakes.add((*path, key), f"given twice (lines {here[key]} and {line}); keep one")
        here.setdefault(key, line)
        lines.setdefault((*path, key), line)
        if len(lines) > MAX_KEYS:
            raise ConfigError(
                f"{mistakes.source}: it has more than {MAX_KEYS} keys, counting those that aliases repeat; write less"
            )
        if isinstance(value_node, yaml.ScalarNode):
            mistakes.spelt.setdefault((*path, key), value_node.value)
        if isinstance(value_node, yaml.MappingNode):
            _walk(value_node, (*path, key), lines, mistakes)


def _describe(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"the text {str(node.value)[:40]!r}"
