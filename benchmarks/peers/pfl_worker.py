"""pfl-research: its simulated backend runs clients one after another in one process; adapters stay personal.

A user's local training is that of `PeftSequential`. Needs pfl; run by `worker`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import FederatedAlgorithm
from pfl.common_types import Population
from pfl.context import CentralContext
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import AlgorithmHyperParams, ModelHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.internal.ops.selector import set_framework_module
from pfl.metrics import Metrics
from pfl.model.base import Model

from benchmarks.peers.peft_sequential import PeftSequential
from benchmarks.peers.serving import read_order, serve_rounds
from benchmarks.workloads import Task, build, fingerprint


class PersonalAdapters(FederatedAlgorithm):  # type: ignore[misc]
    """Trains each user's own adapter; nothing is aggregated."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._client = PeftSequential(task)
        self._start_SP = task.start_SP
        self.rows_SP = task.start_SP.clone()
        self._rounds_wanted = 0

    def one_more_round(self) -> None:
        """Let the next `run` do one central iteration."""
        self._rounds_wanted += 1

    def get_next_central_contexts(
        self, model: Any, iteration: int, algorithm_params: Any, model_train_params: Any, model_eval_params: Any = None
    ) -> tuple[Any, Any, Any]:
        if iteration == self._rounds_wanted:
            return None, model, Metrics()
        context = CentralContext(
            current_central_iteration=iteration,
            do_evaluation=False,
            cohort_size=len(self._start_SP),
            population=Population.TRAIN,
            algorithm_params=algorithm_params,
            model_train_params=model_train_params,
            model_eval_params=model_eval_params,
            seed=0,
        )
        return (context,), model, Metrics()

    def simulate_one_user(self, model: Any, user_dataset: Any, central_context: Any) -> tuple[None, Any]:
        user = user_dataset.user_id
        self.rows_SP[user] = self._client.train_client(user, self._start_SP[user])
        return None, Metrics()

    def process_aggregated_statistics_from_all_contexts(
        self, stats_context_pairs: Any, aggregate_metrics: Any, model: Any
    ) -> tuple[Any, Any]:
        return model, Metrics()

    def process_aggregated_statistics(
        self, central_context: Any, aggregate_metrics: Any, model: Any, statistics: Any
    ) -> tuple[Any, Any]:
        raise AssertionError("no statistics are sent")


def main() -> None:
    """Serve rounds."""
    order = read_order()
    torch.manual_seed(0)
    set_framework_module(pytorch_ops)
    task = build(order.workload, "cpu")
    users = list(range(len(task.clients)))
    data = FederatedDataset(
        lambda user: Dataset(raw_data=(task.clients[user].train,), user_id=user),
        get_user_sampler("minimize_reuse", users),
    )
    backend = SimulatedBackend(training_data=data, val_data=data)
    algorithm = PersonalAdapters(task)

    def one_round() -> np.ndarray:
        algorithm.one_more_round()
        algorithm.run(AlgorithmHyperParams(), backend, Model(), ModelHyperParams(), send_metrics_to_platform=False)
        return algorithm.rows_SP.numpy()

    serve_rounds(one_round, order, fingerprint(task))


if __name__ == "__main__":
    main()
