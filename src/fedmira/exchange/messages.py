"""What crosses the seam, as named tensors: differences of adapters, whole or in fewer bytes, and back.

A message is for S rows at once, each as if encoded alone; its bytes are those of its tensors, scales and places of
numbers included. Both sides know the layout, so no names cross. Knows nothing about clients, rounds or memory.

Axes: S rows, P parameters of one adapter, U of them that cross.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from math import ceil

import torch

from fedmira.config.exchange import Compression
from fedmira.types import Layout, TensorSpec

Message = Mapping[str, torch.Tensor]
"""By name, each with S as its first axis."""

_INT8 = 127.0
PLACES, NUMBERS = "places", "numbers"


def crossing_bytes(layout: Layout, groups: Iterable[str], values_SP: torch.Tensor) -> int:
    """Bytes of the tensors of `groups` in the rows `values_SP` if they cross as they are.

    Components that are 0 in both factors of a pair are beyond a client's rank and need not cross.
    """
    wanted = frozenset(groups)
    whole = sum(values_SP[:, part].nbytes for group in sorted(wanted) for part in layout.slices(group))
    return whole - values_SP.element_size() * sum(_absent(layout, values_SP, wanted))


def _absent(layout: Layout, values_SP: torch.Tensor, groups: frozenset[str]) -> Iterator[int]:
    """Numbers of each pair that `groups` would send although their component is 0 in A and B."""
    for spec_a, spec_b in layout.pairs:
        a_SRI, b_SOR = _view(values_SP, spec_a), _view(values_SP, spec_b)
        # one number of each tells of almost all components that they are there
        doubtful_SR = (a_SRI[:, :, 0] == 0) & (b_SOR[:, 0, :] == 0)
        if not doubtful_SR.any():
            continue
        absent = int(((a_SRI == 0).all(dim=2) & (b_SOR == 0).all(dim=1)).sum())
        yield absent * ((spec_a.group in groups) * a_SRI.shape[2] + (spec_b.group in groups) * b_SOR.shape[1])


def encode(
    layout: Layout, groups: Collection[str], rows_SP: torch.Tensor, compression: Compression, top_k: float = 1.0
) -> Message:
    """Return the tensors of `groups` of the rows in the form `compression`.

    `bf16`: rounded to bfloat16. `int8`: round(127 x / m) with m the largest |x| of each vector along the longer axis
    of a tensor, so of each row of A and each column of B, and m / 127 as a float32 scale. `topk`: of all U numbers of a
    row the ceil(top_k U) largest in absolute value, with their places as int32.

    Args:
        layout: of the rows.
        groups: what crosses.
        rows_SP: differences; finite.
        compression: how.
        top_k: share of the numbers that `topk` keeps, in (0, 1].
    """
    specs = crossing(layout, groups)
    if compression == "topk" and specs:
        values_SU = torch.cat([_view(rows_SP, spec).flatten(1) for spec in specs], dim=1)
        places_Su = values_SU.abs().topk(ceil(top_k * values_SU.shape[1]), dim=1, sorted=False).indices
        return {PLACES: places_Su.int(), NUMBERS: values_SU.gather(1, places_Su)}
    message: dict[str, torch.Tensor] = {}
    for spec in specs:
        values = _view(rows_SP, spec)
        if compression == "int8":
            scale = (values.abs().amax(dim=_longer(spec), keepdim=True).float() / _INT8).to(torch.float32)
            whole = (values.float() / torch.where(scale > 0, scale, 1.0)).round().clamp(-_INT8, _INT8)
            message |= {spec.name: whole.to(torch.int8), f"{spec.name}.scale": scale}
        else:
            message[spec.name] = values.to(torch.bfloat16) if compression == "bf16" else values.clone()
    return message


def decode(layout: Layout, groups: Collection[str], message: Message, like_SP: torch.Tensor) -> torch.Tensor:
    """Return the rows (S, P) that `message` stands for, 0 where nothing crossed; dtype and device as `like_SP`."""
    rows_SP = torch.zeros_like(like_SP)
    specs = crossing(layout, groups)
    if PLACES in message:
        size = sum(spec.size for spec in specs)
        values_SU = rows_SP.new_zeros(len(rows_SP), size)
        values_SU.scatter_(1, message[PLACES].long(), message[NUMBERS].to(rows_SP))
        for spec, part in zip(specs, torch.split(values_SU, [spec.size for spec in specs], dim=1), strict=True):
            _view(rows_SP, spec).copy_(part.view(len(rows_SP), *spec.shape))
        return rows_SP
    for spec in specs:
        values = message[spec.name]
        scale = message.get(f"{spec.name}.scale")
        _view(rows_SP, spec).copy_(values if scale is None else values.float() * scale)
    return rows_SP


def message_bytes(message: Message) -> int:
    """Bytes of a message."""
    return sum(tensor.nbytes for tensor in message.values())


def encoded_bytes(
    layout: Layout, groups: Collection[str], values_SP: torch.Tensor, compression: Compression, top_k: float
) -> int:
    """Bytes of the rows `values_SP` in the form `compression`; they depend on sizes alone."""
    if compression == "none" or not len(values_SP):
        return crossing_bytes(layout, groups, values_SP)
    wide_SP = values_SP[:1].to(torch.promote_types(values_SP.dtype, torch.float32))
    return len(values_SP) * message_bytes(encode(layout, groups, wide_SP, compression, top_k))


def crossing(layout: Layout, groups: Collection[str]) -> tuple[TensorSpec, ...]:
    """The tensors of `groups`, in row order."""
    return tuple(spec for spec in layout.specs if spec.group in groups)


def _view(rows_SP: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return rows_SP[:, spec.columns].view(len(rows_SP), *spec.shape)


def _longer(spec: TensorSpec) -> int:
    """The axis of a stacked tensor along which numbers share a scale."""
    return 1 + max(range(len(spec.shape)), key=lambda axis: (spec.shape[axis], axis))
