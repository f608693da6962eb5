"""From a YAML file and the command line to a `RunConfig` and back; every mistake is reported at once.

Mistakes are found in two passes: one over the keys (unknown, misplaced, misspelt), which needs only the field names
of the sections, and one by pydantic over the values, repeated without the offending values so that a mistake never
hides another. Knows what the sections are called only through `RunConfig`; imports neither torch nor transformers.
The words of the messages are made in `messages`, the YAML dialect is defined in `dialect`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fedmira.config.dialect import Dumper, parse_yaml, read_text
from fedmira.config.messages import (
    Mistakes,
    Schema,
    Section,
    allowed_values,
    did_you_mean,
    given,
    hint_for_value,
    literal_values,
    nearest_names,
)
from fedmira.config.mira import MiraConfig
from fedmira.config.run import RunConfig
from fedmira.errors import ConfigError

NOT_IDENTITY = ("output", "compare", "name")
"""Top-level keys that do not decide what a run computes, so they are left out of its hash."""

SCHEMA = Schema(RunConfig)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML file `path`, apply `key.path=value` overrides (the command line wins) and validate.

    Values follow YAML 1.2: `1e-3` is a number, `yes`, `no`, `on` and `off` are text (and are understood where true or
    false is wanted). Top-level keys that begin with `x-` are the user's own. An empty file means all defaults. Another
    `method.name` than that of the file means that method with its defaults, as in a comparison.

    Raises:
        ConfigError: the file cannot be read or parsed, or any key or value is wrong; all mistakes are listed.
    """
    text = read_text(Path(path))
    return parse_config(text, overrides, source=Path(path).name)


def parse_config(
    text: str, overrides: Sequence[str] = (), source: str = "config", *, recorded: bool = False
) -> RunConfig:
    """Like `load_config`, from text; `source` names it in messages, and `recorded` says that a run began with it."""
    mistakes = Mistakes(source)
    raw, lines = parse_yaml(text, source, mistakes)
    mistakes.lines = lines
    _forget_other_method(raw, overrides)
    for override in overrides:
        _apply_override(raw, override, mistakes)
    return _validate(raw, mistakes, recorded)


def resolved_yaml(config: RunConfig) -> str:
    """Return every field of `config` as YAML in a stable order; `parse_config` of it equals `config`."""
    return yaml.dump(
        config.model_dump(mode="json"),
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=110,
        default_flow_style=False,
    )


def config_hash(config: RunConfig) -> str:
    """Return 8 hex digits that name what `config` computes: `name`, `output` and `compare` do not count.

    >>> config_hash(RunConfig()) == config_hash(RunConfig(name="other"))
    True
    >>> config_hash(RunConfig()) == config_hash(RunConfig(seed=1))
    False
    """
    identity = _identity(config)
    # what runs did before there was a choice; they keep their names
    if config.data.cut == "beginning":
        del identity["data"]["cut"]
    if (choice := identity["method"].get("choice")) and (choice["examples"] is None or not choice["enabled"]):
        del choice["examples"]
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def config_difference(old: RunConfig, new: RunConfig) -> list[str]:
    """Return a line `key.path: old -> new` for every field that decides the computation and differs.

    >>> config_difference(RunConfig(), RunConfig(seed=3, name="other"))
    ['seed: 0 -> 3']
    """
    before, after = dict(_leaves(_identity(old))), dict(_leaves(_identity(new)))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in keys
        if _shown(before, key) != _shown(after, key) or before.get(key) != after.get(key)
    ]


def parse_resolved(text: str) -> RunConfig:
    """Parse what a run or a study wrote down of its config: keys that it lacks mean what was done before they came, and
    what has been found since to lead nowhere was done all the same.

    Raises:
        ConfigError: as `parse_config`.
    """
    config = parse_config(text, source="config.resolved.yaml", recorded=True)
    data, method = config.data, config.method
    if "cut" not in data.model_fields_set:
        data = data.model_copy(update={"cut": "beginning"})
    if isinstance(method, MiraConfig) and method.choice.enabled and "examples" not in method.choice.model_fields_set:
        method = method.model_copy(update={"choice": method.choice.model_copy(update={"examples": None})})
    return config.model_copy(update={"data": data, "method": method})


def with_rounds(config: RunConfig, rounds: int) -> RunConfig:
    """Return `config` with another number of rounds."""
    return config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": rounds})})


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return given(leaves[key]) if key in leaves else "(absent)"


def _identity(config: RunConfig) -> dict[str, Any]:
    """What decides the computation."""
    identity = {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_IDENTITY}
    identity["method"] = config.settled_method.model_dump(mode="json")
    pattern = config.model.adapter.rank_pattern
    if any(one.endswith(f".{other}") for one in pattern for other in pattern):
        # a layer can match both: the first counts, and the hash of a mapping is blind to order
        identity["model"]["adapter"]["rank_pattern"] = list(pattern.items())
    return identity


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


# -------------------------------------------------------------------------------------------------------- command line


def _split(override: str) -> tuple[tuple[str, ...], str]:
    """The keys and the value of `key.path=value`; no keys if it is of another form."""
    key_path, equals, text = override.partition("=")
    keys = tuple(key.strip() for key in key_path.split("."))
    return (keys if equals and all(keys) else ()), text.strip()


def _forget_other_method(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Drop what the file says about its method where the command line names another one."""
    names = [text for keys, text in map(_split, overrides) if keys == ("method", "name")]
    section = raw.get("method")
    if names and isinstance(section, dict) and section.get("name", RunConfig().method.name) != names[-1]:
        raw["method"] = {}


def _is_plain(text: str) -> bool:
    """Whether a value is text although YAML would see a comment, an alias, a tag, a list or a mapping.

    >>> [_is_plain(text) for text in ("a #b", "*.jsonl", "#x", "- a", "a: b", "[a, b]", "1e-3")]
    [True, True, True, True, True, False, False]
    """
    if text[:1] in ("", "[", "{", "'", '"'):
        return False
    marked = any(mark in f"{text} " for mark in (" #", ": ", "\n"))
    return marked or text[0] in "*&!%@`#|>,]}" or f"{text} "[:2] in ("- ", "? ")


def _apply_override(raw: dict[str, Any], override: str, mistakes: Mistakes) -> None:
    keys, text = _split(override)
    if not keys:
        mistakes.add_override(override, "must have the form key.path=value, for example training.learning_rate=1e-3")
        return
    inside = Mistakes("its value")
    try:
        value = text if _is_plain(text) else parse_yaml(f"value: {text}", "its value", inside)[0].get("value")
    except ConfigError as error:
        mistakes.add_override(override, str(error))
        return
    for mistake in inside.found:
        mistakes.add_override(override, mistake.text)
    section = raw
    for depth, key in enumerate(keys[:-1]):
        inner = section.get(key)
        if inner is not None and not isinstance(inner, dict):
            section_path = ".".join(keys[: depth + 1])
            mistakes.add_override(
                override, f"{section_path} is given as {given(inner)}, which has no keys; remove one of the two"
            )
            return
        # a copy: an alias may make another section of the same object
        section[key] = dict(inner or {})
        section = section[key]
    section[keys[-1]] = value
    mistakes.overridden.add(keys)
    mistakes.spelt |= {(*keys, *path[1:]): spelt for path, spelt in inside.spelt.items()}


# ----------------------------------------------------------------------------------------------------------- validation


def _validate(raw: dict[str, Any], mistakes: Mistakes, recorded: bool) -> RunConfig:
    known = {key: value for key, value in raw.items() if not str(key).startswith("x-")}
    checked = _check_keys(known, RunConfig, (), mistakes)
    config = _check_values(checked, mistakes, recorded)
    if mistakes.found or config is None:
        raise ConfigError(mistakes.message())
    return config


def _check_keys(
    raw: dict[Any, Any], model: type[BaseModel], path: tuple[str, ...], mistakes: Mistakes
) -> dict[str, Any]:
    """Return a copy of `raw` without the keys that `model` does not have, noting each of them."""
    checked: dict[str, Any] = {}
    for key, value in raw.items():
        here = (*path, str(key))
        if key not in model.model_fields:
            allowed = ", ".join(model.model_fields)
            mistakes.add(
                here, f"no such key (given {given(value)}){SCHEMA.suggest(here, model, raw)}; allowed: {allowed}"
            )
            continue
        section = SCHEMA.section(model, key)
        if section is None:
            checked[key] = value
        elif not isinstance(value, dict) and value is not None:
            keys = "your own names" if section.named else ", ".join(next(iter(section.variants.values())).model_fields)
            hint = f"; write {key}: {{{section.tag_field}: {value}}}" if value in list(section.variants) else ""
            mistakes.add(here, f"given {given(value)}; allowed: a section with keys such as {keys}{hint}")
        elif section.named:
            checked[key] = _check_keys_of_named(value or {}, section, here, mistakes)
        else:
            # null: a section whose keys are all commented out
            checked[key] = _check_section(value or {}, section, here, mistakes)
    return checked


def _check_keys_of_named(
    sections: dict[Any, Any], section: Section, path: tuple[str, ...], mistakes: Mistakes
) -> dict[str, Any]:
    checked = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            checked[str(name)] = _check_section(value, section, (*path, str(name)), mistakes)
        else:
            mistakes.add((*path, str(name)), f"given {given(value)}; allowed: a section")
    return checked


def _check_section(
    values: dict[str, Any], section: Section, path: tuple[str, ...], mistakes: Mistakes
) -> dict[str, Any]:
    """Check the keys of one section, after filling in which variant it is and what its parent sets by default.

    With a misspelt tag, the nearest one is assumed, so that the other keys are checked too.
    """
    if not section.tag_field:
        # what the parent chooses for its section stays chosen when the user sets another key of it
        chosen = section.default.model_dump(exclude_unset=True) if section.default is not None else {}
        return _check_keys({**chosen, **values}, section.variants[""], path, mistakes)
    default = getattr(section.default, section.tag_field, None)
    tag = values.get(section.tag_field, default)
    if not (isinstance(tag, str) and tag in section.variants):
        close = nearest_names(str(tag), section.variants)
        problem = f"given {given(tag)}" if section.tag_field in values else "missing"
        allowed = ", ".join(section.variants)
        mistakes.add((*path, section.tag_field), f"{problem}; allowed: {allowed}{did_you_mean(close)}")
        if not close:
            return {section.tag_field: default or next(iter(section.variants))}
        tag = close[0]
    return _check_keys({**values, section.tag_field: tag}, section.variants[tag], path, mistakes)


def _check_values(checked: dict[str, Any], mistakes: Mistakes, recorded: bool) -> RunConfig | None:
    """Validate until nothing new turns up, each time without the values already known to be wrong."""
    _settle_booleans(checked, RunConfig, (), mistakes)
    while True:
        try:
            return RunConfig.model_validate(checked, context={"recorded": recorded})
        except ValidationError as error:
            noted = len(mistakes.found)
            for detail in error.errors(include_url=False):
                _note_detail(checked, dict(detail), mistakes)
            if len(mistakes.found) == noted:
                # only consequences of mistakes that are already listed
                return None


def _settle_booleans(
    section: dict[str, Any], model: type[BaseModel], path: tuple[str, ...], mistakes: Mistakes
) -> None:
    """Take `true` for the word where it is one (`graph.kind: true`); refuse it for a number, as pydantic does not, also
    in a list."""
    for key, value in list(section.items()):
        here = (*path, key)
        inner = SCHEMA.section(model, key)
        if inner is not None:
            for name, sub in value.items() if inner.named else [("", value)]:
                sub_path = (*here, name) if inner.named else here
                _settle_booleans(sub, inner.chosen(sub), sub_path, mistakes)
        elif isinstance(value, bool):
            field = model.model_fields[key]
            if given(value) in literal_values(field):
                section[key] = given(value)
            elif "true or false" not in (allowed := allowed_values(field)):
                mistakes.add(here, f"given {given(value)}; allowed: {allowed}")
                del section[key]
        elif isinstance(value, list) and any(isinstance(one, bool) for one in value):
            mistakes.add(here, f"given {given(value)}; allowed: {allowed_values(model.model_fields[key])}")
            del section[key]


def _note_detail(checked: dict[str, Any], detail: dict[str, Any], mistakes: Mistakes) -> None:
    """Add the mistake that one entry of a pydantic error describes and take the value out of `checked`."""
    path, model, key = SCHEMA.resolve(detail["loc"])
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        # a rule between keys, one of which was wrong and is no longer there: a consequence, not a mistake
        if not any(
            mistake.path[:-1] == path and mistake.path[-1] in message for mistake in mistakes.found if mistake.path
        ):
            mistakes.add(path, message, rule=True)
        _remove(checked, path)
        return
    assert key is not None
    field = model.model_fields[key]
    if detail["type"] == "missing":
        description = f" ({' '.join(field.description.split())})" if field.description else ""
        mistakes.add((*path, key), f"missing; needed: {allowed_values(field)}{description}")
        _section(checked, path)[key] = "placeholder"
        return
    section = _section(checked, path)
    if key in section:
        value = section.pop(key)
        hint = hint_for_value(value, field, mistakes.spelt.get((*path, key)))
        mistakes.add((*path, key), f"given {given(value)}; allowed: {allowed_values(field)}{hint}")
        if field.is_required():
            section[key] = "placeholder"


def _section(checked: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        checked = checked.setdefault(key, {})
    return checked


def _remove(checked: dict[str, Any], path: tuple[str, ...]) -> None:
    if path:
        _section(checked, path[:-1]).pop(path[-1], None)
    else:
        checked.clear()
