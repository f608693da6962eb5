"""Flower's simulation with Ray: an actor for each thread; a server that keeps one adapter per client.

Needs flwr[simulation]; run by `worker`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from benchmarks.peers.flower_client import app as client_app
from benchmarks.peers.serving import read_order, serve_rounds
from benchmarks.workloads import build, fingerprint

THREADS = 1
"""Of one actor. Flower's default, and faster: one actor with two threads took 6.4 s a round where two took 5.8."""


def main() -> None:
    """Start the simulation and serve rounds from its server app."""
    order = read_order()
    task = build(order.workload, "cpu")
    start_SP, found = task.start_SP.numpy(), fingerprint(task)
    del task
    server_app = ServerApp()

    @server_app.main()  # type: ignore[untyped-decorator]
    def server(grid: Grid, _context: Context) -> None:
        config = ConfigRecord({"workload": json.dumps(asdict(order.workload)), "threads": THREADS})
        nodes = _nodes_by_client(grid, len(start_SP), config)
        serve_rounds(lambda: _round(grid, nodes, start_SP, config), order, found)

    run_simulation(
        server_app,
        client_app,
        num_supernodes=len(start_SP),
        backend_config={
            "init_args": {"num_cpus": order.threads},
            "client_resources": {"num_cpus": THREADS, "num_gpus": 0.0},
        },
    )


def _nodes_by_client(grid: Grid, num_clients: int, config: ConfigRecord) -> list[int]:
    """The node of each client; waits until all are there and know the base model."""
    while len(list(grid.get_node_ids())) < num_clients:
        time.sleep(0.1)
    questions = [
        Message(RecordDict({"config": config}), message_type=MessageType.QUERY, dst_node_id=node)
        for node in grid.get_node_ids()
    ]
    nodes = {
        int(reply.content["client"]["index"]): reply.metadata.src_node_id for reply in grid.send_and_receive(questions)
    }
    return [nodes[client] for client in range(num_clients)]


def _round(grid: Grid, nodes: list[int], start_SP: np.ndarray, config: ConfigRecord) -> np.ndarray:
    messages = []
    for node, start_P in zip(nodes, start_SP, strict=True):
        content = RecordDict({"adapter": ArrayRecord({"row": Array(start_P)}), "config": config})
        messages.append(Message(content, message_type=MessageType.TRAIN, dst_node_id=node))
    rows = {}
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            raise RuntimeError(f"a Flower client failed: {reply.error.reason}")
        rows[reply.metadata.src_node_id] = reply.content["adapter"]["row"].numpy()
    return np.stack([rows[node] for node in nodes])


if __name__ == "__main__":
    main()
