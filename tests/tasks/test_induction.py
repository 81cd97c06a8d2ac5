"""Induction heads and repeated rows: the answer is what followed before."""

import jax
import numpy as np
import pytest

from memjax.tasks.induction import InductionHeads, RepeatCopy
from memjax.tasks.task import IGNORE


def batch(task, n):
    inputs, labels, _ = jax.jit(task.batch, static_argnums=1)(jax.random.key(0), n)
    return np.asarray(inputs), np.asarray(labels)


@pytest.mark.parametrize("length", [3, 17])
def test_the_special_token_is_answered_by_what_followed_it(length):
    n, task = 4000, InductionHeads(length, 5)
    inputs, labels = batch(task, n)
    special = inputs == 5
    assert (special.sum(1) == 2).all() and special[:, -1].all() and (labels[:, :-1] == IGNORE).all()
    at = special.argmax(1)
    assert (at <= length - 3).all()
    np.testing.assert_array_equal(labels[:, -1], inputs[np.arange(n), at + 1])  # the oracle scores 1
    p = 1 / (length - 2)
    assert np.abs(np.bincount(at, minlength=length - 2) / n - p).max() <= 4 * np.sqrt(p * (1 - p) / n)
    assert np.abs(np.bincount(labels[:, -1], minlength=5) / n - 0.2).max() < 4 * np.sqrt(0.16 / n)


def test_the_second_half_repeats_the_first():
    inputs, labels = batch(RepeatCopy(12, 7), 100)
    np.testing.assert_array_equal(inputs[:, :6], inputs[:, 6:])
    assert (labels[:, :6] == IGNORE).all() and (labels[:, -1] == IGNORE).all()
    np.testing.assert_array_equal(labels[:, 6:-1], inputs[:, 7:])
    assert set(inputs.ravel().tolist()) == set(range(7))


def test_refuses():
    with pytest.raises(ValueError, match="InductionHeads: length is 2, needs at least 3"):
        InductionHeads(2)
    with pytest.raises(ValueError, match="RepeatCopy: length is 5, needs an even number"):
        RepeatCopy(5)
