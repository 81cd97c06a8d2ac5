"""State tracking: every token is an element of a group, and the running product is asked for.

One hidden state must be updated exactly, forever. Recurrences with positive eigenvalues and attention don't extrapolate
to longer rows; recurrent networks, and delta rules whose write strength runs to 2, do.

Source: Merrill, Petty, Sabharwal, The illusion of state in state-space models, arXiv 2404.08819 (word problems);
Grazzi et al., Unlocking state-tracking in linear RNNs, arXiv 2411.12537 (parity, modular arithmetic, lengths).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.tasks.task import IGNORE, Setting, Task, slices, uniform, unlabelled

LARGEST = {"Z": 1024, "S": 6, "A": 6}
SMALLEST = {"Z": 2, "S": 2, "A": 3}


@functools.cache
def permutations(n: int, even: bool = False) -> np.ndarray:
    """All permutations of 0 .. n-1 (even: those of even sign) [order n] in lexicographic order; the first is the
    identity."""
    rows = np.array(list(itertools.permutations(range(n))), np.int32).reshape(-1, n)
    if even:
        sign = sum((rows[:, i] > rows[:, j]).astype(int) for i in range(n) for j in range(i + 1, n))
        rows = rows[np.broadcast_to(sign % 2 == 0, len(rows))]
    return rows


@functools.cache
def table(group: str) -> np.ndarray:
    """table[a, b] = a o b [order order] int32: of Z_m the sum mod m, of S_n and A_n (a o b)[i] = a[b[i]] with elements
    numbered as in `permutations`. ValueError for another name."""
    kind, n = _parse(group)
    if kind == "Z":
        return np.add.outer(np.arange(n), np.arange(n)).astype(np.int32) % n
    rows = permutations(n, even=kind == "A")
    number = {row.tobytes(): i for i, row in enumerate(rows)}
    return np.array([[number[a[b].tobytes()] for b in rows] for a in rows], np.int32)


def _parse(group: str) -> tuple[str, int]:
    match = re.fullmatch(r"([ZSA])(\d{1,4})", group)
    kind, n = (match[1], int(match[2])) if match else ("", 0)
    if not match or not SMALLEST[kind] <= n <= LARGEST[kind]:
        needs = ", ".join(f"{kind}{SMALLEST[kind]} to {kind}{LARGEST[kind]}" for kind in LARGEST)
        raise ValueError(f"group is {group!r}, needs one of {needs}")
    return kind, n


@functools.cache
def generators(group: str) -> np.ndarray:
    """A few elements that generate the group: 0 and 1 of Z_m, the transpositions of S_n, the 3-cycles of A_n."""
    kind, n = _parse(group)
    if kind == "Z":
        return np.arange(2, dtype=np.int32)
    moved = (permutations(n, even=kind == "A") != np.arange(n)[None]).sum(1)
    return np.flatnonzero(moved == (2 if kind == "S" else 3)).astype(np.int32)


@dataclass(frozen=True)
class GroupWord(Task):
    """Tokens g_0 g_1 ..., labels s_t = g_t o s_{t-1} from the identity (id 0).

    group: Z2 (parity: tokens are bits), Z3, ..., S3, S5, A5. length: tokens of a row. elements: "all" of the group are
    drawn, or only its "generators". dense: every position is labelled; False: only the last.
    """

    group: str = "Z2"
    length: int = 32
    elements: Literal["all", "generators"] = "all"
    dense: bool = True

    metric: ClassVar = "scaled"

    def __post_init__(self):
        try:
            _parse(self.group)
        except ValueError as error:
            raise ValueError(f"GroupWord: {error}") from None
        self._require("length", self.length >= 1, "at least 1")
        self._require("elements", self.elements in ("all", "generators"), "'all' or 'generators'")

    @property
    def vocab(self) -> int:
        kind, n = _parse(self.group)
        return n if kind == "Z" else math.factorial(n) // (2 if kind == "A" else 1)

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def answers(self) -> int:
        return self.length if self.dense else 1

    @property
    def chance(self) -> float:
        return 1 / self.vocab

    def example(self, key):
        if self.elements == "all":
            inputs = uniform(key, (self.length,), 0, self.vocab)
        else:
            few = jnp.asarray(generators(self.group))
            inputs = few[uniform(key, (self.length,), 0, len(few))]
        product = jnp.asarray(table(self.group))
        labels = lax.associative_scan(lambda before, now: product[now, before], inputs)
        asked = jnp.arange(self.length, dtype=jnp.int32) == self.length - 1
        return inputs, labels if self.dense else jnp.where(asked, labels, IGNORE)


@dataclass(frozen=True)
class ModularArithmetic(Task):
    """d op d op ... d =, evaluated from left to right mod `modulus`; labelled at "=".

    length: tokens of a row, even. dense: every digit is labelled too, with the value so far.
    Ids: the digits 0 .. modulus - 1, then +, -, *, =.
    """

    modulus: int = 5
    length: int = 40
    dense: bool = False

    metric: ClassVar = "scaled"

    def __post_init__(self):
        self._require("modulus", self.modulus >= 2, "at least 2")
        self._require("length", self.length >= 2 and self.length % 2 == 0, "an even number of at least 2")

    @property
    def vocab(self) -> int:
        return self.modulus + 4

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def answers(self) -> int:
        return self.length // 2 + 1 if self.dense else 1

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def example(self, key):
        m, n = self.modulus, self.length // 2
        k_digits, k_signs = jax.random.split(key)
        digits, signs = uniform(k_digits, (n,), 0, m), uniform(k_signs, (n - 1,), 0, 3)

        def evaluate(value, now):
            sign, digit = now
            value = jnp.stack([value + digit, value - digit, value * digit])[sign] % m
            return value, value

        _, values = lax.scan(evaluate, digits[0], (signs, digits[1:]))
        values = jnp.concatenate([digits[:1], values])
        after = jnp.concatenate([m + signs, jnp.full((1,), m + 3, jnp.int32)])
        inputs = jnp.stack([digits, after], 1).reshape(-1)
        labels = unlabelled(self.length).at[-1].set(values[-1])
        return inputs, labels.at[::2].set(values) if self.dense else labels


def _words(group: str, train: int, tests: tuple[int, ...], source: str, **setting) -> Setting:
    tasks = {t: GroupWord(group, t) for t in tests}
    return Setting((GroupWord(group, train),), slices("T", tasks), source, **setting)


_GRAZZI = "arXiv 2411.12537, sized for a CPU"
_MERRILL = "arXiv 2404.08819, sized for a CPU"

SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        # The memory alone: a feed-forward block learns the parity of a count, which any sum of the tokens gives it.
        "parity": _words("Z2", 32, (32, 64, 128), _GRAZZI, layers=1, steps=1200, learning_rate=5e-3),
        "parity_long": _words(
            "Z2",
            40,
            (40, 64, 128, 256),
            "arXiv 2411.12537: trained on 3 to 40 tokens there, here on 40 that are all labelled",
            hidden=128,
            steps=20_000,
            batch=256,
            learning_rate=1e-3,
        ),
        "z5": _words("Z5", 32, (32, 64, 128), _GRAZZI, layers=1, hidden=128, steps=1200, learning_rate=3e-3),
        "s3": _words("S3", 10, (10, 20, 40), _MERRILL, hidden=128, steps=1500, batch=128, learning_rate=3e-3),
        "s5": _words("S5", 8, (8, 16, 32), _MERRILL, hidden=128, steps=2000, batch=128, learning_rate=3e-3),
        "a5": _words("A5", 8, (8, 16, 32), _MERRILL, hidden=128, steps=2000, batch=128, learning_rate=3e-3),
        "modular_arithmetic": Setting(
            (ModularArithmetic(5, 40, dense=True),),
            slices("T", {t: ModularArithmetic(5, t) for t in (40, 80, 160)}),
            _GRAZZI + ": every digit is labelled in training",
            hidden=128,
            steps=1500,
            learning_rate=3e-3,
        ),
    }
)
