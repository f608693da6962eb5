"""Configs: from YAML and the command line to a `RunConfig` and back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.config.file import (
    config_difference,
    config_hash,
    load_config,
    parse_config,
    parse_resolved,
    resolved_yaml,
)
from fedmira.config.method import DittoConfig, FedITConfig
from fedmira.config.mira import MiraConfig
from fedmira.config.run import OutputConfig, RunConfig
from fedmira.config.training import FederationConfig, TrainingConfig
from fedmira.errors import ConfigError

# ------------------------------------------------------------------------------------------------------------ reading


def test_an_empty_file_means_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("", "# nothing\n", "---\n", "training:\n", "x-mine: {a: [1, 2]}\n"):
        path.write_text(text)
        assert load_config(path) == RunConfig()


def test_discriminators_left_out_get_their_defaults() -> None:
    config = parse_config("data: {families: 3}\nmethod: {strength: 2}\n")
    assert config.data.source == "planted"
    assert config.method == MiraConfig(strength=2.0)


def test_what_a_section_chooses_for_a_subsection_survives_setting_another_key() -> None:
    config = parse_config("data: {partition: {test: 0.3}}\n")
    assert config.data.partition.by == "field"
    assert config.data.partition.test == 0.3
    # the section's own kind stays, not that of any graph: it looks at no neighbours
    with pytest.raises(ConfigError, match="neighbours has no effect with kind = random"):
        parse_config("method: {name: mira_published, graph: {neighbours: 3}}\n")


def test_the_command_line_wins() -> None:
    text = "training: {learning_rate: 0.1}\nmethod: {name: mira, graph: {kind: labels}}\n"
    overrides = [
        "training.learning_rate=1e-3",
        "method.graph.kind=uniform",
        "federation.rounds=3",
        "compare.methods=[mira]",
    ]
    config = parse_config(text, overrides)
    assert config.training.learning_rate == 1e-3
    assert config.method.graph.kind == "uniform"  # type: ignore[union-attr]
    assert config.federation.rounds == 3
    assert config.compare.methods == ("mira",)


def test_the_last_of_two_overrides_wins_and_a_section_can_be_replaced_whole() -> None:
    text = "method: {name: mira, graph: {kind: labels}}\n"
    config = parse_config(text, ["seed=1", "seed=2", "method={name: fedit}"])
    assert (config.seed, config.method.name) == (2, "fedit")


def test_another_method_on_the_command_line_has_its_defaults() -> None:
    text = "method: {name: mira, strength: 3, graph: {kind: labels}}"
    assert parse_config(text, ["method.name=fedit"]).method == FedITConfig(name="fedit")
    same = parse_config(text, ["method.name=mira"]).method
    assert isinstance(same, MiraConfig)
    assert same.strength == 3
    ditto = parse_config(text, ["method.strength=0.5", "method.name=ditto"]).method
    assert isinstance(ditto, DittoConfig)
    assert ditto.strength == 0.5
    # a file that names no method has that of a config without one
    assert parse_config("method: {strength: 3}", ["method.name=mira"]).method.strength == 3  # type: ignore[union-attr]
    assert parse_config("method: {strength: 3}", ["method.name=fedit"]).method.name == "fedit"


def test_blanks_around_the_key_and_the_value_of_an_override_do_not_count() -> None:
    text = "method: {name: mira, strength: 2}"
    assert parse_config(text, ["method.name = fedit"]) == parse_config(text, ["method.name=fedit"])


def test_settings_without_their_switch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"exchange\.privacy: noise_multiplier and budget have no effect"):
        parse_config("exchange: {privacy: {noise_multiplier: 2, budget: 3}}")
    with pytest.raises(ConfigError, match=r"method\.choice: margin has no effect while enabled is false"):
        parse_config("method: {choice: {enabled: false, margin: 0.5}}")
    quiet = parse_config("method: {choice: {enabled: false}}\nexchange: {privacy: {enabled: false}}")
    assert parse_config(resolved_yaml(quiet)) == quiet


def test_an_override_of_a_section_leaves_those_alone_that_an_alias_makes_of_it() -> None:
    method = "method: &m {name: mira, strength: 1.0, graph: {kind: gram, neighbours: 5}}\n"
    variants = "compare: {methods: [mira, same, near], variants: {same: *m, near: {<<: *m, strength: 2}}}\n"
    config = parse_config(method + variants, ["method.strength=3", "method.graph.neighbours=9"])
    assert isinstance(config.method, MiraConfig)
    assert (config.method.strength, config.method.graph.neighbours) == (3.0, 9)
    for name, strength in (("same", 1.0), ("near", 2.0)):
        kept = config.compare.variants[name]
        assert isinstance(kept, MiraConfig)
        assert (kept.strength, kept.graph.neighbours) == (strength, 5)


@pytest.mark.parametrize(
    "text", ["ranks: {1: 2, 007: 4, true: 8, null: 16}", "<<: {ranks: {1: 2, 007: 4, true: 8, null: 16}}"]
)
def test_names_of_the_users_choice_are_taken_as_spelt(text: str) -> None:
    config = parse_config(f"model: {{adapter: {{{text}}}}}".replace("ranks", "client_ranks"))
    assert config.model.adapter.client_ranks == {"1": 2, "007": 4, "true": 8, "null": 16}
    variants = "compare: {methods: [mira, '010'], variants: {010: {name: mira, strength: 2}}}"
    assert list(parse_config(variants).compare.variants) == ["010"]


def test_aliases_of_aliases_are_refused_before_they_take_for_ever() -> None:
    def nine_levels(inside: Callable[[str], str]) -> str:
        return "\n".join(["x-0: &a0 {a: 1, b: 2}", *(f"x-{n}: &a{n} {{{inside(f'*a{n - 1}')}}}" for n in range(1, 9))])

    started = time.perf_counter()
    with pytest.raises(ConfigError, match="config: it has more than 100000 keys, counting those that aliases repeat"):
        parse_config(nine_levels(lambda alias: ", ".join(f"k{key}: {alias}" for key in range(9))))
    # merged into one another they stay two keys
    assert parse_config(nine_levels(lambda alias: f"<<: [{', '.join([alias] * 9)}]")) == RunConfig()
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "path",
    [
        *("/data/run #3/x", "*.jsonl", "!odd", "a/*.jsonl", "%here", "@there", "a#b", "#x", "|", ">x", "-", "- a"),
        *("a: b", "a:", "a\nb: c", ", a", "? a", "-a", "C:\\x"),
    ],
)
def test_a_path_on_the_command_line_is_taken_as_it_is(path: str) -> None:
    config = parse_config("", ["data={source: jsonl, path: x}", f"data.path={path}"])
    assert config.data.path == path  # type: ignore[union-attr]


def test_an_override_may_hold_equals_signs_and_be_empty() -> None:
    config = parse_config("", ["model.path=a=b", "training.clip_norm="])
    assert (config.model.path, config.training.clip_norm) == ("a=b", None)


def test_anchors_and_merge_keys_of_the_users_own_sections() -> None:
    text = "x-fast: &fast {local_steps: 1, batch_size: 2}\ntraining: {<<: *fast, batch_size: 3}\n"
    assert parse_config(text).training == TrainingConfig(local_steps=1, batch_size=3)


# --------------------------------------------------------------------------------------------------------- YAML scalars


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.001", ".001", "1.0e-3", "+1e-3", '"0.001"'])
def test_a_number_is_what_looks_like_one(text: str) -> None:
    """PyYAML follows YAML 1.1, where 1e-3 is text."""
    assert parse_config(f"training: {{learning_rate: {text}}}").training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("1_000", 1000), ("0x10", 16), ("0o17", 15), ("+7", 7), ("3.0", 3)]
)
def test_whole_numbers_are_decimal_unless_marked(text: str, value: int) -> None:
    assert parse_config(f"seed: {text}").seed == value


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "1e", "12:30:45", "2024-01-01"])
def test_words_stay_words(word: str) -> None:
    assert parse_config(f"model: {{path: {word}}}").model.path == word


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("on", True), ("true", True), ("no", False), ("off", False)]
)
def test_words_for_true_and_false_are_understood_where_one_is_wanted(word: str, value: bool) -> None:
    assert parse_config(f"evaluation: {{generation: {{enabled: {word}}}}}").evaluation.generation.enabled is value


def test_true_is_a_kind_of_graph() -> None:
    for overrides in ([], ["method.graph.kind=true"]):
        config = parse_config("method: {graph: {kind: true}}\n", overrides)
        assert config.method.graph.kind == "true"  # type: ignore[union-attr]


def test_true_is_not_the_number_one() -> None:
    with pytest.raises(ConfigError, match=r"federation\.rounds: given true; allowed: a whole number, at least 1"):
        parse_config("federation: {rounds: true}")
    with pytest.raises(ConfigError, match=r"examples_per_client: given \[true, 8\]; allowed: a whole number"):
        parse_config("data: {source: planted, partition: {by: field, examples_per_client: [true, 8]}}")


# ------------------------------------------------------------------------------------------------------- and back again

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
texts = st.one_of(
    st.sampled_from(
        ["no", "1e-3", "true", "null", "~", "12:30", "a: b", "#x", "- a", "0x1", "", " a ", "1_0", "*a", "é"]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20),
)
finite = st.floats(min_value=1e-300, max_value=1e300)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    method: dict[str, Any] = {"name": draw(st.sampled_from(["local_only", "fedit", "mira_published", "mira"]))}
    if method["name"].startswith("mira"):
        method["strength"] = draw(finite)
        method["graph"] = {"kind": "given", "path": draw(texts)}
    source = draw(st.sampled_from(["planted", "dolly", "jsonl"]))
    return RunConfig.model_validate(
        {
            "name": draw(names),
            "seed": draw(st.integers(min_value=0, max_value=2**63)),
            "model": {"path": draw(texts), "adapter": {"targets": draw(st.lists(texts, max_size=3))}},
            "data": {"source": source} | ({} if source == "planted" else {"path": draw(texts)}),
            "training": {"learning_rate": draw(finite), "clip_norm": draw(st.none() | finite)},
            "method": method,
            "compare": {"learning_rates": draw(st.lists(finite, max_size=3))},
        }
    )


@given(configs())
@settings(max_examples=150, deadline=None)
def test_resolved_yaml_reads_back_as_an_equal_config(config: RunConfig) -> None:
    text = resolved_yaml(config)
    again = parse_config(text)
    assert again == config
    assert resolved_yaml(again) == text
    assert config_hash(again) == config_hash(config)


@given(configs())
@settings(max_examples=100, deadline=None)
def test_other_yaml_readers_see_the_same_values(config: RunConfig) -> None:
    """No text is written so that a YAML 1.1 reader takes it for a number or a boolean."""
    assert yaml.safe_load(resolved_yaml(config)) == config.model_dump(mode="json")


def test_resolved_yaml_names_every_field() -> None:
    def leaves(value: Any) -> int:
        return sum(leaves(item) for item in value.values()) if isinstance(value, dict) and value else 1

    config = RunConfig()
    assert leaves(yaml.safe_load(resolved_yaml(config))) == leaves(config.model_dump())


# ----------------------------------------------------------------------------------------------------------- identity


def test_what_runs_of_before_wrote_down_means_what_they_did() -> None:
    default, beginning = RunConfig(), parse_config("{data: {cut: beginning}, method: {choice: {examples: null}}}")
    # the name that a run with all defaults had before there was a choice
    assert config_hash(beginning) == "0fa832ac"
    assert config_hash(default) != config_hash(beginning)
    assert config_difference(beginning, default) == [
        "data.cut: 'beginning' -> 'input'",
        "method.choice.examples: null -> 4",
    ]
    of_before = resolved_yaml(default).replace("  cut: input\n", "").replace("    examples: auto\n", "")
    assert parse_resolved(of_before) == beginning
    assert parse_resolved(resolved_yaml(default)) == default
    nobody_asked = parse_config("method: {choice: {enabled: false}}")
    with_the_default_of_before = resolved_yaml(nobody_asked).replace("    examples: auto\n", "    examples: 4\n")
    assert config_hash(parse_resolved(with_the_default_of_before)) == config_hash(nobody_asked)


def test_questions_go_to_no_more_examples_than_a_step_trains_on() -> None:
    def asked(batch_size: int, examples: str = "auto") -> int | None:
        config = parse_config(
            f"{{training: {{batch_size: {batch_size}}}, method: {{choice: {{examples: {examples}}}}}}}"
        )
        method = config.settled_method
        assert isinstance(method, MiraConfig)
        return method.choice.most_examples()

    assert [asked(size) for size in (1, 2, 4, 8)] == [1, 2, 4, 4]
    assert [asked(1, "7"), asked(8, "7"), asked(1, "null")] == [7, 7, None]
    # so a config that says the number computes the same, and goes on where the other began
    assert config_hash(RunConfig()) == config_hash(parse_config("method: {choice: {examples: 4}}"))
    assert config_hash(parse_config("training: {batch_size: 1}")) == config_hash(
        parse_config("{training: {batch_size: 1}, method: {choice: {examples: 1}}}")
    )
    assert parse_config("method: {name: fedit}").settled_method == parse_config("method: {name: fedit}").method


@pytest.mark.parametrize("method", ["fedlease", "fedtreelora"])
def test_what_is_refused_today_can_be_read_where_it_was_done(method: str) -> None:
    written = resolved_yaml(RunConfig.model_validate({"method": {"name": method}}))
    of_before = written.replace("client_ranks: []", "client_ranks: [2, 8]")
    assert parse_resolved(of_before).model.adapter.client_ranks == (2, 8)
    with pytest.raises(
        ConfigError, match=r"more alike among clients of one rank .*; remove model\.adapter\.client_ranks"
    ):
        parse_config(of_before)
    # what could never be is no config, and damage is no wish
    with pytest.raises(ConfigError, match="no such key"):
        parse_resolved(f"{of_before}a_key_of_another_version: 1\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "data: {partition: {alpha: 0.3}}",
            r"data\.partition: alpha has no effect with by = field; remove it, or use by",
        ),
        (
            "data: {source: jsonl, path: x, client_field: ward}",
            r"data\.client_field = 'ward' has no effect with data\.partition\.by = task; remove it, or use by: field",
        ),
        ("training: {optimizer: sgd, beta1: 0.8}", "training: beta1 has no effect with optimizer = sgd"),
        ("training: {optimizer: sgd, beta2: 0.8}", "training: beta2 has no effect with optimizer = sgd"),
        ("training: {optimizer: sgd, epsilon: 0.1}", "training: epsilon has no effect with optimizer = sgd"),
        *(
            (
                f"{{training: {{{setting}}}, method: {{name: fedkseed}}}}",
                rf"training\.{setting.split(':')[0]} has no effect with method\.name = fedkseed, .*; remove it, or",
            )
            for setting in (
                "keep_moments: true",
                "optimizer: adam",
                "weight_decay: 0.1",
                "beta1: 0.8",
                "clip_norm: null",
            )
        ),
    ],
)
def test_a_setting_without_effect_is_refused_and_read_where_it_was_done(text: str, words: str) -> None:
    written = resolved_yaml(parse_config(text, recorded=True))
    assert resolved_yaml(parse_resolved(written)) == written
    for refused in (text, written):
        with pytest.raises(ConfigError, match=words):
            parse_config(refused)


def test_what_acts_on_another_method_of_a_comparison_may_be_set() -> None:
    training = "training: {optimizer: sgd, momentum: 0.9, weight_decay: 0.1}"
    parse_config(f"{{{training}, method: {{name: fedit}}, compare: {{methods: [fedit, fedkseed]}}}}")
    words = r"training\.optimizer, training\.weight_decay, training\.momentum have no effect .*; remove them, or take"
    with pytest.raises(ConfigError, match=words):
        parse_config(f"{{{training}, method: {{name: fedkseed}}}}")


@pytest.mark.parametrize(("source", "name"), [("jsonl", "a73865ee"), ("huggingface", "06dafe11")])
def test_keys_of_records_that_came_later_leave_the_hash_as_it_was_while_unused(source: str, name: str) -> None:
    before = parse_config(f"{{data: {{source: {source}, path: x}}, method: {{choice: {{examples: null}}}}}}")
    assert config_hash(before) == name
    assert "fields" not in resolved_yaml(before)
    used = parse_config(resolved_yaml(before), ["data.fields.output=Antwort", "data.split_field=part"])
    assert config_difference(before, used) == [
        "data.fields.output: (absent) -> 'Antwort'",
        "data.split_field: (absent) -> 'part'",
    ]
    assert config_hash(used) != name
    assert parse_resolved(resolved_yaml(used)) == used


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{instrution: Frage}", "'instrution'; allowed: instruction, input, output, .*; did you mean 'instruction'"),
        ("{instruction: Frage, output: Frage}", r"fields\.instruction is 'Frage', as another one is; give each"),
        ("{output: ''}", r"fields\.output has no name; give each"),
        ("{output: 3}", r"data\.fields: given a section; allowed: a mapping, each value text"),
        ("Frage", r"data\.fields: given 'Frage'; allowed: a mapping, each value text"),
    ],
)
def test_names_of_fields_that_cannot_be_are_refused(fields: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(f"data: {{source: jsonl, path: x, fields: {fields}}}")


def test_the_order_of_a_rank_pattern_counts_where_a_layer_can_match_two_of_it() -> None:
    def pattern(text: str) -> RunConfig:
        return parse_config(f"model: {{adapter: {{rank_pattern: {{{text}}}}}}}")

    one, other = pattern("attn.c_proj: 4, c_proj: 16"), pattern("c_proj: 16, attn.c_proj: 4")
    assert config_hash(one) != config_hash(other)
    assert config_difference(one, other) == [
        "model.adapter.rank_pattern: [['attn.c_proj', 4], ['c_proj', 16]] -> [['c_proj', 16], ['attn.c_proj', 4]]"
    ]
    one, other = pattern("q_proj: 4, v_proj: 16"), pattern("v_proj: 16, q_proj: 4")
    assert (config_hash(one), config_difference(one, other)) == (config_hash(other), [])


def test_the_hash_sees_everything_but_name_output_and_compare() -> None:
    base = config_hash(RunConfig())
    assert len(base) == 8
    assert set(base) <= set("0123456789abcdef")
    same = RunConfig(name="other", output=OutputConfig(directory="elsewhere"), compare={"seeds": 3})  # type: ignore[arg-type]
    assert config_hash(same) == base
    assert config_hash(parse_config("training: {learning_rate: 2e-3}")) == base, "a default written out is the default"
    assert config_hash(parse_config("training: {learning_rate: 2.1e-3}")) != base


def change(value: Any) -> Any:
    """Another value of the same field, allowed or not."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 if isinstance(value, float) and value else value + 1
    if isinstance(value, dict):
        return {} if value else {"one": 1}
    if isinstance(value, tuple):
        return () if value else (1,)
    return f"{value}x"


def every_leaf(value: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [
        leaf
        for key, item in value.items()
        for leaf in (every_leaf(item, (*path, key)) if isinstance(item, dict) and item else [(*path, key)])
    ]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("path", every_leaf(RunConfig().model_dump()), ids=".".join)
def test_a_change_of_any_field_is_seen(path: tuple[str, ...]) -> None:
    """Every field of the config, changed alone: the hash differs and the difference names it, or it is no identity."""
    old = RunConfig()
    new = old
    inner: list[Any] = [old]
    for key in path[:-1]:
        inner.append(getattr(inner[-1], key))
    value: Any = change(getattr(inner[-1], path[-1]))
    for section, key in zip(reversed(inner), reversed(path), strict=True):
        value = section.model_copy(update={key: value})
    new = value
    difference = config_difference(old, new)
    if path[0] in ("name", "output", "compare"):
        assert difference == []
        assert config_hash(new) == config_hash(old)
    else:
        assert [line.partition(":")[0].removesuffix(".one") for line in difference] == [".".join(path)]
        assert config_hash(new) != config_hash(old)


def test_a_difference_shows_both_values() -> None:
    old = RunConfig(training=TrainingConfig(learning_rate=2e-3))
    new = RunConfig(
        training=TrainingConfig(learning_rate=1e-3), federation=FederationConfig(rounds=9), method={"name": "fedit"}
    )  # type: ignore[arg-type]
    lines = config_difference(old, new)
    assert "training.learning_rate: 0.002 -> 0.001" in lines
    assert "federation.rounds: 8 -> 9" in lines
    assert "method.name: 'mira' -> 'fedit'" in lines
    assert "method.strength: 2.0 -> (absent)" in lines


# -------------------------------------------------------------------------------------------------------------- speed


def test_reading_a_config_imports_no_torch_and_is_quick() -> None:
    code = (
        "import sys; from fedmira.config.file import parse_config; parse_config('seed: 1', ['federation.rounds=3']);"
        "sys.exit(' '.join({'torch', 'transformers', 'numpy', 'rapidfuzz'} & set(sys.modules)) or 0)"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 2.0, f"fastest of three: {min(seconds):.2f} s"
