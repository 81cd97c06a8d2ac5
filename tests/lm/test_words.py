"""BM25 over texts against its formula, and the fusion of rankings."""

import math

import pytest

from memjax.lm.words import WordIndex, fuse, words

TEXTS = ["the cat sat on the mat", "the dog", None, "a Cat, a cat; a dog!", "", "nothing of this"]


def bm25(texts, question, k1=1.5, b=0.75):
    """Scores as Lucene has them: idf ln(1 + (N - n + .5)/(n + .5)), tf / (tf + k1 (1 - b + b len/mean))."""
    split = [words(t or "") for t in texts]
    mean = sum(map(len, split)) / len(split)
    total = [0.0] * len(texts)
    for word in words(question):
        having = sum(word in s for s in split)
        idf = math.log(1 + (len(split) - having + 0.5) / (having + 0.5))
        for i, s in enumerate(split):
            tf = s.count(word)
            total[i] += idf * tf / (tf + k1 * (1 - b + b * len(s) / mean)) if having else 0.0
    return total


def test_scores_are_those_of_bm25():
    index = WordIndex(TEXTS)
    for question in ("cat", "the DOG?", "cat dog nowhere"):
        want = bm25(TEXTS, question)
        got = index.rank(question, 10)
        assert [i for i, _ in got] == sorted((i for i in range(6) if want[i] > 0), key=lambda i: (-want[i], i))
        assert [s for _, s in got] == pytest.approx([want[i] for i, _ in got], rel=1e-4)
    assert [i for i, _ in index.rank("cat", 1)] == [3]


def test_what_has_no_word_of_the_question_is_not_found():
    index = WordIndex(TEXTS)
    assert index.rank("nowhere", 5) == [] and index.rank("?!", 5) == []
    assert all(i not in (2, 4) for i, _ in index.rank("the a of this cat", 10))
    assert WordIndex(["", None]).rank("cat", 5) == []


def test_fusion_is_the_sum_of_reciprocal_ranks():
    fused = fuse([(7, 9.0), (3, 1.0)], [(3, 0.2), (5, 0.1)])
    assert [i for i, _ in fused] == [3, 7, 5]
    assert dict(fused) == pytest.approx({3: 1 / 62 + 1 / 61, 7: 1 / 61, 5: 1 / 62})
    assert [i for i, _ in fuse([(4, 1.0)], [(2, 1.0)])] == [2, 4]  # a tie
    assert fuse([], []) == []
