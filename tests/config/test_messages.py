"""Every mistake of a config at once, in words that say what to do; pinned message by message."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import pytest

from fedmira.config.dialect import read_text
from fedmira.config.file import load_config, parse_config, resolved_yaml
from fedmira.config.messages import MAX_SHOWN, Schema, given, nearest_names
from fedmira.config.run import RunConfig
from fedmira.errors import ConfigError

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "config_errors"
CASES = sorted(path.stem for path in GOLDEN.glob("*.yaml"))


def message_of(text: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides or [], source="config.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_messages_are_as_pinned(case: str) -> None:
    """FEDMIRA_WRITE_GOLDEN=1 rewrites the files after a wanted change."""
    text = (GOLDEN / f"{case}.yaml").read_text()
    first, prefix = text.splitlines()[0], "# overrides: "
    overrides = shlex.split(first.removeprefix(prefix)) if first.startswith(prefix) else []
    message = message_of(text, overrides) + "\n"
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("FEDMIRA_WRITE_GOLDEN"):
        golden.write_text(message)
    assert message == golden.read_text()


@pytest.mark.parametrize("spelt", ["1e3", "010", "0x10"])
def test_what_may_be_a_name_is_shown_as_it_was_written(spelt: str) -> None:
    for text, overrides in ((f"output: {{directory: {spelt}}}", []), ("", [f"output.directory={spelt}"])):
        assert f"put it in quotes: '{spelt}'" in message_of(text, overrides)


# --------------------------------------------------------------------------------------------- a thousand typing errors


def every_key(text: str) -> list[tuple[int, str]]:
    """The line number and name of every key of a block-style YAML text."""
    lines = text.splitlines()
    return [(n, line.split(":")[0].strip()) for n, line in enumerate(lines) if ":" in line and "- " not in line]


def with_typing_error(key: str, generator: np.random.Generator) -> str:
    """One character dropped, doubled, replaced, inserted or swapped with its neighbour."""
    letters = "abcdefghijklmnopqrstuvwxyz_"
    at = int(generator.integers(len(key)))
    other = letters[generator.integers(len(letters))]
    swapped = key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :] if at + 1 < len(key) else key[:-1]
    edits = [key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:], key[:at] + other + key[at + 1 :]]
    return [*edits, key[:at] + other + key[at:], swapped][generator.integers(5)]


STARTS = {
    "planted": [],
    "dolly": ["data={source: dolly, path: x}", "method={name: mira_published}"],
    "jsonl": ["data={source: jsonl, path: x}", "method={name: fedit}"],
    "natural_instructions": ["data={source: natural_instructions, path: x}", "method={name: local_only}"],
    "huggingface": ["data={source: huggingface, path: x}"],
}


def test_a_thousand_typing_errors_get_the_right_suggestion() -> None:
    generator = np.random.Generator(np.random.Philox(5))
    starts = [resolved_yaml(parse_config("", overrides)) for overrides in STARTS.values()]
    tried = right = 0
    wrong: list[str] = []
    while tried < 1000:
        text = starts[tried % len(starts)]
        keys = every_key(text)
        line, key = keys[generator.integers(len(keys))]
        typo = with_typing_error(key, generator)
        lines = text.splitlines()
        siblings = [
            k for n, k in keys if len(lines[n]) - len(lines[n].lstrip()) == len(lines[line]) - len(lines[line].lstrip())
        ]
        if not typo or typo in siblings or typo.startswith("x-"):
            continue
        tried += 1
        lines[line] = lines[line].replace(key, typo, 1)
        rows = [row for row in message_of("\n".join(lines)).splitlines() if f"line {line + 1}: " in row]
        assert rows, f"{typo!r} for {key!r} was not reported on its line"
        suggestion = rows[0].partition("did you mean ")[2].partition("?")[0]
        if repr(key) in suggestion:
            right += 1
        else:
            wrong.append(f"{typo} for {key}: {rows[0][:160]}")
    print(f"{right} of {tried} right")
    assert right >= 950, f"{right} of {tried} right, for example\n" + "\n".join(wrong[:20])


def test_a_typing_error_never_costs_another_message() -> None:
    """Two typing errors in one file are both reported, whatever they are."""
    generator = np.random.Generator(np.random.Philox(6))
    text = resolved_yaml(RunConfig())
    keys = [(line, key) for line, key in every_key(text) if text.splitlines()[line].startswith("  ")]
    for _ in range(100):
        lines = text.splitlines()
        chosen = generator.choice(len(keys), 2, replace=False)
        for index in chosen:
            line, key = keys[index]
            lines[line] = lines[line].replace(key, f"{key}qqq", 1)
        message = message_of("\n".join(lines))
        parents_lost = sum(1 for index in chosen if lines[keys[index][0]].endswith(":"))
        assert message.count("qqq: no such key") >= 2 - parents_lost, message


# ------------------------------------------------------------------------------------------------------- parts of words


def test_long_and_nested_values_are_shown_short() -> None:
    bomb = "x-a: &a [x, x, x, x]\nx-b: &b [*a, *a, *a, *a]\nx-c: &c [*b, *b, *b, *b]\nx-d: &d [*c, *c, *c, *c]\n"
    message = message_of(bomb + "model: {adapter: {targets: [*d, *d, *d]}}\nseed: " + "9" * 5000 + "x\n")
    assert all(len(row) < 300 for row in message.splitlines())


def test_a_self_containing_value_is_refused() -> None:
    assert "seed" in message_of("seed: &a [*a]\n")


def test_a_deeply_nested_file_is_refused() -> None:
    assert "nested" in message_of("seed: " + "[" * 100_000)
    assert "nested" in message_of("".join(" " * depth + "a:\n" for depth in range(200)))


def test_control_characters_in_keys_and_values_do_not_reach_the_terminal() -> None:
    message = message_of('"se\\e[31med": 1\nname: "a\\e[2Jb"\n')
    assert "\x1b" not in message


def test_given_is_one_short_line() -> None:
    assert len(given("a\nb" * 1000)) < MAX_SHOWN + 30
    assert "\n" not in given("a\nb")
    assert given([1, [2, None]]) == "[1, [2, null]]"


def test_nearest_names_needs_likeness() -> None:
    assert nearest_names("zzz", ["rank", "alpha"]) == []
    assert nearest_names("x", []) == []


def test_every_section_of_the_config_is_known_to_the_schema() -> None:
    places = Schema(RunConfig).places
    assert ("training.learning_rate", "") in places["learning_rate"]
    assert sum(map(len, places["path"].values())) >= 4, "model.path, data.path of four sources, graph.path"


def test_a_missing_file_names_the_recipes(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no config file 'quikstart'; did you mean 'quickstart'\?.*dolly, quickstart"
    ) as e:
        read_text(Path("quikstart"), ["dolly", "quickstart"])
    assert e.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"name: \xff\xfe", "not UTF-8"), (b"#" * (2 << 20), "Is it a data file"), (b"name: a\x00b", "not valid YAML")],
)
def test_unreadable_files(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        load_config(path)


def test_a_folder_is_not_a_config(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    with pytest.raises(ConfigError, match=r"is a folder.*a\.yaml"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {device: gpu}", "device = gpu is unknown; allowed: auto, cpu, cuda, cuda:1 and so on"),
        ("model: {device: mps}", "device = mps has no float64, in which adapters are compared and mixed; use cpu"),
        ("data: {partition: {test: 0}}", "data.partition.test = 0 leaves nothing to judge clients by in the end"),
        ("federation: {clients_per_round: 17}", "data.families * data.clients_per_family = 16; lower it to at most 16"),
        ("compare: {methods: 'fedit,mira'}", "for a list write [fedit,mira]"),
        ("compare: {methods: fedit}", "for a list of one write [fedit]"),
    ],
)
def test_what_the_config_alone_shows_is_told(text: str, told: str) -> None:
    assert told in message_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "model: {device: 'cuda:1'}",
        "{data: {partition: {test: 0}}, evaluation: {test: false}}",
        "federation: {clients_per_round: 16}",
    ],
)
def test_what_can_be_is_taken(text: str) -> None:
    assert parse_config(text)
