"""The tables by kind and by method agree with the config, which cannot import them: nothing is half added."""

from __future__ import annotations

from typing import get_args

import pytest
from tests.federation.builders import CONFIGS, clients

from fedmira.config.graph import _KINDS, ASKING_GRAPHS, KNOWN_GRAPHS, LOW_RANK_GRAPHS, GraphConfig, GraphKind
from fedmira.config.method import METHOD_NAMES, METHOD_SECTIONS
from fedmira.errors import FedmiraError
from fedmira.federation.asked_graphs import ASKED
from fedmira.federation.graph import PRIVACY
from fedmira.federation.known_graphs import resolve_graph
from fedmira.federation.learned_graphs import _FROM_ADAPTERS
from fedmira.federation.registry import METHODS


def section(kind: GraphKind) -> GraphConfig:
    return GraphConfig(kind=kind, path="graph.json" if kind == "given" else None)


def test_every_method_of_the_config_is_built_and_goes_through_the_contract() -> None:
    assert set(METHODS) == set(METHOD_NAMES) == {config.name for config in CONFIGS.values()}


def test_every_kind_of_graph_is_in_every_table() -> None:
    kinds = set(get_args(GraphKind))
    assert set(_KINDS) == set(PRIVACY) == kinds
    assert set(LOW_RANK_GRAPHS) == set(_FROM_ADAPTERS)
    assert set(ASKING_GRAPHS) == set(ASKED)
    assert sorted((*LOW_RANK_GRAPHS, *ASKING_GRAPHS, *KNOWN_GRAPHS)) == sorted(kinds)


def test_kinds_look_at_keys_that_exist_and_no_key_is_left_over() -> None:
    keys = {key for facts in _KINDS.values() for key in facts.keys}
    assert keys == set(GraphConfig.model_fields) - {"kind"}


@pytest.mark.parametrize("kind", get_args(GraphKind))
def test_a_kind_is_learned_where_it_is_not_known(kind: GraphKind) -> None:
    config = section(kind)
    try:
        graph = resolve_graph(config, clients(6), None)
    except FedmiraError:
        # it is known and needs what was not handed over
        assert not config.is_learned
    else:
        assert (graph is None) == config.is_learned
    assert config.asks == (kind in ("trust", "probe"))
    assert config.uses("settled") == config.is_learned


def test_only_methods_with_a_graph_say_anything_of_it() -> None:
    for name, one in METHOD_SECTIONS.items():
        assert "graph" in one.model_fields or not (one.needs_known_graph or one.relates_participants), name
