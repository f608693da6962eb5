"""Small federations for the tests of the server: a layout, clients, initial adapters and a fake local training."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from fedmira.config import (
    FedITConfig,
    GraphConfig,
    LocalOnlyConfig,
    MethodConfig,
    MiraConfig,
    MiraPublishedConfig,
)
from fedmira.federation.method import Method, State
from fedmira.randomness import torch_generator
from fedmira.types import Arena, ClientReport, Clients, Job, Layout, Participants, Results, TensorSpec

LOCAL, FEDIT = LocalOnlyConfig(name="local_only"), FedITConfig(name="fedit")


def published(kind: str = "random", strength: float = 0.5, server_lr: float = 0.1) -> MiraPublishedConfig:
    return MiraPublishedConfig(
        name="mira_published", graph=GraphConfig(kind=kind), strength=strength, server_lr=server_lr
    )


def mira(kind: str = "gram", strength: float = 1.0, **graph: object) -> MiraConfig:
    path = "graph.npy" if kind == "given" else None
    return MiraConfig(graph=GraphConfig.model_validate({"kind": kind, "path": path, **graph}), strength=strength)


CONFIGS: dict[str, MethodConfig] = {
    "local_only": LOCAL,
    "fedit": FEDIT,
    **{f"mira_published-{kind}": published(kind) for kind in ("random", "labels", "gram")},
    **{f"mira-{kind}": mira(kind) for kind in ("gram", "labels", "uniform", "random", "true", "permuted", "given")},
    "mira-gram-memory": mira("gram", memory=0.5, warmup_rounds=1, neighbours=2, power=2.0),
}


def layout(rank: int = 2, scaling: float = 2.0, features: tuple[tuple[int, int], ...] = ((5, 4), (3, 6))) -> Layout:
    """Two layers of a LoRA adapter with different in and out features."""
    specs: list[TensorSpec] = []
    offset = 0
    for index, (num_inputs, num_outputs) in enumerate(features):
        for group, shape in (("lora_a", (rank, num_inputs)), ("lora_b", (num_outputs, rank))):
            specs.append(TensorSpec(f"layer{index}.{group}", group, f"layer{index}", shape, offset))
            offset += specs[-1].size
    return Layout(tuple(specs), scaling)


def clients(num_clients: int = 6, seed: int = 0) -> Clients:
    """Clients of unequal size in two or more families; the true graph joins the families."""
    tasks = tuple("ab"[k % 2] for k in range(num_clients))
    same = np.array([[one == other for other in tasks] for one in tasks], dtype=np.float64)
    return Clients(
        names=tuple(f"client-{k}" for k in range(num_clients)),
        num_examples_K=tuple(3 + 2 * (k % 4) for k in range(num_clients)),
        tasks=tasks,
        seed=seed,
        true_adjacency_KK=same - np.eye(num_clients),
    )


def given_graph(num_clients: int = 6) -> np.ndarray:
    """A weighted path through the clients, without the last one."""
    adjacency = np.zeros((num_clients, num_clients))
    for k in range(num_clients - 2):
        adjacency[k, k + 1] = adjacency[k + 1, k] = 0.5 + k
    return adjacency


def initial(num_clients: int = 6, dtype: torch.dtype = torch.float32, of: Layout | None = None) -> Arena:
    """As a run starts: A drawn once for everybody, B zero."""
    of = of or layout()
    row = torch.randn(of.num_parameters, generator=torch_generator(1, "initial"), dtype=torch.float64)
    for part in of.slices("lora_b"):
        row[part] = 0.0
    return Arena(of, row.to(dtype).expand(num_clients, -1).clone())


def trained(job: Job, names: tuple[str, ...], failed: Collection[int] = ()) -> Results:
    """Stand-in for local training: each client moves by a step that depends on its name and the round alone."""
    ids = tuple(id_ for id_ in job.ids if id_ not in failed)
    rows = [job.start_SP[job.ids.index(id_)] + step(names[id_], job.round, job.start_SP[0]) for id_ in ids]
    return Results(
        ids=ids,
        values_SP=torch.stack(rows) if rows else job.start_SP[:0],
        reports=tuple(ClientReport(k, 3, 1, 1.0, 1, 1, "lost" if k in failed else "") for k in job.ids),
        upload_bytes=0,
        download_bytes=0,
        train_seconds=0.0,
        peak_memory_bytes=0,
    )


def step(name: str, round_: int, like: torch.Tensor) -> torch.Tensor:
    """Half from the client's own data, and as much again as the clients of its pair (0 and 1, 2 and 3, ...) see."""
    pair = int("".join(filter(str.isdigit, name))) // 2

    def draw(*purpose: str | int) -> torch.Tensor:
        return torch.randn(len(like), generator=torch_generator(2, *purpose), dtype=torch.float64)

    return ((draw(name, round_) + draw("pair", pair, round_)) / 2**0.5).to(like.dtype)


def play(method: Method, state: State, names: tuple[str, ...], rounds: list[tuple[int, ...]], first: int = 1) -> State:
    """Carry out rounds with the given participants."""
    for round_, ids in enumerate(rounds, start=first):
        participants = Participants(round_, ids)
        state, _ = method.merge(state, participants, trained(method.plan(state, participants), names))
    return state


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal shape, dtype and bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
