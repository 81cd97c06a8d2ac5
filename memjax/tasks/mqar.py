"""Multi-query associative recall: pairs of a key and a value, then every key again, to be answered with its value.

Accuracy against the bytes of a state is the usual picture of what a memory can recall.

Source: Arora et al., Zoology, arXiv 2312.04927 (the task, the forgetting and the compositional variant of its code);
Arora et al., Based, arXiv 2402.18668 (the mixture of lengths).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp

from memjax.tasks.task import Setting, Task, distinct, place, slices, uniform, unlabelled


@dataclass(frozen=True)
class MQAR(Task):
    """k_1 v_1 ... k_K v_K, then each key once more at a random later place; the label there is its value.

    vocab: keys are distinct ids of 1 .. vocab/2 - 1, values distinct ids of vocab/2 .. vocab - 1.
    length: tokens of a row. pairs: K. power: a query stands in slot s = 0, 1, ... (of two tokens) with weight
    (s + 1)^(power - 1): 0.01 keeps most of them near the pairs, 1 spreads them evenly.
    random_fill: tokens between queries are any ids, not 0; some look like keys, an error of about K / vocab.
    updates: so many keys stand behind the pairs again with new values, and the last value counts (forgetting MQAR).
    """

    vocab: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    random_fill: bool = True
    updates: int = 0

    def __post_init__(self):
        k, u, values = self.pairs, self.updates, self.vocab - self.vocab // 2
        self._require("pairs", 1 <= k < self.vocab // 2, f"1 to {self.vocab // 2 - 1} = vocab / 2 - 1")
        self._require("updates", 0 <= u <= min(k, values - k), f"0 to {min(k, values - k)}")
        least = 4 * k + 2 * u
        self._require("length", self.length >= least, f"at least {least} = 4 pairs + 2 updates")
        self._require("vocab", self.vocab > self.length, f"more than length = {self.length}")

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def answers(self) -> int:
        return self.pairs

    @property
    def chance(self) -> float:
        """A guess among the values that were shown."""
        return 1 / self.pairs

    def example(self, key):
        k, u, half = self.pairs, self.updates, self.vocab // 2
        k_keys, k_values, k_again, k_fill, k_slots = jax.random.split(key, 5)
        keys = 1 + distinct(k_keys, half - 1, k)
        values = half + distinct(k_values, self.vocab - half, k + u)
        again = distinct(k_again, k, u)
        context = jnp.stack([jnp.concatenate([keys, keys[again]]), values], 1).reshape(-1)
        slots = _query_slots(k_slots, (self.length - len(context)) // 2, k, self.power)
        at = len(context) + 2 * slots
        fill = _fill(k_fill, self.length - len(context), self)
        inputs = jnp.concatenate([context, fill]).at[at].set(keys)
        return inputs, unlabelled(self.length).at[at].set(values[:k].at[again].set(values[k:]))


@dataclass(frozen=True)
class CompositionalMQAR(Task):
    """MQAR with keys of two tokens on a grid: a_i b_j v_ij for i, j < side, then "a_i b_j", labelled v_ij at b_j.

    Neither half of a key tells the value. a, b and v are distinct ids of the three thirds of `vocab` (a from 1 on).
    Other fields as in MQAR; K = side^2, a slot has three tokens.
    """

    vocab: int = 8192
    length: int = 64
    side: int = 2
    power: float = 0.01
    random_fill: bool = True

    def __post_init__(self):
        k, third = self.pairs, self.vocab // 3
        self._require("side", 1 <= self.side < third and k <= third, f"1 to {math.isqrt(third)} = sqrt(vocab / 3)")
        self._require("length", self.length >= 6 * k, f"at least {6 * k} = 6 side^2")
        self._require("vocab", self.vocab > self.length, f"more than length = {self.length}")

    @property
    def pairs(self) -> int:
        """K: compound keys of a row."""
        return self.side**2

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def answers(self) -> int:
        return self.pairs

    @property
    def chance(self) -> float:
        """A guess among the values that were shown."""
        return 1 / self.pairs

    def example(self, key):
        k, m, third = self.pairs, self.side, self.vocab // 3
        k_a, k_b, k_values, k_order, k_fill, k_slots = jax.random.split(key, 6)
        a, b = 1 + distinct(k_a, third - 1, m), third + distinct(k_b, third, m)
        values = 2 * third + distinct(k_values, third, k)
        grid = jnp.stack([jnp.repeat(a, m), jnp.tile(b, m), values], 1)
        context = grid[distinct(k_order, k, k)].reshape(-1)
        at = len(context) + 3 * _query_slots(k_slots, (self.length - len(context)) // 3, k, self.power)
        fill = _fill(k_fill, self.length - len(context), self)
        inputs = place(jnp.concatenate([context, fill]), at, grid[:, :2])
        return inputs, unlabelled(self.length).at[at + 1].set(values)


def _query_slots(key, slots: int, count: int, power: float):
    return distinct(key, slots, count, (power - 1) * jnp.log(jnp.arange(1, slots + 1, dtype=jnp.float32)))


def _fill(key, count: int, task: MQAR | CompositionalMQAR):
    return uniform(key, (count,), 0, task.vocab) if task.random_fill else jnp.zeros((count,), jnp.int32)


def _zoology(length: int, pairs: int) -> Setting:
    """One column of figure 2: 64 epochs of 100,000 rows."""
    task, batch = MQAR(8192, length, pairs, random_fill=False), {64: 512, 128: 512, 256: 256, 512: 128}[length]
    return Setting(
        (task,),
        {f"K={pairs}": task},
        f"Zoology, arXiv 2312.04927, figure 2, {length} tokens; best of 4 learning rates from 1e-4 to 1e-2 there",
        steps=6_400_000 // batch,
        batch=batch,
        learning_rate=1e-3,
    )


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "mqar": Setting(
            tuple(MQAR(128, 64, k) for k in (4, 8, 16)),
            slices("K", {k: MQAR(128, 64, k) for k in (4, 8, 16)}),
            "Zoology, arXiv 2312.04927, sized for a CPU",
        ),
        "mqar_forgetting": Setting(
            tuple(MQAR(128, 64, k, updates=k // 2) for k in (4, 8, 12)),
            slices("K", {k: MQAR(128, 64, k, updates=k // 2) for k in (4, 8, 12)}),
            "the code of Zoology, sized for a CPU; half of the keys get a new value",
        ),
        "mqar_compositional": Setting(
            tuple(CompositionalMQAR(128, 96, m) for m in (2, 3, 4)),
            slices("K", {m * m: CompositionalMQAR(128, 96, m) for m in (2, 3, 4)}),
            "the code of Zoology, sized for a CPU",
        ),
        **{f"mqar_zoology_{t}": _zoology(t, k) for t, k in ((64, 4), (128, 8), (256, 16), (512, 64))},
        "mqar_based": Setting(
            (MQAR(8192, 64, 4),) * 5 + tuple(MQAR(8192, t, k) for t, k in ((128, 8), (256, 16), (256, 32), (256, 64))),
            slices(
                "K",
                {
                    k: MQAR(8192, t, k)
                    for t, k in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
                },
            ),
            "Based, arXiv 2402.18668: 32 epochs of 180,000 rows; best of 4 learning rates from 1e-3 to 3e-2 there",
            steps=22_500,
            batch=256,
            learning_rate=3e-3,
        ),
    }
)
