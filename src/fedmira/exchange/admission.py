"""What the server takes from a client: the right tensors, finite, of a size that can be. Everything else is rejected
by name and the round goes on without it.

Knows nothing about how uploads travelled. Axes: S rows of a job, P parameters of one adapter.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch

from fedmira.errors import nearest
from fedmira.exchange.messages import crossing
from fedmira.types import Layout

_SHOWN = 3
"""Names of tensors that a reason lists."""
_LARGEST_NORM = 1e16
"""Squares and products of larger numbers, scaled and summed over rounds, may leave the range of float32 for good."""
_TENSORS = (torch.Tensor, torch.nn.Parameter)
"""What answers as a tensor does; what is derived from them may do anything."""
_BEGINS, _REJECTED = "the upload of client", " was rejected: "


class Admitted(NamedTuple):
    """What the server goes on with."""

    values_SP: torch.Tensor
    """The rows that were accepted, in the order they came."""
    accepted: tuple[int, ...]
    """Their places among those that came, ascending."""
    rejected: Mapping[int, str]
    """Place -> why, for all others."""


def admit(
    layout: Layout,
    groups: Collection[str],
    uploads: Sequence[object],
    names: Sequence[str],
    start_SP: torch.Tensor,
    max_norm_ratio: float | None,
) -> Admitted:
    """Return the rows of the uploads that are sound, and why the others are not.

    An upload must hold exactly the tensors of `groups`, by name, each of the layout's shape and of the dtype of
    `start_SP`; then `sound` judges the numbers. Nothing an upload holds raises. Other tensors of a row stay as they
    started.

    Args:
        layout: the tensors of one adapter.
        groups: those that a client sends.
        uploads: one per row of `start_SP`: what a client sent, decoded but otherwise believed in nothing.
        names: of the clients, for the reasons.
        start_SP: where each row started.
        max_norm_ratio: see `sound`.
    """
    rows_SP, wrong = start_SP.clone(), dict[int, str]()
    for place, upload in enumerate(uploads):
        reason = _misfit(layout, groups, upload, start_SP)
        if reason:
            wrong[place] = f"{_BEGINS} {names[place]}{_REJECTED}{reason}"
            continue
        assert isinstance(upload, Mapping)
        for spec in crossing(layout, groups):
            sent = upload[spec.name]
            assert isinstance(sent, torch.Tensor)
            rows_SP[place, spec.columns] = sent.detach().reshape(-1).to(rows_SP.device)
    fitting = [place for place in range(len(uploads)) if place not in wrong]
    judged = sound(
        layout, groups, rows_SP[fitting], [names[place] for place in fitting], start_SP[fitting], max_norm_ratio
    )
    wrong |= {fitting[place]: reason for place, reason in judged.rejected.items()}
    return Admitted(judged.values_SP, tuple(fitting[place] for place in judged.accepted), dict(sorted(wrong.items())))


def sound(
    layout: Layout,
    groups: Collection[str],
    values_SP: torch.Tensor,
    names: Sequence[str],
    start_SP: torch.Tensor,
    max_norm_ratio: float | None,
    num_crossing: int | None = None,
) -> Admitted:
    """Return the rows whose numbers are finite, can be computed with, and whose updates are of a possible size.

    Impossible is an update, the difference to the start over the tensors of `groups`, with a norm of more than
    `max_norm_ratio` times the median of all that can be computed with; None allows any. Fewer than three say nothing,
    and neither does a median of 0. Of rows behind the first `num_crossing`, which stay with their clients, nobody knows
    the size.
    """
    columns_P = _columns(layout, groups, values_SP.device)
    crossing_S = slice(num_crossing)
    norms, largest = list[float](), list[float]()
    for value_P, start_P in zip(values_SP[crossing_S], start_SP[crossing_S], strict=True):
        wide_P = value_P[columns_P].double()
        norms.append(float(torch.linalg.vector_norm(wide_P - start_P[columns_P].to(value_P).double())))
        largest.append(max(norms[-1], float(torch.linalg.vector_norm(wide_P))))
    finite = [bool(torch.isfinite(value_P).all()) for value_P in values_SP]
    too_large = [norm > _LARGEST_NORM for norm in largest]
    among = [norm for norm, good, large in zip(norms, finite, too_large, strict=False) if good and not large]
    median = statistics.median(among) if len(among) > 2 else 0.0
    rejected: dict[int, str] = {}
    for place, name in enumerate(names):
        reason = ""
        if not finite[place]:
            tensors = [spec.name for spec in layout.specs if not torch.isfinite(values_SP[place, spec.columns]).all()]
            reason = f"values that are not finite in {_listed(tensors)}"
        elif place < len(norms) and too_large[place]:
            reason = f"its norm {largest[place]:.3g} is too large to compute with, allowed is {_LARGEST_NORM:g}"
        elif place < len(norms) and max_norm_ratio is not None and median and norms[place] > max_norm_ratio * median:
            reason = (
                f"its norm {norms[place]:.3g} is {norms[place] / median:.3g} times the median {median:.3g} of the "
                f"round, allowed is exchange.max_norm_ratio = {max_norm_ratio:g}"
            )
        if reason:
            rejected[place] = f"{_BEGINS} {name}{_REJECTED}{reason}"
    accepted = tuple(place for place in range(len(names)) if place not in rejected)
    return Admitted(values_SP[list(accepted)] if rejected else values_SP, accepted, rejected)


def was_rejected(failure: str) -> bool:
    """Whether what is told of a client's failure is that its upload came and was rejected."""
    return failure.startswith(_BEGINS) and _REJECTED in failure


def _columns(layout: Layout, groups: Collection[str], device: torch.device) -> torch.Tensor | slice:
    """What crosses of a row: all of it as a slice, which spares a copy."""
    if set(layout.groups) <= set(groups):
        return slice(None)
    parts = [torch.arange(s.offset, s.offset + s.size, device=device) for s in crossing(layout, groups)]
    return torch.cat(parts) if parts else slice(0)


def _misfit(layout: Layout, groups: Collection[str], upload: object, start_SP: torch.Tensor) -> str:
    """Why the tensors of an upload are not those asked for; empty if they are."""
    expected = {spec.name: spec for spec in crossing(layout, groups)}
    if not isinstance(upload, Mapping):
        return f"named tensors were expected, given {type(upload).__name__}"
    if missing := [name for name in expected if name not in upload]:
        return f"it lacks {_listed(missing)}"
    if strange := [str(name) for name in upload if name not in expected]:
        return f"it holds {_listed(strange)}, which nobody asked for{nearest(strange[0], expected)}"
    for name, spec in expected.items():
        sent = upload[name]
        if type(sent) not in _TENSORS:
            return f"{name} is no tensor but {type(sent).__name__}"
        if sent.layout != torch.strided or sent.is_nested or sent.device.type == "meta":
            return f"{name} holds no dense numbers"
        if tuple(sent.shape) != spec.shape:
            return f"{name} has shape {tuple(sent.shape)}, expected {spec.shape}{_rank_hint(spec.shape, sent.shape)}"
        if sent.dtype != start_SP.dtype:
            return f"{name} has dtype {sent.dtype}, expected {start_SP.dtype}"
    return ""


def _rank_hint(expected: tuple[int, ...], given: Sequence[int]) -> str:
    differing = [axis for axis, size in enumerate(expected) if axis < len(given) and given[axis] != size]
    if len(given) == len(expected) == 2 and len(differing) == 1 and differing[0] == expected.index(min(expected)):
        return f": rank {given[differing[0]]} instead of {min(expected)}"
    return ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
