"""Inverse cloze: questions are words of the text, in their order, from one span, and as many as asked for."""

import numpy as np
import pytest

from memjax.tasks.cloze import cloze

TEXT = " ".join(f"w{i}" for i in range(40))


@pytest.mark.parametrize(("words", "keep"), [((4, 8), 0.65), ((3, 3), 0.1), ((5, 60), 1.0)])
def test_a_question_is_a_span_with_words_dropped(words, keep):
    sizes = []
    for seed in range(200):
        asked = cloze(np.random.default_rng(seed), TEXT, words=words, keep=keep)
        numbers = [int(w[1:]) for w in asked.split()]
        assert numbers == sorted(set(numbers)) and len(numbers) >= 3
        assert numbers[-1] - numbers[0] < words[1]
        sizes.append(len(numbers))
    span = np.minimum(np.arange(words[0], words[1] + 1), 40) if words[1] < 40 else np.arange(words[0], 41)
    assert np.mean(sizes) == pytest.approx(max(3, keep * span.mean()), rel=0.15)
    assert keep == 1.0 or max(sizes) <= words[1]


def test_every_word_is_asked_for():
    found = {w for seed in range(300) for w in cloze(np.random.default_rng(seed), TEXT).split()}
    assert found == set(TEXT.split())


def test_the_same_generator_gives_the_same_question():
    assert cloze(np.random.default_rng(3), TEXT) == cloze(np.random.default_rng(3), TEXT)


def test_a_text_of_few_words_has_no_question():
    assert cloze(np.random.default_rng(0), "three words only") is None
    assert cloze(np.random.default_rng(0), "") is None


@pytest.mark.parametrize("bad", [{"words": (2, 4)}, {"words": (5, 4)}, {"keep": 0.0}, {"keep": 1.5}])
def test_bad_sizes(bad):
    with pytest.raises(ValueError, match="cloze: words is"):
        cloze(np.random.default_rng(0), TEXT, **bad)
