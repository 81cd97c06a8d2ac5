"""Needles: distinct keys, held-out words, planting in place, and what counts as a correct answer."""

import re

import numpy as np
import pytest

from memjax.tasks.needle import Needle, common_words, is_correct, needles, plant, split_words

WORDS = [f"word{chr(97 + i)}" for i in range(20)]


def rng(seed=0):
    return np.random.default_rng(seed)


def test_sentence_and_question_name_the_key():
    needle = Needle("amber lake", "1234567")
    assert needle.sentence == " The special magic number for amber lake is 1234567."
    assert needle.sentence == f" {needle.question}{needle.answer}."


def test_keys_are_distinct_and_numbers_have_seven_digits():
    some = needles(rng(), WORDS, 200)  # the most that 400 pairs are asked for
    assert len({n.key for n in some}) == 200
    assert all(re.fullmatch(r"[1-9]\d{6}", n.value) for n in some)
    assert {w for n in some for w in n.key.split()} == set(WORDS)
    assert needles(rng(), WORDS, 3) == needles(rng(), WORDS, 3) != needles(rng(1), WORDS, 3)
    with pytest.raises(ValueError, match="20 words make too few distinct keys for 201 needles"):
        needles(rng(), WORDS, 201)


def test_held_out_words_are_never_trained_on():
    train, held_out = split_words(WORDS, 6)
    assert sorted(train + held_out) == sorted(WORDS) and len(held_out) == 6
    assert split_words(WORDS, 6) == (train, held_out) != split_words(WORDS, 6, seed=1)
    for wrong in (0, 20):
        with pytest.raises(ValueError, match=f"held_out is {wrong}, needs 1 to 19"):
            split_words(WORDS, wrong)


def test_common_words_by_frequency_then_alphabet():
    texts = ["river stone river Cloud", "stone apple tiny_thing abc muchtoolong it's river2"]
    assert common_words(texts) == ["river", "stone", "apple"]
    assert common_words(texts, 1) == ["river"]


def test_planting_replaces_as_many_tokens():
    document, sentence = np.arange(10), np.array([-1, -2, -3])
    places = set()
    for seed in range(60):
        planted = plant(rng(seed), document, sentence)
        at = int(np.flatnonzero(planted < 0)[0])
        places.add(at)
        assert planted[at : at + 3].tolist() == [-1, -2, -3] and len(planted) == 10
        assert np.delete(planted, range(at, at + 3)).tolist() == np.delete(document, range(at, at + 3)).tolist()
    assert places == set(range(8))  # both ends included
    assert document.tolist() == list(range(10))
    np.testing.assert_array_equal(plant(rng(), document[:3], sentence), sentence)
    with pytest.raises(ValueError, match="the sentence has 3 tokens, the document 2"):
        plant(rng(), document[:2], sentence)


@pytest.mark.parametrize(
    "answer, right",
    [
        ("1234567", True),
        (" The number is 1234567.", True),
        ("12345678", False),
        ("7654321 or 1234567", False),
        ("", False),
    ],
)
def test_the_first_number_counts(answer, right):
    assert is_correct(answer, Needle("amber lake", "1234567")) is right
