"""Who holds what: the tables and rendered examples behind `fedmira data CONFIG`, as plain data.

Knows nothing about where it is printed, nor how clients and tokens came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from fedmira.data.sources.files import unusable_line
from fedmira.data.tokenization import ClientTokens, TokenizationReport, TokenizedClient, TokenizedExample
from fedmira.types import Client, Federation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_TEXT_COLUMNS = 3
"""Columns of the table that are aligned to the left."""
NUM_NAMED = 5
"""Clients that are named with their duplicates."""
NUM_SHOWN = 40
"""Clients whose example people are shown: those of a thousand would push the table out of sight."""


class ClientRow(NamedTuple):
    """One client in the table. Token numbers are over all its splits."""

    client: str
    task: str
    category: str
    train: int
    """Examples, here and in the next two."""
    validation: int
    test: int
    mean_tokens: float
    longest: int
    supervised_share: float
    """Supervised tokens over all tokens."""
    truncated_prompts: int
    dropped_examples: int
    duplicate_examples: int
    """Beyond the first of those with the same texts, turns and answers; they are kept."""


class Piece(NamedTuple):
    """One token of a rendered example; characters that span tokens are one piece."""

    text: str
    supervised: bool


class RenderedExample(NamedTuple):
    """The first training example of one client as the model sees it."""

    client: str
    id: str
    pieces: tuple[Piece, ...]


class Description(NamedTuple):
    """Everything `fedmira data` shows."""

    template: str
    max_length: int
    rows: tuple[ClientRow, ...]
    total: ClientRow
    """Sums over the clients; its name is "total"."""
    samples: tuple[RenderedExample, ...]
    """One of each client, or of the first ones."""
    dropped: tuple[tuple[str, tuple[str, ...]], ...]
    """(client, ids of its first dropped examples) of the clients that lost some."""
    provenance: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """The same as JSON-able data."""
        return {
            "template": self.template,
            "max_length": self.max_length,
            "clients": [row._asdict() for row in self.rows],
            "total": self.total._asdict(),
            "samples": [
                {"client": s.client, "id": s.id, "pieces": [piece._asdict() for piece in s.pieces]}
                for s in self.samples
            ],
            "dropped": {client: list(ids) for client, ids in self.dropped},
            "provenance": self.provenance,
        }

    def text(self) -> str:
        """The same for people: the table, what did not come to be trained on, and each client's example, `marked`.

        Control characters of the data are in it as they are: whoever prints it to a terminal escapes them.
        """
        lines = [*_table(self.rows, self.total), ""]
        lines += [
            f"template {self.template}, at most {self.max_length} tokens: {self.total.truncated_prompts} prompts were "
            f"cut, {self.total.dropped_examples} examples were dropped for answers that are too long"
        ]
        told = (unusable_line(self.provenance), _left_out_line(self.provenance), _duplicates_line(self.rows))
        lines += [line for line in told if line]
        lines += [f"dropped at {client}: {', '.join(ids)} ..." for client, ids in self.dropped]
        for sample in self.samples:
            lines += ["", f"--- {sample.client} (example {sample.id}); [[...]] is trained on", marked(sample)]
        if left_out := len(self.rows) - len(self.samples):
            lines += ["", f"--- {left_out:,} more clients: --json shows an example of each"]
        return "\n".join(lines)


def describe(
    federation: Federation,
    tokenized: Sequence[TokenizedClient],
    report: TokenizationReport,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int | None = None,
) -> Description:
    """Gather what there is to know about the clients' data.

    Args:
        federation: the clients before tokenization, for their duplicates and its provenance.
        tokenized: its clients as `tokenize_federation` returns them; dropped examples are not counted in the splits.
        report: of the same call.
        tokenizer: of the same call.
        num_samples: render an example of so many of the first clients; None: of all.
    """
    clients = zip(tokenized, report.clients, federation.clients, strict=True)
    rows = tuple(_row(client, counts, _num_duplicates(held)) for client, counts, held in clients)
    return Description(
        template=report.template,
        max_length=report.max_length,
        rows=rows,
        total=_total(rows, report.clients),
        samples=tuple(
            RenderedExample(client.name, client.train[0].id, token_pieces(client.train[0], tokenizer))
            for client in tokenized[:num_samples]
        ),
        dropped=tuple((c.name, c.first_dropped) for c in report.clients if c.dropped_examples),
        provenance=dict(federation.provenance),
    )


def marked(sample: RenderedExample) -> str:
    """Return the example as one string with the supervised tokens between double square brackets.

    >>> marked(RenderedExample("a", "1", (Piece("2 + 2 =", False), Piece(" 4", True), Piece("</s>", True))))
    '2 + 2 =[[ 4</s>]]'
    """
    parts = []
    for supervised, pieces in groupby(sample.pieces, key=lambda piece: piece.supervised):
        joined = "".join(piece.text for piece in pieces)
        parts.append(f"[[{joined}]]" if supervised else joined)
    return "".join(parts)


def token_pieces(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
    """Decode an example token by token. Joined, the pieces of prompt and of answer read as each decodes in one go."""
    prompt = _decoded(example.tokens[: example.prompt_length].tolist(), tokenizer)
    answer = _decoded(example.tokens[example.prompt_length :].tolist(), tokenizer)
    return (*(Piece(text, False) for text in prompt), *(Piece(text, True) for text in answer))


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds; tokens that end within a character are joined with the next ones.

    Decodes each token together with the piece before it, as tokenizers strip or add spaces at the beginning of a text.
    """
    texts: list[str] = []
    before = start = 0
    for end in range(1, len(ids) + 1):
        context = str(tokenizer.decode(ids[before:start], clean_up_tokenization_spaces=False))
        text = str(tokenizer.decode(ids[before:end], clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd") and end < len(ids):
            continue
        texts.append(text[len(context) :])
        before, start = start, end
    return texts


def _left_out_line(data: Mapping[str, Any]) -> str:
    num_left_out = data.get("partition", {}).get("examples_left_out", 0)
    if not num_left_out:
        return ""
    return f"left out: {num_left_out:,} examples, which data.partition.examples_per_client leaves to no client"


def _num_duplicates(client: Client) -> int:
    held = [*client.train, *client.validation, *client.test]
    return len(held) - len({replace(example, id="") for example in held})


def _duplicates_line(rows: Sequence[ClientRow]) -> str:
    having = sorted((row for row in rows if row.duplicate_examples), key=lambda row: -row.duplicate_examples)
    if not having:
        return ""
    named = ", ".join(f"{row.client} {row.duplicate_examples:,}" for row in having[:NUM_NAMED])
    more = ", ..." if len(having) > NUM_NAMED else ""
    count = sum(row.duplicate_examples for row in having)
    return f"duplicates: {count:,} examples are the same as another one of their client and are kept ({named}{more})"


def _row(client: TokenizedClient, counts: ClientTokens, num_duplicates: int) -> ClientRow:
    return ClientRow(
        client=client.name,
        task=client.examples.task,
        category=client.examples.category,
        train=len(client.train),
        validation=len(client.validation),
        test=len(client.test),
        mean_tokens=counts.num_tokens / max(counts.num_examples, 1),
        longest=counts.longest,
        supervised_share=counts.num_supervised_tokens / max(counts.num_tokens, 1),
        truncated_prompts=counts.truncated_prompts,
        dropped_examples=counts.dropped_examples,
        duplicate_examples=num_duplicates,
    )


def _total(rows: Sequence[ClientRow], counts: Sequence[ClientTokens]) -> ClientRow:
    num_tokens = sum(count.num_tokens for count in counts)
    return ClientRow(
        client="total",
        task="",
        category="",
        train=sum(row.train for row in rows),
        validation=sum(row.validation for row in rows),
        test=sum(row.test for row in rows),
        mean_tokens=num_tokens / max(sum(count.num_examples for count in counts), 1),
        longest=max((count.longest for count in counts), default=0),
        supervised_share=sum(count.num_supervised_tokens for count in counts) / max(num_tokens, 1),
        truncated_prompts=sum(row.truncated_prompts for row in rows),
        dropped_examples=sum(row.dropped_examples for row in rows),
        duplicate_examples=sum(row.duplicate_examples for row in rows),
    )


def _table(rows: Sequence[ClientRow], total: ClientRow) -> list[str]:
    heads = ("client", "task", "category", "train", "val", "test", "tokens", "longest", "trained on", "cut", "dropped")
    cells = [
        (
            *(row.client, row.task, row.category),
            *(str(row.train), str(row.validation), str(row.test)),
            *(f"{row.mean_tokens:.1f}", str(row.longest), f"{row.supervised_share:.1%}"),
            *(str(row.truncated_prompts), str(row.dropped_examples)),
        )
        for row in (*rows, total)
    ]
    lines = [heads, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if column < NUM_TEXT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
