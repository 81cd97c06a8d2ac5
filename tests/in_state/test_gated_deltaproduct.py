"""Gated DeltaProduct against the equations of the paper, one write after another in numpy, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.in_state.gated_deltaproduct import GatedDeltaProduct
from tests.in_state.layer import apply, inputs, sigmoid

SMALL = GatedDeltaProduct(dim=6, heads=2, head_dim=4, expand_v=1.5)


def paper(memory, params, x):
    """y and the final state, in float64, with loops over everything that the equations index."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), n, h, hv, k, v = x.shape, memory.num_householder, memory.heads, memory.hv, memory.head_dim, memory.v
    padded = np.concatenate(
        [np.zeros((b, memory.conv_size - 1, sum(memory.qkv))), x @ np.hstack([p["w_q"], p["w_k"], p["w_v"]])], 1
    )
    rows = sum(p["conv"][j] * padded[:, j : j + t] for j in range(memory.conv_size))
    q, key, value = np.split(rows * sigmoid(rows), np.cumsum(memory.qkv)[:-1], -1)
    q, key, value = q.reshape(b, t, h, k), key.reshape(b, t, n, h, k), value.reshape(b, t, n, hv, v)
    q, key = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, key))
    beta = sigmoid(x @ p["w_b"]).reshape(b, t, n, hv) * (2 if memory.allow_neg_eigval else 1)
    g = np.zeros((b, t, hv))
    if memory.use_forget_gate:
        g = -np.exp(p["A_log"]) * np.log1p(np.exp(x @ p["w_a"] + p["dt_bias"]))
    S, y = np.zeros((b, hv, k, v)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((hv, v))
            for j in range(hv):
                S[i, j] *= np.exp(g[i, s, j])
                for m in range(n):
                    now = key[i, s, m, j // (hv // h)]
                    S[i, j] += beta[i, s, m, j] * np.outer(now, value[i, s, m, j] - S[i, j].T @ now)
                o[j] = k**-0.5 * S[i, j].T @ q[i, s, j // (hv // h)]
            o = o / np.sqrt((o * o).mean(-1, keepdims=True) + memory.norm_eps) * p["norm"]
            z = x[i, s] @ p["w_g"] if memory.use_gate else None
            y[i, s] = (o.reshape(-1) if z is None else o.reshape(-1) * z * sigmoid(z)) @ p["w_o"]
    return y, S


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_householder": 3, "v_heads": 4, "expand_v": 0.5, "allow_neg_eigval": False, "norm_eps": 1e-3},
        {"use_forget_gate": False, "use_gate": False, "conv_size": 2},
    ],
    ids=["two writes", "three writes, grouped, beta to 1", "no gates, narrow convolution"],
)
def test_equals_the_paper(fields):
    memory = dataclasses.replace(SMALL, **fields)
    params, state, x = inputs(memory, t=19)  # more than 16 rows: the chunked form
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=5e-6)


def test_one_write_is_gated_delta_net():
    one = dataclasses.replace(SMALL, num_householder=1)
    other = GatedDeltaNet(dim=6, heads=2, head_dim=4, expand_v=1.5, allow_neg_eigval=True)
    params, state, x = inputs(one)
    y, state = apply(one, params, state, x)
    want, want_state = apply(other, params, other.init_state(2), x)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.S, want_state.S, rtol=1e-5, atol=1e-6)


def at_first_channel(w, column):
    """Only x[..., 0] feeds this projection."""
    return jnp.zeros_like(w).at[0].set(jnp.asarray(column, w.dtype))


def test_two_writes_turn_the_plane_of_their_keys_by_pi():
    memory = GatedDeltaProduct(dim=6, heads=1, head_dim=4, expand_v=1.0, use_forget_gate=False)
    params, state, x = inputs(memory, t=1)
    params |= {
        "conv": jnp.zeros_like(params["conv"]).at[-1].set(1.0),
        "w_k": at_first_channel(params["w_k"], [20.0, 0, 0, 0, 0, 20.0, 0, 0]),  # channels 0 and 1
        "w_v": jnp.zeros_like(params["w_v"]),
        "w_b": at_first_channel(params["w_b"], [200.0, 200.0]),  # beta = 2
    }
    before = jax.random.normal(jax.random.key(2), state.S.shape)
    _, after = apply(memory, params, state._replace(S=before), x.at[..., 0].set(1.0))
    np.testing.assert_allclose(after.S, np.asarray(before) * np.array([-1, -1, 1, 1])[:, None], rtol=1e-5, atol=1e-5)


def test_without_rates_the_state_only_decays_and_once_a_token():
    params, state, x = inputs(SMALL)
    params |= {"w_b": at_first_channel(params["w_b"], [-200.0] * 4)}
    x = x.at[..., 0].set(1.0)
    before = jax.random.normal(jax.random.key(2), state.S.shape)
    _, after = apply(SMALL, params, state._replace(S=before), x)
    dt = jax.nn.softplus(x @ params["w_a"] + params["dt_bias"][None, None])
    factor = jnp.exp(-jnp.exp(params["A_log"])[None] * dt.sum(1))
    np.testing.assert_allclose(after.S, factor[..., None, None] * before, rtol=1e-4, atol=1e-6)


def test_a_write_of_rate_zero_is_none():
    params, state, x = inputs(SMALL)
    x = x.at[..., 0].set(1.0)
    w_b = params["w_b"].at[:, 2:].set(at_first_channel(params["w_b"][:, 2:], [-200.0] * 2))  # the second write
    one = dataclasses.replace(SMALL, num_householder=1)
    _, two_writes = apply(SMALL, params | {"w_b": w_b}, state, x)
    q, k, v = 8, 8, 12
    first = {
        "w_k": params["w_k"][:, :k],
        "w_v": params["w_v"][:, :v],
        "w_b": params["w_b"][:, :2],
        "conv": params["conv"][:, np.r_[: q + k, q + 2 * k : q + 2 * k + v]],
    }
    _, one_write = apply(one, params | first, one.init_state(2), x)
    np.testing.assert_allclose(two_writes.S, one_write.S, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "field, value, needs",
    [
        ("v_heads", 3, "a multiple of heads = 2"),
        ("expand_v", 0.3, "whole"),
        ("num_householder", 0, "at least 1"),
        ("conv_size", 1, "at least 2"),
    ],
)
def test_bad_fields(field, value, needs):
    with pytest.raises(ValueError, match=f"GatedDeltaProduct: {field} is {value}, needs .*{needs}"):
        dataclasses.replace(SMALL, **{field: value})
