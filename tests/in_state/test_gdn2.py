"""Gated DeltaNet-2 against the equation of the paper, one token after another in numpy, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.gdn2 import GatedDeltaNet2
from memjax.in_state.kda import KDA
from tests.in_state.layer import apply, bad_fields, float64, inputs, l2_norm, qkv, rms_norm, sigmoid

SMALL = GatedDeltaNet2(dim=8, heads=2, head_dim=4)


def paper(memory, params, x):
    """y and the final state, in float64, with loops over everything that the equation indexes."""
    p, x = float64(params, x)
    (b, t, _), h, hv, k, v = x.shape, memory.heads, memory.hv, memory.head_dim, memory.v
    q, key, value = qkv(memory, p, x, (h, k), (h, k), (hv, v))
    q, key = l2_norm(q), l2_norm(key)
    erase = sigmoid(x @ p["w_b"]).reshape(b, t, h, k) * (2 if memory.allow_neg_eigval else 1)
    write = sigmoid(x @ p["w_w"]).reshape(b, t, hv, v)
    f, rate = (x @ p["w_f1"] @ p["w_f2"] + p["dt_bias"]).reshape(b, t, h, k), np.exp(p["A_log"])[:, None]
    least = memory.lower_bound
    g = -rate * np.log1p(np.exp(f)) if least is None else least * sigmoid(rate * f)
    S, y = np.zeros((b, hv, k, v)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((hv, v))
            for j in range(hv):
                c = j // (hv // h)
                now = key[i, s, c]
                kept = np.eye(k) - np.outer(now, erase[i, s, c] * now)
                S[i, j] = kept @ np.diag(np.exp(g[i, s, c])) @ S[i, j] + np.outer(now, write[i, s, j] * value[i, s, j])
                o[j] = k**-0.5 * S[i, j].T @ q[i, s, c]
            o = rms_norm(o, p["norm"], memory.norm_eps).reshape(-1)
            y[i, s] = (o * sigmoid(x[i, s] @ p["w_g1"] @ p["w_g2"] + p["b_g"])) @ p["w_o"]
    return y, S


@pytest.mark.parametrize(
    "fields",
    [{}, {"v_heads": 4, "expand_v": 1.5, "lower_bound": -5.0, "allow_neg_eigval": True, "conv_size": 2}],
    ids=["plain", "grouped, bounded decays, erase to 2"],
)
def test_equals_the_paper(fields):
    memory = dataclasses.replace(SMALL, **fields)
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    params |= {"b_g": jnp.linspace(-1, 1, params["b_g"].size)}
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=2e-6)


def test_equal_gates_make_it_kda():
    other = KDA(dim=8, heads=2, head_dim=4)
    params, state, x = inputs(other)
    gates = jnp.repeat(params["w_b"], 4, 1)
    y, state = apply(SMALL, params | {"w_b": gates, "w_w": gates}, SMALL.init_state(2), x)
    want, want_state = apply(other, params, other.init_state(2), x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.S, want_state.S, rtol=1e-4, atol=2e-6)


def shut(params, name):
    """A gate that is 0 at every token whose x[..., 0] is 1."""
    return params | {name: jnp.zeros_like(params[name]).at[0].set(-200.0)}


def test_without_writes_an_empty_state_stays_empty_and_a_full_one_is_erased():
    params, state, x = inputs(SMALL)
    params, x = shut(params, "w_w") | {"A_log": jnp.full(2, -200.0)}, x.at[..., 0].set(1.0)
    np.testing.assert_array_equal(apply(SMALL, params, state, x)[1].S, 0)
    full = state._replace(S=jax.random.normal(jax.random.key(2), state.S.shape))
    assert np.abs(np.asarray(apply(SMALL, params, full, x)[1].S - full.S)).max() > 0.1


def test_without_erasure_and_decay_what_is_written_does_not_depend_on_what_is_there():
    params, state, x = inputs(SMALL)
    params, x = shut(params, "w_b") | {"A_log": jnp.full(2, -200.0)}, x.at[..., 0].set(1.0)
    full = state._replace(S=jax.random.normal(jax.random.key(2), state.S.shape))
    written, added = apply(SMALL, params, state, x)[1].S, apply(SMALL, params, full, x)[1].S - full.S
    assert np.abs(np.asarray(written)).max() > 0.01
    np.testing.assert_allclose(added, written, rtol=1e-4, atol=2e-6)


test_bad_fields = bad_fields(
    SMALL,
    ("v_heads", 3, "a multiple of heads = 2"),
    ("expand_v", 0.3, "whole"),
    ("lower_bound", -6.0, "at least -5 and below 0"),
    ("head_dim", 0, "at least 1"),
    ("conv_size", 1, "at least 2"),
)
