"""The server's mixing against copying the same bytes: in memory, and of an arena file on disk.

Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from benchmarks.gate import UnequalError
from benchmarks.options import Options
from benchmarks.results import Row, Section
from benchmarks.timing import interleave
from fedmira.federation.graph import Graph, laplacian, validated
from fedmira.federation.mixing import laplacian_explicit
from fedmira.federation.multiply import multiply_into
from fedmira.randomness import generator, torch_generator
from fedmira.types import Arena, Layout, TensorSpec

NEIGHBOURS = 10
TAU = 0.02
COPY, MIX = "copying the same bytes", "mixing"
COPY_ANEW, MIX_ANEW = "copying into new memory", "mixing into new memory"
IN_TASKS, SCATTERED = "mixing tasks in order", "mixing tasks in any order"
SHARE_OF_COPY = "share of the copy rate"
SHARE_IN_TASKS, SHARE_SCATTERED = f"{SHARE_OF_COPY}, tasks in order", f"{SHARE_OF_COPY}, tasks in any order"
_TOLERANCE = 1e-5


def edges(num_clients: int) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """The edges of a graph in which every client has `NEIGHBOURS` neighbours: clients here, there, and the weight.

    Each part has one edge from every client and one to it, at one distance on a circle, on which clients stand in any
    order: were they in order, each client's neighbours would be those of the client before shifted by one, and
    gathering would read as many streams as there are neighbours.
    """
    rng = generator(0, "benchmark graph", num_clients)
    distances = 1 + rng.permutation((num_clients - 1) // 2)[: NEIGHBOURS // 2]
    weights = rng.uniform(0.5, 1.0, size=len(distances))
    circle = rng.permutation(num_clients)
    return [
        (circle, np.roll(circle, -distance), float(weight)) for distance, weight in zip(distances, weights, strict=True)
    ]


def neighbour_graph(num_clients: int) -> Graph:
    """A graph in which every client has `NEIGHBOURS` neighbours."""
    adjacency_KK = np.zeros((num_clients, num_clients))
    for here, there, weight in edges(num_clients):
        adjacency_KK[here, there] = adjacency_KK[there, here] = weight
    return validated(adjacency_KK, num_clients, "benchmark")


def task_graph(num_clients: int, *, in_order: bool) -> Graph:
    """A graph of tasks whose clients all are neighbours of one another: `NEIGHBOURS` each, fewer in the last task.

    Args:
        num_clients: number of clients.
        in_order: whether the clients of a task follow one another, or lie anywhere.
    """
    rng = generator(0, "benchmark tasks", num_clients)
    numbers_K = np.arange(num_clients) if in_order else rng.permutation(num_clients)
    task_K = numbers_K // (NEIGHBOURS + 1)
    adjacency_KK = rng.uniform(0.5, 1.0, size=(num_clients, num_clients)) * (task_K[:, None] == task_K)
    np.fill_diagonal(adjacency_KK, 0.0)
    return validated(np.maximum(adjacency_KK, adjacency_KK.T), num_clients, "benchmark")


def one_tensor_layout(num_parameters: int) -> Layout:
    """An adapter that is one matrix."""
    return Layout((TensorSpec("all", "lora_a", "layer", (1, num_parameters), 0),))


def measure_mixing_in_memory(
    name: str, num_clients: int, num_parameters: int, options: Options, say: Callable[[str], None]
) -> Section:
    """Time the published step along graphs with ten neighbours against a copy of the same matrix.

    All into memory that is there already, in the same number of threads, which is what the target means; the first
    graph and a copy also into new memory, which is what a run does.
    """
    generator_ = torch_generator(0, "benchmark arena")
    values_KP = torch.empty(num_clients, num_parameters)
    for row_P in values_KP:
        row_P.uniform_(-1.0, 1.0, generator=generator_)
    values_KP = values_KP.to(options.device)
    arena = Arena(one_tensor_layout(num_parameters), values_KP)
    target_KP = torch.zeros_like(values_KP)
    graphs = {
        MIX: neighbour_graph(num_clients),
        IN_TASKS: task_graph(num_clients, in_order=True),
        SCATTERED: task_graph(num_clients, in_order=False),
    }
    mixers = {contestant: laplacian_explicit(graph, TAU) for contestant, graph in graphs.items()}
    for contestant, graph in graphs.items():
        _check_mixing(mixers[contestant](arena).values_KP, graph, values_KP)
    steps = {contestant: np.eye(num_clients) - TAU * laplacian(graph) for contestant, graph in graphs.items()}
    times = interleave(
        {mixing: partial(multiply_into, matrix_KK, values_KP, target_KP) for mixing, matrix_KK in steps.items()}
        | {
            COPY: lambda: _copy(values_KP, target_KP, options.threads),
            MIX_ANEW: partial(mixers[MIX], arena),
            COPY_ANEW: values_KP.clone,
        },
        warm_up=options.warm_up + 1,
        repeats=options.repeats,
        device=options.device,
    )
    section = Section(
        name,
        f"{num_clients:,} clients x {num_parameters:,} parameters, float32, in memory; {NEIGHBOURS} neighbours of each "
        "client anywhere, or in tasks",
    )
    section.rows = [Row.timed(contestant, times[contestant]) for contestant in times]
    copy = times[COPY].median
    for mixing, share in ((MIX, SHARE_OF_COPY), (IN_TASKS, SHARE_IN_TASKS), (SCATTERED, SHARE_SCATTERED)):
        section.measures[share] = copy / times[mixing].median
    section.facts = {"bytes": 2.0 * values_KP.nbytes, "copy_bytes_per_second": 2.0 * values_KP.nbytes / copy}
    say("  " + ", ".join(f"{contestant} {times[contestant].median:.3f} s" for contestant in (*graphs, COPY)))
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
