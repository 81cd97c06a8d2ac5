"""What all tasks share: scores, exact sampling, settings, and that a batch is what its task says it is."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.tasks import IGNORE, SETTINGS, Setting, Task, score
from memjax.tasks.mqar import MQAR
from memjax.tasks.task import continued, distinct, place, spread, unlabelled

ALL = {task for s in SETTINGS.values() for task in (*s.train, *s.test.values())}
FIRST = {s.train[0] for s in SETTINGS.values() if s.train[0].tokens <= 160}


@functools.partial(jax.jit, static_argnums=0)
def batch(task, key):
    return task.batch(key, 5)


def test_scores():
    labels = np.array([[IGNORE, 3, IGNORE, 5], [1, 2, 3, IGNORE], [7, IGNORE, IGNORE, IGNORE], [IGNORE] * 4], np.int32)
    said = np.array([[3, 3, 5, 4], [1, 2, 3, 9], [8, 1, 1, 1], [0, 0, 0, 0]], np.int32)
    got = score(jnp.asarray(said), jnp.asarray(labels))
    np.testing.assert_allclose(got.accuracy, [0.5, 1, 0, 1])
    np.testing.assert_allclose(got.exact, [0, 1, 0, 1])
    np.testing.assert_allclose(got.last, [0, 1, 0, 1])
    said[0] = [0, 0, 0, 5]
    got = score(jnp.asarray(said), jnp.asarray(labels))
    assert (float(got.accuracy[0]), float(got.exact[0]), float(got.last[0])) == (0.5, 0, 1)
    np.testing.assert_allclose(got.scaled(0.25), (np.array([0.5, 1, 0, 1]) - 0.25) / 0.75, rtol=1e-6)
    assert got.value(MQAR(128, 64, 4)) is got.accuracy


def test_distinct_draws_without_replacement_by_weight():
    """All ordered pairs out of four, with the probabilities of one draw after another."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    n = 20_000
    weights = jnp.asarray(np.log(p), jnp.float32)
    drawn = np.asarray(jax.jit(jax.vmap(lambda k: distinct(k, 4, 2, weights)))(jax.random.split(jax.random.key(0), n)))
    for i in range(4):
        for j in range(4):
            expected = 0 if i == j else p[i] * p[j] / (1 - p[i])
            seen = float(np.mean((drawn == [i, j]).all(1)))
            assert abs(seen - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)
    assert distinct(jax.random.key(0), 5, 0).shape == (0,)
    assert sorted(np.asarray(distinct(jax.random.key(1), 5, 5)).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="count is 6, needs 0 to 5"):
        distinct(jax.random.key(0), 5, 6)


def test_spread_reaches_every_arrangement_evenly():
    n = 8000
    at = np.asarray(jax.vmap(lambda k: spread(k, 9, 2, 3))(jax.random.split(jax.random.key(0), n)))
    arrangements, counts = np.unique(at, axis=0, return_counts=True)
    assert arrangements.tolist() == [[i, j] for i in range(7) for j in range(i + 3, 7)]
    assert abs(counts / n - 0.1).max() < 4 * np.sqrt(0.1 * 0.9 / n)


def test_place_and_continued():
    row = place(jnp.zeros(6, jnp.int32), jnp.array([1, 4]), jnp.array([[5, 6], [7, 8]]))
    assert row.tolist() == [0, 5, 6, 0, 7, 8]
    tokens, labels = continued(jnp.array([1, 2]), jnp.array([7, 8, 9]))
    assert tokens.tolist() == [1, 2, 7, 8]
    assert labels.tolist() == [IGNORE, 7, 8, 9]
    assert unlabelled(2).tolist() == [IGNORE] * 2


def check(task, inputs, labels):
    assert inputs.shape == labels.shape == (inputs.shape[0], task.tokens)
    assert inputs.dtype == labels.dtype == np.int32
    assert inputs.min() >= 0 and inputs.max() < task.vocab
    asked = labels != IGNORE
    assert set(asked.sum(1).tolist()) == {task.answers}
    assert labels[asked].min() >= 0 and labels.max() < task.vocab
    assert 0 < task.chance <= 1


@pytest.mark.parametrize("task", sorted(FIRST, key=repr), ids=repr)
def test_a_batch_is_what_its_task_says(task):
    inputs, labels, valid = batch(task, jax.random.key(0))
    check(task, np.asarray(inputs), np.asarray(labels))
    assert valid is None
    again, other = batch(task, jax.random.key(0)), batch(task, jax.random.key(1))
    np.testing.assert_array_equal(inputs, again.inputs)
    np.testing.assert_array_equal(labels, again.labels)
    assert (np.asarray(other.inputs) != np.asarray(inputs)).any()
    assert len({row.tobytes() for row in np.asarray(inputs)}) > 1


@pytest.mark.parametrize("task", sorted(ALL, key=repr), ids=repr)
def test_shapes_are_known_without_a_batch(task):
    inputs, labels, _ = jax.eval_shape(lambda key: task.batch(key, 3), jax.random.key(0))
    assert inputs.shape == labels.shape == (3, task.tokens)
    assert hash(task) == hash(replace(task)) and task.answers >= 1 and 0 < task.chance <= 1


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_can_be_trained(name):
    setting = SETTINGS[name]
    assert setting.train and setting.test and setting.source
    assert setting.vocab == max(t.vocab for t in setting.train)  # nothing is tested that was not learned
    assert setting.longest >= max(t.tokens for t in setting.train)
    assert min(setting.layers, setting.steps, setting.batch, setting.learning_rate) > 0


def test_a_setting_with_other_fields():
    changed = SETTINGS["mqar"].replace(random_fill=False)
    assert {task.random_fill for task in (*changed.train, *changed.test.values())} == {False}
    assert changed.test.keys() == SETTINGS["mqar"].test.keys() and changed.steps == SETTINGS["mqar"].steps
    with pytest.raises(ValueError, match="MQAR: length is 8, needs at least 16 = 4 pairs"):
        SETTINGS["mqar"].replace(length=8)
    with pytest.raises(TypeError):
        SETTINGS["mqar"].replace(nothing=1)


def test_a_task_of_ones_own():
    @dataclass(frozen=True)
    class Last(Task):
        vocab: int = 3
        tokens: int = 4

        @property
        def answers(self):
            return 1

        @property
        def chance(self):
            return 1 / self.vocab

        def example(self, key):
            inputs = jax.random.randint(key, (self.tokens,), 0, self.vocab, jnp.int32)
            return inputs, unlabelled(self.tokens).at[-1].set(inputs[0])

    inputs, labels, _ = Last().batch(jax.random.key(0), 6)
    check(Last(), np.asarray(inputs), np.asarray(labels))
    setting = Setting((Last(),), {"all": Last(tokens=5)}, "here")
    assert (setting.vocab, setting.longest) == (3, 5)
