"""HGRN2 against the equations of the paper, one token after another in numpy, and what its gates do to the state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.combinators import Stack
from memjax.in_state.hgrn2 import HGRN2
from pallas_kernels.linear_attention import linear_attention
from tests.in_state.layer import above, apply, bad_fields, float64, inputs, projected, rms_norm, sigmoid, silu

SMALL = HGRN2(dim=8, expand_ratio=4)


def paper(memory, params, x, bound=0.0):
    """y and the final state, in float64, with loops over everything that the equations index."""
    p, x = float64(params, x)
    (b, t, d), h, k = x.shape, memory.heads, memory.expand_ratio
    q, f, v = projected(memory, p, x, "w_q", "w_f", "w_i")
    f = bound + (1 - bound) * sigmoid(f)
    q, f, v = (a.reshape(b, t, h, k) for a in (silu(q), f, v))
    S, y = np.zeros((b, h, k, k)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((h, k))
            for j in range(h):
                S[i, j] = f[i, s, j][:, None] * S[i, j] + np.outer(1 - f[i, s, j], v[i, s, j])
                o[j] = k**-0.5 * S[i, j].T @ q[i, s, j]
            # the norm is over all heads together
            y[i, s] = rms_norm(o.reshape(d), p["norm"], memory.norm_eps) @ p["w_o"]
    return y, S


@pytest.mark.parametrize(
    "memory",
    [SMALL, HGRN2(dim=8, expand_ratio=2, use_short_conv=True, conv_size=3, norm_eps=1e-3)],
    ids=["plain", "four heads, convolution"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    params["norm"] = params["norm"] + jnp.arange(8.0) / 8
    y, last = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last.S, want_S, rtol=1e-4, atol=2e-6)
    y, last = above(memory, params, state, x, 0.3)
    want_y, want_S = paper(memory, params, x, 0.3)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last.S, want_S, rtol=1e-4, atol=2e-6)


def test_it_is_gla_whose_keys_are_one_minus_the_gates():
    params, state, x = inputs(SMALL)
    o, last = SMALL.recall(params, state, x)
    q, f, v = ((x @ params[w]).reshape(2, 7, 2, 4) for w in ("w_q", "w_f", "w_i"))
    g = jax.nn.log_sigmoid(f)
    want, S = linear_attention(jax.nn.silu(q) * 0.5, -jnp.expm1(g), v, g)
    np.testing.assert_allclose(o, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(last.S, S, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logit, kept", [(200.0, True), (-200.0, False)], ids=["open", "closed"])
def test_a_gate_at_its_end_keeps_all_or_writes_the_value_everywhere(logit, kept):
    params, state, _ = inputs(SMALL)
    x = jnp.ones((2, 3, 8))
    params |= {"w_f": jnp.full((8, 8), logit / 8)}
    before = state._replace(S=jnp.arange(64.0).reshape(2, 2, 4, 4))
    _, after = apply(SMALL, params, before, x)
    value = jnp.broadcast_to((x[:, -1] @ params["w_i"]).reshape(2, 2, 1, 4), (2, 2, 4, 4))
    np.testing.assert_allclose(after.S, before.S if kept else value, rtol=1e-5)


def test_values_of_1_stay_averages():
    params, state, x = inputs(SMALL, t=40)
    x = x.at[:, :, 0].set(1)
    params |= {"w_i": jnp.zeros((8, 8)).at[0].set(1)}
    _, after = apply(SMALL, params, state, x)
    assert (after.S >= 0).all() and (after.S <= 1 + 1e-5).all() and (after.S > 0.5).any()


def test_layers_share_one_parameter():
    stack = Stack(tuple(HGRN2(dim=8, expand_ratio=4, layer=i, layers=3) for i in range(3)))
    params, state = stack.init(jax.random.key(0)), stack.init_state(2)
    assert [n for n in params if "lower_bounds" in params[n]] == ["0"]
    drawn = jnp.arange(24.0).reshape(3, 8) / 9
    params["0"]["lower_bounds"] = drawn
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    y, _ = apply(stack, params, state, x)
    shares = np.exp(np.asarray(drawn)) / np.exp(np.asarray(drawn)).sum(0)
    want = x
    for i, bound in enumerate((0.0, shares[1], shares[1] + shares[2])):
        want, _ = paper(SMALL, params[str(i)], want, 0.0 if i == 0 else bound)
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-5)


def test_a_layer_above_needs_one_below():
    alone = dataclasses.replace(SMALL, layer=1, layers=2)
    params, state, x = inputs(alone)
    with pytest.raises(ValueError, match="HGRN2: needs the stream 'lower_bounds' of a layer below it"):
        alone.apply(params, state, x)
    with pytest.raises(ValueError, match=r"HGRN2: lower_bound is None, layer 1 needs \[8\]"):
        alone.recall(params, state, x)


test_bad_fields = bad_fields(
    SMALL,
    ("layer", 1, "0 to layers - 1 = 0"),
    ("layers", 0, "at least 1"),
    ("expand_ratio", 3, "a divisor of dim = 8"),
    ("conv_size", 1, "at least 2"),
)
