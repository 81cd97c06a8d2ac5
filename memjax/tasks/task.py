"""What a task is: rows of tokens with the tokens that should follow, made on the device from a key, and their score.

A task is a frozen dataclass of its difficulty that writes `example`, one row; `batch` follows by vmap. Everything is
pure and of fixed shapes, so that batches are made inside the jitted update that learns from them.

    task = MQAR(vocab=128, length=64, pairs=8)
    inputs, labels, _ = task.batch(key, size=64)        # labels: IGNORE where nothing is asked
    score(logits.argmax(-1), labels).accuracy           # [b]

A `Setting` is a published difficulty: what is trained on, what is tested on slice by slice, and for how long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

IGNORE = -100
"""The label of a position at which nothing is asked."""


class Examples(NamedTuple):
    """Rows of a task. The label stands at the token after which the model must say it."""

    inputs: Int[Array, "b t"]
    labels: Int[Array, "b t"]
    valid: Bool[Array, "b t"] | None = None  # None: every token is


@dataclass(frozen=True)
class Task:
    """A generator of rows of one difficulty. All sizes are of one row and known without making it.

    vocab: token ids are 0 .. vocab - 1. tokens: t. answers: labels of every row.
    chance: the share of right answers for a guess that knows the task but has kept nothing of the row.
    metric: the figure that is published: share of right answers, of rows that are right throughout, or the first one
    scaled so that chance is 0.
    """

    metric: ClassVar[Literal["accuracy", "exact", "scaled"]] = "accuracy"
    vocab: ClassVar[int]
    tokens: ClassVar[int]
    answers: ClassVar[int]
    chance: ClassVar[float]

    def example(self, key: Array) -> tuple[Int[Array, " t"], Int[Array, " t"]]:
        """Tokens and labels of one row, int32."""
        raise NotImplementedError

    def batch(self, key: Array, size: int) -> Examples:
        """`size` independent rows; the same key gives the same rows. `size` is static under jit."""
        return Examples(*jax.vmap(self.example)(jax.random.split(key, size)))

    def _require(self, name: str, holds: bool, needs: str) -> None:
        """For `__post_init__`: ValueError that names a field, its value and what it needs."""
        if not holds:
            raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}, needs {needs}")


# ---------------------------------------------------------------------------------------------- score


class Score(NamedTuple):
    """Of each row, or the mean over rows."""

    accuracy: Any  # share of the labelled positions that are right
    exact: Any  # 1 where all of them are
    last: Any  # 1 where the last of them is: an average over easy early positions hides what a long row loses

    def scaled(self, chance: float) -> Any:
        """(accuracy - chance) / (1 - chance): a guess is 0, everything right 1."""
        return (self.accuracy - chance) / (1 - chance)

    def value(self, task: Task) -> Any:
        """The figure that is published for this task."""
        return self.scaled(task.chance) if task.metric == "scaled" else getattr(self, task.metric)


def score(predicted: Int[Array, "b t"], labels: Int[Array, "b t"]) -> Score:
    """The score of each row, float32 [b]; a row without labels counts as right."""
    asked = labels != IGNORE
    right = (predicted == labels) & asked
    count = asked.sum(1, dtype=jnp.int32)
    share = jnp.where(count == 0, 1, right.sum(1, dtype=jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32))
    fine = right | ~asked
    latest = jnp.where(asked, jnp.arange(labels.shape[1], dtype=jnp.int32)[None], 0).max(1)
    last = jnp.take_along_axis(fine, latest[:, None], 1)[:, 0]
    return Score(share, fine.all(1).astype(jnp.float32), last.astype(jnp.float32))


# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """A published difficulty of a task.

    train: a batch is of one of these, drawn evenly; one that stands twice is drawn twice as often.
    test: by the name of a slice. source: where the setting comes from, and what of it is ours.
    layers, hidden (width of a feed-forward block behind each mixer, None: none), steps, batch, learning_rate: how it is
    trained on there.
    """

    train: tuple[Task, ...]
    test: Mapping[str, Task]
    source: str
    layers: int = 2
    hidden: int | None = None
    steps: int = 800
    batch: int = 64
    learning_rate: float = 5e-3

    @property
    def vocab(self) -> int:
        """Of all tasks together."""
        return max(task.vocab for task in (*self.train, *self.test.values()))

    @property
    def longest(self) -> int:
        """Tokens of the longest row, trained on or tested."""
        return max(task.tokens for task in (*self.train, *self.test.values()))

    def replace(self, **fields: Any) -> Setting:
        """The same with these fields in every task. TypeError or ValueError where a task refuses them."""
        change = lambda task: replace(task, **fields)  # noqa: E731
        test = {name: change(task) for name, task in self.test.items()}
        return replace(self, train=tuple(map(change, self.train)), test=test)


def slices(name: str, tasks: Mapping[Any, Task]) -> Mapping[str, Task]:
    """Names for slices: {4: task} and "K" make {"K=4": task}."""
    return MappingProxyType({f"{name}={value}": task for value, task in tasks.items()})


# ---------------------------------------------------------------------------------------------- sampling


def distinct(key: Array, n: int, count: int, log_weight: Float[Array, " n"] | None = None) -> Int[Array, " count"]:
    """`count` different numbers below n in random order, as if drawn one after another without replacement.

    Exact, by the largest of Gumbel noise. log_weight: log probabilities of a draw, up to a constant (None: even).
    """
    if not 0 <= count <= n:
        raise ValueError(f"distinct: count is {count}, needs 0 to {n}")
    noise = jax.random.gumbel(key, (n,), jnp.float32)
    return lax.top_k(noise if log_weight is None else noise + log_weight, count)[1].astype(jnp.int32)


def spread(key: Array, room: int, count: int, width: int) -> Int[Array, " count"]:
    """Where `count` blocks of `width` tokens begin among `room` tokens, ascending: any way without overlap, evenly."""
    begins = jnp.sort(distinct(key, room - count * (width - 1), count))
    return begins + (width - 1) * jnp.arange(count, dtype=jnp.int32)


def place(row: Int[Array, " t"], at: Int[Array, " n"], blocks: Int[Array, "n w"]) -> Int[Array, " t"]:
    """The row with block i in place of the tokens from at[i] on."""
    return row.at[at[:, None] + jnp.arange(blocks.shape[1], dtype=jnp.int32)[None]].set(blocks)


def uniform(key: Array, shape: tuple[int, ...], low: int, high: int) -> Int[Array, "*shape"]:
    """Independent int32 from low to high - 1."""
    return jax.random.randint(key, shape, low, high, jnp.int32)


def unlabelled(t: int) -> Int[Array, " t"]:
    """Labels of a row in which nothing is asked yet."""
    return jnp.full((t,), IGNORE, jnp.int32)


def continued(prompt: Int[Array, " p"], answers: Int[Array, " m"]) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """What stands at the end of a row: a prompt and its answers, each given once it has been asked for.

    Tokens [p + m - 1] and their labels: the first answer at the last token of the prompt, the next one at that answer.
    """
    tokens = jnp.concatenate([prompt, answers[:-1]])
    return tokens, jnp.concatenate([unlabelled(len(prompt) - 1), answers])
