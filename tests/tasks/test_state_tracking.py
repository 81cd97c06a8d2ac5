"""State tracking: group tables, running products against a simulator, and the delta rule that solves parity exactly."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.tasks.state_tracking import GroupWord, ModularArithmetic, generators, permutations, table
from memjax.tasks.task import IGNORE
from pallas_kernels import delta_rule

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "tasks" / "state_tracking_a.npz")


def batch(task, n=16):
    inputs, labels, _ = jax.jit(task.batch, static_argnums=1)(jax.random.key(0), n)
    return np.asarray(inputs), np.asarray(labels)


def compose(a, b):
    return tuple(a[i] for i in b)


def simulate(group, row):
    """The running product of permutations, or sum of numbers, by hand."""
    n = int(group[1:])
    if group[0] == "Z":
        return [sum(row[: i + 1].tolist()) % n for i in range(len(row))]
    elements = [p for p in itertools.permutations(range(n)) if group[0] == "S" or is_even(p)]
    state, labels = tuple(range(n)), []
    for g in row:
        state = compose(elements[g], state)
        labels.append(elements.index(state))
    return labels


def is_even(p):
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0


def test_the_samples_of_the_reference():
    np.testing.assert_array_equal(permutations(5), GOLDEN["in_perms"])
    np.testing.assert_array_equal(table("S3"), GOLDEN["out_table_S3"])
    product = table("S5")
    for row, labels in zip(GOLDEN["in_tokens"], GOLDEN["out_labels"], strict=True):
        assert simulate("S5", row) == labels.tolist()
        state = 0
        for g, label in zip(row, labels, strict=True):
            state = product[g, state]
            assert state == label
    for bits, labels in zip(GOLDEN["in_bits"], GOLDEN["out_parity"], strict=True):
        assert simulate("Z2", bits) == labels.tolist()


@pytest.mark.parametrize("group, order", [("Z2", 2), ("Z7", 7), ("S3", 6), ("S4", 24), ("A4", 12), ("A5", 60)])
def test_tables_are_groups(group, order):
    product = table(group)
    assert product.shape == (order, order) and GroupWord(group).vocab == order
    np.testing.assert_array_equal(product[0], np.arange(order))
    np.testing.assert_array_equal(product[:, 0], np.arange(order))
    for a in (product, product.T):
        assert (np.sort(a, 1) == np.arange(order)).all()
    a, b, c = np.ix_(*[np.arange(order)] * 3)
    np.testing.assert_array_equal(product[product[a, b], c], product[a, product[b, c]])


@pytest.mark.parametrize("group", ["Z2", "Z5", "S3", "S5", "A5"])
def test_labels_are_running_products(group):
    task = GroupWord(group, 23)
    inputs, labels = batch(task)
    for row, asked in zip(inputs, labels, strict=True):
        assert simulate(group, row) == asked.tolist()  # the oracle scores 1
    assert len(set(inputs.ravel().tolist())) > min(task.vocab, 100) * 0.9
    _, last = batch(GroupWord(group, 23, dense=False))
    np.testing.assert_array_equal(last[:, -1], labels[:, -1])
    assert (last[:, :-1] == IGNORE).all()


@pytest.mark.parametrize("group, count", [("Z6", 2), ("S3", 3), ("S5", 10), ("A4", 8), ("A5", 20)])
def test_generators_generate(group, count):
    few, product = generators(group), table(group)
    assert len(few) == count
    reached = {0}
    while new := {int(product[g, s]) for g in few for s in reached} - reached:
        reached |= new
    assert len(reached) == len(product)
    inputs, labels = batch(GroupWord(group, 9, elements="generators"), 64)
    assert set(inputs.ravel().tolist()) == set(few.tolist())
    assert simulate(group, inputs[0]) == labels[0].tolist()


@pytest.mark.parametrize("dense", [True, False])
def test_modular_arithmetic(dense):
    task = ModularArithmetic(5, 12, dense)
    for row, asked in zip(*batch(task), strict=True):
        digits, signs = row[::2], row[1::2]
        assert signs[-1] == 8 and set(signs[:-1].tolist()) <= {5, 6, 7} and digits.max() < 5
        values = [int(digits[0])]
        for sign, digit in zip(signs[:-1].tolist(), digits[1:].tolist(), strict=True):
            values.append({5: values[-1] + digit, 6: values[-1] - digit, 7: values[-1] * digit}[sign] % 5)
        assert asked[-1] == values[-1]
        assert asked[::2].tolist() == (values if dense else [IGNORE] * 6)
        assert (asked[1:-1:2] == IGNORE).all()


def test_a_delta_rule_tracks_parity_forever():
    """beta = 2 on ones turns the state's sign along k, beta = 0 on zeros keeps it: exact over 10,000 tokens."""
    inputs, labels = batch(GroupWord("Z2", 10_000), 2)
    one = jnp.ones((2, 10_000, 1, 1), jnp.float32)
    beta = jnp.asarray(2.0 * inputs, jnp.float32)[..., None]
    for implementation in ("xla", "reference"):
        o, _ = delta_rule(one, one, 0 * one, beta, initial_state=jnp.ones((2, 1, 1, 1)), implementation=implementation)
        np.testing.assert_array_equal(o[..., 0, 0], 1 - 2 * labels)


@pytest.mark.parametrize("group", ["Z1", "S7", "A2", "D4", "S", "Z-2"])
def test_refuses_groups(group):
    with pytest.raises(
        ValueError, match=f"GroupWord: group is '{group}', needs one of Z2 to Z1024, S2 to S6, A3 to A6"
    ):
        GroupWord(group)


def test_refuses():
    with pytest.raises(ValueError, match="ModularArithmetic: length is 7, needs an even number"):
        ModularArithmetic(5, 7)
    with pytest.raises(ValueError, match="ModularArithmetic: modulus is 1, needs at least 2"):
        ModularArithmetic(1)
    with pytest.raises(ValueError, match="GroupWord: length is 0, needs at least 1"):
        GroupWord("Z2", 0)
