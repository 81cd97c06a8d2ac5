"""Passkey: five digits stated once in a long filler and asked for at its end, by length and depth.

The easiest long-range test: one needle, one question, the same form every time.

Source: Mohtashami and Jaggi, Landmark attention, arXiv 2305.16300, as tokens in place of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.tasks.task import Setting, Task, continued, place, uniform, unlabelled

DIGITS = 5
KEY, QUESTION, FILL = 10, 11, 12  # the digits are the ids 0 .. 9


@dataclass(frozen=True)
class Passkey(Task):
    """Filler with KEY d1 d2 d3 d4 d5 somewhere in it, then QUESTION d1 d2 d3 d4, labelled d1 .. d5.

    length: tokens of a row, question included. fillers: how many filler tokens there are, ids from 12 on.
    random_fill: they come at random; False: in a fixed cycle, in which the key is told by surprise alone.
    depth: where the key stands, 0 (first) to 1 (right before the question); None: anywhere, evenly.
    """

    length: int = 256
    fillers: int = 32
    random_fill: bool = True
    depth: float | None = None

    metric: ClassVar = "exact"

    def __post_init__(self):
        least = 2 * DIGITS + 1
        self._require("length", self.length >= least, f"at least {least}: key and question")
        self._require("fillers", self.fillers >= 1, "at least 1")
        self._require("depth", self.depth is None or 0 <= self.depth <= 1, "a number from 0 to 1, or None")

    @property
    def vocab(self) -> int:
        return FILL + self.fillers

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def answers(self) -> int:
        return DIGITS

    @property
    def chance(self) -> float:
        return 0.1

    def example(self, key):
        k_digits, k_fill, k_at = jax.random.split(key, 3)
        digits, room = uniform(k_digits, (DIGITS,), 0, 10), self.length - DIGITS
        if self.random_fill:
            body = uniform(k_fill, (room,), FILL, self.vocab)
        else:
            body = FILL + jnp.arange(room, dtype=jnp.int32) % self.fillers
        latest = room - 1 - DIGITS
        at = uniform(k_at, (), 0, latest + 1) if self.depth is None else jnp.int32(round(self.depth * latest))
        body = place(body, at[None], jnp.concatenate([jnp.full((1,), KEY, jnp.int32), digits])[None])
        question, answers = continued(jnp.full((1,), QUESTION, jnp.int32), digits)
        return jnp.concatenate([body, question]), jnp.concatenate([unlabelled(room), answers])


def grid(lengths: Sequence[int], depths: Sequence[float], **fields) -> dict[str, Task]:
    """A slice for each length and depth, named "T=256 depth=0.5"; fields are those of `Passkey`."""
    return {f"T={t} depth={d:g}": Passkey(t, depth=d, **fields) for t in lengths for d in depths}


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "passkey": Setting(
            tuple(Passkey(t) for t in (64, 128, 256)),
            MappingProxyType(grid((256, 1024, 4096), (0.0, 0.5, 1.0))),
            "arXiv 2305.16300 as tokens, sized for a CPU",
            steps=1500,
        ),
        "passkey_long": Setting(
            tuple(Passkey(t) for t in (128, 256, 384, 512)),
            MappingProxyType(grid(tuple(2**i for i in range(9, 18, 2)), tuple(i / 10 for i in range(11)))),
            "arXiv 2305.16300 as tokens, up to 2^17",
            steps=1500,
        ),
    }
)
