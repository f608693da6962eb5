"""Soft prompts of many clients in front of one frozen base: their virtual tokens are the first rows of each client.

A prompt is tuned as it is (kind `prompt`) or comes out of a small network that is tuned with it (kind `p_tuning`):
prompt = W3 relu(W2 relu(W1 e + b1) + b2) + b3, the multilayer perceptron of PEFT's prompt encoder. Gradients are added
to a gradient arena. Knows nothing about losses, optimizers or rounds.

Axes: C clients (rows of the arena), A clients that have packed rows, N packed rows, V virtual tokens, d hidden
features, H hidden features of the encoder, P parameters of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from fedmira.config.run import AdapterConfig
from fedmira.errors import ConfigError
from fedmira.model.base import BaseModel
from fedmira.model.body import Soften
from fedmira.randomness import torch_generator
from fedmira.types import Arena, Layout

PROMPT = "prompt"
ENCODER = "encoder"
"""The groups of tensors that a soft prompt consists of."""
_SHORTEST_TEXT = 8
"""Tokens that must remain for a sequence beside the virtual ones."""


def prompt_layout(base: BaseModel, adapter: AdapterConfig) -> Layout:
    """One tensor `prompt` (V, d): the embeddings of the virtual tokens (Lester et al., EMNLP 2021).

    Raises:
        ConfigError: the virtual tokens leave no room in the base's context, or the base needs more than embeddings.
    """
    _refuse_where_embeddings_are_not_all(base, adapter)
    longest = base.max_length - _SHORTEST_TEXT
    if adapter.num_virtual_tokens > longest:
        raise ConfigError(
            f"model.adapter.num_virtual_tokens = {adapter.num_virtual_tokens} leaves no room for text: {base.name} "
            f"reads at most {base.max_length} tokens; use {longest} or fewer"
        )
    features = int(base.model.get_input_embeddings().weight.shape[1])
    return _layout(((PROMPT, PROMPT, (adapter.num_virtual_tokens, features)),))


def p_tuning_layout(base: BaseModel, adapter: AdapterConfig) -> Layout:
    """`prompt` (V, d), the encoder's input, and its three layers: weights (H, d), (H, H), (d, H), each with a bias.

    The shapes of PEFT's `PromptEncoder` in its MLP form (Liu et al., GPT Understands, Too, 2021).

    Raises:
        ConfigError: the virtual tokens leave no room in the base's context.
    """
    (prompt,) = prompt_layout(base, adapter).specs
    num_tokens, features = prompt.shape
    hidden = adapter.encoder_hidden_size
    sizes = ((hidden, features), (hidden, hidden), (features, hidden))
    tensors: list[tuple[str, str, tuple[int, ...]]] = [(PROMPT, PROMPT, (num_tokens, features))]
    for number, (num_out, num_in) in enumerate(sizes):
        # PEFT counts the activations between them too
        tensors.append((f"{ENCODER}.{2 * number}.weight", ENCODER, (num_out, num_in)))
        tensors.append((f"{ENCODER}.{2 * number}.bias", ENCODER, (num_out,)))
    return _layout(tensors)


def _layout(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> Layout:
    # of no layer: a prompt stands before all of them
    return Layout.of((name, group, "", shape) for name, group, shape in tensors)


def _refuse_where_embeddings_are_not_all(base: BaseModel, adapter: AdapterConfig) -> None:
    """A virtual token has an embedding and no id, by which Gemma 3n and 4 look up something more for each layer."""
    if getattr(base.model.config.get_text_config(), "hidden_size_per_layer_input", None):
        raise ConfigError(
            f"model.adapter.kind = {adapter.kind} does not fit {base.name}: each of its layers looks up something of "
            "its own by a token's id, which a virtual token has none of; use model.adapter.kind = lora"
        )


def initial_prompt(base: BaseModel, layout: Layout, seed: int) -> torch.Tensor:
    """The row (P,) before round 1, in float32 on the CPU, drawn from the streams (seed, "adapter", ...).

    A prompt begins as the embeddings of tokens drawn from the vocabulary, which trains better than random directions
    (Lester et al., 2021, section 3.2). In front of an encoder it begins as standard normal numbers, and the encoder's
    layers as `torch.nn.Linear` does, uniform in +-1/sqrt(inputs): both as PEFT has them.
    """
    row_P = torch.zeros(layout.num_parameters, dtype=torch.float32)
    encoded = ENCODER in layout.groups
    num_inputs = 1
    for spec in layout.specs:
        part = row_P[spec.columns]
        draw = torch_generator(seed, "adapter", spec.name)
        if spec.group == ENCODER:
            # the bias of a layer follows its weight and has the same bound
            num_inputs = spec.shape[1] if len(spec.shape) == 2 else num_inputs
            bound = 1.0 / math.sqrt(num_inputs)
            part.uniform_(-bound, bound, generator=draw)
        elif encoded:
            part.normal_(generator=draw)
        else:
            # called and not looked up: some families scale what they look up
            embed = base.model.get_input_embeddings()
            chosen_V = torch.randint(len(embed.weight), (spec.shape[0],), generator=draw)
            part.copy_(embed(chosen_V.to(embed.weight.device)).detach().flatten())
    return row_P


def prompts_of(layout: Layout, values_CP: torch.Tensor) -> torch.Tensor:
    """What the virtual tokens are embedded as, (C, V, d): the encoder's outputs where there is one."""
    arena = Arena(layout, values_CP)
    return _encode([arena.view(spec) for spec in layout.specs])


class SoftPrompts:
    """The virtual tokens of an arena of soft prompts, for as long as the arena lies where it lies."""

    def __init__(
        self, arena: Arena, gradient_CP: torch.Tensor | None = None, trainable: frozenset[str] = frozenset()
    ) -> None:
        """See the arena.

        Args:
            arena: (C, P), on the device of the base. Its values may change between calls, not before backward is done.
            gradient_CP: where backward adds the gradients; None computes none.
            trainable: groups that get a gradient.
        """
        self._arena, self._trainable = arena, trainable
        self._gradients = None if gradient_CP is None else arena.replace(gradient_CP)

    def into(self, rows_per_client: Sequence[int]) -> Soften:
        """What puts each client's prompt into its first rows, among embeddings (N, d) of packed tokens.

        Args:
            rows_per_client: how many packed rows each row of the arena has, in order; 0 is allowed, fewer than the
                virtual tokens are not.
        """
        device = self._arena.values_KP.device
        ends = list(accumulate(rows_per_client))
        active = [client for client, rows in enumerate(rows_per_client) if rows]
        active_A = torch.tensor(active, dtype=torch.int64)
        starts_A = torch.tensor([ends[client] - rows_per_client[client] for client in active], dtype=torch.int64)
        virtual_V = torch.arange(self._arena.layout.num_virtual_tokens)
        rows_AV = (starts_A[:, None] + virtual_V).flatten().to(device)

        def soften(words_Nd: torch.Tensor) -> torch.Tensor:
            prompts_AVd = _encode(self._leaves(active_A.to(device)))
            return words_Nd.index_copy(0, rows_AV, prompts_AVd.flatten(0, 1).to(words_Nd.dtype))

        return soften

    def _leaves(self, active_A: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of some clients; what backward brings them is added to the gradient arena."""
        leaves = []
        for spec in self._arena.layout.specs:
            leaf_A = self._arena.view(spec).index_select(0, active_A)
            if self._gradients is not None and spec.group in self._trainable and torch.is_grad_enabled():
                leaf_A.requires_grad_()
                _pass_on(leaf_A, self._gradients.view(spec), active_A)
            leaves.append(leaf_A)
        return leaves


def _pass_on(leaf_A: torch.Tensor, gradient_C: torch.Tensor, active_A: torch.Tensor) -> None:
    """Let backward add the gradient of a leaf to the rows `active_A` of a gradient arena's view."""

    def add(gradient_A: torch.Tensor) -> None:
        gradient_C.index_add_(0, active_A, gradient_A)

    leaf_A.register_hook(add)  # type: ignore[no-untyped-call]


def _encode(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(A, V, d) from the tensors of an arena of soft prompts, in the order of its layout."""
    x_AVd, *encoder = tensors
    layers = list(zip(encoder[::2], encoder[1::2], strict=True))
    for number, (weight_AOI, bias_AO) in enumerate(layers):
        x_AVd = torch.baddbmm(bias_AO[:, None], x_AVd, weight_AOI.transpose(1, 2))
        if number + 1 < len(layers):
            x_AVd = torch.relu(x_AVd)
    return x_AVd
