"""The federated algorithms by name. Adding one: a module with `build`, a config class, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from fedmira.config import FederationConfig, MethodConfig
from fedmira.federation.graph import Graph, Matrix
from fedmira.federation.known_graphs import resolve_graph
from fedmira.federation.method import Method
from fedmira.federation.methods import fedit, local_only, mira, mira_published
from fedmira.types import Clients

Builder: TypeAlias = Callable[[Any, Clients, Graph | None, FederationConfig | None], Method]

METHODS: Mapping[str, Builder] = {
    "local_only": lambda config, clients, graph, federation: local_only.build(),
    "fedit": lambda config, clients, graph, federation: fedit.build(clients),
    "mira_published": lambda config, clients, graph, federation: mira_published.build(
        config, clients, graph, federation
    ),
    "mira": lambda config, clients, graph, federation: mira.build(config, clients, graph),
}


def build_method(
    config: MethodConfig,
    clients: Clients,
    given_graph: Matrix | None = None,
    federation: FederationConfig | None = None,
) -> Method:
    """Return the method of `config` for `clients`.

    Args:
        config: the `method` section.
        clients: what the server knows about them.
        given_graph: with `method.graph.kind: given`, the (K, K) matrix in client order.
        federation: who takes part when; lets `mira_published` check every round's subgraph before the first round.
            Without it the whole graph must be stable.

    Raises:
        ConfigError: strength beyond the stable bound, or a graph that needs what the data does not know.
        DataError: an unusable graph.
    """
    section = getattr(config, "graph", None)
    graph = None if section is None else resolve_graph(section, clients, given_graph)
    return METHODS[config.name](config, clients, graph, federation)
