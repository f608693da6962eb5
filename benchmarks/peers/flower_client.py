"""The client app of the Flower simulation: trains the adapter that arrives and sends it back.

Only adapters cross; the base model is made once per actor. A module of its own, so that actors import it instead of
getting a copy with every message. Needs flwr.
"""

from __future__ import annotations

import json
from functools import cache

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.peers.peft_sequential import PeftSequential
from benchmarks.peers.serving import read_workload
from benchmarks.workloads import build

app = ClientApp()


@cache
def _trainer(workload: str, threads: int) -> PeftSequential:
    torch.set_num_threads(threads)
    return PeftSequential(build(read_workload(json.loads(workload)), "cpu"))


@app.query()  # type: ignore[untyped-decorator]
def which(message: Message, context: Context) -> Message:
    """Tell which client this node is; the actor's base model is made on the first of these questions."""
    config = message.content["config"]
    _trainer(config["workload"], config["threads"])
    client = int(context.node_config["partition-id"])
    return Message(RecordDict({"client": ConfigRecord({"index": client})}), reply_to=message)


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train the adapter of this node's client."""
    config = message.content["config"]
    trainer = _trainer(config["workload"], config["threads"])
    start_P = torch.from_numpy(message.content["adapter"]["row"].numpy().copy())
    row_P = trainer.train_client(int(context.node_config["partition-id"]), start_P)
    return Message(RecordDict({"adapter": ArrayRecord({"row": Array(row_P.numpy())})}), reply_to=message)
