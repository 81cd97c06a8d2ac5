"""Gated DeltaNet against the equations of the paper, one token after another in numpy, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.gated_delta_net import GatedDeltaNet
from tests.in_state.layer import apply, inputs, sigmoid

SMALL = GatedDeltaNet(dim=6, heads=2, head_dim=4, expand_v=1.5)


def paper(memory, params, x, decay=True):
    """y and the final state, in float64, with loops over everything that the equations index."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), h, hv, k, v = x.shape, memory.heads, memory.hv, memory.head_dim, memory.v
    padded = np.concatenate(
        [np.zeros((b, memory.conv_size - 1, sum(memory.qkv))), x @ np.hstack([p["w_q"], p["w_k"], p["w_v"]])], 1
    )
    rows = sum(p["conv"][j] * padded[:, j : j + t] for j in range(memory.conv_size))
    q, key, value = np.split(rows * sigmoid(rows), np.cumsum(memory.qkv)[:-1], -1)
    q, key, value = q.reshape(b, t, h, k), key.reshape(b, t, h, k), value.reshape(b, t, hv, v)
    q, key = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, key))
    beta = sigmoid(x @ p["w_b"]) * (2 if memory.allow_neg_eigval else 1)
    g = -np.exp(p["A_log"]) * np.log1p(np.exp(x @ p["w_a"] + p["dt_bias"])) if decay else np.zeros((b, t, hv))
    S, y = np.zeros((b, hv, k, v)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((hv, v))
            for j in range(hv):
                now = key[i, s, j // (hv // h)]
                forgotten = np.exp(g[i, s, j]) * (np.eye(k) - beta[i, s, j] * np.outer(now, now)) @ S[i, j]
                S[i, j] = forgotten + beta[i, s, j] * np.outer(now, value[i, s, j])
                o[j] = k**-0.5 * S[i, j].T @ q[i, s, j // (hv // h)]
            o = o / np.sqrt((o * o).mean(-1, keepdims=True) + memory.norm_eps) * p["norm"]
            z = x[i, s] @ p["w_g"] if memory.use_gate else None
            y[i, s] = (o.reshape(-1) if z is None else o.reshape(-1) * z * sigmoid(z)) @ p["w_o"]
    return y, S


@pytest.mark.parametrize(
    "memory",
    [
        SMALL,
        GatedDeltaNet(dim=6, heads=2, v_heads=4, head_dim=4, expand_v=0.5, allow_neg_eigval=True, norm_eps=1e-3),
        GatedDeltaNet(dim=6, heads=1, v_heads=3, head_dim=4, expand_v=1.0, conv_size=2, use_gate=False),
    ],
    ids=["plain", "grouped, beta to 2", "grouped, no gate, narrow convolution"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=2e-6)


def test_without_decay_it_is_delta_net():
    params, state, x = inputs(SMALL)
    y, _ = apply(SMALL, params | {"A_log": jnp.full(2, -200.0)}, state, x)
    np.testing.assert_allclose(y, paper(SMALL, params, x, decay=False)[0], rtol=1e-4, atol=2e-6)
    assert np.abs(y - paper(SMALL, params, x)[0]).max() > 1e-3


def test_grouped_value_heads_repeat_queries_and_keys():
    grouped = GatedDeltaNet(dim=6, heads=2, v_heads=4, head_dim=4, expand_v=1.0)
    repeated = GatedDeltaNet(dim=6, heads=4, head_dim=4, expand_v=1.0)
    params, state, x = inputs(grouped)

    def repeat(w):  # [i, 2 * 4] -> [i, 4 * 4]
        return jnp.repeat(w.reshape(len(w), 2, 4), 2, 1).reshape(len(w), 16)

    conv_q, conv_k, conv_v = jnp.split(params["conv"], (8, 16), -1)
    conv = jnp.concatenate([repeat(conv_q), repeat(conv_k), conv_v], -1)
    more = params | {"w_q": repeat(params["w_q"]), "w_k": repeat(params["w_k"]), "conv": conv}
    y, new = apply(grouped, params, state, x)
    want, want_new = apply(repeated, more, repeated.init_state(2), x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(new.S, want_new.S, rtol=1e-4, atol=5e-6)


def test_a_log_decay_of_minus_25_starts_afresh():
    params, state, x = inputs(SMALL)
    only_now = jnp.zeros_like(params["conv"]).at[-1].set(params["conv"][-1])
    resets = {"A_log": jnp.full(2, np.log(25.0)), "w_a": jnp.zeros((6, 2)), "dt_bias": jnp.full(2, np.log(np.e - 1))}
    params = params | {"conv": only_now} | jax.tree.map(lambda a: a.astype(jnp.float32), resets)
    y, _ = apply(SMALL, params, state, x)
    alone = jnp.concatenate([apply(SMALL, params, state, x[:, s : s + 1])[0] for s in range(7)], 1)
    np.testing.assert_allclose(y, alone, rtol=1e-4, atol=1e-6)


def test_without_writes_the_state_only_decays():
    params, state, x = inputs(SMALL)
    x = x.at[..., 0].set(1.0)
    params["w_b"] = jnp.zeros((6, 2)).at[0].set(-200.0)  # beta = 0
    before = jax.random.normal(jax.random.key(2), state.S.shape)
    _, after = apply(SMALL, params, state._replace(S=before), x)
    dt = jax.nn.softplus(x @ params["w_a"] + params["dt_bias"][None, None])
    factor = jnp.exp(-jnp.exp(params["A_log"])[None] * dt.sum(1))
    np.testing.assert_allclose(after.S, factor[..., None, None] * before, rtol=1e-4, atol=1e-6)


def test_initial_decays():
    params = GatedDeltaNet(dim=4, heads=2048, head_dim=1, expand_v=1.0).init(jax.random.key(0))
    rate, dt = jnp.exp(params["A_log"]), jax.nn.softplus(params["dt_bias"])
    assert np.isfinite(params["A_log"]).all() and rate.max() <= 16 and 7.5 < rate.mean() < 8.5
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001 and abs(jnp.median(dt) - 0.01) < 2e-3


@pytest.mark.parametrize(
    "field, value, needs",
    [
        ("v_heads", 3, "a multiple of heads = 2"),
        ("expand_v", 0.3, "whole"),
        ("head_dim", 0, "at least 1"),
        ("conv_size", 1, "at least 2"),
    ],
)
def test_bad_fields(field, value, needs):
    with pytest.raises(ValueError, match=f"GatedDeltaNet: {field} is {value}, needs .*{needs}"):
        GatedDeltaNet(**{"dim": 6, "heads": 2, "head_dim": 4, field: value})
