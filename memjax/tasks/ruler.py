"""RULER as tokens: needles, chains of variables, and counting, with the combinatorics of the text but for small models.

Ids: the six marks below, then fillers, then keys (variables, words), then values.

Source: Hsieh et al., RULER, arXiv 2404.06654. The layouts of tokens are ours; every answer but the first is asked for
with those before it given. The common words, which are all as frequent, are asked for by ascending id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memjax.tasks.task import Setting, Task, continued, distinct, place, slices, spread, uniform, unlabelled

KEY, IS, SEP, Q, A, VAR = range(6)
MARKS = 6


def _row(*tokens: int | Array) -> Array:
    """Single tokens side by side."""
    return jnp.stack([jnp.asarray(token, jnp.int32) for token in tokens])


def _asked(body: Array, *questions: tuple[Array, Array]) -> tuple[Array, Array]:
    """A row: the body, then the questions with their answers one after another."""
    tokens, labels = zip(*(continued(prompt, answers) for prompt, answers in questions), strict=True)
    return jnp.concatenate([body, *tokens]), jnp.concatenate([unlabelled(len(body)), *labels])


@dataclass(frozen=True)
class Needles(Task):
    """Needles KEY k IS v in filler, then for each question Q k A, labelled with the values of k in the order they came.

    length: tokens of a row, questions included. keys, values: how many keys there are, and values of each; so many are
    needles, with distinct values. queries: different keys that are asked for. haystack: "filler", or "needles": as many
    other needles as there is room for stand in its place, and `keys` counts only what may be asked for.
    n_fillers, n_keys, n_values: sizes of the blocks of ids.
    """

    length: int = 128
    keys: int = 1
    values: int = 1
    queries: int = 1
    haystack: Literal["filler", "needles"] = "filler"
    n_fillers: int = 64
    n_keys: int = 32
    n_values: int = 32

    def __post_init__(self):
        self._require("keys", 1 <= self.keys <= self.n_keys, f"1 to {self.n_keys} = n_keys")
        self._require("queries", 1 <= self.queries <= self.keys, f"1 to {self.keys} = keys")
        self._require("values", self.values >= 1, "at least 1")
        self._require("haystack", self.haystack in ("filler", "needles"), "'filler' or 'needles'")
        least = 4 * self.keys * self.values + self.length - self._room
        self._require("length", self.length >= least, f"at least {least}: needles and questions")
        if self.haystack == "needles":
            self._require("values", self.values == 1, "1 where the haystack is of needles")
            self._require("n_keys", self.n_keys >= self._needles, f"at least {self._needles} for this length")
        self._require("n_values", self.n_values >= self._needles, f"at least {self._needles}: one for each needle")

    @property
    def _room(self) -> int:
        """Tokens before the questions."""
        return self.length - self.queries * (self.values + 2)

    @property
    def _needles(self) -> int:
        return self.keys * self.values if self.haystack == "filler" else self._room // 4

    @property
    def vocab(self) -> int:
        return MARKS + self.n_fillers + self.n_keys + self.n_values

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def answers(self) -> int:
        return self.queries * self.values

    @property
    def chance(self) -> float:
        return 1 / self.n_values

    def example(self, key):
        k_body, k_at, k_keys, k_values, k_order = jax.random.split(key, 5)
        n, first = self._needles, MARKS + self.n_fillers
        keys = first + distinct(k_keys, self.n_keys, n // self.values)
        values = first + self.n_keys + distinct(k_values, self.n_values, n)
        owner = distinct(k_order, n, n) // self.values  # of the needle at each place: which key
        marks = jnp.ones((n,), jnp.int32)
        needles = jnp.stack([KEY * marks, keys[owner], IS * marks, values], 1)
        body = uniform(k_body, (self._room,), MARKS, first)
        body = place(body, spread(k_at, self._room, n, 4), needles)
        by_key = values[jnp.argsort(owner, stable=True)].reshape(-1, self.values)
        return _asked(body, *((_row(Q, keys[i], A), by_key[i]) for i in range(self.queries)))


@dataclass(frozen=True)
class VariableTracking(Task):
    """VAR x1 IS v, VAR x2 IS x1, ... at random places of the filler, in order; then Q v A, labelled x1, x2, ...

    length: tokens of a row, question included. hops: assignments of a variable to a variable; the chain has one name
    more. chains: with different values, their lines mixed; the first is asked for. Ids as in `Needles`.
    """

    length: int = 128
    hops: int = 4
    chains: int = 1
    n_fillers: int = 64
    n_keys: int = 32
    n_values: int = 32

    def __post_init__(self):
        self._require("hops", self.hops >= 0, "at least 0")
        self._require("chains", 1 <= self.chains <= self.n_values, f"1 to {self.n_values} = n_values")
        names = self.chains * self.answers
        self._require("n_keys", self.n_keys >= names, f"at least {names} = chains (hops + 1)")
        least = 4 * names + self.length - self._room
        self._require("length", self.length >= least, f"at least {least}: assignments and question")

    @property
    def _room(self) -> int:
        return self.length - self.answers - 2

    @property
    def vocab(self) -> int:
        return MARKS + self.n_fillers + self.n_keys + self.n_values

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def answers(self) -> int:
        return self.hops + 1

    @property
    def chance(self) -> float:
        return 1 / self.n_keys

    def example(self, key):
        k_body, k_at, k_names, k_values, k_order = jax.random.split(key, 5)
        n, m, first = self.chains * self.answers, self.answers, MARKS + self.n_fillers
        names = (first + distinct(k_names, self.n_keys, n)).reshape(self.chains, m)
        values = first + self.n_keys + distinct(k_values, self.n_values, self.chains)
        sources = jnp.concatenate([values[:, None], names[:, :-1]], 1)
        # a line at each place: of which chain, and the how manieth of it
        chain = distinct(k_order, n, n) // m
        nth = (
            jnp.cumsum(jax.nn.one_hot(chain, self.chains, dtype=jnp.int32), 0)[jnp.arange(n, dtype=jnp.int32), chain]
            - 1
        )
        marks = jnp.ones((n,), jnp.int32)
        lines = jnp.stack([VAR * marks, names[chain, nth], IS * marks, sources[chain, nth]], 1)
        body = place(uniform(k_body, (self._room,), MARKS, first), spread(k_at, self._room, n, 4), lines)
        return _asked(body, (_row(Q, values[0], A), names[0]))


@dataclass(frozen=True)
class CommonWords(Task):
    """Words in random order, some of them more often; then Q A, labelled with the common ones by ascending id.

    common: common words, `repeats` times each. others: other words, `other_repeats` times each. n_words: all there are,
    ids from 6 on.
    """

    common: int = 10
    repeats: int = 6
    others: int = 56
    other_repeats: int = 1
    n_words: int = 128

    def __post_init__(self):
        self._require("common", self.common >= 1, "at least 1")
        self._require("repeats", self.repeats > self.other_repeats, f"more than other_repeats = {self.other_repeats}")
        self._require("other_repeats", self.other_repeats >= 1, "at least 1")
        used = self.common + self.others
        self._require("n_words", self.n_words >= used, f"at least {used} = common + others")

    @property
    def vocab(self) -> int:
        return MARKS + self.n_words

    @property
    def tokens(self) -> int:
        return self.common * self.repeats + self.others * self.other_repeats + self.common + 1

    @property
    def answers(self) -> int:
        return self.common

    @property
    def chance(self) -> float:
        """A guess among the words that were shown."""
        return self.common / (self.common + self.others)

    def example(self, key):
        k_words, k_order = jax.random.split(key)
        words = MARKS + distinct(k_words, self.n_words, self.common + self.others)
        counts = np.repeat([self.repeats, self.other_repeats], [self.common, self.others])
        body = jax.random.permutation(k_order, words[np.repeat(np.arange(len(words)), counts)])
        return _asked(body, (_row(Q, A), jnp.sort(words[: self.common])))


@dataclass(frozen=True)
class FrequentWords(Task):
    """Words whose counts follow a zeta distribution, in random order; then Q A, labelled with the three that are the
    most frequent beside the noise, the most frequent first.

    length: tokens before the question. alpha: the word of rank r comes floor(length r^-alpha / zeta(alpha)) times; rank
    1 is the noise, the first filler, which also takes what remains. n_words: all there are, ids from 7 on.
    """

    length: int = 123
    alpha: float = 2.0
    n_words: int = 64

    def __post_init__(self):
        self._require("alpha", self.alpha > 1, "more than 1")
        counts = self._counts
        distinct_ranks = len(counts) >= 3 and all(np.diff(counts[:4]) < 0)
        self._require("length", distinct_ranks, "more: ranks 2 to 5 must differ in their counts")
        self._require("n_words", self.n_words >= len(counts), f"at least {len(counts)} for this length")

    @property
    def _counts(self) -> np.ndarray:
        """Of the ranks from 2 on that come at all."""
        ranks = np.arange(1, 100_000, dtype=np.float64)
        tail = ranks[-1] ** (1 - self.alpha) / (self.alpha - 1)  # of the zeta function beyond these ranks
        counts = np.floor(self.length * ranks[1:] ** -self.alpha / (np.sum(ranks**-self.alpha) + tail))
        return counts[counts > 0].astype(int)

    @property
    def vocab(self) -> int:
        return MARKS + 1 + self.n_words

    @property
    def tokens(self) -> int:
        return self.length + 4

    @property
    def answers(self) -> int:
        return 3

    @property
    def chance(self) -> float:
        """A guess among the words that were shown."""
        return 1 / len(self._counts)

    def example(self, key):
        k_words, k_order = jax.random.split(key)
        counts = self._counts
        words = MARKS + 1 + distinct(k_words, self.n_words, len(counts))
        noise = jnp.full((self.length - counts.sum(),), MARKS, jnp.int32)
        body = jnp.concatenate([noise, words[np.repeat(np.arange(len(counts)), counts)]])
        return _asked(jax.random.permutation(k_order, body), (_row(Q, A), words[:3]))


def _needles(lengths=(128, 512), **fields) -> Setting:
    tasks = {t: Needles(t, **fields) for t in lengths}
    return Setting((tasks[lengths[0]],), slices("T", tasks), "RULER, arXiv 2404.06654, as tokens", steps=1500)


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "niah_single": _needles(),
        "niah_multikey": _needles(keys=4),
        "niah_multikey_needles": _needles((128, 256), haystack="needles", n_keys=64, n_values=64),
        "niah_multivalue": _needles(values=4),
        "niah_multiquery": _needles(keys=4, queries=4),
        "vt": Setting(
            (VariableTracking(),),
            slices("T", {t: VariableTracking(t) for t in (128, 512)}),
            "RULER, arXiv 2404.06654, as tokens",
            steps=1500,
        ),
        "cwe": Setting(
            (CommonWords(),),
            slices("T", {c.tokens: c for c in (CommonWords(), CommonWords(repeats=12, others=110))}),
            "RULER, arXiv 2404.06654, as tokens; words by ascending id",
            steps=1500,
        ),
        "fwe": Setting(
            (FrequentWords(),),
            slices("T", {f.tokens: f for f in (FrequentWords(), FrequentWords(507))}),
            "RULER, arXiv 2404.06654, as tokens",
            steps=1500,
        ),
    }
)
