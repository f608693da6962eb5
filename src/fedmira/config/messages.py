"""The words of config mistakes: what was given, what is allowed, where a key belongs, the nearest right name.

Reads the models of `config` by introspection, so that a new field is described without a line here. Knows nothing
about files and YAML.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedmira.formats import counted, printable

MAX_SHOWN = 60
"""Characters of a given value that a message shows."""


class Mistake(NamedTuple):
    """One thing that is wrong, and the key it is about (empty if about none)."""

    path: tuple[str, ...]
    text: str


class Mistakes:
    """Collects mistakes; `message` lists them in the order of the file, then those of the command line."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: Mapping[tuple[str, ...], int] = {}
        self.spelt: dict[tuple[str, ...], str] = {}
        """How plain values were written: `1e3` or `010`, of which the value no longer tells."""
        self.overridden: set[tuple[str, ...]] = set()
        self.found: list[Mistake] = []

    def add(self, path: tuple[str, ...], text: str, rule: bool = False) -> None:
        """Note that `text` is wrong with the key `path`; a `rule` is broken by several keys of the section `path`."""
        name = ".".join(path) or ("the config" if rule else self.source)
        self.found.append(Mistake(path, f"{name}: {text}"))

    def add_override(self, override: str, text: str) -> None:
        """Note that an override of the command line is unusable as a whole."""
        self.found.append(Mistake((), f"{override!r}: {text}"))

    def _line(self, path: tuple[str, ...]) -> int:
        """The line that gives `path` or the section around it; 0 if the file does not."""
        if any(path[: len(key)] == key for key in self.overridden):
            return 0
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)

    def message(self) -> str:
        """One line per mistake under a headline."""
        rows = [(self._line(mistake.path), mistake.text) for mistake in self.found]
        rows.sort(key=lambda row: row[0] or 1 << 30)
        return "\n".join(
            [
                f"{self.source}: {counted(len(self.found), 'mistake')}",
                # control characters, which a key can contain, must not reach a terminal
                *(f"  {f'line {line}: ' if line else ''}{printable(text)}" for line, text in rows),
            ]
        )


# -------------------------------------------------------------------------------------------------------------- schema


class Section(NamedTuple):
    """What a key holds that is not a plain value."""

    variants: Mapping[str, type[BaseModel]]
    """The models it can be, by tag; a single one has the empty tag."""
    tag_field: str
    """The key inside it that holds the tag; empty for a single model."""
    default: BaseModel | None
    named: bool
    """True for a mapping from names of the user's choice to such sections."""

    def chosen(self, section: Mapping[str, Any]) -> type[BaseModel]:
        """The model of a section whose tag is known to be right."""
        return self.variants[str(section[self.tag_field]) if self.tag_field else ""]


class Schema:
    """Which sections and keys a tree of pydantic models has."""

    def __init__(self, root: type[BaseModel]) -> None:
        self.root = root

    @staticmethod
    def section(model: type[BaseModel], key: str) -> Section | None:
        """What `key` of `model` holds, or None for a plain value."""
        field = model.model_fields[key]
        annotation, discriminator = field.annotation, field.discriminator
        named = get_origin(annotation) is dict
        if named:
            annotation = get_args(annotation)[1]
            discriminator = next((m.discriminator for m in get_args(annotation)[1:] if isinstance(m, FieldInfo)), None)
        members = [m for m in _union_members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
        if not members:
            return None
        default = field.default if isinstance(field.default, BaseModel) else None
        if discriminator is None:
            return Section({"": members[0]}, "", default, named)
        tag_field = str(discriminator)
        tagged = {str(get_args(m.model_fields[tag_field].annotation)[0]): m for m in members}
        return Section(tagged, tag_field, default, named)

    def resolve(self, location: Sequence[Any]) -> tuple[tuple[str, ...], type[BaseModel], str | None]:
        """Split a pydantic error location into the path of the section, its model, and the key inside it if any."""
        path: tuple[str, ...] = ()
        model = self.root
        rest = [str(part) for part in location]
        while rest:
            section = self.section(model, rest[0])
            depth = 2 if section is not None and section.named else 1
            if section is None or len(rest) < depth + bool(section.tag_field):
                return path, model, rest[0]
            path = (*path, *rest[:depth])
            model = section.variants[rest[depth] if section.tag_field else ""]
            rest = rest[depth + bool(section.tag_field) :]
        return path, model, None

    @cached_property
    def places(self) -> dict[str, dict[tuple[str, str], list[str]]]:
        """Every key by where it exists: its dotted path, and the key that must hold one of these tags for it if any."""
        found: dict[str, dict[tuple[str, str], list[str]]] = {}
        for key, path, tag_field, tag in self._keys(self.root):
            found.setdefault(key, {}).setdefault((path, tag_field), []).append(tag)
        return found

    def where(self, key: str) -> list[str]:
        """The places of `key` in words."""
        words = []
        for (path, tag_field), tags in self.places.get(key, {}).items():
            # the tag itself is there with every tag
            always = not tag_field or tags == self.places[tag_field.rpartition(".")[2]][tag_field, tag_field]
            words.append(path if always else f"{path} with {tag_field} = {' or '.join(tags)}")
        return words

    def _keys(
        self, model: type[BaseModel], prefix: str = "", tag_field: str = "", tag: str = ""
    ) -> Iterator[tuple[str, str, str, str]]:
        """Each key, its path, and the tag field with the tag that it is there for."""
        for key in model.model_fields:
            path = f"{prefix}{key}"
            yield key, path, tag_field, tag
            section = self.section(model, key)
            if section is not None and not section.named:
                for own, variant in section.variants.items():
                    condition = (f"{path}.{section.tag_field}", own) if own else (tag_field, tag)
                    yield from self._keys(variant, f"{path}.", *condition)

    def suggest(self, path: tuple[str, ...], model: type[BaseModel], taken: Iterable[str]) -> str:
        """Return the part of a message that says which key was probably meant by the unknown last key of `path`.

        `taken` are the keys the section has already: of two equally near names the free one is meant.
        """
        key = path[-1]
        free = set(model.model_fields) - set(taken)
        close = nearest_names(key, [name for name in model.model_fields if name in free]) or nearest_names(
            key, model.model_fields
        )
        owners = _listed([_owner(place) for place in self.where(key)])
        if close:
            return did_you_mean(close) + (f" ({key!r} belongs to {owners})" if owners else "")
        if owners:
            return f"; {key!r} belongs to {owners}"
        far = [place for name in nearest_names(key, self.places) for place in self.where(name)]
        return f"; did you mean {_listed(far)}?" if far else ""


def _owner(place: str) -> str:
    path, separator, condition = place.partition(" ")
    return f"{path.rpartition('.')[0] or 'the top level'}{separator}{condition}"


def _listed(items: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(items))


# -------------------------------------------------------------------------------------------------------- nearest names


def nearest_names(name: str, allowed: Iterable[str]) -> list[str]:
    """Return the at most 3 allowed names at the smallest edit distance (a swap counts 1), if that is small.

    >>> nearest_names("learnign_rate", ["learning_rate", "rounds"])
    ['learning_rate']
    >>> nearest_names("beta", ["beta1", "beta2", "momentum"])
    ['beta1', 'beta2']
    """
    from rapidfuzz.distance import OSA

    normal = _normal(name)
    limit = max(1, len(normal) // 3)
    distances = {candidate: OSA.distance(normal, _normal(candidate)) for candidate in allowed}
    smallest = min(distances.values(), default=limit + 1)
    if smallest > limit:
        return []
    return [candidate for candidate, distance in distances.items() if distance == smallest][:3]


def _normal(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


# --------------------------------------------------------------------------------------------------- given and allowed


def given(value: Any, depth: int = 0) -> str:
    """Return `value` as it would be written in YAML, on one line and not too long or deep.

    >>> given(None), given(True), given(2e-3), given("a b"), given([1, [2, [3]]])
    ('null', 'true', '0.002', "'a b'", '[1, [2, [...]]]')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    if isinstance(value, list | tuple):
        items = ["..."] if depth > 1 else [given(item, depth + 1) for item in value[:8]]
        return _shortened("[" + ", ".join([*items, *(["..."] if len(value) > 8 else [])]) + "]")
    return _shortened(ascii(value))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]}... ({len(text)} characters)"


def allowed_values(field: FieldInfo) -> str:
    """Return in words what `field` accepts.

    >>> from fedmira.config.run import TrainingConfig
    >>> allowed_values(TrainingConfig.model_fields["local_steps"])
    'a whole number, at least 1, or null'
    """
    return ", or ".join(_alternatives(field.annotation, field.metadata))


def literal_values(field: FieldInfo) -> list[str]:
    """Return the words a field accepts literally."""
    return [
        value
        for member in _union_members(field.annotation)
        if get_origin(member) is Literal
        for value in get_args(member)
    ]


def hint_for_value(value: Any, field: FieldInfo, spelt: str | None = None) -> str:
    """Return what to do about a wrong value, where that can be guessed; `spelt` is how it was written, if known."""
    words = literal_values(field)
    if isinstance(value, str) and words and (close := nearest_names(value, words)):
        return did_you_mean(close)
    members = _union_members(field.annotation)
    if isinstance(value, str) and type(None) in members and value.lower() in ("none", "nil", "off", "no", "false"):
        return "; for nothing write null"
    accepts_list = any(get_origin(member) is tuple for member in members)
    if accepts_list and isinstance(value, str | int | float) and not isinstance(value, bool):
        return f"; for a list{'' if ',' in str(value) else ' of one'} write [{value}]"
    if str in members and isinstance(value, int | float) and not isinstance(value, bool):
        return f"; if it is a name, put it in quotes: {spelt or str(value)!r}"
    return ""


def did_you_mean(names: Sequence[str]) -> str:
    """Return `"; did you mean 'a' or 'b'?"`, or an empty string for no names."""
    return f"; did you mean {' or '.join(repr(name) for name in names)}?" if names else ""


def _union_members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for item in get_args(annotation) for member in _union_members(item)]
    return [annotation]


def _alternatives(annotation: Any, metadata: Sequence[Any] = ()) -> list[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(arguments[0], [*metadata, *arguments[1:]])
    if origin in (Union, types.UnionType):
        return [text for item in arguments for text in _alternatives(item, metadata)]
    if origin is Literal:
        return [", ".join(str(value) for value in arguments)]
    if origin is tuple:
        return [f"a list, each item {' or '.join(_alternatives(arguments[0]))}"]
    if origin is dict:
        return [f"a mapping, each value {' or '.join(_alternatives(arguments[1]))}"]
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    name = names.get(annotation, str(annotation))
    return [", ".join([name, *_bounds(metadata, whole=annotation is int)])]


def _bounds(metadata: Sequence[Any], whole: bool) -> list[str]:
    """Say in words what the constraints of a number or a text are."""
    words: list[str] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            words += _bounds(item.metadata, whole)
        elif isinstance(item, annotated_types.Gt):
            words.append(f"at least {float(str(item.gt)) + 1:g}" if whole else f"greater than {item.gt:g}")
        elif isinstance(item, annotated_types.Ge):
            words.append(f"at least {item.ge:g}")
        elif isinstance(item, annotated_types.Lt):
            words.append(f"less than {item.lt:g}")
        elif isinstance(item, annotated_types.Le):
            words.append(f"at most {item.le:g}")
        elif getattr(item, "pattern", None):
            words.append(f"matching {item.pattern}")
        elif getattr(item, "allow_inf_nan", None) is False:
            words.append("finite")
    return words
