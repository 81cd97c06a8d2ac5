"""Mamba against the equations of the paper, one token after another in numpy, and its limits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.mamba import Mamba, selective_scan
from memjax.memory import Flow
from tests.in_state.layer import apply, inputs, sigmoid

SMALL = Mamba(dim=6, state_size=3)


def paper(memory, params, x):
    """y, the final state and m, in float64, with loops over everything that the equations index."""
    p, u = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), d, n, w = u.shape, memory.inner, memory.state_size, memory.conv_size
    x, z = np.split(u @ p["w_in"], 2, -1)
    padded = np.concatenate([np.zeros((b, w - 1, d)), x], 1)
    x = sum(p["conv"][j] * padded[:, j : j + t] for j in range(w)) + p["conv_bias"]
    x = x * sigmoid(x)
    r, B, C = np.split(x @ p["w_x"], (memory.rank, memory.rank + n), -1)
    dt = np.log1p(np.exp(r @ p["w_dt"] + p["dt_bias"]))
    h, m = np.zeros((b, d, n)), np.zeros((b, t, d))
    for i in range(b):
        for s in range(t):
            for j in range(d):
                decay = np.exp(-np.exp(p["A_log"][j]) * dt[i, s, j])
                h[i, j] = decay * h[i, j] + dt[i, s, j] * x[i, s, j] * B[i, s]
                m[i, s, j] = h[i, j] @ C[i, s] + p["D"][j] * x[i, s, j]
    return (m * z * sigmoid(z)) @ p["w_o"], h, m


@pytest.mark.parametrize(
    "memory",
    [SMALL, Mamba(dim=6, state_size=2, conv_size=2, expand=3, dt_rank=4)],
    ids=["plain", "wide, narrow convolution"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)
    y, state = apply(memory, params, state, x)
    want_y, want_h, _ = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.ssm, want_h, rtol=1e-4, atol=2e-6)


def test_what_was_read_is_handed_on():
    memory = dataclasses.replace(SMALL, hands_on=True)
    params, state, x = inputs(memory)
    flow, _ = apply(memory, params, state, Flow(x, {"other": x}))
    np.testing.assert_allclose(flow.shared["memory"], paper(memory, params, x)[2], rtol=1e-4, atol=2e-6)
    np.testing.assert_array_equal(flow.x, apply(SMALL, params, state, x)[0])
    assert set(flow.shared) == {"memory", "other"} and memory.streams and not SMALL.streams


def scan_arrays(t=23, b=2, d=3, n=2):
    keys = jax.random.split(jax.random.key(1), 7)
    shapes = (b, t, d), (b, t, d), (d, n), (b, t, n), (b, t, n), (b, d, n)
    x, dt, A, B, C, h = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False))
    masks = {
        "valid": jax.random.uniform(keys[6], (b, t)) < 0.7,
        "start": jnp.arange(t)[None] % 7 == jnp.array([[3], [4]]),
    }
    return (x, jax.nn.softplus(dt), -jnp.exp(A), B, C, h), masks


@pytest.mark.slow
def test_spans_of_any_length_are_one_scan():
    arrays, masks = scan_arrays()

    @functools.partial(jax.jit, static_argnames="span")
    def run(arrays, span):
        outputs, pull = jax.vjp(lambda *a: selective_scan(*a, **masks, span=span), *arrays)
        return outputs, pull(jax.tree.map(jnp.cos, outputs))

    want = run(arrays, 64)
    for span in (4, 12):  # 23 tokens: the last span is not full
        for a, b in zip(jax.tree.leaves(run(arrays, span)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_the_states_of_all_tokens_never_exist():
    """Not in the backward pass either: the largest array is that of one span, or an input."""
    t, n, span = 256, 8, 16
    arrays, masks = scan_arrays(t=t, n=n)

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars)
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    def loss(arrays):
        return selective_scan(*arrays, **masks, span=span, implementation="xla")[0].sum()

    x = arrays[0].size
    assert max(sizes(jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr)) <= max(arrays[3].size, x * span * n // t, x)


def test_a_step_of_0_skips_the_token():
    params, state, x = inputs(SMALL)
    params |= {"dt_bias": jnp.full(12, -200.0)}
    before = state._replace(ssm=jax.random.normal(jax.random.key(2), state.ssm.shape))
    y, after = apply(SMALL, params, before, x)
    np.testing.assert_allclose(after.ssm, before.ssm, rtol=1e-6)
    m = paper(SMALL, params, x)[2]  # D x: nothing is written, and the empty state reads 0
    _, z = np.split(np.asarray(x @ params["w_in"]), 2, -1)
    silenced, _ = apply(SMALL, params, state, x)
    np.testing.assert_allclose(silenced, (m * z * sigmoid(z)) @ params["w_o"], rtol=1e-4, atol=2e-6)
    assert np.abs(y - silenced).max() > 1e-3


def test_a_large_step_forgets_all_before():
    params, state, x = inputs(SMALL)
    params |= {"dt_bias": jnp.full(12, 100.0)}
    before = state._replace(ssm=jnp.ones_like(state.ssm))
    np.testing.assert_array_equal(apply(SMALL, params, before, x)[0], apply(SMALL, params, state, x)[0])


def test_what_does_not_select_is_a_convolution():
    """With the same dt, B and C at every token: the kernel C exp(j dt A) dt B."""
    (x, dt, A, B, C, h), _ = scan_arrays()
    dt, B, C = (jnp.broadcast_to(a[:1, :1], a.shape) for a in (dt, B, C))
    y, _ = selective_scan(x, dt, A, B, C, jnp.zeros_like(h))
    x, step, A, B, C = (np.asarray(a, np.float64) for a in (x, dt[0, 0], A, B[0, 0], C[0, 0]))
    kernel = np.stack([np.exp(j * step[:, None] * A) @ (B * C) * step for j in range(x.shape[1])])
    want = np.stack([sum(kernel[s - i] * x[:, i] for i in range(s + 1)) for s in range(x.shape[1])], 1)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_linear_in_the_state():
    (*arrays, h), _ = scan_arrays()
    run = jax.jit(lambda h: selective_scan(*arrays, h)[0])
    empty = run(jnp.zeros_like(h))
    np.testing.assert_allclose(run(3 * h) - empty, 3 * (run(h) - empty), rtol=1e-4, atol=1e-5)


def test_initial_steps_and_rates():
    params = Mamba(dim=512, state_size=4).init(jax.random.key(0))
    dt = jax.nn.softplus(params["dt_bias"])
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001 and abs(jnp.median(dt) - 0.01) < 2e-3
    np.testing.assert_allclose(jnp.exp(params["A_log"]), np.tile(np.arange(1, 5), (1024, 1)), rtol=1e-6)
    assert params["w_dt"].shape == (32, 1024) and np.abs(params["w_dt"]).max() <= 32**-0.5


@pytest.mark.parametrize(
    "field, value, needs", [("state_size", 0, 1), ("expand", 0, 1), ("dt_rank", 0, 1), ("conv_size", 1, 2)]
)
def test_bad_fields(field, value, needs):
    with pytest.raises(ValueError, match=f"Mamba: {field} is {value}, needs at least {needs}"):
        dataclasses.replace(SMALL, **{field: value})
