"""What crosses the seam, as named tensors: differences of adapters, whole or in fewer bytes, and back.

A message is for S rows at once, each as if encoded alone; its bytes are those of its tensors, scales and places of
numbers included. Both sides know the layout, so no names cross. Components that are 0 in both factors of a pair are
beyond a client's rank and do not cross: rows of unequal rank go in messages of their own, in the layout of their rank.
Knows nothing about clients, rounds or memory.

Axes: S rows, P parameters of one adapter, U of them that cross or that a client has, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import ceil
from typing import NamedTuple

import torch

from fedmira.config.exchange import Compression
from fedmira.types import Layout, TensorSpec

Message = Mapping[str, torch.Tensor]
"""By name, each with S as its first axis."""

_INT8 = 127.0
PLACES, NUMBERS = "places", "numbers"


class Held(NamedTuple):
    """Rows that hold the same components of every pair."""

    rows: list[int]
    """Their places."""
    layout: Layout
    """Of what they hold: of an adapter of their own rank."""
    columns_U: torch.Tensor | None
    """Where that lies in a whole row; None: it is the whole row."""

    def part(self, rows_SP: torch.Tensor) -> torch.Tensor:
        """What these rows hold of all rows (S, P): `rows_SP` itself where that is everything."""
        return rows_SP if self.columns_U is None else rows_SP[self.rows][:, self.columns_U]


def crossing_bytes(layout: Layout, groups: Collection[str], values_SP: torch.Tensor) -> int:
    """Bytes of the tensors of `groups` in the rows `values_SP` if they cross as they are.

    Components that are 0 in both factors of a pair are beyond a client's rank and need not cross.
    """
    specs, absent = crossing(layout, groups), _absent(layout, values_SP)
    whole = len(values_SP) * sum(spec.size for spec in specs)
    beyond = ((spec, absent[spec.name]) for spec in specs if spec.name in absent)
    gone = sum(int(gone_SR.sum()) * (spec.size // gone_SR.shape[1]) for spec, gone_SR in beyond)
    return (whole - gone) * values_SP.element_size()


def by_components(layout: Layout, *alike_SP: torch.Tensor) -> list[Held]:
    """Return the rows by what they hold: the components that are not 0 in both factors in all of `alike_SP`, (S, P)."""
    num_rows, absent = len(alike_SP[0]), _absent(layout, *alike_SP)
    if not absent:
        return [Held(list(range(num_rows)), layout, None)] if num_rows else []
    gone_SC = torch.cat([absent[spec_a.name] for spec_a, _ in layout.pairs if spec_a.name in absent], dim=1)
    kind_S = torch.unique(gone_SC.cpu(), dim=0, return_inverse=True)[1].tolist()
    alike: dict[int, list[int]] = {}
    for row, kind in enumerate(kind_S):
        alike.setdefault(kind, []).append(row)
    return [Held(rows, *_without(layout, {n: gone[rows[0]] for n, gone in absent.items()})) for rows in alike.values()]


def _absent(layout: Layout, *alike_SP: torch.Tensor) -> dict[str, torch.Tensor]:
    """By the name of both factors of a pair, (S, R): which components are 0 in A and B in all of `alike_SP`. Pairs of
    which all is there are left out."""
    found: dict[str, torch.Tensor] = {}
    for spec_a, spec_b in layout.pairs:
        views = [(_view(values_SP, spec_a), _view(values_SP, spec_b)) for values_SP in alike_SP]
        # one number of each tells of almost all components that they are there
        doubtful = ((a_SRI[:, :, 0] == 0) & (b_SOR[:, 0, :] == 0) for a_SRI, b_SOR in views)
        if not all(bool(doubtful_SR.any()) for doubtful_SR in doubtful):
            continue
        gone = [(a_SRI == 0).all(dim=2) & (b_SOR == 0).all(dim=1) for a_SRI, b_SOR in views]
        gone_SR = torch.stack(gone).all(dim=0)
        if gone_SR.any():
            found[spec_a.name] = found[spec_b.name] = gone_SR
    return found


def _without(layout: Layout, gone: Mapping[str, torch.Tensor]) -> tuple[Layout, torch.Tensor]:
    """The layout of a row without the components `gone`, (R,) by the names of their tensors, and its columns in it."""
    axes = {spec.name: axis for pair in layout.pairs for axis, spec in enumerate(pair)}
    kept, columns = [], [torch.zeros(0, dtype=torch.long)]
    for spec in layout.specs:
        places = torch.arange(spec.offset, spec.offset + spec.size).view(spec.shape)
        if spec.name in gone:
            here_R = (~gone[spec.name]).nonzero().flatten().cpu()
            places = places.index_select(axes[spec.name], here_R)
        if places.numel():
            kept.append((spec.name, spec.group, spec.layer, tuple(places.shape)))
            columns.append(places.flatten())
    return Layout.of(kept, layout.scaling), torch.cat(columns)


def carried(
    layout: Layout,
    groups: Collection[str],
    rows_SP: torch.Tensor,
    known_SP: torch.Tensor,
    compression: Compression,
    top_k: float = 1.0,
) -> tuple[torch.Tensor, int]:
    """Encode and decode rows: what arrives of them, 0 where nothing crossed, and the bytes of their messages.

    Args:
        layout: of the rows.
        groups: what crosses.
        rows_SP: differences, as `encode` takes them.
        known_SP: what they are differences to, or make together with it. A component crosses if it is there or here.
        compression: how.
        top_k: as in `encode`; of the numbers that a row holds.
    """
    got_SP, total_bytes = torch.zeros_like(rows_SP), 0
    for held in by_components(layout, known_SP, rows_SP):
        own_SU = held.part(rows_SP)
        message = encode(held.layout, groups, own_SU, compression, top_k)
        total_bytes += message_bytes(message)
        decoded_SU = decode(held.layout, groups, message, own_SU)
        if held.columns_U is None:
            return decoded_SU, total_bytes
        got_SP[torch.tensor(held.rows)[:, None], held.columns_U] = decoded_SU
    return got_SP, total_bytes


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
    """Bytes of the rows `values_SP` in the form `compression`; they depend on sizes and ranks alone."""
    if compression == "none":
        return crossing_bytes(layout, groups, values_SP)
    total_bytes = 0
    for held in by_components(layout, values_SP):
        first_SP = values_SP[held.rows[:1]]
        one_SU = first_SP if held.columns_U is None else first_SP[:, held.columns_U]
        wide_SU = one_SU.to(torch.promote_types(values_SP.dtype, torch.float32))
        total_bytes += len(held.rows) * message_bytes(encode(held.layout, groups, wide_SU, compression, top_k))
    return total_bytes


def crossing(layout: Layout, groups: Collection[str]) -> tuple[TensorSpec, ...]:
    """The tensors of `groups`, in row order."""
    return tuple(spec for spec in layout.specs if spec.group in groups)


def _view(rows_SP: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return rows_SP[:, spec.columns].view(len(rows_SP), *spec.shape)


def _longer(spec: TensorSpec) -> int:
    """The axis of a stacked tensor along which numbers share a scale."""
    return 1 + max(range(len(spec.shape)), key=lambda axis: (spec.shape[axis], axis))
