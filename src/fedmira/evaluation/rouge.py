"""Compares a generated answer with the acceptable ones: Rouge-L and exact match.

Rouge-L equals that of the rouge-score package without stemming, at the speed of a bit-parallel longest common
subsequence. Knows nothing about models or about how answers were generated.

Source: C.-Y. Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

from fedmira.errors import DataError

_SEPARATORS = re.compile(r"[^a-z0-9]+")


def rouge_tokens(text: str) -> list[str]:
    """Lower-cased runs of ASCII letters and digits; everything else separates.

    >>> rouge_tokens("The U.S. won 3-1!")
    ['the', 'u', 's', 'won', '3', '1']
    """
    return [token for token in _SEPARATORS.split(text.lower()) if token]


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of tokens, 0 to 1; the best over the references.

    With LCS of length l, P = l / |prediction| and R = l / |reference|: F = 2 P R / (P + R), and 0 where either side
    has no token.

    Raises:
        DataError: there is no reference.

    >>> rouge_l("a small cat", ["the cat", "a small dog"])
    0.6666666666666666
    """
    _refuse_none(references)
    predicted = rouge_tokens(prediction)
    return max(_f_measure(predicted, rouge_tokens(reference)) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals a reference, apart from white space at both ends. Case and punctuation count.

    Raises:
        DataError: there is no reference.

    >>> exact_match(" Paris\\n", ["Lyon", "Paris"]), exact_match("paris", ["Paris"])
    (True, False)
    """
    _refuse_none(references)
    return prediction.strip() in {reference.strip() for reference in references}


def _f_measure(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return 0.0
    # numbers instead of words: rapidfuzz compares hashes, and only those of small integers can never collide
    numbers = {token: number for number, token in enumerate({*predicted, *wanted})}
    common = LCSseq.similarity([numbers[token] for token in predicted], [numbers[token] for token in wanted])
    # the order of operations is that of rouge-score, so that results are equal to the last bit
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _refuse_none(references: Sequence[str]) -> None:
    if not references:
        raise DataError("an answer was compared with no reference; give at least one acceptable answer")
    if isinstance(references, str):
        raise DataError(f"references is the text {references[:40]!r}; give a list of texts, even of one")
