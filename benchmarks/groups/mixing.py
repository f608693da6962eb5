"""The server's mixing against copying the same bytes: in memory, and of an arena file on disk.

Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks.gate import UnequalError
from benchmarks.options import Options
from benchmarks.results import Row, Section
from benchmarks.timing import interleave
from fedmira.federation.graph import Graph, laplacian, validated
from fedmira.federation.mixing import laplacian_explicit
from fedmira.federation.multiply import multiply_sparse, sparse
from fedmira.randomness import generator, torch_generator
from fedmira.types import Arena, Layout, TensorSpec

NEIGHBOURS = 10
TAU = 0.02
COPY, MIX = "copying the same bytes", "mixing"
COPY_ANEW, MIX_ANEW = "copying into new memory", "mixing into new memory"
SHARE_OF_COPY = "share of the copy rate"
_TOLERANCE = 1e-5


def neighbours(num_clients: int) -> tuple[list[int], list[float]]:
    """How far away the neighbours of every client are, in both directions, and the weights of these edges.

    Distances are drawn at random, so that neighbours are not near each other in memory.
    """
    rng = generator(0, "benchmark graph", num_clients)
    distances = 1 + rng.permutation((num_clients - 1) // 2)[: NEIGHBOURS // 2]
    return distances.tolist(), rng.uniform(0.5, 1.0, size=len(distances)).tolist()


def neighbour_graph(num_clients: int) -> Graph:
    """A graph in which every client has `NEIGHBOURS` neighbours."""
    adjacency_KK = np.zeros((num_clients, num_clients))
    here = np.arange(num_clients)
    for distance, weight in zip(*neighbours(num_clients), strict=True):
        there = (here + distance) % num_clients
        adjacency_KK[here, there] = adjacency_KK[there, here] = weight
    return validated(adjacency_KK, num_clients, "benchmark")


def one_tensor_layout(num_parameters: int) -> Layout:
    """An adapter that is one matrix."""
    return Layout((TensorSpec("all", "lora_a", "layer", (1, num_parameters), 0),))


def measure_mixing_in_memory(
    name: str, num_clients: int, num_parameters: int, options: Options, say: Callable[[str], None]
) -> Section:
    """Time the published step along a graph with ten neighbours against a copy of the same matrix.

    Both into memory that is there already, in the same number of threads, which is what the target means; and both
    into new memory, which is what a run does.
    """
    graph = neighbour_graph(num_clients)
    mixer = laplacian_explicit(graph, TAU)
    generator_ = torch_generator(0, "benchmark arena")
    values_KP = torch.empty(num_clients, num_parameters)
    for row_P in values_KP:
        row_P.uniform_(-1.0, 1.0, generator=generator_)
    values_KP = values_KP.to(options.device)
    arena = Arena(one_tensor_layout(num_parameters), values_KP)
    _check_mixing(mixer(arena).values_KP, graph, values_KP)
    target_KP = torch.zeros_like(values_KP)
    section = Section(
        name,
        f"{num_clients:,} clients x {num_parameters:,} parameters, float32, {NEIGHBOURS} neighbours, in memory",
    )
    matrix = sparse(np.eye(num_clients) - TAU * laplacian(graph))
    times = interleave(
        {
            MIX: lambda: multiply_sparse(matrix, values_KP, target_KP),
            COPY: lambda: _copy(values_KP, target_KP, options.threads),
            MIX_ANEW: lambda: mixer(arena),
            COPY_ANEW: values_KP.clone,
        },
        warm_up=options.warm_up + 1,
        repeats=options.repeats,
        device=options.device,
    )
    section.rows = [Row.timed(contestant, times[contestant]) for contestant in times]
    mix, copy = times[MIX].median, times[COPY].median
    section.measures[SHARE_OF_COPY] = copy / mix
    section.facts = {"bytes": 2.0 * values_KP.nbytes, "copy_bytes_per_second": 2.0 * values_KP.nbytes / copy}
    say(f"  mixing {mix:.3f} s, copying {copy:.3f} s")
    return section


def _copy(from_KP: torch.Tensor, to_KP: torch.Tensor, threads: int) -> None:
    """Copy in several threads; torch uses one for what lies in order."""
    if from_KP.device.type != "cpu":
        to_KP.copy_(from_KP)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(torch.Tensor.copy_, to_KP.chunk(threads), from_KP.chunk(threads)))


def _check_mixing(mixed_KP: torch.Tensor, graph: Graph, values_KP: torch.Tensor) -> None:
    """Compare a few columns with (I - tau L) Theta in float64."""
    columns = values_KP[:, :64].double().cpu().numpy()
    expected = columns - TAU * (laplacian(graph) @ columns)
    difference = float(np.abs(mixed_KP[:, :64].double().cpu().numpy() - expected).max())
    if not difference <= _TOLERANCE:
        raise UnequalError(f"mixing differs from (I - tau L) Theta by {difference:.1e}; allowed are {_TOLERANCE:.0e}")
