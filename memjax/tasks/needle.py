"""Needles: planted sentences that name a magic number, in the manner of RULER, and the score of answers about them.

Source: Hsieh et al., RULER, arXiv 2404.06654 (the single-needle task: word keys, numbers of seven digits).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

DIGITS = 7


class Needle(NamedTuple):
    """A key of two words and its number."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """What is planted in a document."""
        return f" The special magic number for {self.key} is {self.value}."

    @property
    def question(self) -> str:
        """What is asked: the sentence up to its number, as RULER leads in an answer."""
        return f"The special magic number for {self.key} is"

    @property
    def answer(self) -> str:
        """What continues the question."""
        return f" {self.value}"


def common_words(texts: Iterable[str], count: int = 3000) -> list[str]:
    """The most frequent lower-case words of 4 to 9 letters, most frequent first, ties in the order of the alphabet."""
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(re.findall(r"\b[a-z]{4,9}\b", text))
    return [word for word, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:count]]


def split_words(words: Sequence[str], held_out: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Words to train with and `held_out` words that training never sees in a key."""
    if not 0 < held_out < len(words):
        raise ValueError(f"split_words: held_out is {held_out}, needs 1 to {len(words) - 1}")
    order: list[int] = np.random.default_rng(seed).permutation(len(words)).tolist()
    return [words[i] for i in order[held_out:]], [words[i] for i in order[:held_out]]


def needles(rng: np.random.Generator, words: Sequence[str], count: int) -> list[Needle]:
    """`count` needles with distinct keys of two words each."""
    n = len(words)
    if n * n < 2 * count:
        raise ValueError(f"needles: {n} words make too few distinct keys for {count} needles")
    pairs: dict[int, None] = {}
    while len(pairs) < count:
        pairs[int(rng.integers(n * n))] = None
    numbers = rng.integers(10 ** (DIGITS - 1), 10**DIGITS, count)
    return [Needle(f"{words[p // n]} {words[p % n]}", str(v)) for p, v in zip(pairs, numbers, strict=True)]


def plant(rng: np.random.Generator, document: np.ndarray, sentence: np.ndarray) -> np.ndarray:
    """The document with the sentence in the place of as many of its tokens, at a random offset."""
    if len(sentence) > len(document):
        raise ValueError(f"plant: the sentence has {len(sentence)} tokens, the document {len(document)}")
    at = int(rng.integers(0, len(document) - len(sentence) + 1))
    return np.concatenate([document[:at], sentence, document[at + len(sentence) :]])


def is_correct(answer: str, needle: Needle) -> bool:
    """The first number of the answer is the needle's."""
    found = re.search(r"\d+", answer)
    return found is not None and found.group() == needle.value
