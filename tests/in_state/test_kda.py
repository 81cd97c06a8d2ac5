"""Kimi Delta Attention against the equations of the paper, one token after another in numpy, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.delta_net import DeltaNet
from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.in_state.kda import KDA
from tests.in_state.layer import apply, bad_fields, float64, inputs, l2_norm, qkv, rms_norm, sigmoid

SMALL = KDA(dim=8, heads=2, head_dim=4)


def paper(memory, params, x, decay_first=True):
    """y and the final state, in float64, with loops over everything that the equations index."""
    p, x = float64(params, x)
    (b, t, _), h, hv, k, v = x.shape, memory.heads, memory.hv, memory.head_dim, memory.v
    q, key, value = qkv(memory, p, x, (h, k), (h, k), (hv, v))
    q, key = l2_norm(q), l2_norm(key)
    beta = sigmoid(x @ p["w_b"]) * (2 if memory.allow_neg_eigval else 1)
    f, rate = (x @ p["w_f1"] @ p["w_f2"] + p["dt_bias"]).reshape(b, t, hv, k), np.exp(p["A_log"])[:, None]
    least = memory.lower_bound
    g = -rate * np.log1p(np.exp(f)) if least is None else least * sigmoid(rate * f)
    S, y = np.zeros((b, hv, k, v)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((hv, v))
            for j in range(hv):
                now, decay = key[i, s, j // (hv // h)], np.diag(np.exp(g[i, s, j]))
                erase = np.eye(k) - beta[i, s, j] * np.outer(now, now)
                S[i, j] = (erase @ decay if decay_first else decay @ erase) @ S[i, j]
                S[i, j] += beta[i, s, j] * np.outer(now, value[i, s, j])
                o[j] = k**-0.5 * S[i, j].T @ q[i, s, j // (hv // h)]
            o = rms_norm(o, p["norm"], memory.norm_eps).reshape(-1)
            y[i, s] = (o * sigmoid(x[i, s] @ p["w_g1"] @ p["w_g2"] + p["b_g"])) @ p["w_o"]
    return y, S


@pytest.mark.parametrize(
    "fields",
    [{}, {"v_heads": 4, "expand_v": 1.5, "lower_bound": -5.0, "allow_neg_eigval": True, "conv_size": 2}],
    ids=["plain", "grouped, bounded decays, beta to 2"],
)
def test_equals_the_paper(fields):
    memory = dataclasses.replace(SMALL, **fields)
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    params |= {"b_g": jnp.linspace(-1, 1, params["b_g"].size)}
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=2e-6)


def test_the_decay_comes_before_the_reading():
    params, state, x = inputs(SMALL, t=19)
    y, _ = apply(SMALL, params, state, x)
    assert np.abs(y - paper(SMALL, params, x, decay_first=False)[0]).max() > 1e-3


def recall(memory, params, x):
    """What is read, and the state."""
    o, state = jax.jit(memory.recall)(params, memory.init_state(len(x)), x)
    return o, state.S


def alike(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_one_decay_for_all_channels_is_gated_delta_net():
    params, _, x = inputs(SMALL)
    first = params["w_f2"].reshape(4, 2, 4)[..., 0]
    params |= {"w_f2": jnp.repeat(first, 4, 1), "dt_bias": jnp.repeat(params["dt_bias"][::4], 4)}
    other = GatedDeltaNet(dim=8, heads=2, head_dim=4, expand_v=1.0)
    scalar = params | {"w_a": params["w_f1"] @ first, "dt_bias": params["dt_bias"][::4]}
    alike(recall(SMALL, params, x), recall(other, scalar, x))


def test_without_decay_it_is_delta_net():
    params, _, x = inputs(SMALL)
    never = params | {"A_log": jnp.full(2, -200.0)}
    alike(recall(SMALL, never, x), recall(DeltaNet(dim=8, heads=2), params, x))


@pytest.mark.parametrize("least", [None, -5.0])
def test_without_writes_every_row_only_decays(least):
    memory = dataclasses.replace(SMALL, lower_bound=least)
    params, state, x = inputs(memory)
    x = x.at[..., 0].set(1.0)
    params |= {"w_b": jnp.zeros((8, 2)).at[0].set(-200.0)}  # beta = 0
    before = jax.random.normal(jax.random.key(2), state.S.shape)
    _, after = apply(memory, params, state._replace(S=before), x)
    f = (x @ params["w_f1"] @ params["w_f2"] + params["dt_bias"][None, None]).reshape(2, 7, 2, 4)
    rate = jnp.exp(params["A_log"])[None, None, :, None]
    g = -rate * jax.nn.softplus(f) if least is None else least * jax.nn.sigmoid(rate * f)
    np.testing.assert_allclose(after.S, jnp.exp(g.sum(1))[..., None] * before, rtol=1e-4, atol=1e-6)


def test_initial_rates():
    memory = KDA(dim=4, heads=2048, head_dim=1)
    rate = np.exp(memory.init(jax.random.key(0))["A_log"])
    assert rate.min() >= 1 and rate.max() <= 16 and 8 < rate.mean() < 9
    bounded = dataclasses.replace(memory, lower_bound=-5.0)
    np.testing.assert_array_equal(bounded.init(jax.random.key(0))["A_log"], 0)


test_bad_fields = bad_fields(
    SMALL,
    ("v_heads", 3, "a multiple of heads = 2"),
    ("expand_v", 0.3, "whole"),
    ("lower_bound", -6.0, "at least -5 and below 0"),
    ("lower_bound", 0.0, "at least -5 and below 0"),
    ("head_dim", 0, "at least 1"),
    ("conv_size", 1, "at least 2"),
)
