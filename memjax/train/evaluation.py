"""Scores of small trainings: train on a setting of `memjax.tasks`, then read fresh rows of every slice of it.

result = measure(model, setting, Recipe.of(setting), seed=0)
result.scores["K=16"].accuracy, result.state_bytes
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from memjax.memory import How, Memory
from memjax.tasks.task import Score, Setting, Task, score
from memjax.train.small import Recipe, check_vocab, train_on

LOGITS = 1 << 24
"""Logits that are made at once when rows are read: longer ones are read in pieces."""

PIECE = 512
"""Tokens that are read at once, at most: what attention keeps of a piece grows with its square."""


def evaluate(
    model: Memory,
    params: dict,
    task: Task,
    *,
    rows: int = 512,
    batch: int = 64,
    piece: int | None = None,
    seed: int = 0,
    how: How = How(),
) -> Score:
    """The mean score over fresh rows of a task, floats.

    rows: how many, rounded up to whole batches. piece: tokens that are read at once, the state carried from one piece
    to the next; None: as many as make `LOGITS` logits, at most `PIECE`. seed: never gives a row that `train_on` has
    seen but by chance.
    """
    check_vocab(model, (task,))
    key = jax.random.fold_in(jax.random.key(seed), 2)
    piece = min(PIECE, max(16, LOGITS // (batch * task.vocab))) if piece is None else piece
    found = []
    for i in range(-(-rows // batch)):
        inputs, labels, valid = _rows(jax.random.fold_in(key, i), task=task, size=batch)
        predicted = read(params, inputs, valid, model=model, piece=min(piece, task.tokens), how=how)
        found.append(_score(predicted, labels))
    return Score(*(float(np.mean([np.mean(one) for one in part])) for part in zip(*found, strict=True)))


@functools.partial(jax.jit, static_argnames=("task", "size"))
def _rows(key, *, task, size):
    return task.batch(key, size)


_score = jax.jit(score)


@functools.partial(jax.jit, static_argnames=("model", "piece", "how"))
def read(params: dict, inputs: Array, valid: Array | None, *, model: Memory, piece: int, how: How = How()) -> Array:
    """The most likely next token at every token [b t] int32, read `piece` tokens at a time from the empty memory."""
    (b, t), whole = inputs.shape, inputs.shape[1] // piece * piece

    def apply(state, now):
        logits, state = model.apply(params, state, now[0], valid=now[1], how=how)
        return state, logits.argmax(-1).astype(jnp.int32)

    now = (inputs, valid)
    pieces = jax.tree.map(lambda a: a[:, :whole].reshape(b, -1, piece).swapaxes(0, 1), now)
    state, predicted = lax.scan(apply, model.init_state(b), pieces)
    predicted = predicted.swapaxes(0, 1).reshape(b, whole)
    if whole == t:
        return predicted
    return jnp.concatenate([predicted, apply(state, jax.tree.map(lambda a: a[:, whole:], now))[1]], 1)


class Result(NamedTuple):
    """scores: by slice. seconds: of training, with compilation; step_seconds: of an update, without. losses: of every
    `CALL` updates. state_bytes: of one row."""

    scores: dict[str, Score]
    losses: list[float]
    steps: int
    seconds: float
    step_seconds: float
    parameters: int
    state_bytes: int
    params: dict

    def plain(self) -> dict[str, Any]:
        """What a file keeps of it: all but the parameters, as JSON has it."""
        scores = {name: score._asdict() for name, score in self.scores.items()}
        return {name: value for name, value in self._asdict().items() if name != "params"} | {"scores": scores}


def measure(
    model: Memory,
    setting: Setting,
    recipe: Recipe | None = None,
    *,
    reader: Memory | None = None,
    rows: int = 512,
    seed: int = 0,
    how: How = How(),
    report: Callable[[int, float], None] | None = None,
) -> Result:
    """Train on a setting, then score every slice of it.

    recipe: None: that of the setting. reader: a model with the same parameters that reads the test rows, such as one
    whose window is longer; None: `model`. Other arguments and errors as in `train_on` and `evaluate`.
    """
    recipe = Recipe.of(setting) if recipe is None else recipe
    trained = train_on(model, setting.train, recipe, seed=seed, how=how, report=report)
    reader = model if reader is None else reader
    scores = {
        name: evaluate(reader, trained.params, task, rows=rows, seed=seed, how=how)
        for name, task in setting.test.items()
    }
    return Result(
        scores,
        trained.losses.tolist(),
        recipe.steps,
        trained.seconds,
        trained.step_seconds,
        model.param_bytes() // 4,
        model.state_bytes(1),
        trained.params,
    )
