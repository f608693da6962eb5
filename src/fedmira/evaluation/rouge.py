"""Compares a generated answer with the acceptable ones: Rouge-L and exact match.

Rouge-L equals that of the rouge-score package without stemming, at the speed of a bit-parallel longest common
subsequence. It differs in one thing. That package sees ASCII letters and digits only: of a reference in another script
(Chinese, Russian) it sees nothing, or nothing but numbers, so that any answer with the same numbers would be right.
Here such a reference is compared by its Unicode words, or by characters where a script puts no spaces between words.
Knows nothing about models or about how answers were generated.

Source: C.-Y. Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, section 3.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

from fedmira.errors import DataError

_SEPARATORS = re.compile(r"[^a-z0-9]+")
# Han, Hiragana and Katakana, which put no spaces between words
_CJK = "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
# nor do Thai, Lao, Burmese and Khmer, whose letters carry marks and whose digits make numbers
_SOUTH_EAST_ASIAN = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f]"
_UNSPACED = re.compile(rf"(?=[^\W\d])(?:{_CJK}|{_SOUTH_EAST_ASIAN}(?:(?!\w){_SOUTH_EAST_ASIAN})*)")


def rouge_tokens(text: str) -> list[str]:
    """Lower-cased runs of ASCII letters and digits; everything else separates.

    >>> rouge_tokens("The U.S. won 3-1!")
    ['the', 'u', 's', 'won', '3', '1']
    """
    return [token for token in _SEPARATORS.split(text.lower()) if token]


def unicode_tokens(text: str) -> list[str]:
    """Case-folded runs of letters, digits and the marks on them, of any script; where a script puts no spaces between
    words (Chinese, Japanese, Thai, Lao, Burmese, Khmer), each letter with the marks on it.

    >>> unicode_tokens("\u0414\u0430, 2!"), unicode_tokens("\u4e16\u754c"), unicode_tokens("\u0e01\u0e31\u0e19")
    (['\u0434\u0430', '2'], ['\u4e16', '\u754c'], ['\u0e01\u0e31', '\u0e19'])
    """
    kept = "".join(map(_kept, unicodedata.normalize("NFKC", text.casefold())))
    return [token for token in _UNSPACED.sub(r" \g<0> ", kept).split() if any(map(str.isalnum, token))]


def _kept(character: str) -> str:
    # vowel signs of Indic scripts are marks, and make another word
    return character if character.isalnum() or unicodedata.category(character).startswith("M") else " "


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of tokens, 0 to 1; the best over the references.

    With LCS of length l, P = l / |prediction| and R = l / |reference|: F = 2 P R / (P + R), and 0 where either side
    has no token.

    Tokens are, on both sides, `unicode_tokens` where most letters of the reference are not ASCII, or where it has no
    letter and rouge-score would overlook digits; otherwise `rouge_tokens`, as in rouge-score. Digits do not count
    beside letters, as most scripts use the ASCII ones: where rouge-score sees "5" alone of a sentence with a number,
    "5" is as good as the sentence. A reference without any token, such as "+", gives 1 to the same text, apart from
    white space at both ends, else 0.

    Raises:
        DataError: there is no reference.

    >>> rouge_l("a small cat", ["the cat", "a small dog"])
    0.6666666666666666
    """
    _refuse_none(references)
    return max(_one_rouge_l(prediction, reference) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals a reference, apart from white space at both ends. Case and punctuation count.

    Raises:
        DataError: there is no reference.

    >>> exact_match(" Paris\\n", ["Lyon", "Paris"]), exact_match("paris", ["Paris"])
    (True, False)
    """
    _refuse_none(references)
    return prediction.strip() in {reference.strip() for reference in references}


def _one_rouge_l(prediction: str, reference: str) -> float:
    tokens = unicode_tokens if _is_overlooked(reference) else rouge_tokens
    if wanted := tokens(reference):
        return _f_measure(tokens(prediction), wanted)
    return float(bool(reference.strip()) and prediction.strip() == reference.strip())


def _is_overlooked(text: str) -> bool:
    """Whether most of its letters are not ASCII; where it has none, whether a decimal digit or all of it is not."""
    letters = [character.isascii() for character in text if character.isalpha()]
    if letters:
        return 2 * sum(letters) < len(letters)
    digits = [character for character in text if character.isalnum()]
    others = [digit for digit in digits if not digit.isascii()]
    return any(map(str.isdecimal, others)) or len(others) == len(digits)


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
