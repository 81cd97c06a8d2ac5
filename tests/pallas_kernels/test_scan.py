"""scan_tokens: a token recurrence under valid and start, against a Python loop over rows and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.scan import scan_tokens
from tests.pallas_kernels.compare import compiled

B, T, D = 3, 9, 2


def step(state, now):
    """Not linear and not commuting, with a count beside the array."""
    x, gain = now
    s = jnp.tanh(0.5 * state["s"] + x * gain)
    return {"s": s, "count": state["count"] + 1}, s * 2


def inputs():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((B, T, D)), jnp.float32)
    state = {"s": jnp.asarray(draw.standard_normal((B, D)), jnp.float32), "count": jnp.array([4, 0, 7], jnp.int32)}
    gain = jnp.asarray(draw.random((B, T, 1)), jnp.float32)
    return state, (x, gain), jnp.asarray(draw.random((B, T)) < 0.6), jnp.asarray(draw.random((B, T)) < 0.3)


@pytest.mark.parametrize("t", [1, T])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("masks", ["none", "valid", "start", "both"])
def test_equals_a_loop(masks, learned, t):
    state, (x, gain), valid, start = inputs()
    x, gain, valid, start = x[:, :t], gain[:, :t], valid[:, :t], start[:, :t]
    if t == 1:
        valid, start = jnp.array([[True], [False], [False]]), jnp.array([[False], [True], [False]])
    valid = valid if masks in ("valid", "both") else None
    start = start if masks in ("start", "both") else None
    empty = {"s": jnp.array([[0.5, -0.5]]), "count": jnp.array([-1], jnp.int32)} if learned else None
    y, final = compiled(lambda *a: scan_tokens(step, *a[:2], valid=a[2], start=a[3], empty=a[4]))(
        state, (x, gain), valid, start, empty
    )
    for row in range(B):
        s, count = np.asarray(state["s"][row]), int(state["count"][row])
        for i in range(t):
            if start is not None and start[row, i]:
                s, count = (np.array([0.5, -0.5]), -1) if learned else (np.zeros(D), 0)
            if valid is None or valid[row, i]:
                s, count = np.tanh(0.5 * s + np.asarray(x[row, i] * gain[row, i])), count + 1
                np.testing.assert_allclose(y[row, i], 2 * s, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(final["s"][row], s, rtol=1e-5, atol=1e-6)
        assert final["count"][row] == count


def test_what_stands_at_invalid_tokens_reaches_nothing():
    state, (x, gain), valid, _ = inputs()

    def loss(x, state):
        y, final = scan_tokens(step, state, (x, gain), valid=valid)
        return jnp.where(valid[..., None], y, 0.0).sum() + final["s"].sum(), y

    run = compiled(jax.grad(lambda x, s: loss(x, state | {"s": s}), (0, 1), has_aux=True))
    clean, y = run(x, state["s"])
    poisoned, y_poisoned = run(jnp.where(valid[..., None], x, jnp.nan), state["s"])
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    np.testing.assert_array_equal(y, y_poisoned)
    assert (np.asarray(poisoned[0])[~np.asarray(valid)] == 0).all()


def test_a_learned_empty_state_gets_its_gradient():
    state, now, _, start = inputs()

    def loss(s):
        empty = {"s": s, "count": jnp.zeros((1,), jnp.int32)}
        return scan_tokens(step, state, now, start=start, empty=empty)[0].sum()

    assert start.any()
    assert (jax.grad(loss)(jnp.zeros((1, D))) != 0).all()


def test_inputs_must_hold_an_array():
    with pytest.raises(ValueError, match="scan_tokens: inputs hold no array"):
        scan_tokens(step, jnp.zeros(2), ())
