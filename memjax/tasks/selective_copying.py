"""Copying: remember K tokens and replay them in order; selective where they stand among noise.

A memory whose dynamics don't depend on the input can copy what stands at known places, but not select.

Source: Gu and Dao, Mamba, arXiv 2312.00752 (section 4.1.1); plain copying: Hochreiter and Schmidhuber, Long short-term
memory (1997), in the form of Arjovsky, Shah, Bengio, arXiv 1511.06464.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp

from memjax.tasks.task import Setting, Task, distinct, slices, uniform, unlabelled

NOISE, MARKER, FIRST = 0, 1, 2


@dataclass(frozen=True)
class Copying(Task):
    """`length` tokens of noise with `count` content tokens among them, then as many markers, each labelled with the
    next content token.

    content: how many content tokens there are; each is drawn independently. selective: at random places; False: at the
    beginning, side by side. Ids: noise 0, marker 1, content 2 .. content + 1.
    """

    length: int = 4096
    count: int = 16
    content: int = 16
    selective: bool = True

    def __post_init__(self):
        self._require("count", 1 <= self.count <= self.length, f"1 to {self.length} = length")
        self._require("content", self.content >= 1, "at least 1")

    @property
    def vocab(self) -> int:
        return self.content + FIRST

    @property
    def tokens(self) -> int:
        return self.length + self.count

    @property
    def answers(self) -> int:
        return self.count

    @property
    def chance(self) -> float:
        return 1 / self.content

    def example(self, key):
        k_content, k_at = jax.random.split(key)
        content = uniform(k_content, (self.count,), FIRST, self.vocab)
        if self.selective:
            at = jnp.sort(distinct(k_at, self.length, self.count))
        else:
            at = jnp.arange(self.count, dtype=jnp.int32)
        body = jnp.full((self.length,), NOISE, jnp.int32).at[at].set(content)
        markers = jnp.full((self.count,), MARKER, jnp.int32)
        return jnp.concatenate([body, markers]), jnp.concatenate([unlabelled(self.length), content])


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "selective_copying": Setting(
            (Copying(64, 8),),
            slices("T", {t: Copying(t, 8) for t in (64, 128)}),
            "Mamba, arXiv 2312.00752, sized for a CPU",
        ),
        "copying": Setting(
            (Copying(64, 8, selective=False),),
            slices("T", {t: Copying(t, 8, selective=False) for t in (64, 128)}),
            "arXiv 1511.06464, sized for a CPU",
        ),
        "selective_copying_mamba": Setting(
            (Copying(4096, 16),),
            slices("T", {4096: Copying(4096, 16)}),
            "Mamba, arXiv 2312.00752, table 1",
            steps=400_000,
            learning_rate=1e-4,
        ),
    }
)
