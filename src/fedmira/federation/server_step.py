"""The implicit step with all that can be chosen about it: the form that is mixed, and whom to distrust.

Knows nothing about rounds, who takes part, or where graph and confidences come from. Axes: K clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from fedmira.config.mira import MiraConfig
from fedmira.federation.forms import Form, form
from fedmira.federation.graph import Graph, Matrix
from fedmira.federation.mixing import laplacian_implicit, step_numbers, welcomed
from fedmira.federation.robust import ROBUST, heard
from fedmira.types import Arena, Clients


class Mixture(NamedTuple):
    """What one step made of the uploads."""

    adapters: Arena
    numbers: Callable[[], dict[str, float]]
    """What people look at, see `mixing.step_numbers`."""


class ServerStep(NamedTuple):
    """The step of one config."""

    form: Form
    mixtures: Callable[[Graph, Arena, Sequence[float]], Callable[[float], Mixture]]
    """From the graph, the uploads and the clients' confidences to the mixture of each strength."""


def server_step(config: MiraConfig, clients: Clients) -> ServerStep:
    """Return the step that `config` describes, for clients of the given ranks."""
    mixed_as = form(config.mixing, clients.ranks_K)
    ranks_K = clients.ranks_K or (1,) * len(clients.names)
    effort_K = [n * rank for n, rank in zip(clients.num_examples_K, ranks_K, strict=True)]

    def mixtures(graph: Graph, uploads: Arena, confidence_K: Sequence[float]) -> Callable[[float], Mixture]:
        trusting = ROBUST.get(config.robust)
        distances = cache(lambda: mixed_as.distances(uploads))
        unheard: set[int] = set()

        def trusted(matrix_KK: Matrix) -> Matrix:
            if trusting is None:
                return matrix_KK
            revised_KK = trusting(matrix_KK, distances(), effort_K)
            unheard.update(set(heard(matrix_KK)) - set(heard(revised_KK)))
            return revised_KK

        def of_strength(tau: float) -> Mixture:
            def revised(part: Graph, matrix_KK: Matrix) -> Matrix:
                return trusted(welcomed(matrix_KK, part, confidence_K) if tau > 0 else matrix_KK)

            on_rows = laplacian_implicit(graph, tau, confidence_K, revised)
            mixed = mixed_as.of(on_rows)(uploads)

            def numbers() -> dict[str, float]:
                told = {} if trusting is None else {"unheard": float(len(unheard))}
                return {**step_numbers(graph, on_rows, uploads, mixed, mixed_as.energy), **told}

            return Mixture(mixed, numbers)

        return of_strength

    return ServerStep(mixed_as, mixtures)
