"""The process of one contestant of this environment; run by `worker`, one task after another.

Prepares itself as the command line of fedmira does if it is told to, before torch is imported.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from fedmira.cli.process import prepare_process

if TYPE_CHECKING:
    from benchmarks.workloads import Task, Workload


class Seat:
    """What a contestant has taken: a round of training or answers, of one workload after another."""

    def __init__(self, contestant: str) -> None:
        self._contestant = contestant
        self._held: tuple[Workload, Task, str] | None = None
        self.call: Any = None

    def take(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make what the request describes; a task of training is kept for the next request if it is the same."""
        from benchmarks.groups.generation import Generation, answering_here, without_end
        from benchmarks.peers.peer import make_here
        from benchmarks.peers.serving import read_workload
        from benchmarks.workloads import build, fingerprint

        self.call = None
        workload, answers = read_workload(request["workload"]), request.get("answers")
        if answers is not None:
            # not kept: PEFT has a copy of the weights to merge into, and would be counted with two
            self._held = None
            task = without_end(build(workload, "cpu"))
            self.call = answering_here(self._contestant, task, Generation(workload, **answers)).answer
            return {"fingerprint": fingerprint(task)}
        if self._held is None or self._held[0] != workload:
            self._held = None
            task = build(workload, "cpu")
            self._held = workload, task, fingerprint(task)
        _, task, found = self._held
        peer = make_here(self._contestant, task, request["form"])
        self.call = lambda: peer.round().numpy()
        return {"fingerprint": found, "cohort_size": getattr(peer, "cohort_size", None)}


def main() -> None:
    """Serve tasks."""
    content = json.loads(sys.argv[1])
    if content["prepared"]:
        prepare_process()
    from benchmarks.peers.serving import measured, read_order, serve

    order = read_order()
    seat = Seat(content["contestant"])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return seat.take(request) if request["do"] == "take" else measured(seat.call, order)

    serve(answer, order)


if __name__ == "__main__":
    main()
