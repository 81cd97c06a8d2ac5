"""Passkey: the key stands once, anywhere, and its digits are the answer."""

import jax
import numpy as np
import pytest

from memjax.tasks.passkey import DIGITS, FILL, KEY, QUESTION, Passkey, grid
from memjax.tasks.task import IGNORE


def batch(task, n=64):
    inputs, labels, _ = jax.jit(task.batch, static_argnums=1)(jax.random.key(0), n)
    return np.asarray(inputs), np.asarray(labels)


def find(row):
    """Where the key stands, and its digits."""
    (at,) = np.flatnonzero(row == KEY)
    return int(at), row[at + 1 : at + 1 + DIGITS]


@pytest.mark.parametrize("task", [Passkey(40), Passkey(40, 7, random_fill=False), Passkey(11), Passkey(40, depth=0.5)])
def test_the_key_is_asked_for(task):
    inputs, labels = batch(task)
    for row, asked in zip(inputs, labels, strict=True):
        at, digits = find(row)
        assert np.flatnonzero(row == QUESTION).tolist() == [task.length - DIGITS]
        assert asked[-DIGITS:].tolist() == digits.tolist()  # the oracle scores 1
        assert (asked[:-DIGITS] == IGNORE).all()
        assert row[-DIGITS + 1 :].tolist() == digits[:-1].tolist()
        body = np.delete(row[:-DIGITS], range(at, at + 1 + DIGITS))
        assert (body >= FILL).all()
        if not task.random_fill:
            cycle = FILL + np.arange(task.length) % task.fillers
            np.testing.assert_array_equal(row[:at], cycle[:at])


def test_depth_is_uniform():
    n, room = 4000, 30
    inputs, _ = batch(Passkey(room + DIGITS), n)
    places = room - DIGITS
    counts = np.bincount([find(row)[0] for row in inputs], minlength=places)
    assert len(counts) == places
    chi2 = ((counts - n / places) ** 2 / (n / places)).sum()
    assert chi2 < places + 5 * np.sqrt(2 * places)


def test_a_grid_of_depths():
    tasks = grid((20, 30), (0.0, 0.5, 1.0), fillers=3)
    assert list(tasks)[:3] == ["T=20 depth=0", "T=20 depth=0.5", "T=20 depth=1"] and len(tasks) == 6
    at = {name: {find(row)[0] for row in batch(task)[0]} for name, task in tasks.items()}
    assert at["T=30 depth=0"] == {0} and at["T=30 depth=1"] == {30 - 2 * DIGITS - 1} and len(at["T=30 depth=0.5"]) == 1


def test_refuses():
    with pytest.raises(ValueError, match="Passkey: length is 10, needs at least 11"):
        Passkey(10)
    with pytest.raises(ValueError, match=r"Passkey: depth is 1\.5, needs a number from 0 to 1"):
        Passkey(depth=1.5)
