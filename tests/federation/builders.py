"""Small federations for the tests of the server: a layout, clients, initial adapters and a fake local training."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from fedmira.config.graph import GraphConfig
from fedmira.config.method import (
    CentralisedConfig,
    DittoConfig,
    FedAdamConfig,
    FedALoRAConfig,
    FedALTConfig,
    FedAMPConfig,
    FedDPAConfig,
    FedExLoraConfig,
    FedITConfig,
    FedITFinetunedConfig,
    FedKSeedConfig,
    FedLEASEConfig,
    FedProxConfig,
    FedSALoRAConfig,
    FedTreeLoRAConfig,
    FedUConfig,
    FfaLoraConfig,
    FlexLoraConfig,
    FloraConfig,
    FloristConfig,
    HetLoraConfig,
    IFCAConfig,
    LocalOnlyConfig,
    MethodConfig,
    MrMtlConfig,
    OracleClustersConfig,
    PCLConfig,
    PFedGraphConfig,
    RoLoraConfig,
)
from fedmira.config.mira import ChoiceConfig, MiraConfig, MiraPublishedConfig
from fedmira.federation.method import Info, Method, State
from fedmira.federation.registry import build_method
from fedmira.randomness import torch_generator
from fedmira.types import (
    Arena,
    ClientReport,
    Clients,
    Job,
    Layout,
    Losses,
    Participants,
    Results,
    TensorSpec,
    Trial,
)

ROUNDS = [(0, 1, 3), (1, 2, 4), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5), (5,)]
"""Who takes part in the rounds of a test."""
LOCAL, FEDIT = LocalOnlyConfig(name="local_only"), FedITConfig(name="fedit")


def published(kind: str = "random", strength: float = 0.5, server_lr: float = 0.1) -> MiraPublishedConfig:
    return MiraPublishedConfig(name="mira_published", graph=graph_section(kind), strength=strength, server_lr=server_lr)


def graph_section(kind: str, **settings: object) -> GraphConfig:
    """A graph section; one that is learned is used from the first round on."""
    path = "graph.npy" if kind == "given" else None
    first = {"settled": 0} if GraphConfig(kind=kind, path=path).uses("settled") else {}
    return GraphConfig.model_validate({"kind": kind, "path": path, **first, **settings})


def mira(kind: str = "gram", strength: float = 1.0, **settings: object) -> MiraConfig:
    """Without choice and average: everybody takes all of the last mixture."""
    taken = ChoiceConfig(enabled=False)
    return MiraConfig(graph=graph_section(kind, **settings), strength=strength, choice=taken, ema_decay=0.0)


def mira_with(kind: str = "gram", **settings: object) -> MiraConfig:
    """With settings of its own, without choice and average unless they say so."""
    first = {"graph": graph_section(kind), "strength": 1.0, "choice": {"enabled": False}, "ema_decay": 0.0}
    return MiraConfig.model_validate({**first, **settings})


CONFIGS: dict[str, MethodConfig] = {
    "local_only": LOCAL,
    "fedit": FEDIT,
    **{f"mira_published-{kind}": published(kind) for kind in ("random", "labels", "gram")},
    **{f"mira-{kind}": mira(kind) for kind in ("gram", "labels", "uniform", "random", "true", "permuted", "given")},
    **{f"mira-{kind}": mira(kind) for kind in ("gram_layers", "pfedgraph", "kalofolias", "mtrl", "clusters")},
    **{f"mira-{kind}": mira(kind) for kind in ("trust", "probe", "embeddings")},
    "mira_published-trust": published("trust"),
    "mira-gram-choice": mira_with(choice={"enabled": True}),
    "mira-gram-average": MiraConfig(graph=graph_section("gram")),
    **{f"mira-{kind}-settling": mira(kind, settled=0.8) for kind in ("gram", "gram_layers", "trust", "probe")},
    "mira-gram-memory": mira("gram", memory=0.5, settled=0.5, neighbours=2, power=2.0),
    **{f"mira-gram-{mixing}": mira_with(mixing=mixing) for mixing in ("products", "least_squares", "shared_a")},
    "mira-gram_layers-products": mira_with("gram_layers", mixing="products", choice={"enabled": True}),
    **{f"mira-gram-{robust}": mira_with(robust=robust) for robust in ("clip", "krum", "geometric_median")},
    "mira-gram-products-krum": mira_with(mixing="products", robust="krum"),
    "mira-labels-depth": mira_with("labels", depth=0.5),
    "mira-gram_layers-depth": mira_with("gram_layers", depth=0.5, mixing="shared_a"),
    "mira-labels-auto": mira_with("labels", strength="auto"),
    "mira-gram_layers-auto": mira_with(
        "gram_layers", strength="auto", mixing="least_squares", choice={"enabled": True}
    ),
    "mira-trust-auto": mira_with(
        "trust", strength="auto", choice={"tolerance": 0.0, "every": 2}, depth=1.0, robust="clip"
    ),
    "fedprox": FedProxConfig(name="fedprox"),
    "ffa_lora": FfaLoraConfig(name="ffa_lora"),
    "rolora": RoLoraConfig(name="rolora"),
    "fedadam": FedAdamConfig(name="fedadam"),
    "fedadam-momentum": FedAdamConfig(name="fedadam", rule="momentum", server_lr=0.7),
    "fedkseed": FedKSeedConfig(name="fedkseed"),
    "flexlora": FlexLoraConfig(name="flexlora"),
    "flexlora-unaligned": FlexLoraConfig(name="flexlora", align=False),
    "hetlora": HetLoraConfig(name="hetlora"),
    "fedex_lora": FedExLoraConfig(name="fedex_lora"),
    "flora": FloraConfig(name="flora"),
    "florist": FloristConfig(name="florist"),
    "fedit_finetuned": FedITFinetunedConfig(name="fedit_finetuned", local_rounds=5),
    "ditto": DittoConfig(name="ditto"),
    "mr_mtl": MrMtlConfig(name="mr_mtl"),
    "fedsa_lora": FedSALoRAConfig(name="fedsa_lora"),
    "fed_alora": FedALoRAConfig(name="fed_alora"),
    "feddpa": FedDPAConfig(name="feddpa"),
    "fedalt": FedALTConfig(name="fedalt", own_weight=0.6),
    "fedamp": FedAMPConfig(name="fedamp"),
    "pfedgraph": PFedGraphConfig(name="pfedgraph"),
    "pfedgraph-average": PFedGraphConfig(name="pfedgraph", ema_decay=0.7),
    "pfedgraph-pull": PFedGraphConfig(name="pfedgraph", strength=2.0, pull=0.1),
    "ifca": IFCAConfig(name="ifca", models=2),
    "fedlease": FedLEASEConfig(name="fedlease", warmup_rounds=2),
    "fedtreelora": FedTreeLoRAConfig(name="fedtreelora", warmup_rounds=2),
    "pcl": PCLConfig(name="pcl"),
    "fedu-labels": FedUConfig(name="fedu", graph=GraphConfig(kind="labels"), server_lr=0.2),
    "oracle_clusters-labels": OracleClustersConfig(name="oracle_clusters"),
    "oracle_clusters-true": OracleClustersConfig(name="oracle_clusters", graph=GraphConfig(kind="true")),
    "centralised": CentralisedConfig(name="centralised"),
}


def layout(
    rank: int = 2,
    scaling: float = 2.0,
    features: tuple[tuple[int, int], ...] = ((5, 4), (3, 6)),
    num_pairs: int = 1,
) -> Layout:
    """Two layers of a LoRA adapter with different in and out features."""
    specs: list[TensorSpec] = []
    offset = 0
    for index, (num_inputs, num_outputs) in enumerate(features):
        for group_a, group_b in (("lora_a", "lora_b"), ("second_a", "second_b"))[:num_pairs]:
            for group, shape in ((group_a, (rank, num_inputs)), (group_b, (num_outputs, rank))):
                specs.append(TensorSpec(f"layer{index}.{group}", group, f"layer{index}", shape, offset))
                offset += specs[-1].size
    return Layout(tuple(specs), scaling)


def layout_for(config: MethodConfig) -> Layout:
    """The layout that a method asks for."""
    return layout(num_pairs=config.num_pairs)


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


def handed_over(kind: str | None, num_clients: int = 6) -> np.ndarray | None:
    """The matrix that a graph of `kind` is made from, for kinds that need one."""
    if kind == "embeddings":
        # clients 0 and 1, 2 and 3, ... hold like prompts, and all share a template
        pairs = np.kron(np.eye(-(-num_clients // 2)), np.ones((2, 2)))[:num_clients, :num_clients]
        return 5.0 + pairs + 0.3 * np.eye(num_clients)
    return given_graph(num_clients) if kind == "given" else None


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
    for part in (*of.slices("lora_b"), *of.slices("second_b")):
        row[part] = 0.0
    return Arena(of, row.to(dtype).expand(num_clients, -1).clone())


def trained(job: Job, names: tuple[str, ...], failed: Collection[int] = ()) -> Results:
    """Stand-in for local training: each client moves by a step that depends on its name and the round alone."""
    returned = [s for s, id_ in enumerate(job.ids) if id_ not in failed]
    moving_P = _moving(job)
    steps = [job.work * step(names[job.ids[s]], job.round, job.start_SP[0]) * moving_P for s in returned]
    if job.pooled:
        steps = [torch.stack(steps).mean(dim=0)] * len(steps) if steps else []
    rows = [job.start_SP[s] + moved_P for s, moved_P in zip(returned, steps, strict=True)]
    return Results(
        ids=tuple(job.ids[s] for s in returned),
        values_SP=torch.stack(rows) if rows else job.start_SP[:0],
        reports=tuple(ClientReport(k, 3, 1, 1.0, 1, 1, "lost" if k in failed else "") for k in job.ids),
        upload_bytes=0,
        download_bytes=0,
        train_seconds=0.0,
    )


def _moving(job: Job) -> torch.Tensor:
    """1 in the columns that the job trains, 0 in the others."""
    known = (layout(num_pairs=pairs) for pairs in (1, 2))
    of = next((one for one in known if one.num_parameters == job.start_SP.shape[1]), None)
    if of is None:
        return torch.ones_like(job.start_SP[0])
    moving_P = torch.zeros_like(job.start_SP[0])
    for group in job.trainable:
        for part in of.slices(group):
            moving_P[part] = 1.0
    return moving_P


def step(name: str, round_: int, like: torch.Tensor) -> torch.Tensor:
    """Half from the client's own data, and as much again as the clients of its pair (0 and 1, 2 and 3, ...) see."""
    pair = int("".join(filter(str.isdigit, name))) // 2

    def draw(*purpose: str | int) -> torch.Tensor:
        return torch.randn(len(like), generator=torch_generator(2, *purpose), dtype=torch.float64)

    return ((draw(name, round_) + draw("pair", pair, round_)) / 2**0.5).to(like.dtype)


def judged(trial: Trial, names: tuple[str, ...]) -> Losses:
    """Stand-in for the clients' judgement: how far a candidate is from where the client's own data pulls it."""
    rows = [trial.candidate(number).double() for number in range(trial.num_candidates)]
    wanted = [step(names[id_], 0, rows[0][0]) if rows else torch.zeros(0) for id_ in trial.ids]
    losses = [
        [float((candidate_SP[s] - wanted[s]).square().mean()) for candidate_SP in rows] for s in range(len(wanted))
    ]
    mean_SQ = torch.tensor(losses, dtype=torch.float64).reshape(len(wanted), len(rows))
    agreement_SS = None
    if trial.compare_SP is not None:
        compared_SP = torch.nn.functional.normalize(trial.compare_SP.double())
        agreement_SS = compared_SP @ compared_SP.T
    scatter_SQ = torch.full_like(mean_SQ, 0.01) if trial.versus else None
    return Losses(mean_SQ, (3,) * len(wanted), 0, 0, agreement_SS, scatter_SQ)


def one_round(
    method: Method, state: State, names: tuple[str, ...], participants: Participants, failed: Collection[int] = ()
) -> tuple[State, Info]:
    """A round with made-up training and judgement."""
    results = trained(method.plan(state, participants), names, failed)
    state, info = method.merge(state, participants, results)
    trial = method.trial(state, participants, results) if method.trial else None
    if trial is None or method.decide is None:
        return state, info
    state, more = method.decide(state, trial, judged(trial, names))
    return state, Info({**info.numbers, **more.numbers}, more.graph or info.graph)


def play(method: Method, state: State, names: tuple[str, ...], rounds: list[tuple[int, ...]], first: int = 1) -> State:
    """Carry out rounds with the given participants."""
    for round_, ids in enumerate(rounds, start=first):
        state, _ = one_round(method, state, names, Participants(round_, ids))
    return state


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal shape, dtype and bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def build(name: str, of: Clients | None = None) -> Method:
    """The method of CONFIGS with that name."""
    of = of or clients()
    return build_method(CONFIGS[name], of, given(name, len(of.names)))


def given(name: str, num_clients: int = 6) -> np.ndarray | None:
    """What it is handed over."""
    return handed_over(getattr(getattr(CONFIGS[name], "graph", None), "kind", None), num_clients)


def adapters(name: str, num_clients: int = 6, dtype: torch.dtype = torch.float32) -> Arena:
    """Initial adapters in the layout that it asks for."""
    return initial(num_clients, dtype, layout_for(CONFIGS[name]))


def start(name: str, dtype: torch.dtype = torch.float32) -> tuple[Method, State, Clients]:
    """It, its state before round 1, and whose."""
    who, method = clients(), build(name)
    return method, method.init(adapters(name, dtype=dtype), who), who


def bits(state: State) -> list[torch.Tensor]:
    """All tensors of a state, always in the same order."""
    return [state.adapters.values_KP, *(state.memory[key] for key in sorted(state.memory))]


def equal_bits(one: State, other: State) -> bool:
    return one.last_round_K == other.last_round_K and all(
        same_bytes(left, right) for left, right in zip(bits(one), bits(other), strict=True)
    )
