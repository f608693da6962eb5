"""What the optimizers of clients remember from one of their rounds to the next, turned with the factors.

Between a client's rounds the server may hand back another pair of factors with nearly the same product: (B R, R^T A)
for a rotation R. Moments belong to the factors they were gathered on, so they are turned by the rotation that brings
where the client ended nearest to where it starts: the minimiser of |B R - B'|^2 + |R^T A - A'|^2, which is U V^T of the
decomposition of B^T B' + A A'^T (orthogonal Procrustes). Mean gradients turn as the factors do; mean squares turn with
the squares of R, which is exact if the gradients of the r components are uncorrelated.

All of it stays with the clients: nothing crosses. Knows nothing about the server or about how steps are made.

Axes: K clients, C clients of a cohort, P parameters of one adapter, R rank, I/O in and out features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fedmira.config.training import TrainingConfig
from fedmira.training.optimizers import Moments, fresh_moments
from fedmira.types import Layout, TensorSpec

_PREFIX = "moments"


class Place(NamedTuple):
    """Which memory a row of a job has."""

    client: int
    block: int
    """How many earlier rows of the job are the same client's."""


class Continuity:
    """The memory of all clients; plain tensors, so that a checkpoint can keep it."""

    def __init__(self, layout: Layout, num_clients: int, training: TrainingConfig) -> None:
        self._layout, self._num_clients, self._training = layout, num_clients, training
        self._tensors: dict[str, torch.Tensor] = {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """`moments.B.first`, `second` and `ended`, (K, P), and `steps`, (K,), of the B-th row of each client."""
        return dict(self._tensors)

    @staticmethod
    def parted(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What `tensors` returned and everything else, from a mapping that holds both."""
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{_PREFIX}.")}
        return mine, {name: tensor for name, tensor in tensors.items() if name not in mine}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `tensors` returned; clients that joined since, which are the last, remember nothing."""
        self._tensors = {
            name: torch.cat([rows, rows.new_zeros((self._num_clients - len(rows), *rows.shape[1:]))])
            for name, rows in tensors.items()
        }

    def begin(self, places: Sequence[Place], start_CP: torch.Tensor) -> Moments:
        """The moments with which clients begin at `start_CP`; fresh ones for those that never ended a round."""
        moments = fresh_moments(self._training, start_CP)
        for row, place in enumerate(places):
            steps_K = self._tensors.get(f"{_PREFIX}.{place.block}.steps")
            if steps_K is None or not steps_K[place.client]:
                continue
            first_P, second_P, ended_P = (
                self._tensors[f"{_PREFIX}.{place.block}.{name}"][place.client].to(start_CP)
                for name in ("first", "second", "ended")
            )
            turned = turn(self._layout, ended_P, start_CP[row], first_P, second_P)
            moments.first_CP[row], moments.second_CP[row] = turned
            moments.steps_C[row] = steps_K[place.client]
        return moments

    def end(self, places: Sequence[Place], values_CP: torch.Tensor, moments: Moments, finished: Sequence[bool]) -> None:
        """Remember how the clients that `finished` ended; the others keep what they had."""
        for row, place in enumerate(places):
            if not finished[row]:
                continue
            of_row = {
                "first": moments.first_CP[row],
                "second": moments.second_CP[row],
                "ended": values_CP[row],
                "steps": moments.steps_C[row],
            }
            for name, tensor in of_row.items():
                key = f"{_PREFIX}.{place.block}.{name}"
                if key not in self._tensors:
                    self._tensors[key] = tensor.new_zeros((self._num_clients, *tensor.shape))
                self._tensors[key] = self._tensors[key].to(tensor.device)
                self._tensors[key][place.client] = tensor

    def forget(self, places: Sequence[Place]) -> None:
        """Let these begin afresh: what led to an upload that was rejected is not to be trusted either."""
        for place in places:
            steps_K = self._tensors.get(f"{_PREFIX}.{place.block}.steps")
            if steps_K is not None:
                steps_K[place.client] = 0


def turn(
    layout: Layout, ended_P: torch.Tensor, start_P: torch.Tensor, first_P: torch.Tensor, second_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the moments of a client that ended at `ended_P` and goes on from `start_P`.

    Each pair is turned by its own rotation; tensors that are no low-rank factors keep theirs. Equal adapters keep
    every bit.

    Args:
        layout: of the adapter.
        ended_P: where its last round ended.
        start_P: what the server handed out.
        first_P: means of gradients; may have no columns.
        second_P: means of squared gradients; may have no columns.
    """
    first_P, second_P = first_P.clone(), second_P.clone()
    if torch.equal(ended_P, start_P):
        return first_P, second_P
    for spec_a, spec_b in layout.pairs:
        (a_RI, b_OR), (to_a_RI, to_b_OR) = (
            (_seen(row_P, spec_a).double(), _seen(row_P, spec_b).double()) for row_P in (ended_P, start_P)
        )
        if torch.equal(a_RI, to_a_RI) or torch.equal(b_OR, to_b_OR):
            # one factor rested, so nothing was turned: what is new about the other is another product
            continue
        u, _, v = torch.linalg.svd(b_OR.T @ to_b_OR + a_RI @ to_a_RI.T)
        rotation_RR = u @ v
        for moment_P, by_RR in ((first_P, rotation_RR), (second_P, rotation_RR.square())):
            if len(moment_P):
                moment_a_RI, moment_b_OR = _seen(moment_P, spec_a), _seen(moment_P, spec_b)
                moment_a_RI.copy_(by_RR.T @ moment_a_RI.double())
                moment_b_OR.copy_(moment_b_OR.double() @ by_RR)
    return first_P, second_P


def _seen(row_P: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return row_P[spec.columns].view(spec.shape)
