"""Runs adapted models one token further for many sequences at once, without reading again what they hold.

Prompts are read in packed rows, as in training; from then on every call takes the newest token of every sequence.
Sequences may join and leave between calls. Known families run through their body written out; any other one runs
through the stock model, with attention registered with transformers under `CACHED`, which is also the slow twin of the
former. Knows nothing about how a token is chosen.

Axes: K clients, P parameters of one adapter, B rows of a call, n of them with a sequence, N packed rows, H heads,
G key-value heads, D features of a head, d hidden features.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedmira.data.packing import PackedBatch, pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.errors import SetupError
from fedmira.model import fused, inference
from fedmira.model.adapted import body_for
from fedmira.model.attention import PACKED, Packing, Settings, attention_of
from fedmira.model.base import MISUNDERSTANDINGS, BaseModel, unlike
from fedmira.model.body import Soften
from fedmira.model.buckets import CacheBucket, Growing, Newest, PackedRows, Pair, group_by_length
from fedmira.model.lora import attached
from fedmira.model.low_rank import assign_rows
from fedmira.model.soft_prompt import SoftPrompts
from fedmira.randomness import torch_generator
from fedmira.types import Arena

CACHED = "fedmira_cached"

_CPU_BUCKET_BYTES = 5e5
_BUCKET_BYTES = 1e8
"""The calls of one more bucket take about as long as reading this many bytes of keys and values; on a CPU calls are
cheap and reading is not."""


class KeyValueCache:
    """The keys and values of sequences that grow together, one token per call.

    `read` takes prompts in; inside `rows`, `advance` adds a token to each.
    """

    def __init__(self, base: BaseModel, arena: Arena) -> None:
        """An empty cache.

        Args:
            base: the frozen model.
            arena: (K, P), on the device of the base.
        """
        self._base = base
        self._body = body_for(base, arena.layout)
        self._prompts = SoftPrompts(arena) if arena.layout.num_virtual_tokens else None
        # the body written out computes adapters in its own dtype
        self._arena = arena if self._body is None else arena.replace(arena.values_KP.to(self._body.dtype))
        self._read: list[PackedRows] = []
        self._buckets: list[CacheBucket] = []
        self._rows_n = torch.zeros(0, dtype=torch.int64, device=base.device)
        """The rows of a call that are sequences, in the order in which these lie in the buckets."""
        self._newest: dict[tuple[torch.Size, ...], Newest] = {}
        """By the shapes of queries, keys and values."""
        self._position_B = torch.zeros(0, dtype=torch.int64, device=base.device)
        self._longest = 0
        self._add_low_rank_: inference.LowRank | None = None
        self._num_groups = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values held."""
        sources: list[PackedRows | CacheBucket] = [*self._read, *self._buckets]
        return sum(states.nbytes for source in sources for pair in source.pairs.values() for states in pair)

    def read(self, batch: PackedBatch, members: Sequence[Growing]) -> torch.Tensor:
        """Read prompts and return the final hidden state of the last token of each, (B, d).

        Args:
            batch: of K clients, with the virtual tokens of the arena's layout; its supervised rows are the prompts'
                last ones.
            members: its sequences, in order.
        """
        base, device = self._base, self._base.device
        rows = PackedRows(members, batch)
        packing = base.plan(batch)
        tokens_N, positions_N = batch.tokens_N.to(device), batch.positions_N.to(device)
        last_B = batch.supervised_rows_M.to(device)
        soften = None if self._prompts is None else self._prompts.into(batch.rows_per_client)
        if self._body is None:
            with attached(base, self._arena, batch.rows_per_client):
                hidden_Nd = self._stock(tokens_N, positions_N, soften, fedmira_cache=rows, fedmira_packing=packing)
                hidden_Bd = hidden_Nd[last_B]
        else:

            def look_back(
                block: int, query_NHD: torch.Tensor, key_NGD: torch.Tensor, value_NGD: torch.Tensor, settings: Settings
            ) -> torch.Tensor:
                query, key, value = (states.transpose(0, 1)[None] for states in (query_NHD, key_NGD, value_NGD))
                return _read(rows, block, query, key, value, packing, settings).squeeze(0)

            adapters = fused.bind(self._body, self._arena, None, frozenset())
            hidden_Bd = inference.hidden(
                self._body,
                self._body.embed(tokens_N, positions_N, soften),
                self._body.rotation(positions_N, packing.longest),
                inference.of_rows(adapters, assign_rows(batch.rows_per_client, device)),
                look_back,
                inference.Wanted(last_B, inference.of_rows(adapters, assign_rows(batch.supervised_per_client, device))),
            )
        self._read.append(rows)
        return hidden_Bd

    @contextmanager
    def rows(self, names_B: Sequence[int | None], clients: Sequence[int]) -> Iterator[None]:
        """Inside the `with` block, row i of a call is the sequence `names_B[i]`.

        Args:
            names_B: None is a row that looks at nothing. Sequences without a row leave for good.
            clients: whose adapter each group of rows uses; groups have the same number of rows.
        """
        self._arrange(names_B)
        arena = self._arena.replace(self._arena.values_KP[list(clients)])
        rows_per_group = [len(names_B) // len(clients)] * len(clients)
        if self._body is None:
            with attached(self._base, arena, rows_per_group):
                yield
        else:
            adapters = fused.bind(self._body, arena, None, frozenset())
            self._add_low_rank_ = inference.of_equal_groups(self._body, adapters)
            self._num_groups = len(clients)
            yield

    def advance(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Add one token to every sequence and return the final hidden state of each row, (B, d)."""
        if self._body is None:
            hidden_Bd = self._stock(tokens_B, self._position_B, fedmira_cache=self)
        else:
            assert self._add_low_rank_ is not None, "advance is called inside rows"
            x_Bd = self._body.embed(tokens_B, self._position_B)
            rotation = self._body.rotation(self._position_B, self._longest)
            x_Cnd = x_Bd.view(self._num_groups, -1, x_Bd.shape[1])
            hidden_Bd = inference.hidden(self._body, x_Cnd, rotation, self._add_low_rank_, self.attend).flatten(0, 1)
        self._position_B += 1
        for bucket in self._buckets:
            bucket.grow()
        return hidden_Bd

    def attend(
        self,
        module: Hashable,
        query_BHD: torch.Tensor,
        key_BGD: torch.Tensor,
        value_BGD: torch.Tensor,
        settings: Settings,
    ) -> torch.Tensor:
        """Attention of the newest tokens, (B, H, D)."""
        states = (query_BHD, key_BGD, value_BGD)
        shapes = tuple(each.shape for each in states)
        if shapes not in self._newest:
            self._newest[shapes] = Newest(self._buckets, self._rows_n, states)
        return self._newest[shapes].look_back(module, states, settings)

    def _arrange(self, names_B: Sequence[int | None]) -> None:
        """Bring the sequences that go on into buckets, and let go of the others."""
        sources: list[PackedRows | CacheBucket] = [*self._read, *self._buckets]
        held = {
            member.name: (member, source, index) for source in sources for index, member in enumerate(source.members)
        }
        rows = [row for row, name in enumerate(names_B) if name is not None]
        names = [name for name in names_B if name is not None]
        position_B = torch.zeros(len(names_B), dtype=torch.int64)
        position_B[rows] = torch.tensor([held[name][0].length for name in names], dtype=torch.int64)
        self._position_B = position_B.to(self._base.device)
        self._longest = max((held[name][0].length + held[name][0].room for name in names), default=0)
        self._read, self._buckets, self._newest = [], [], {}
        moves = []
        order: list[int] = []
        for group in group_by_length([held[name][0].length for name in names], self._bucket_tokens(sources)):
            bucket = CacheBucket([held[names[i]][0] for i in group], self._base.device)
            self._buckets.append(bucket)
            order += [rows[i] for i in group]
            for source in sources:
                places = [(held[names[i]][2], there) for there, i in enumerate(group) if held[names[i]][1] is source]
                if places:
                    moves.append((source, bucket, source.move(bucket, places)))
        self._rows_n = torch.tensor(order, dtype=torch.int64, device=self._base.device)
        for module in list(sources[0].pairs) if sources else []:
            for bucket in self._buckets:
                bucket.allocate(module, sources[0].pairs[module])
            for source, bucket, move in moves:
                for states, into in zip(source.pairs[module], bucket.pairs[module], strict=True):
                    move(states, into)
            # one module at a time is held twice, not the whole cache
            for source in sources:
                source.free(module)

    def _stock(
        self, tokens_N: torch.Tensor, positions_N: torch.Tensor, soften: Soften | None = None, **attention: Any
    ) -> torch.Tensor:
        with attention_of(self._base.model.config, CACHED):
            output = self._base.model.base_model(
                **self._base.inputs(tokens_N, soften), position_ids=positions_N[None], use_cache=False, **attention
            )
        hidden_Nd: torch.Tensor = output.last_hidden_state.squeeze(0)
        return hidden_Nd

    def _bucket_tokens(self, sources: Sequence[PackedRows | CacheBucket]) -> float:
        """How many tokens' keys and values could be read in the time of one more bucket, in one module."""
        bytes_per_token = max(
            (
                2 * pair.keys.shape[1] * pair.keys.shape[3] * pair.keys.element_size()
                for source in sources
                for pair in source.pairs.values()
            ),
            default=1,
        )
        return (_CPU_BUCKET_BYTES if self._base.device.type == "cpu" else _BUCKET_BYTES) / bytes_per_token


def check_growing(base: BaseModel) -> None:
    """Compare the last tokens of two short sequences, each added to what was read of it, with the stock model's.

    A family that keeps more or something else than keys and values is found here and not after all rounds.

    Raises:
        SetupError: their logits differ, or the family cannot run so.
    """
    lengths, vocabulary = (3, 5), int(base.model.config.get_text_config().vocab_size)
    random = torch_generator(0, "self-check", "growing")
    sequences = [torch.randint(vocabulary, (length,), generator=random) for length in lengths]
    read = [TokenizedExample(one.int().numpy(), len(one) - 1, str(name)) for name, one in enumerate(sequences)]
    cache, reason = KeyValueCache(base, base.no_adapter), ""
    try:
        with torch.inference_mode():
            cache.read(pack([read]), [Growing(name, length - 1, 1) for name, length in enumerate(lengths)])
            with cache.rows(range(len(lengths)), [0]):
                grown_BV = base.logits(cache.advance(torch.stack([one[-1] for one in sequences]).to(base.device)))
            stock_BV = torch.stack(
                [base.model(input_ids=one[None].to(base.device), use_cache=False).logits[0, -1] for one in sequences]
            )
        if apart := unlike(base, grown_BV, stock_BV):
            reason = f"its logits {apart}"
    except MISUNDERSTANDINGS as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise SetupError(
            f"fedmira cannot write answers with the family {base.model.config.get_text_config().model_type!r} of the "
            f"base model {base.name} ({reason}); set evaluation.generation.enabled to false, or use a GPT-2, Llama, "
            "Qwen, Mistral or Gemma model"
        )


def _read(
    rows: PackedRows,
    module: Hashable,
    query_1HND: torch.Tensor,
    key_1GND: torch.Tensor,
    value_1GND: torch.Tensor,
    packing: Packing,
    settings: Settings,
) -> torch.Tensor:
    """Keep the keys and values of prompts and return what their rows see, (1, N, H, D)."""
    if module in rows.pairs:
        raise SetupError("fedmira cannot write answers with a model that looks back twice in one layer")
    rows.pairs[module] = Pair(key_1GND, value_1GND)
    output_1NHD: torch.Tensor
    output_1NHD, _ = ALL_ATTENTION_FUNCTIONS[PACKED](
        None, query_1HND, key_1GND, value_1GND, None, fedmira_packing=packing, **settings._asdict()
    )
    return output_1NHD


def _cached_attention_forward(
    module: torch.nn.Module,
    query_1HND: torch.Tensor,
    key_1GND: torch.Tensor,
    value_1GND: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    fedmira_cache: PackedRows | KeyValueCache,
    fedmira_packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Keep the keys and values of prompts, or look back over those kept; (1, N, H, D), as transformers expects."""
    settings = Settings(scaling, sliding_window, softcap)
    if isinstance(fedmira_cache, PackedRows):
        assert fedmira_packing is not None
        return _read(fedmira_cache, module, query_1HND, key_1GND, value_1GND, fedmira_packing, settings), None
    query_BHD, key_BGD, value_BGD = (states[0].transpose(0, 1) for states in (query_1HND, key_1GND, value_1GND))
    return fedmira_cache.attend(module, query_BHD, key_BGD, value_BGD, settings)[None], None


ALL_ATTENTION_FUNCTIONS.register(CACHED, _cached_attention_forward)
