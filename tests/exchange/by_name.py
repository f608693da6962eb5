"""An exchange whose uploads reach the server as named tensors, as they would over a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fedmira.exchange.admission import admit
from fedmira.exchange.in_process import InProcess
from fedmira.types import Job, Results

Upload = dict[str, torch.Tensor]


class ByName(InProcess):
    """Clients train here as ever; the server believes nothing of what it gets and admits it by name."""

    on_the_way: Mapping[str, Callable[[Upload], Any]] = {}
    """By client, what happens to what it sends."""

    def run(self, job: Job, **more: Any) -> Results:
        results = super().run(job, **more)
        rows = [row for row, report in enumerate(results.reports) if not report.failure]
        names = [self._clients[id_].name for id_ in results.ids]
        specs = [spec for spec in self._layout.specs if spec.group in job.upload]
        uploads = [
            self.on_the_way.get(name, lambda upload: upload)(
                {spec.name: row_P[spec.columns].clone().view(spec.shape) for spec in specs}
            )
            for name, row_P in zip(names, results.values_SP, strict=True)
        ]
        ratio = self._seam._config.max_norm_ratio
        admitted = admit(self._layout, job.upload, uploads, names, job.start_SP[rows], ratio)
        reasons = {results.ids[place]: reason for place, reason in admitted.rejected.items()}
        return results._replace(
            ids=tuple(results.ids[place] for place in admitted.accepted),
            values_SP=admitted.values_SP,
            reports=tuple(
                report._replace(failure=reasons.get(report.id, report.failure)) for report in results.reports
            ),
        )
