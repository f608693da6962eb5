"""Why a method cannot be used with other settings of a run, in words for whoever wrote them. No torch, no transformers.

Knows nothing about files; `config` asks when a config is read, `studies` for every method of a comparison.
"""

from __future__ import annotations

from typing import get_args

from fedmira.config.exchange import ExchangeConfig
from fedmira.config.graph import LOW_RANK_GRAPHS, GraphKind
from fedmira.config.method import METHOD_SECTIONS
from fedmira.config.method_section import AdapterKind, MethodSection
from fedmira.config.training import TrainingConfig

_OF_GRADIENTS = ("optimizer", "weight_decay", "beta1", "beta2", "epsilon", "momentum", "keep_moments", "clip_norm")
"""Keys of `training` that say what is made of gradients."""


def methods_for(kind: AdapterKind) -> tuple[str, ...]:
    """Names of the methods that can use adapters of `kind`."""
    return tuple(name for name, section in METHOD_SECTIONS.items() if kind in section.kinds)


def refusal(method: MethodSection, kind: AdapterKind) -> str:
    """Why `method` cannot use adapters of `kind`; empty if it can.

    >>> from fedmira.config.method import method_with_defaults
    >>> refusal(method_with_defaults("fedit"), "prompt")
    ''
    """
    if kind not in method.kinds:
        usable = ", ".join(method.kinds)
        return f"method.name = {method.name} cannot use model.adapter.kind = {kind}; it can use {usable}"
    mixing = getattr(method, "mixing", "auto")
    if kind != "lora" and mixing not in ("auto", "factors"):
        return (
            f"method.mixing = {mixing} mixes low-rank products, and model.adapter.kind = {kind} has none; use factors"
        )
    if kind in ("prompt", "p_tuning") and getattr(method, "depth", None):
        return (
            f"method.depth has no effect with model.adapter.kind = {kind}, which lies before all layers; "
            "remove it, or use kind: lora or full"
        )
    graph = getattr(method, "graph", None)
    if kind != "lora" and graph is not None and graph.kind in LOW_RANK_GRAPHS:
        others = (one for one in get_args(GraphKind) if one not in LOW_RANK_GRAPHS)
        return (
            f"method.graph.kind = {graph.kind} compares low-rank products, and model.adapter.kind = {kind} has none; "
            f"use {', '.join(others)}"
        )
    return ""


def asks_for_validation(method: MethodSection) -> tuple[str, ...]:
    """What of `method` rests on the clients' validation examples.

    >>> from fedmira.config.method import method_with_defaults
    >>> asks_for_validation(method_with_defaults("mira"))
    ('method.choice',)
    """
    graph, choice = getattr(method, "graph", None), getattr(method, "choice", None)
    asked = []
    if choice is not None and choice.enabled:
        asked.append("method.choice")
    if getattr(method, "strength", None) == "auto":
        asked.append("method.strength = auto")
    if graph is not None and graph.kind == "trust":
        asked.append("method.graph.kind = trust")
    if method.rests_on_validation:
        asked.append(method.rests_on_validation)
    return tuple(asked)


def refusal_beside(method: MethodSection, exchange: ExchangeConfig, client_ranks: bool, keep_moments: bool) -> str:
    """Why `method` cannot be used beside what other sections ask for; empty if it can.

    Args:
        method: the `method` section.
        exchange: what happens to what crosses.
        client_ranks: whether clients have adapters of different ranks.
        keep_moments: whether clients go on with their optimizer's moments.

    >>> from fedmira.config.method import method_with_defaults
    >>> refusal_beside(method_with_defaults("fedit"), ExchangeConfig(), client_ranks=True, keep_moments=True)
    ''
    """
    if method.alternates and keep_moments:
        return (
            f"training.keep_moments = true would move tensors in rounds in which method.name = {method.name}, which "
            "trains some in one round and others in the next, lets them rest; remove it"
        )
    if method.draws_factors and keep_moments:
        return (
            "training.keep_moments = true would carry moments of one pair of factors over to another, as "
            f"method.name = {method.name} starts each round from new random factors; remove it"
        )
    return (
        _refusal_of_scalars(method, exchange, client_ranks)
        or (_refusal_of_ranks(method) if client_ranks else "")
        or _refusal_of_feedback(method, exchange)
        or (_refusal_under_noise(method) if exchange.privacy.enabled else "")
    )


def refusal_of_training(method: MethodSection, training: TrainingConfig) -> str:
    """Why `training` cannot be as it is where `method` alone is carried out; empty if it can.

    Not asked for a comparison, in which the same section is meant for its other methods, too.

    >>> from fedmira.config.method import method_with_defaults
    >>> refusal_of_training(method_with_defaults("fedit"), TrainingConfig(optimizer="adam"))
    ''
    """
    changed = training.changed(_OF_GRADIENTS) if method.sends_scalars else []
    if not changed:
        return ""
    have, them = ("have", "them") if len(changed) > 1 else ("has", "it")
    return (
        f"{', '.join(f'training.{key}' for key in changed)} {have} no effect with method.name = {method.name}, whose "
        f"clients train without gradients; remove {them}, or take a method that trains with them, such as fedit"
    )


def refusal_of_dtype(method: MethodSection, dtype: str) -> str:
    """Why `method` cannot be used with a base of that `model.dtype`; empty if it can.

    >>> from fedmira.config.method import method_with_defaults
    >>> refusal_of_dtype(method_with_defaults("fedit"), "bfloat16")
    ''
    """
    if not (method.moves_the_base and dtype in ("bfloat16", "float16")):
        return ""
    return (
        f"method.name = {method.name} adds to the weights of the base what {dtype} would mostly round away; set "
        "model.dtype to float32, or to auto, which is float32 with this method"
    )


def _refusal_of_scalars(method: MethodSection, exchange: ExchangeConfig, client_ranks: bool) -> str:
    """Why settings about tensors that cross do not go with `method`; empty if they do, or it sends tensors."""
    if not method.sends_scalars:
        return ""
    name = method.name
    instead = "take a method that sends tensors, such as fedit"
    for key in ("compression", "download_compression"):
        if (form := getattr(exchange, key)) != "none":
            return (
                f"exchange.{key} = {form} has no effect with method.name = {name}, which sends scalars and no tensors; "
                f"remove it, or {instead}"
            )
    if exchange.privacy.enabled:
        return (
            f"exchange.privacy covers tensors only, but method.name = {name} sends a scalar for each step, which "
            f"nothing would noise; switch exchange.privacy.enabled off, or {instead}"
        )
    if client_ranks:
        return (
            f"method.name = {name} moves all numbers of an adapter along random directions, so the components that "
            f"clients of smaller rank leave at 0 would be filled; remove model.adapter.client_ranks, or {instead}"
        )
    return ""


def _refusal_of_ranks(method: MethodSection) -> str:
    """Why `method` cannot be used by clients of different ranks; empty if it can, or sends scalars."""
    if method.clusters_by_factors:
        return (
            f"method.name = {method.name} finds clusters from the factors B, which are more alike among clients of one "
            "rank than of one task; remove model.adapter.client_ranks, or take mira, pfedgraph or ifca, which relate "
            "clients of all ranks"
        )
    if not method.moves_the_base or method.draws_factors:
        return ""
    return (
        f"method.name = {method.name} adds to the base, for everybody alike, what the mean of the factors gets wrong, "
        "but those of a smaller rank hold only a part of that mean; remove model.adapter.client_ranks, or take flora, "
        "which is exact for all ranks, or flexlora, which gives each rank the nearest pair"
    )


def _refusal_of_feedback(method: MethodSection, exchange: ExchangeConfig) -> str:
    """Why what compression leaves out of an upload of `method` cannot be added to the next; empty if it can."""
    new = "starts each round from new random factors" if method.draws_factors else ""
    if not getattr(method, "align", True):
        new = "hands out pairs that do not match those before them (align: false)"
    if not new or exchange.compression == "none" or not exchange.error_feedback:
        return ""
    return (
        f"method.name = {method.name} {new}, so what compression left out of the old ones would only "
        "disturb them; set exchange.error_feedback: false"
    )


def _refusal_under_noise(method: MethodSection) -> str:
    """Why `method` cannot be used with `exchange.privacy`, which covers adapters only; empty if it can."""
    if method.pools_examples:
        return (
            f"exchange.privacy noises adapters that clients send, and method.name = {method.name} trains on their "
            "examples in one place instead; take another method, or switch exchange.privacy.enabled off"
        )
    graph, choice = getattr(method, "graph", None), getattr(method, "choice", None)
    if choice is not None and choice.enabled:
        asks, instead = "each client's losses", "set method.choice.enabled: false"
    elif getattr(method, "strength", None) == "auto":
        asks, instead = "clients' losses", "set method.strength to a number"
    elif method.asks_for_losses:
        asks, instead = "clients' losses", "take a method that asks nobody, such as fedit"
    elif graph is not None and graph.kind == "trust":
        asks, instead = "clients' losses", "learn the graph from the adapters, method.graph.kind: gram"
    elif graph is not None and graph.kind == "embeddings":
        asks, instead = "embeddings of clients' prompts", "learn the graph from the adapters, method.graph.kind: gram"
    else:
        return ""
    name = method.name
    return (
        f"exchange.privacy covers adapters only, but method.name = {name} with these settings asks for {asks}, which "
        f"nothing would noise; {instead}, or switch exchange.privacy.enabled off"
    )
