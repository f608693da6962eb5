"""Claims: Rouge-L is rouge-score's to the last bit, where that sees at least half of the reference's letters; exact
match forgives white space at the ends and nothing else."""

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
    """Whether rouge-score sees something of it, and no fewer letters than it overlooks; without any, all digits."""
    letters = [character for character in reference if character.isalpha()]
    if not letters and any(character.isdecimal() and not character.isascii() for character in reference):
        return False
    return bool(rouge_tokens(reference)) and 2 * sum(map(str.isascii, letters)) >= len(letters)


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
    # a sigma is a sigma wherever it stands
    assert rouge_l("\u03a3", ["\u03c2"]) == 1.0
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
    # however many digits: rouge-score sees nothing else of "2019 nonsense", "2019 year", nor of "temperature 100"
    assert oracle("2019 \u0447\u0443\u0448\u044c", ["2019 \u0433\u043e\u0434"]) == 1.0
    assert rouge_l("2019 \u0447\u0443\u0448\u044c", ["2019 \u0433\u043e\u0434"]) == 0.5
    # LCS(on do wa 100, ki on 100) = 2: P = 1/2, R = 2/3
    assert rouge_l("\u6e29\u5ea6\u306f100", ["\u6c17\u6e29100"]) == pytest.approx(4 / 7)
    # as many ASCII letters as others, and rouge-score's rule holds
    assert rouge_l("\u4e16\u754c GB", ["\u4eba\u4eba GB"]) == oracle("GB", ["\u4eba\u4eba GB"]) == 1.0


def test_numbers_alone_are_rouge_scores_unless_it_overlooks_their_digits() -> None:
    assert rouge_l("10", ["10\u00b2"]) == oracle("10", ["10\u00b2"]) == 1.0
    # Arabic digits, 7 5 2: P = 1, R = 1/3
    assert oracle("7", ["7 \u0665 \u0662"]) == 1.0
    assert rouge_l("7", ["7 \u0665 \u0662"]) == 0.5
    assert rouge_l("\u0665.", ["\u0665"]) == 1.0
    # a circled number and a fraction, of which it sees nothing
    assert rouge_l("\u2460.", ["\u2460"]) == rouge_l("\u00bd!", ["\u00bd"]) == 1.0


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        # Thai "word 12b", whose vowel am is two characters; Lao, Burmese, Khmer
        ("\u0e04\u0e33 \u0e51\u0e52b", ["\u0e04\u0e4d", "\u0e32", "\u0e51\u0e52b"]),
        ("\u0ea5\u0eb2\u0ea7", ["\u0ea5", "\u0eb2", "\u0ea7"]),
        ("\u1019\u103c\u1014\u103a\u1019\u102c\u104b", ["\u1019\u103c", "\u1014\u103a", "\u1019\u102c"]),
        ("\u1781\u17d2\u1798\u17c2\u179a", ["\u1781\u17d2", "\u1798\u17c2", "\u179a"]),
    ],
)
def test_scripts_of_south_east_asia_are_compared_by_letters_with_their_marks(text: str, letters: list[str]) -> None:
    assert unicode_tokens(text) == letters
    half = text[: len(text) // 2]
    assert 0 < rouge_l(half, [text]) < rouge_l(text, [text]) == 1.0


def test_thai_that_is_right_in_part_is_neither_wrong_nor_right() -> None:
    love_you, love_mother = (
        "\u0e09\u0e31\u0e19\u0e23\u0e31\u0e01\u0e40\u0e18\u0e2d",
        "\u0e09\u0e31\u0e19\u0e23\u0e31\u0e01\u0e41\u0e21\u0e48",
    )
    # the first four of seven letters are the first four of six
    assert rouge_l(love_you, [love_mother]) == pytest.approx(8 / 13)


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
