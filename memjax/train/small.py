"""Small trainings: one memory, one task, minutes on a CPU. What memories are compared by.

    model = small_model(small_mixers("gated_delta_net"), vocab=setting.vocab)  # memjax.lm.small
    params = train_on(model, setting.train, Recipe.of(setting), seed=0).params

`memjax.train.evaluation` scores what was trained.

Batches are made inside the jitted update, and many updates run in one call of it, so that Python costs nothing. What
is trained with is an argument of the compiled program: other seeds and learning rates compile nothing.

Source of the recipe: Arora et al., Zoology, arXiv 2312.04927 (two layers without feed-forward blocks, AdamW).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jaxtyping import Float, Int

from memjax.combinators import Verb
from memjax.errors import ConfigError
from memjax.lm.model import LanguageModel
from memjax.lm.small import small_params
from memjax.memory import How, Memory
from memjax.tasks.task import IGNORE, Examples, Setting, Task
from memjax.train.loop import DivergedError
from memjax.train.losses import cross_entropy
from memjax.train.optimizer import lenient

CALL = 20
"""Updates in one call of the compiled program: as often is reported."""


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine to 0.

    steps: updates. batch: rows of each. learning_rate: its peak. weight_decay: of all parameters, times the learning
    rate. warmup: share of the steps. clip: largest global norm of the gradient.
    """

    steps: int = 800
    batch: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    clip: float = 1.0

    def __post_init__(self):
        for name, holds, needs in (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "more than 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup", 0 <= self.warmup < 1, "a share of the steps, from 0 to less than 1"),
            ("clip", self.clip > 0, "more than 0"),
        ):
            if not holds:
                raise ConfigError(f"Recipe: {name} is {getattr(self, name)}, needs {needs}")

    @classmethod
    def of(cls, setting: Setting, **changes: Any) -> Recipe:
        """That of a setting, with these fields changed where they are not None."""
        own = {name: getattr(setting, name) for name in ("steps", "batch", "learning_rate")}
        return cls(**own | {name: value for name, value in changes.items() if value is not None})


class Trained(NamedTuple):
    """losses: [calls] the mean cross entropy of each call of `CALL` updates. seconds: in all. step_seconds: of an
    update, the median over the calls after the first, which compiles."""

    params: dict
    losses: np.ndarray
    seconds: float
    step_seconds: float


def train_on(
    model: Memory,
    tasks: Sequence[Task],
    recipe: Recipe = Recipe(),
    *,
    seed: int = 0,
    how: How = How(),
    report: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train a model over token ids from scratch (`small_params`), in float32; the same seed gives the same result.

    Args:
      model: see `small_model`. Auxiliary losses are not trained.
      tasks: each batch is of one of these, drawn evenly. Rows of shorter ones are padded on the right.
      report: called after each call of the program with the updates it did and their mean loss.

    Raises:
      DivergedError: the loss is not finite.
      ConfigError: a token of a task that the model has no embedding for.
    """
    tasks = tuple(tasks)
    check_vocab(model, tasks)
    key = jax.random.key(seed)
    params = jax.jit(small_params, static_argnums=0)(model, jax.random.fold_in(key, 0))
    numbers = _Numbers(*(np.float32(getattr(recipe, name)) for name in _Numbers._fields))
    carry, losses, times = (params, _optimizer(numbers).init(params)), [], []
    for first in range(0, recipe.steps, CALL):
        began, last = time.perf_counter(), min(first + CALL, recipe.steps)
        carry, loss = _updates(
            carry, jax.random.fold_in(key, 1), np.int32(first), np.int32(last), numbers,
            model=model, tasks=tasks, batch=recipe.batch, how=how,
        )  # fmt: skip
        losses.append(float(loss))
        times.append((time.perf_counter() - began) / (last - first))
        if not math.isfinite(losses[-1]):
            raise DivergedError(f"train_on: the loss is {losses[-1]} between steps {first + 1} and {last}")
        if report is not None:
            report(last - first, losses[-1])
    seconds = sum(t * min(CALL, recipe.steps - CALL * i) for i, t in enumerate(times))
    return Trained(carry[0], np.array(losses, np.float32), seconds, float(np.median(times[1:] or times)))


class _Numbers(NamedTuple):
    """What of a recipe is an argument of the program, float32."""

    steps: Any
    learning_rate: Any
    weight_decay: Any
    warmup: Any
    clip: Any


def _optimizer(numbers: _Numbers) -> optax.GradientTransformation:
    def rate(count):
        warm = jnp.maximum(numbers.warmup * numbers.steps, 1.0)
        decayed = jnp.clip((count - warm) / jnp.maximum(numbers.steps - warm, 1.0), 0.0, 1.0)
        return numbers.learning_rate * jnp.minimum((count + 1) / warm, 0.5 + 0.5 * jnp.cos(jnp.pi * decayed))

    adamw = optax.adamw(rate, weight_decay=numbers.weight_decay)
    return lenient(optax.chain(optax.clip_by_global_norm(numbers.clip), adamw))


@functools.partial(jax.jit, static_argnames=("model", "tasks", "batch", "how"), donate_argnames=("carry",))
def _updates(carry, key, first, last, numbers, *, model, tasks, batch, how):
    """The updates from `first` to `last` - 1 and their mean loss."""
    optimizer = _optimizer(numbers)

    def update(i, now):
        (params, opt_state), total = now
        examples = draw(tasks, batch, jax.random.fold_in(key, i))
        loss, grads = jax.value_and_grad(answer_loss, argnums=1)(model, params, examples, most_answers(tasks), how=how)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), total + loss

    carry, total = lax.fori_loop(first, last, update, (carry, jnp.float32(0)))
    return carry, total / (last - first).astype(jnp.float32)


def most_answers(tasks: Sequence[Task]) -> int:
    """Labels of a row, at most."""
    return max(task.answers for task in tasks)


def draw(tasks: Sequence[Task], batch: int, key: Array) -> Examples:
    """A batch of one of the tasks, padded on the right to the longest of them; `valid` only where that pads."""
    unique = list(dict.fromkeys(tasks))
    longest = max(task.tokens for task in unique)
    padded = any(task.tokens < longest for task in unique)

    def rows(task: Task, key: Array) -> Examples:
        inputs, labels, _ = task.batch(key, batch)
        pad = ((0, 0), (0, longest - task.tokens))
        valid = jnp.pad(jnp.ones(inputs.shape, jnp.bool_), pad) if padded else None
        return Examples(jnp.pad(inputs, pad), jnp.pad(labels, pad, constant_values=IGNORE), valid)

    k_which, k_rows = jax.random.split(key)
    if len(unique) == 1:
        return rows(unique[0], k_rows)
    of = jnp.asarray([unique.index(task) for task in tasks], jnp.int32)
    which = of[jax.random.randint(k_which, (), 0, len(of), jnp.int32)]
    return lax.switch(which, [functools.partial(rows, task) for task in unique], k_rows)


def answer_loss(model: Memory, params: dict, examples: Examples, answers: int, *, how: How = How()) -> Float[Array, ""]:
    """Mean cross entropy in nats over the labelled tokens. answers: labels of a row, at most.

    Logits are made at labelled tokens only: most tasks label few, and the rest would cost more than a small model.
    """
    inputs, labels, valid = examples
    state = model.init_state(inputs.shape[0])
    if isinstance(model, LanguageModel) and 2 * answers <= inputs.shape[1]:
        asked, at = lax.top_k((labels != IGNORE).astype(jnp.int32), answers)
        labels = jnp.where(asked > 0, jnp.take_along_axis(labels, at, 1), IGNORE)
        verb = Verb("apply", {"ids": inputs, "valid": valid, "start": None}, how)
        logits, _, _ = model.thread(_At(verb, at), params, state, inputs)
    else:
        logits, _ = model.apply(params, state, inputs, valid=valid, how=how)
    entropy, _ = cross_entropy(logits, jnp.maximum(labels, 0), labels != IGNORE)
    return entropy


class _At(NamedTuple):
    """A `Call` that runs a body and hands on its rows at some tokens of each example."""

    verb: Verb
    at: Int[Array, "b m"]

    @property
    def unrolled(self) -> bool:
        return self.verb.unrolled

    @property
    def remat(self) -> bool:
        return self.verb.remat

    def __call__(self, memory: Memory, params, state, x) -> tuple[Any, Any, Any]:
        y, state, aux = self.verb(memory, params, state, x)
        return jnp.take_along_axis(y, self.at[..., None], 1), state, aux


def check_vocab(model: Memory, tasks: Sequence[Task]) -> None:
    """ConfigError if a task has a token that the model has no embedding for."""
    has, needs = model.reads_ids, max(task.vocab for task in tasks)
    if has is not None and has < needs:
        raise ConfigError(f"{type(model).__name__}: vocab is {has}, the task has {needs} tokens")
