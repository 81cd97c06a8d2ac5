"""Copying: what stands where, and that selecting is beyond any linear map of the positions."""

import jax
import numpy as np
import pytest

from memjax.tasks.selective_copying import FIRST, MARKER, NOISE, Copying
from memjax.tasks.task import IGNORE


def batch(task, n, seed=0):
    inputs, labels, _ = jax.jit(task.batch, static_argnums=1)(jax.random.key(seed), n)
    return np.asarray(inputs), np.asarray(labels)


@pytest.mark.parametrize("task", [Copying(24, 5, 4), Copying(24, 5, 4, selective=False), Copying(5, 5, 3)])
def test_the_content_is_asked_for_in_order(task):
    inputs, labels = batch(task, 200)
    body, markers = inputs[:, : task.length], inputs[:, task.length :]
    assert (markers == MARKER).all() and (labels[:, : task.length] == IGNORE).all()
    for row, asked in zip(body, labels[:, task.length :], strict=True):
        content = row[row != NOISE]
        assert (content >= FIRST).all() and content.tolist() == asked.tolist()  # the oracle scores 1
    at = (body != NOISE).mean(0)
    if task.selective and task.count < task.length:
        p = task.count / task.length
        assert np.abs(at - p).max() < 5 * np.sqrt(p * (1 - p) / 200)
    elif not task.selective:
        assert at.tolist() == [1.0] * task.count + [0.0] * (task.length - task.count)
    assert set(body[body != NOISE].tolist()) == set(range(FIRST, task.vocab))


def linear_accuracy(task):
    """The best linear map from what stands at each position, fitted to many rows: more than any fixed convolution."""

    def features(inputs):
        return np.eye(task.vocab, dtype=np.float32)[inputs[:, : task.length]].reshape(len(inputs), -1)

    inputs, labels = batch(task, 3000)
    x, y = features(inputs), labels[:, task.length :]
    test_inputs, test_labels = batch(task, 1000, seed=1)
    right = []
    for i in range(task.count):
        weights = np.linalg.lstsq(x, np.eye(task.vocab, dtype=np.float32)[y[:, i]], rcond=1e-4)[0]
        right.append((features(test_inputs) @ weights).argmax(1) == test_labels[:, task.length + i])
    return np.mean(right, axis=1)


@pytest.mark.slow
def test_a_linear_map_of_positions_copies_but_cannot_select():
    assert (linear_accuracy(Copying(24, 8, 8, selective=False)) == 1).all()
    assert linear_accuracy(Copying(24, 8, 8)).min() < 0.5  # those at the ends are easier: first and last of the row


def test_refuses():
    with pytest.raises(ValueError, match="Copying: count is 9, needs 1 to 8 = length"):
        Copying(8, 9)
    with pytest.raises(ValueError, match="Copying: content is 0, needs at least 1"):
        Copying(8, 2, 0)
