"""Claims: Rouge-L is rouge-score's to the last bit, where that sees at least half of the reference; exact match
forgives white space at the ends and nothing else."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from fedmira.errors import DataError
from fedmira.evaluation.rouge import exact_match, rouge_l, rouge_tokens, unicode_tokens

ORACLE = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
ASCII_PIECES = [
    "the",
    "The",
    "cat",
    "CAT",
    "sat",
    "on",
    "1",
    "42",
    "3.14",
    "don't",
    "U.S.",
    "well-known",
    "-",
    "!?",
    "_",
    "a_b",
]
OTHER_PIECES = ["na\u00efve", "\u0130stanbul", "\u212a", "\u4e16\u754c", "x" * 40, "", "\n", "\t", "\u00a0"]
PIECES = [*ASCII_PIECES, *OTHER_PIECES]


def oracle(prediction: str, references: list[str]) -> float:
    """Of references in which rouge-score finds a token."""
    return max(float(ORACLE.score(reference, prediction)["rougeL"].fmeasure) for reference in references)


def random_text(stream: random.Random) -> str:
    separators = (" ", " ", " ", "", "  ", ", ", "\n")
    words = stream.choices(PIECES, k=stream.randrange(0, 13))
    return "".join(word + stream.choice(separators) for word in words)


def test_equals_rouge_score_on_ten_thousand_random_pairs() -> None:
    stream = random.Random(20_041_0)
    scores = set()
    for _ in range(10_000):
        # the end makes every reference one that is mostly ASCII
        prediction, reference = random_text(stream), random_text(stream) + " the " + "y" * 24
        assert rouge_l(prediction, [reference]) == oracle(prediction, [reference]), (prediction, reference)
        scores.add(rouge_l(prediction, [reference]))
    # the pairs exercise the whole scale, not only no match and full match
    assert len(scores) > 50


def seen(reference: str) -> bool:
    """Whether rouge-score sees something of it, and no less than it overlooks."""
    return bool(rouge_tokens(reference)) and 2 * sum(map(str.isascii, filter(str.isalnum, reference))) >= sum(
        map(str.isalnum, reference)
    )


@given(st.text(max_size=60), st.lists(st.text(max_size=60).filter(seen), min_size=1, max_size=3))
def test_equals_rouge_score_on_any_text_with_the_best_reference(prediction: str, references: list[str]) -> None:
    assert rouge_l(prediction, references) == oracle(prediction, references)


def test_long_answers_agree_too() -> None:
    stream = random.Random(7)
    for _ in range(20):
        prediction, reference = (" ".join(stream.choices("abcdefgh", k=200)) for _ in range(2))
        assert rouge_l(prediction, [reference]) == oracle(prediction, [reference])


def test_edges_by_hand() -> None:
    assert rouge_l("", ["anything"]) == rouge_l("anything", ["..."]) == rouge_l("", [""]) == 0.0
    assert rouge_l("Yes.", ["no", "YES"]) == 1.0
    # LCS(a b c d, a c) = 2: P = 1/2, R = 1
    assert rouge_l("a b c d", ["a c"]) == pytest.approx(2 * 0.5 / 1.5)


@pytest.mark.parametrize(
    "text",
    [
        "\u0414\u0430, \u043a\u043e\u043d\u0435\u0447\u043d\u043e!",  # Russian
        "\u4f60\u597d\u4e16\u754c",  # Chinese
        "\u0939\u093f\u0928\u094d\u0926\u0940",  # Hindi
        "+",
        "\u2764\ufe0f",
        "___",
    ],
)
def test_an_answer_without_ascii_can_be_right(text: str) -> None:
    assert rouge_l(f" {text}\n", [text]) == 1.0
    assert rouge_l("no", [text]) == rouge_l("", [text]) == 0.0


def test_other_scripts_are_compared_by_words_and_cjk_by_characters() -> None:
    # LCS(da net da, da da) = 2: P = 2/3, R = 1
    assert rouge_l("\u0434\u0430 \u043d\u0435\u0442, \u0434\u0430", ["\u0414\u0410 \u0434\u0430!"]) == pytest.approx(
        0.8
    )
    # one of two characters
    assert rouge_l("\u4e16\u754c", ["\u4e16\u4eba"]) == pytest.approx(0.5)
    assert unicode_tokens("\u30ab\u30ca\u30fb\u6f22 \ud55c\uad6d\uc5b4") == [
        "\u30ab",
        "\u30ca",
        "\u6f22",
        "\ud55c\uad6d\uc5b4",
    ]
    # another vowel sign is another word: ki, kii
    assert rouge_l("\u0915\u0940", ["\u0915\u093f"]) == 0.0
    assert rouge_l("-", ["+"]) == rouge_l("\u2600\ufe0f", ["\u2764\ufe0f"]) == 0.0


def test_a_number_among_other_words_does_not_make_them_invisible() -> None:
    # "I live in Moscow 5 years" in Russian
    reference = "\u042f \u0436\u0438\u0432\u0443 \u0432 \u041c\u043e\u0441\u043a\u0432\u0435 5 \u043b\u0435\u0442"
    assert oracle("5", [reference]) == 1.0
    # P = 1, R = 1/6
    assert rouge_l("5", [reference]) == pytest.approx(2 / 7)
    assert rouge_l(reference.replace("5", "7"), [reference]) == pytest.approx(5 / 6)
    # as much ASCII as not, and rouge-score's rule holds
    assert rouge_l("\u4e16\u754c 42", ["\u4eba\u4eba 42"]) == oracle("\u4e16\u754c 42", ["\u4eba\u4eba 42"]) == 1.0


def test_exact_match_strips_and_is_otherwise_strict() -> None:
    assert exact_match("  yes\n", ["no", "yes "])
    assert not exact_match("Yes", ["yes"])
    assert not exact_match("yes.", ["yes"])
    assert exact_match("", [" "])


@pytest.mark.parametrize("judge", [rouge_l, exact_match])
def test_no_reference_or_a_bare_text_is_refused(judge) -> None:
    with pytest.raises(DataError, match="at least one"):
        judge("a", [])
    with pytest.raises(DataError, match="list of texts"):
        judge("a", "abc")
