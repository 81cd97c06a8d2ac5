"""What the timed programs return, and in which order contestants are run."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from memjax.bench import timing


def op(x, initial_state):
    return x * initial_state[:, None], initial_state + x.sum(1)


INPUTS = {"x": jnp.arange(6.0).reshape(2, 3), "initial_state": jnp.asarray([2.0, 3.0])}
COTANGENTS = jnp.ones((2, 3)), jnp.full(2, 10.0)


def test_programs():
    o, state = op(**INPUTS)
    for mode in ("forward", "residuals", "both"):
        found = timing.compiled(mode, op)(INPUTS, COTANGENTS)
        outputs, rest = (found, None) if mode == "forward" else found
        np.testing.assert_array_equal(outputs[0], o)
        np.testing.assert_array_equal(outputs[1], state)
        if mode == "forward":
            continue
        gradients = rest if mode == "both" else rest(COTANGENTS)[0]
        np.testing.assert_array_equal(gradients["x"], [[12.0] * 3, [13.0] * 3])
        np.testing.assert_array_equal(gradients["initial_state"], INPUTS["x"].sum(1) + 10)


def test_contestants_take_turns():
    def run():
        seen = []

        def call(name):
            seen.append(name)
            return float(len(seen))

        return timing.interleave({name: functools.partial(call, name) for name in "abc"}, repeats=6), seen

    samples, seen = run()
    turns = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(turns) == timing.WARM_UP + 6 and all(sorted(turn) == list("abc") for turn in turns)
    assert len(set(turns)) > 2 and (samples, seen) == run()
    counted = [(name, i + 1.0) for i, name in enumerate(seen)][3 * timing.WARM_UP :]
    assert samples == {name: [at for other, at in counted if other == name] for name in "abc"}


@pytest.mark.parametrize("mode", timing.MODES)
def test_a_sample_is_the_time_of_one_call(mode):
    call = timing.caller(mode, op, INPUTS, COTANGENTS, hasty=True)
    assert 0 < call() < 60
    np.testing.assert_array_equal(INPUTS["initial_state"], [2.0, 3.0])  # a donated state was a copy


def test_a_loop_runs_every_call():
    """As on accelerators. The program counts its own runs through a callback."""
    import jax

    runs = []

    def counted(x, initial_state):
        jax.debug.callback(lambda: runs.append(1))
        return op(x, initial_state)

    call = timing._looped(timing.program("forward", counted), INPUTS, COTANGENTS)
    jax.effects_barrier()
    before = len(runs)
    assert call() > 0
    jax.effects_barrier()
    assert len(runs) - before > 1


def test_summary():
    found = timing.summary([float(x) for x in range(1, 12)])
    assert (found["p20"], found["median"], found["p80"]) == (3, 6, 9)
    assert len(found["samples"]) == 11
