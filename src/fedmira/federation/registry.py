"""The federated algorithms by name. Adding one: a module with `build`, a config class, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from fedmira.config.graph import KNOWN_GRAPHS
from fedmira.config.method import MethodConfig
from fedmira.config.training import FederationConfig
from fedmira.errors import ConfigError
from fedmira.federation.asked_graphs import asking
from fedmira.federation.choosing import KEPT
from fedmira.federation.diagnostics import diagnosed
from fedmira.federation.graph import Graph, Matrix
from fedmira.federation.known_graphs import resolve_graph
from fedmira.federation.learned_graphs import learner
from fedmira.federation.method import Method
from fedmira.federation.methods import (
    centralised,
    ditto,
    fed_alora,
    fedadam,
    fedalt,
    fedamp,
    feddpa,
    fedex_lora,
    fedit,
    fedit_finetuned,
    fedkseed,
    fedlease,
    fedprox,
    fedsa_lora,
    fedtreelora,
    fedu,
    ffa_lora,
    flexlora,
    flora,
    florist,
    hetlora,
    ifca,
    local_only,
    mira,
    mira_published,
    mr_mtl,
    oracle_clusters,
    pcl,
    pfedgraph,
    rolora,
)
from fedmira.federation.ranks import within_ranks
from fedmira.federation.taking_home import over_rounds
from fedmira.types import Clients

Builder: TypeAlias = Callable[[Any, Clients, Graph | None, FederationConfig], Method]


def known(graph: Graph | None) -> Graph:
    """Return a graph that is known before the first round; the config refuses all others."""
    if graph is None:
        raise ConfigError(f"this method needs method.graph.kind = {' or '.join(KNOWN_GRAPHS)}")
    return graph


METHODS: Mapping[str, Builder] = {
    "local_only": lambda config, clients, graph, federation: local_only.build(),
    "fedit": lambda config, clients, graph, federation: fedit.build(clients),
    "mira_published": mira_published.build,
    "mira": lambda config, clients, graph, federation: mira.build(config, clients, graph),
    "fedit_finetuned": lambda config, clients, graph, federation: fedit_finetuned.build(config, clients, federation),
    "ditto": lambda config, clients, graph, federation: ditto.build(config, clients),
    "mr_mtl": lambda config, clients, graph, federation: mr_mtl.build(config),
    "fedsa_lora": lambda config, clients, graph, federation: fedsa_lora.build(clients),
    "fed_alora": lambda config, clients, graph, federation: fed_alora.build(clients),
    "feddpa": lambda config, clients, graph, federation: feddpa.build(clients),
    "fedalt": lambda config, clients, graph, federation: fedalt.build(config),
    "fedamp": lambda config, clients, graph, federation: fedamp.build(config, clients),
    "pfedgraph": lambda config, clients, graph, federation: pfedgraph.build(config, clients),
    "ifca": lambda config, clients, graph, federation: ifca.build(config, clients),
    "fedlease": lambda config, clients, graph, federation: fedlease.build(config, clients),
    "fedtreelora": lambda config, clients, graph, federation: fedtreelora.build(config, clients),
    "pcl": lambda config, clients, graph, federation: pcl.build(config, clients),
    "fedu": lambda config, clients, graph, federation: fedu.build(config, clients, known(graph)),
    "oracle_clusters": lambda config, clients, graph, federation: oracle_clusters.build(clients, known(graph)),
    "fedprox": lambda config, clients, graph, federation: fedprox.build(config, clients),
    "ffa_lora": lambda config, clients, graph, federation: ffa_lora.build(clients),
    "rolora": lambda config, clients, graph, federation: rolora.build(clients),
    "fedadam": lambda config, clients, graph, federation: fedadam.build(config, clients),
    "fedkseed": lambda config, clients, graph, federation: fedkseed.build(config, clients),
    "flexlora": lambda config, clients, graph, federation: flexlora.build(config, clients),
    "hetlora": lambda config, clients, graph, federation: hetlora.build(clients),
    "fedex_lora": lambda config, clients, graph, federation: fedex_lora.build(clients),
    "flora": lambda config, clients, graph, federation: flora.build(clients),
    "florist": lambda config, clients, graph, federation: florist.build(clients, config.energy),
    "centralised": lambda config, clients, graph, federation: centralised.build(),
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
        given_graph: with `method.graph.kind: given`, the (K, K) matrix in client order; with `embeddings`, the (K, K)
            inner products of the clients' prompt embeddings.
        federation: who takes part when; lets `mira_published` check every round's subgraph before the first round.
            Without it everybody may take part, in the default number of rounds.

    Raises:
        ConfigError: strength beyond the stable bound, or a graph that needs what the data does not know.
        DataError: an unusable graph.
    """
    section = getattr(config, "graph", None)
    graph = None if section is None else resolve_graph(section, clients, given_graph)
    method = METHODS[config.name](config, clients, graph, federation or FederationConfig())
    # innermost, so that the average is of what clients keep before ranks cut it and diagnostics look at it
    choice = getattr(config, "choice", None)
    judged = KEPT if choice is not None and choice.enabled and choice.average else ()
    method = over_rounds(method, config.ema_decay, judged)
    if clients.ranks_K is not None:
        method = within_ranks(method, clients.ranks_K, pooled=config.pools_examples)
    if section is None:
        return diagnosed(method, clients, remembers=config.shows_new_graphs)
    if graph is None:
        method = asking(method, learner(section, clients))
    strength = getattr(config, "strength", None)
    tau = None if strength is None or isinstance(strength, str) else strength * getattr(config, "server_lr", 1.0)
    return diagnosed(method, clients, tau)
