"""Which sections are measured on a CPU and on a GPU, and what they must reach.

Names sections and measures; knows nothing about how anything is measured or shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.groups.disk_mixing import MEMORY, OVER_COPY
from benchmarks.groups.generation import Generation
from benchmarks.groups.memory import OVER_FLOOR
from benchmarks.groups.mixing import SHARE_IN_TASKS, SHARE_OF_COPY, SHARE_SCATTERED
from benchmarks.groups.training import SHARE_OF_GEMM
from benchmarks.peers.peer import FLOWER, KEPT, MIXED, ONE_CLIENT, OURS, PADDED, PEFT, PFL
from benchmarks.results import Results, Section
from benchmarks.workloads import Workload

DOLLY, NATURAL = "dolly", "natural_instructions"
ATTENTION_PAIR = ("q_proj", "v_proj")
GPT2_PAIR = ("c_attn", "c_proj")


class Training(NamedTuple):
    """A round of training and who takes part."""

    workload: Workload
    contestants: tuple[str, ...] = (OURS, ONE_CLIENT, PEFT, MIXED)


class MemoryMixing(NamedTuple):
    """Mixing in memory."""

    num_clients: int
    num_parameters: int


class DiskMixing(NamedTuple):
    """Mixing of a file."""

    num_clients: int
    num_parameters: int


@dataclass(frozen=True, slots=True)
class ClientMemory:
    """Memory of one more client."""


Measurement = Training | Generation | MemoryMixing | DiskMixing | ClientMemory

_AGAINST_PEFT = (OURS, ONE_CLIENT, PEFT)
_LLAMA_15M = Workload("llama-15m", DOLLY, 4, 8, ATTENTION_PAIR, local_steps=1)
_NATURAL_15M = replace(_LLAMA_15M, lengths=NATURAL, batch_size=8)
_EMBEDDED = Workload("embedded", DOLLY, 4, 8, "all-linear", local_steps=1)
_GPT2 = Workload("gpt2-124m", DOLLY, 4, 8, GPT2_PAIR, local_steps=1)
_GPT2_LARGE = Workload("gpt2-large", DOLLY, 4, 8, GPT2_PAIR, local_steps=1, dtype="bfloat16")
_LLAMA_1B = Workload("llama-1.3b", DOLLY, 8, 16, ("q_proj",), local_steps=1, dtype="bfloat16")

CPU: dict[str, Measurement] = {
    "train-15m": Training(_LLAMA_15M, (OURS, ONE_CLIENT, PEFT, KEPT, MIXED, FLOWER, PFL)),
    "train-15m-ni": Training(_NATURAL_15M, (OURS, ONE_CLIENT, PEFT, KEPT)),
    "train-15m-batch-1": Training(replace(_LLAMA_15M, batch_size=1, local_steps=2), _AGAINST_PEFT),
    "train-gpt2": Training(_GPT2, contestants=(OURS, PEFT)),
    "train-embedded-batch-1": Training(replace(_EMBEDDED, batch_size=1, local_steps=4)),
    "train-embedded": Training(_EMBEDDED, (OURS, ONE_CLIENT, PEFT, MIXED, PADDED)),
    "train-embedded-batch-8": Training(replace(_EMBEDDED, batch_size=8), _AGAINST_PEFT),
    "generate-embedded": Generation(replace(_EMBEDDED, num_clients=16), prompts_per_client=4),
    "generate-embedded-8": Generation(replace(_EMBEDDED, num_clients=8), prompts_per_client=4),
    "client-memory": ClientMemory(),
    "mix-memory": MemoryMixing(1000, 1_000_000),
    "mix-disk": DiskMixing(10_000, 125_000),
}

_ON_GPU = (OURS, ONE_CLIENT, PEFT, MIXED)
CUDA: dict[str, Measurement] = {
    "client-memory": ClientMemory(),
    "generate-gpt2": Generation(replace(_GPT2_LARGE, model="gpt2-124m", num_clients=16), prompts_per_client=4),
    "train-gpt2-large": Training(_GPT2_LARGE, _ON_GPU),
    "train-1.3b": Training(_LLAMA_1B, _ON_GPU),
    "train-gpt2-large-batch-1": Training(replace(_GPT2_LARGE, batch_size=1), _ON_GPU),
    "train-1.3b-batch-1": Training(replace(_LLAMA_1B, batch_size=1), _ON_GPU),
    "train-gpt2-large-16k": Training(replace(_GPT2_LARGE, num_clients=22), (OURS,)),
    "train-gpt2-large-32": Training(replace(_GPT2_LARGE, num_clients=32), _AGAINST_PEFT),
    "train-gpt2-large-batch-1-32": Training(replace(_GPT2_LARGE, batch_size=1, num_clients=32), _AGAINST_PEFT),
    "train-1.3b-batch-1-32": Training(replace(_LLAMA_1B, batch_size=1, num_clients=32), _AGAINST_PEFT),
    "train-gpt2-large-80": Training(replace(_GPT2_LARGE, num_clients=80), _AGAINST_PEFT),
    "mix-memory": MemoryMixing(1000, 1_000_000),
}
"""One call of ten minutes on one GPU; what carries a target comes first, so that a cut-off run loses the least."""
CUDA_MORE: dict[str, Measurement] = {
    "train-1.3b-32": Training(replace(_LLAMA_1B, num_clients=32), _AGAINST_PEFT),
    "generate-gpt2-large": Generation(replace(_GPT2_LARGE, num_clients=16), prompts_per_client=4),
    "generate-gpt2-8": Generation(replace(_GPT2_LARGE, model="gpt2-124m", num_clients=8), prompts_per_client=4),
    "generate-gpt2-80": Generation(replace(_GPT2_LARGE, model="gpt2-124m", num_clients=80), prompts_per_client=4),
}
CPU_MORE: dict[str, Measurement] = {
    "train-15m-batch-8": Training(replace(_LLAMA_15M, batch_size=8), _AGAINST_PEFT),
    "train-15m-bf16": Training(replace(_LLAMA_15M, dtype="bfloat16"), _AGAINST_PEFT),
    "train-15m-ni-bf16": Training(replace(_NATURAL_15M, dtype="bfloat16"), _AGAINST_PEFT),
    "train-gpt2-bf16": Training(replace(_GPT2, dtype="bfloat16"), _AGAINST_PEFT),
    "train-gpt2-batch-1": Training(replace(_GPT2, batch_size=1), _AGAINST_PEFT),
    "train-gpt2-batch-8": Training(replace(_GPT2, batch_size=8), contestants=(OURS, PEFT)),
    "generate-embedded-single": Generation(replace(_EMBEDDED, num_clients=16), prompts_per_client=1),
    "generate-embedded-80": Generation(replace(_EMBEDDED, num_clients=80), prompts_per_client=4),
}
SUITES = {"cpu": CPU, "cuda": CUDA}
MORE = {"cpu": CPU_MORE, "cuda": CUDA_MORE}
"""Sections that a plain run leaves out: `make bench-more`, `make bench-gpu-more`, or by name."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a measure must reach."""

    device: str
    """`cpu` or `cuda`."""
    what: str
    """For people."""
    section: str
    measure: str
    bound: float
    at_least: bool = True
    """False: at most."""

    def reached(self, value: float) -> bool:
        """Whether a measured value meets the bound."""
        return value >= self.bound if self.at_least else value <= self.bound


TARGETS = (
    Target("cpu", "15M shape, batch 4, over stock PEFT", "train-15m", f"over {PEFT}", 4.0),
    Target("cpu", "15M shape, batch 4, over PEFT mixed batch", "train-15m", f"over {MIXED}", 2.5),
    Target("cpu", "15M shape, batch 4, over Flower simulation", "train-15m", f"over {FLOWER}", 4.5),
    Target("cpu", "15M shape, Natural Instructions, batch 8, over stock PEFT", "train-15m-ni", f"over {PEFT}", 6.0),
    Target("cpu", "GPT-2 124M, batch 4, over stock PEFT", "train-gpt2", f"over {PEFT}", 2.5),
    Target(
        "cpu", "embedded base, batch 1, over our own one-client engine", "train-embedded-batch-1",
        f"over {ONE_CLIENT}", 1.5,
    ),
    Target("cpu", "generation, 16 clients, embedded base, over PEFT", "generate-embedded", f"over {PEFT}", 4.0),
    Target(
        "cpu", "memory of one more client, over 16 bytes x parameters", "client-memory",
        OVER_FLOOR, 1.1, at_least=False,
    ),
    Target("cpu", "mixing 1,000 x 1M in memory, share of the copy rate", "mix-memory", SHARE_OF_COPY, 0.7),
    Target("cpu", "the same, neighbours are tasks, clients in any order", "mix-memory", SHARE_SCATTERED, 0.7),
    Target("cpu", "the same, neighbours are tasks, clients in order", "mix-memory", SHARE_IN_TASKS, 0.7),
    Target(
        "cpu", "mixing 10,000 clients on disk, times copying the file", "mix-disk", OVER_COPY, 1.5, at_least=False,
    ),
    Target("cpu", "mixing 10,000 clients on disk, peak memory in GB", "mix-disk", MEMORY, 8.0, at_least=False),
    Target("cuda", "GPT-2 large, batch 4, 8 clients, over stock PEFT", "train-gpt2-large", f"over {PEFT}", 5.0),
    Target("cuda", "GPT-2 large, batch 4, 32 clients, over stock PEFT", "train-gpt2-large-32", f"over {PEFT}", 5.0),
    Target("cuda", "1.3B shape, batch 8, 8 clients, over stock PEFT", "train-1.3b", f"over {PEFT}", 3.0),
    Target(
        "cuda", "GPT-2 large, batch 1, 8 clients, over stock PEFT", "train-gpt2-large-batch-1",
        f"over {PEFT}", 10.0,
    ),
    Target("cuda", "1.3B shape, batch 1, 8 clients, over stock PEFT", "train-1.3b-batch-1", f"over {PEFT}", 10.0),
    Target(
        "cuda", "GPT-2 large, some 16k packed tokens per step, share of the bf16 matrix-product rate",
        "train-gpt2-large-16k", SHARE_OF_GEMM, 0.5,
    ),
    Target("cuda", "generation, 16 clients, GPT-2 124M, over PEFT", "generate-gpt2", f"over {PEFT}", 10.0),
    Target(
        "cuda", "memory of one more client, over 16 bytes x parameters", "client-memory",
        OVER_FLOOR, 1.1, at_least=False,
    ),
)  # fmt: skip


class Verdict(NamedTuple):
    """A target and what was found on one machine."""

    target: Target
    machine: str
    """Name of its results; the kind of machine where there are none."""
    value: float | None
    """None if it was not measured."""
    section: Section | None = None
    """Where it was measured."""

    @property
    def word(self) -> str:
        """`met`, `missed` or `not measured`."""
        if self.value is None:
            return "not measured"
        return "met" if self.target.reached(self.value) else "missed"


def machines(found: dict[str, Results]) -> dict[str, str]:
    """The names of results with their kind of machine (`cpu`, `cuda`); a kind without results stands for itself."""
    kinds = {name: name.partition("-")[0] for name in found}
    return kinds | {kind: kind for kind in SUITES if kind not in kinds.values()}


def judge(found: dict[str, Results]) -> list[Verdict]:
    """Compare results by name of a machine (`cpu-intel-xeon`) with all targets of its kind."""
    sections: dict[tuple[str, str], Section] = {
        (name, section.name): section for name, results in found.items() for section in results.sections
    }
    verdicts = []
    for target in TARGETS:
        for name in (name for name, kind in machines(found).items() if kind == target.device):
            section = sections.get((name, target.section))
            value = None if section is None else section.measures.get(target.measure)
            verdicts.append(Verdict(target, name, value, section))
    return verdicts
