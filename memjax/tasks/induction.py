"""Induction: say what followed the last time. With one special token, or for a whole row that is repeated.

Source: Olsson et al., In-context learning and induction heads, arXiv 2209.11895; the special token and its lengths: Fu
et al., H3, arXiv 2212.14052, and Gu and Dao, Mamba, arXiv 2312.00752 (section 4.1.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp

from memjax.tasks.task import Setting, Task, slices, uniform, unlabelled


@dataclass(frozen=True)
class InductionHeads(Task):
    """Random tokens, among them the special one at a random place; it comes again as the last token, where the label is
    the token that followed it.

    length: tokens of a row. ordinary: tokens 0 .. ordinary - 1; the special one is the id `ordinary`.
    """

    length: int = 256
    ordinary: int = 16

    def __post_init__(self):
        self._require("length", self.length >= 3, "at least 3: special, token, special")
        self._require("ordinary", self.ordinary >= 1, "at least 1")

    @property
    def vocab(self) -> int:
        return self.ordinary + 1

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def answers(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        return 1 / self.ordinary

    def example(self, key):
        k_row, k_at = jax.random.split(key)
        row = uniform(k_row, (self.length,), 0, self.ordinary)
        at = uniform(k_at, (), 0, self.length - 2)
        inputs = row.at[jnp.stack([at, jnp.int32(self.length - 1)])].set(self.ordinary)
        return inputs, unlabelled(self.length).at[-1].set(row[at + 1])


@dataclass(frozen=True)
class RepeatCopy(Task):
    """A row of random tokens whose second half repeats its first: in the second half the next token is asked for, at
    each token but the last.

    length: tokens of a row, even. ordinary: how many tokens there are.
    """

    length: int = 64
    ordinary: int = 64

    def __post_init__(self):
        self._require("length", self.length >= 4 and self.length % 2 == 0, "an even number of at least 4")
        self._require("ordinary", self.ordinary >= 1, "at least 1")

    @property
    def vocab(self) -> int:
        return self.ordinary

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def answers(self) -> int:
        return self.length // 2 - 1

    @property
    def chance(self) -> float:
        return 1 / self.ordinary

    def example(self, key):
        half = uniform(key, (self.length // 2,), 0, self.ordinary)
        labels = jnp.concatenate([unlabelled(self.length // 2), half[1:], unlabelled(1)])
        return jnp.concatenate([half, half]), labels


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "induction": Setting(
            (InductionHeads(64),),
            slices("T", {t: InductionHeads(t) for t in (64, 256, 1024)}),
            "Mamba, arXiv 2312.00752, sized for a CPU",
        ),
        "induction_mamba": Setting(
            (InductionHeads(256),),
            slices("T", {2**i: InductionHeads(2**i) for i in range(6, 21, 2)}),
            "Mamba, arXiv 2312.00752, table 2: 25 epochs of 8,192 batches",
            steps=204_800,
            batch=8,
            learning_rate=1e-3,
        ),
        "repeat_copy": Setting(
            (RepeatCopy(64),),
            slices("T", {t: RepeatCopy(t) for t in (64, 128)}),
            "arXiv 2209.11895 (repeated random tokens), sized for a CPU",
        ),
    }
)
