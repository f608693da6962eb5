"""What is known before the first round not to be as whoever wrote the config may think: lines for people.

Nothing here ends a run. Knows nothing about rounds that are over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from fedmira.assembly import Assembly
from fedmira.config.exchange import WEAK_EPSILON, PrivacyConfig
from fedmira.config.graph import LOW_RANK_GRAPHS
from fedmira.config.refusals import asks_for_validation
from fedmira.config.run import RunConfig
from fedmira.data.packing import batches_in_round
from fedmira.data.sources.files import unusable_line
from fedmira.evaluation.judge import shortened_line
from fedmira.exchange.messages import crossing
from fedmira.exchange.privacy import epsilon, max_uploads
from fedmira.federation import participation
from fedmira.federation.known_graphs import resolve_graph
from fedmira.federation.similarity import MINIMUM_CLIENTS, low_rank_pairs
from fedmira.formats import counted, format_bytes
from fedmira.training.memory import available_bytes
from fedmira.types import Arena, Layout, Participants

_CUT = {"input": "input, or of their prompt where that is not enough", "beginning": "prompt"}
_JUDGING_SHARE = 0.2
"""Of the time of training: what is advised where judging takes longer than training itself."""


def warnings(parts: Assembly) -> tuple[str, ...]:
    """Return what should be said before a run of `parts` begins, in the order of the journey."""
    lines = (
        unusable_line(parts.federation.provenance),
        _alone_line(parts),
        _shortened_training_line(parts),
        _unanswered_line(parts),
        _known_graph_line(parts),
        _learned_graph_line(parts.config, len(parts.clients.names)),
        _inner_products_line(parts),
        *_phase_lines(parts.config),
        _judging_line(parts),
        shortened_line(parts.base, parts.layout, parts.tokenized, parts.config.evaluation),
        *_privacy_lines(parts),
    )
    return tuple(line for line in lines if line)


def _alone_line(parts: Assembly) -> str:
    """What one client alone can come from."""
    names, data = parts.clients.names, parts.config.data
    if len(names) > 1:
        return ""
    by_field = data.partition.by == "field" and hasattr(data, "client_field")
    where = "give each client a file of its own, or set data.client_field to the field that names it"
    how = where if by_field else f"see data.partition.by = {data.partition.by}"
    return f"{names[0]!r} is the only client, so there is nobody to learn from; {how}"


def _shortened_training_line(parts: Assembly) -> str:
    """What clients hold and is not trained on, or not whole, for its length."""
    report = parts.tokenization
    held = sum(len(client.train) + len(client.validation) + len(client.test) for client in parts.federation.clients)
    counts = (
        (report.dropped_examples, "left out, as their answers do not fit"),
        (report.truncated_prompts, f"read without the beginning of their {_CUT[parts.config.data.cut]}"),
    )
    found = [f"{count:,} {what}" for count, what in counts if count]
    if not found:
        return ""
    return (
        f"data.max_length = {report.max_length}: of {held:,} examples {' and '.join(found)}; `fedmira data` says whose"
    )


def _unanswered_line(parts: Assembly) -> str:
    """What has no effect because nobody holds validation examples."""
    asked = asks_for_validation(parts.config.method)
    if not asked or any(client.validation for client in parts.tokenized):
        return ""
    return (
        f"no client holds validation examples, so nothing comes of {' and '.join(asked)} in method.name = "
        f"{parts.config.method.name}; set data.partition.validation to 0.15, for example"
    )


def _known_graph_line(parts: Assembly) -> str:
    """Whether a graph that is known joins nobody."""
    method, num_clients = parts.config.method, len(parts.clients.names)
    section = getattr(method, "graph", None)
    graph = None if section is None else resolve_graph(section, parts.clients, parts.given_graph)
    if graph is None or graph.num_edges or num_clients < 2:
        return ""
    few = num_clients < MINIMUM_CLIENTS
    unlike = f"fewer than {MINIMUM_CLIENTS} clients cannot be compared" if few else "no two clients' prompts are alike"
    why = {"labels": "no two clients have the same task", "embeddings": unlike}.get(graph.name, "it has no edges")
    learns = not (few or method.needs_known_graph or parts.config.model.adapter.kind != "lora")
    instead = ", or kind: gram to find out who is" if learns else ""
    return (
        f"method.graph.kind = {graph.name} joins nobody with anybody, as {why}: everybody trains alone, as with "
        f"local_only; set method.graph.kind: uniform where they are related{instead}"
    )


def _learned_graph_line(config: RunConfig, num_clients: int) -> str:
    """Whether nothing comes of a learned graph: clients or rounds are too few."""
    graph, rounds = getattr(config.method, "graph", None), config.federation.rounds
    if graph is None or not graph.is_learned:
        return ""
    everybody = graph.warmup == "uniform" and graph.settled
    joined = "everybody is joined with everybody" if everybody else "nobody is joined with anybody"
    # predictions are compared among the participants too
    if graph.kind == "probe" or config.method.relates_participants:
        num_clients = participation.num_participants(num_clients, config.federation)
    if num_clients < MINIMUM_CLIENTS:
        otherwise = "warmup: none where they are not related" if everybody else "kind: uniform where they are related"
        return (
            f"method.graph.kind = {graph.kind} cannot tell who is related among fewer than {MINIMUM_CLIENTS} clients "
            f"at a time: {joined}; set method.graph.{otherwise}"
        )
    # what is asked after one round serves the next, and a graph needs one before it that it can agree with
    first = (2 if graph.asks else 1) + (graph.settled > 0)
    if rounds >= first:
        return ""
    return (
        f"federation.rounds = {rounds}: {joined} to the end, and no learned graph is used before round {first} with "
        f"method.graph.kind = {graph.kind} and settled = {graph.settled:g}"
    )


def _inner_products_line(parts: Assembly) -> str:
    """Whether what a graph is learned from does not fit in memory: a number for each layer and two clients."""
    graph, num_clients = getattr(parts.config.method, "graph", None), len(parts.clients.names)
    if graph is None or graph.kind not in LOW_RANK_GRAPHS:
        return ""
    num_layers = len(low_rank_pairs(parts.layout))
    # those of the round before beside those of now
    needed = 2 * 8 * num_layers * num_clients**2
    free = available_bytes(torch.device("cpu"))
    if needed <= free:
        return ""
    return (
        f"method.graph.kind = {graph.kind} compares {num_clients:,} clients in each of {num_layers} layers, which "
        f"takes {format_bytes(needed)} where {format_bytes(free)} are free; take fewer clients or "
        "model.adapter.targets, or a graph that is known before the first round, such as kind: labels"
    )


def _phase_lines(config: RunConfig) -> list[str]:
    """Which other phases take all rounds, so that what should follow them, or come before, never happens."""
    rounds, warming, alone = config.federation.rounds, config.training.warmup_rounds, "as with local_only"
    clustered = getattr(config.method, "warmup_rounds", 0)
    local = getattr(config.method, "local_rounds", None) or 0
    no_quarter = getattr(config.method, "local_rounds", 0) is None and round(rounds / 4) == 0
    found = (
        (warming >= rounds, f"training.warmup_rounds = {warming:g}", "training.learning_rate is never reached"),
        (clustered > rounds, f"method.warmup_rounds = {clustered}", f"clients train alone, {alone}"),
        (local >= rounds, f"method.local_rounds = {local}", f"nothing is averaged, {alone}"),
        (no_quarter, "method.local_rounds = null", "no round is left for local fine-tuning, as with fedit"),
    )
    return [f"{key} and federation.rounds = {rounds}: {what}" for holds, key, what in found if holds]


def _judging_line(parts: Assembly) -> str:
    """Whether the validation losses between rounds take longer than training."""
    config, training, every = parts.config, parts.config.training, parts.config.evaluation.every
    between = (config.federation.rounds - 1) // every
    trained = 0
    for id_ in participation.draw(len(parts.clients.names), config.federation, config.seed, 1).ids:
        client = parts.tokenized[id_]
        batches = batches_in_round(client, training, config.seed, 1)
        trained += sum(client.train[place].num_inputs for batch in batches for place in batch)
    judged = sum(example.num_inputs for client in parts.tokenized for example in client.validation)
    # of one token, to that of judging it
    as_long_as_training = judged / (3 * max(trained, 1))
    if not between or as_long_as_training <= every:
        return ""
    times, rarer = as_long_as_training / every, math.ceil(as_long_as_training / _JUDGING_SHARE)
    turns = f"{every} rounds" if every > 1 else "round"
    return (
        f"evaluation.every = {every}: judging all validation examples will take about {times:.1f} times as long as "
        f"training, {judged:,} tokens after every {turns} for {trained:,} trained on in each; with "
        f"evaluation.every: {rarer} it takes a fifth"
    )


def _privacy_lines(parts: Assembly) -> list[str]:
    """What noise on uploads promises after all rounds, whether it is larger than what clients learn, and whether the
    budget allows it."""
    privacy, federation = parts.config.exchange.privacy, parts.config.federation
    if not privacy.enabled:
        return []
    uploads, most_numbers = _planned_uploads(parts)
    if not any(uploads):
        return ["exchange.privacy has no effect: with this method nothing is uploaded"]
    num_clients, rounds, spent, drawn = len(parts.clients.names), federation.rounds, Counter[int](), Counter[int]()
    most_by_round = []
    for round_, number in enumerate(uploads, start=1):
        ids = participation.draw(num_clients, federation, parts.config.seed, round_).ids
        drawn.update(ids)
        spent.update(dict.fromkeys(ids, number))
        most_by_round.append(max(spent.values()))
    (client, most), *_ = spent.most_common(1)
    value = epsilon(most, privacy.noise_multiplier, privacy.delta)
    who = f"takes part in all {rounds} rounds" if rounds > 1 else "takes part"
    if drawn[client] < rounds:
        who = f"is drawn most often, for {drawn[client]} of {rounds} rounds,"
    line = f"exchange.privacy: a client that {who} gives away epsilon {value:.4g} at delta {privacy.delta:g}"
    if value > WEAK_EPSILON:
        line += (
            f"; above about {WEAK_EPSILON:g} that protects little: raise noise_multiplier or lower federation.rounds"
        )
    lines = [line]
    if privacy.noise_seed == "run":
        lines.append(
            f"exchange.privacy.noise_seed = run: the noise follows from seed = {parts.config.seed}, so that the run "
            "can be repeated, and whoever knows the seed can take it out of what was sent; before you give adapters "
            "away, set it to system"
        )
    most_learned, noise = privacy.clip_norm, privacy.noise_multiplier * privacy.clip_norm * math.sqrt(most_numbers)
    if noise > most_learned:
        lines.append(
            f"exchange.privacy: the noise of an upload has norm {_short(noise)} (noise_multiplier * clip_norm * "
            f"sqrt({most_numbers:,} numbers)), what a client learned at most clip_norm = {most_learned:g}: a mean over "
            "few clients is mostly noise, and losses can end above that of the base. A smaller model.adapter.rank, "
            "fewer targets and more clients per round help, and a smaller noise_multiplier at the cost of epsilon"
        )
    return [*lines, _budget_line(privacy, most_by_round)]


def _short(value: float) -> str:
    """Three digits, without an exponent where that is short.

    >>> _short(407.29), _short(3.0), _short(12345.6)
    ('407', '3', '12,346')
    """
    return f"{value:,.0f}" if 1000 <= value < 1e9 else f"{value:.3g}"


def _planned_uploads(parts: Assembly) -> tuple[list[int], int]:
    """How many rows a participant uploads in each round, and how many numbers the largest of them has."""
    rounds, num_clients = parts.config.federation.rounds, len(parts.clients.names)
    # what a plan sends depends on the groups and the round, not on sizes or values
    specs = parts.layout.specs
    small = Layout.of((spec.name, spec.group, spec.layer, (1,) * len(spec.shape)) for spec in specs)
    state = parts.method.init(Arena(small, torch.zeros(num_clients, small.num_parameters)), parts.clients)
    uploads, most_numbers = [], 0
    for round_ in range(1, rounds + 1):
        job = parts.method.plan(state, Participants(round_, (0,), round_ == rounds))
        groups = job.upload & set(parts.layout.groups)
        uploads.append(job.num_crossing if groups else 0)
        most_numbers = max(most_numbers, sum(spec.size for spec in crossing(parts.layout, groups)))
    return uploads, most_numbers


def _budget_line(privacy: PrivacyConfig, most_by_round: Sequence[int]) -> str:
    """Which round the privacy budget will not allow: the first by whose end a client has made too many uploads."""
    if privacy.budget is None:
        return ""
    most = max_uploads(privacy)
    refused = next((round_ for round_, number in enumerate(most_by_round, start=1) if number > most), None)
    if refused is None:
        return ""
    advice = "raise noise_multiplier or the budget"
    if most:
        advice = "what is spent by then stays spent: lower federation.rounds or raise noise_multiplier now"
    return (
        f"exchange.privacy.budget = {privacy.budget:g} is enough for {counted(most, 'upload')} of a client; "
        f"if all that are drawn send one, round {refused} will be refused; {advice}"
    )
