"""MQAR: samples of the reference and ours, against a dictionary that reads them, and where queries stand."""

from pathlib import Path

import jax
import numpy as np
import pytest

from memjax.tasks.mqar import MQAR, CompositionalMQAR
from memjax.tasks.task import IGNORE

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "tasks" / "mqar_a.npz")
TASKS = [
    MQAR(128, 64, 8),
    MQAR(128, 64, 8, random_fill=False),
    MQAR(128, 64, 8, random_fill=False, updates=4),
    MQAR(97, 63, 9, power=1.0, updates=9),
    MQAR(64, 63, 15),
]


def batch(task, n=64, seed=0):
    inputs, labels, _ = jax.jit(task.batch, static_argnums=1)(jax.random.key(seed), n)
    return np.asarray(inputs), np.asarray(labels)


def read(row, pairs):
    """A dictionary that reads the pairs at the beginning of a row: the last value of each key."""
    return {int(k): int(v) for k, v in row[: 2 * pairs].reshape(-1, 2)}


def validate(task, inputs, labels, distinct=True):
    """What makes a sample one of the task, found by reading it."""
    k, context = task.pairs, 2 * (task.pairs + task.updates)
    for row, asked in zip(inputs, labels, strict=True):
        at = np.flatnonzero(asked != IGNORE)
        assert len(at) == k and at.min() >= context and not ((at - context) % 2).any()
        known = read(row, k + task.updates)
        assert sorted(row[at].tolist()) == sorted(known) and len(known) == k
        assert [known[int(key)] for key in row[at]] == asked[at].tolist()  # the oracle scores 1
        keys, values = row[:context:2], row[1:context:2]
        assert 1 <= keys.min() and keys.max() < task.vocab // 2 <= values.min() and values.max() < task.vocab
        assert len(set(keys[:k].tolist())) == k and len(set(values[:k].tolist())) == k
        assert set(keys[k:].tolist()) <= set(keys[:k].tolist())
        if distinct:
            assert len(set(values.tolist())) == k + task.updates
        if not task.random_fill:
            rest = np.delete(row, at)[context:]
            assert not rest.any()


def test_the_samples_of_the_reference_are_of_the_task():
    n = int(GOLDEN["in_num_kv"])
    assert int(GOLDEN["in_vocab"]) == 128
    validate(MQAR(128, 64, n, random_fill=False), GOLDEN["in_inputs"], GOLDEN["in_labels"])
    validate(MQAR(128, 64, n), GOLDEN["in_inputs_rand"], GOLDEN["in_labels_rand"])
    task = MQAR(128, 64, n, random_fill=False, updates=4)
    validate(task, GOLDEN["in_forget_inputs"], GOLDEN["in_forget_labels"], distinct=False)


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_ours_are_too(task):
    validate(task, *batch(task))


def test_an_update_changes_the_answer():
    task = MQAR(128, 64, 8, updates=4)
    inputs, labels = batch(task)
    first = [{int(k): int(v) for k, v in row[:16].reshape(-1, 2)} for row in inputs]
    changed = [
        sum(first[i][int(row[j])] != labels[i, j] for j in np.flatnonzero(labels[i] != IGNORE))
        for i, row in enumerate(inputs)
    ]
    assert changed == [4] * len(inputs)


def test_fill_is_uniform_over_the_vocabulary():
    inputs, labels = batch(MQAR(128, 64, 4), 512)
    fill = inputs[:, 8:][labels[:, 8:] == IGNORE]
    counts = np.bincount(fill, minlength=128)
    expected = len(fill) / 128
    assert ((counts - expected) ** 2 / expected).sum() < 127 + 5 * np.sqrt(2 * 127)


def test_queries_stand_where_those_of_the_reference_do():
    """Golden: the frequency of a label at each position over 4000 rows."""
    n = 4000
    _, labels = batch(MQAR(128, 64, 8), n)
    p, q = GOLDEN["out_query_position_prob"], (labels != IGNORE).mean(0)
    spread = np.sqrt(p * (1 - p) * 2 / n)
    assert (np.abs(p - q) <= 4 * spread).all()
    _, labels = batch(MQAR(128, 64, 8, power=1.0), n)
    q = (labels != IGNORE).mean(0)[16::2]
    assert np.abs(q - 8 / 24).max() < 4 * np.sqrt(8 / 24 * 16 / 24 / n)


@pytest.mark.parametrize("task", [CompositionalMQAR(128, 96, 4), CompositionalMQAR(64, 63, 3, random_fill=False)])
def test_compositional(task):
    inputs, labels = batch(task)
    k, m, third = task.pairs, task.side, task.vocab // 3
    for row, asked in zip(inputs, labels, strict=True):
        triplets = row[: 3 * k].reshape(-1, 3).tolist()
        known = {(a, b): v for a, b, v in triplets}
        halves = [set(column) for column in zip(*triplets, strict=True)]
        assert [len(h) for h in halves] == [m, m, k] and len(known) == k
        assert min(halves[0]) >= 1 and max(halves[0]) < third <= min(halves[1])
        assert max(halves[1]) < 2 * third <= min(halves[2])
        at = np.flatnonzero(asked != IGNORE)
        assert len(at) == k and at.min() >= 3 * k and set(((at - 3 * k) % 3).tolist()) == {1}
        asks = [(int(row[i - 1]), int(row[i])) for i in at]
        assert sorted(asks) == sorted(known) and [known[ask] for ask in asks] == asked[at].tolist()
        if not task.random_fill:
            assert not np.delete(row, [*at, *(at - 1)])[3 * k :].any()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MQAR(128, 64, 0), "MQAR: pairs is 0, needs 1 to 63"),
        (lambda: MQAR(128, 64, 17), "MQAR: length is 64, needs at least 68 = 4 pairs"),
        (lambda: MQAR(128, 64, 8, updates=9), "MQAR: updates is 9, needs 0 to 8"),
        (lambda: MQAR(64, 64, 8), "MQAR: vocab is 64, needs more than length = 64"),
        (lambda: CompositionalMQAR(128, 64, 7), "CompositionalMQAR: side is 7, needs 1 to 6"),
        (lambda: CompositionalMQAR(128, 64, 4), "CompositionalMQAR: length is 64, needs at least 96"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
