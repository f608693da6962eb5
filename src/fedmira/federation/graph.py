"""The relation between clients: a weighted undirected graph with a name and a provenance, and what is computed from it.

Knows nothing about adapters beyond rows of numbers, and reads no files. Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fedmira.errors import DataError, nearest
from fedmira.federation.multiply import components, over_tiles, times

Matrix: TypeAlias = npt.NDArray[np.float64]
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """Weighted undirected relation between the K clients, in the row order of the arena."""

    adjacency_KK: Matrix
    """a_kl of the paper: float64, symmetric, non-negative, zero diagonal, read-only."""
    name: str
    """Kind of graph: `labels`, `gram`, ..."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able: where it comes from, and what the server learns by it."""
    by_layer: Mapping[str, Matrix] = field(default_factory=dict)
    """The adjacency of each adapted layer, where they differ; layers that share one hold the same array, and
    `adjacency_KK` is the mean over layers. Empty: `adjacency_KK` is that of every layer."""

    @property
    def num_clients(self) -> int:
        return int(self.adjacency_KK.shape[0])

    @property
    def num_edges(self) -> int:
        """Pairs of clients with a positive weight."""
        return int(np.count_nonzero(self.adjacency_KK)) // 2


PRIVACY: Mapping[str, str] = {
    "gram": "The server compares the adapters it gets anyway; the graph says whose updates are alike.",
    "gram_layers": "The server compares the adapters it gets anyway; the graphs say whose updates are alike at which "
    "depth.",
    "pfedgraph": "The server compares the adapters it gets anyway, and uses how many examples each client holds.",
    "kalofolias": "The server compares the adapters it gets anyway; the graph says whose updates are alike.",
    "mtrl": "The server compares the adapters it gets anyway; the graph says whose updates are alike.",
    "clusters": "The server compares the adapters it gets anyway; the graph says who belongs together.",
    "trust": "Clients get adapters of others, from which training data may be read out, and tell the server how well "
    "each of them does on their validation examples.",
    "probe": "The server runs the adapters it gets anyway on texts of its own; the graph says whose answers are alike.",
    "embeddings": "Before round 1 every client sends the mean hidden state of its training prompts, which says what "
    "they are about, to a reader of embeddings nearly in words.",
    "labels": "Every client tells the server its task label.",
    "given": "Nothing is learned from clients; whoever wrote the file knew who is related.",
    "uniform": "Nothing: everybody is joined with everybody.",
    "random": "Nothing: the weights are drawn from the seed.",
    "true": "The graph the data was made from, which no server knows in earnest.",
    "permuted": "The graph the data was made from, shuffled, which no server knows in earnest.",
}
"""What the server, or another client, learns for the sake of each kind of graph."""


def explained(graph: Graph) -> Graph:
    """Return the graph with its privacy note in the provenance."""
    return replace(graph, provenance={**graph.provenance, "privacy": PRIVACY[graph.name]})


# ------------------------------------------------------------------------------------------------------------ checking


def validated(
    adjacency: npt.ArrayLike, num_clients: int, name: str, provenance: Mapping[str, Any] | None = None
) -> Graph:
    """Return `adjacency` as a `Graph` over `num_clients` clients.

    Weights on the diagonal cancel in L = D - M; they are dropped and counted in the provenance. So are edges that both
    of their clients would not notice, below 1e-12 of either's degree: they join groups in name only, and no step could
    be computed along them. An asymmetry below 1e-9 of the largest weight is rounding and is averaged away.

    Raises:
        DataError: not a (K, K) matrix of numbers; NaN, infinite, negative or asymmetric weights.
    """
    expected = f"expected {num_clients} x {num_clients}, a row and a column per client"
    try:
        matrix = np.array(adjacency, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"graph {name!r}: not a matrix of numbers ({error}); {expected}") from error
    if matrix.shape != (num_clients, num_clients):
        raise DataError(f"graph {name!r}: its shape is {matrix.shape}; {expected}, in the order of the clients")
    _refuse_where(~np.isfinite(matrix), matrix, name, "not finite; write 0 where there is no edge")
    _refuse_where(matrix < 0, matrix, name, "negative; weights say how related two clients are and start at 0")
    largest = float(matrix.max(initial=0.0))
    gap = np.abs(matrix - matrix.T)
    if gap.max(initial=0.0) > 1e-9 * largest:
        row, column = np.unravel_index(int(gap.argmax()), gap.shape)
        raise DataError(
            f"graph {name!r} is not symmetric: weight ({row}, {column}) is {matrix[row, column]:g} but "
            f"({column}, {row}) is {matrix[column, row]:g}; store the mean of the two, for example"
        )
    details = dict(provenance or {})
    if np.any(np.diagonal(matrix)):
        details["self_edges_dropped"] = int(np.count_nonzero(np.diagonal(matrix)))
        np.fill_diagonal(matrix, 0.0)
    matrix = (matrix + matrix.T) / 2
    degree_K = matrix.sum(axis=1)
    negligible_KK = (matrix > 0) & (matrix < _NEGLIGIBLE * np.minimum(degree_K[:, None], degree_K[None, :]))
    if negligible_KK.any():
        details["negligible_edges_dropped"] = int(negligible_KK.sum()) // 2
        matrix[negligible_KK] = 0.0
    matrix.setflags(write=False)
    return Graph(matrix, name, details)


def _refuse_where(bad_KK: npt.NDArray[np.bool_], matrix: Matrix, name: str, what: str) -> None:
    if bad_KK.any():
        row, column = np.argwhere(bad_KK)[0]
        raise DataError(
            f"graph {name!r}: {int(bad_KK.sum())} of {matrix.size} weights are wrong; the first, "
            f"({row}, {column}), is {matrix[row, column]:g}: {what}"
        )


def from_matrix(matrix: npt.ArrayLike, names: Sequence[str] | None, client_names: Sequence[str]) -> Matrix:
    """Return a given adjacency, checked, in client order; `names` label its rows, None: they are in client order.

    Raises:
        DataError: a client is missing in `names`, a name is unknown or doubled, or the matrix is bad (`validated`).
    """
    if names is None:
        return validated(matrix, len(client_names), "given").adjacency_KK
    # some systems part letters from their accents, and the clients' names do not
    names = [unicodedata.normalize("NFC", name) for name in names]
    known, place = set(client_names), {name: number for number, name in enumerate(names)}
    doubled = sorted(name for name, count in Counter(names).items() if count > 1)
    unknown = [name for name in names if name not in known]
    missing = [name for name in client_names if name not in place]
    if doubled:
        raise DataError(f"graph 'given': the names {doubled} appear more than once; each client has one row")
    if unknown or missing:
        hint = nearest(unknown[0], client_names) if unknown else ""
        raise DataError(
            f"graph 'given': its names are not the clients' names: unknown {unknown[:5]}{hint}, missing {missing[:5]}; "
            f"it needs exactly the {len(client_names)} clients, such as {list(client_names)[:3]}"
        )
    order = [place[name] for name in client_names]
    return validated(matrix, len(names), "given").adjacency_KK[np.ix_(order, order)]


# -------------------------------------------------------------------------------------------- what follows from it


def parts(graph: Graph) -> tuple[tuple[Graph, tuple[str, ...]], ...]:
    """Return each distinct graph of a graph by layer, with the layers that share it; else the graph, with no layers."""
    if not graph.by_layer:
        return ((graph, ()),)
    sharing: dict[int, list[str]] = {}
    for layer, adjacency_KK in graph.by_layer.items():
        sharing.setdefault(id(adjacency_KK), []).append(layer)
    return tuple(
        (Graph(graph.by_layer[layers[0]], graph.name, graph.provenance), tuple(layers)) for layers in sharing.values()
    )


def degrees(graph: Graph) -> Matrix:
    """Return delta_k = sum_l a_kl, (K,)."""
    return np.asarray(graph.adjacency_KK.sum(axis=1))


def laplacian(graph: Graph) -> Matrix:
    """Return L = D - M, (K, K).

    >>> laplacian(validated([[0, 2], [2, 0]], 2, "given")).tolist()
    [[2.0, -2.0], [-2.0, 2.0]]
    """
    return np.asarray(np.diag(degrees(graph)) - graph.adjacency_KK)


def largest_eigenvalue(graph: Graph) -> float:
    """Return the largest eigenvalue of L; at most twice the largest degree. 0 without edges."""
    if not graph.num_edges:
        return 0.0
    return float(np.linalg.eigvalsh(laplacian(graph))[-1])


def subgraph(graph: Graph, ids: Sequence[int]) -> Graph:
    """Return the graph among the clients `ids` alone, in their order.

    Its largest Laplacian eigenvalue never exceeds the whole graph's (Cauchy interlacing).
    """
    block = np.ix_(list(ids), list(ids))

    def among(adjacency_KK: Matrix) -> Matrix:
        adjacency = adjacency_KK[block]
        adjacency.setflags(write=False)
        return adjacency

    by_layer: dict[str, Matrix] = {}
    for part, layers in parts(graph):
        by_layer |= dict.fromkeys(layers, among(part.adjacency_KK))
    return Graph(among(graph.adjacency_KK), graph.name, graph.provenance, by_layer)


def connected_components(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """Return the clients of each connected component, ascending; components ordered by their first client.

    >>> connected_components(validated([[0, 0, 1], [0, 0, 0], [1, 0, 0]], 3, "given"))
    ((0, 2), (1,))
    """
    linked_KK = graph.adjacency_KK + np.eye(graph.num_clients)
    return tuple(tuple(component.rows.tolist()) for component in components(linked_KK))


def weight_inside(graph: Graph, labels: Sequence[str]) -> float:
    """Return the share of edge weight that joins clients of the same label, in 0 .. 1; 0 for a graph without edges.

    A client without a label, the empty string, has none in common with anybody.

    >>> weight_inside(validated([[0, 3, 1], [3, 0, 0], [1, 0, 0]], 3, "given"), ["a", "a", "b"])
    0.75
    """
    total = float(graph.adjacency_KK.sum())
    names_K = np.asarray(labels)
    same_KK = (names_K[:, None] == names_K[None, :]) & (names_K != "")
    return float(graph.adjacency_KK[same_KK].sum()) / total if total else 0.0


def disagreement(graph: Graph, values_KP: torch.Tensor) -> float:
    """Return tr(Theta^T L Theta) = 1/2 sum_kl a_kl ||theta_k - theta_l||^2, Eq. (3) of MIRA, computed in float64."""
    if not graph.num_edges:
        return 0.0
    laplacian_KK = laplacian(graph)
    others_KK = 1 - np.eye(graph.num_clients)
    if np.array_equal(graph.adjacency_KK, graph.adjacency_KK[0, 1] * others_KK):
        # everybody with everybody: L x = K a x for an x of mean 0
        laplacian_KK = laplacian_KK.trace() / (graph.num_clients - 1) * np.eye(graph.num_clients)
    apply_laplacian = times(laplacian_KK, values_KP.device)

    def of_tile(columns: slice) -> float:
        tile = values_KP[:, columns].double()
        # L ignores what all rows share; without it small differences of large numbers keep their digits
        tile = tile - tile.mean(dim=0)
        return float((apply_laplacian(tile) * tile).sum())

    return max(sum(over_tiles(of_tile, values_KP)), 0.0)
