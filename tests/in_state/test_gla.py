"""Gated linear attention against the equations of the paper, one token after another in numpy, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.gla import GatedLinearAttention
from tests.in_state.layer import apply, bad_fields, float64, inputs, qkv, rms_norm, silu

SMALL = GatedLinearAttention(dim=8, heads=2, gate_low_rank_dim=3)


def paper(memory, params, x, decay=True):
    """y and the final state, in float64, with loops over everything that the equations index."""
    p, x = float64(params, x)
    (b, t, _), h, hkv, k, v = x.shape, memory.heads, memory.hkv, memory.k, memory.v
    q, key, value = qkv(memory, p, x, (h, k), (hkv, k), (hkv, v))
    gk = -np.log1p(np.exp(-(x @ p["w_gk1"] @ p["w_gk2"] + p["b_gk"]))) / memory.gate_logit_normalizer
    gk = np.maximum(gk, -np.inf if memory.clamp_min is None else memory.clamp_min).reshape(b, t, -1, k) * decay
    S, y = np.zeros((b, h, k, v)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((h, v))
            for j in range(h):
                kv = j // (h // hkv)
                S[i, j] = np.exp(gk[i, s, kv])[:, None] * S[i, j] + np.outer(key[i, s, kv], value[i, s, kv])
                o[j] = k**-0.5 * S[i, j].T @ q[i, s, j]
            o = rms_norm(o, p["norm"], memory.norm_eps).reshape(-1)
            y[i, s] = (o * silu(x[i, s] @ p["w_g"]) if memory.use_gate else o) @ p["w_o"]
    return y, S


@pytest.mark.parametrize(
    "memory",
    [
        SMALL,
        GatedLinearAttention(dim=8, heads=2, expand_k=1.0, expand_v=0.5, use_short_conv=True, gate_low_rank_dim=3),
        GatedLinearAttention(
            dim=8,
            heads=4,
            kv_heads=2,
            gate_logit_normalizer=1.0,
            clamp_min=-0.5,
            use_short_conv=True,
            conv_size=3,
            use_gate=False,
        ),
    ],
    ids=["plain", "convolution", "shared heads, clamped, no gate"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=2e-6)


def test_without_decay_it_is_linear_attention():
    params, state, x = inputs(SMALL)
    y, _ = apply(SMALL, params | {"b_gk": jnp.full(4, 1e3)}, state, x)
    np.testing.assert_allclose(y, paper(SMALL, params, x, decay=False)[0], rtol=1e-4, atol=2e-6)
    assert np.abs(y - paper(SMALL, params, x)[0]).max() > 1e-3


def test_a_log_decay_of_minus_30_leaves_only_the_token_itself():
    params, state, x = inputs(SMALL)
    params |= {"w_gk2": jnp.zeros((3, 4)), "b_gk": jnp.full(4, -30.0 * 16)}
    y, _ = apply(SMALL, params, state, x)
    alone = jnp.concatenate([apply(SMALL, params, state, x[:, s : s + 1])[0] for s in range(7)], 1)
    np.testing.assert_allclose(y, alone, rtol=1e-4, atol=1e-6)


def test_the_normaliser_divides_after_the_logarithm():
    params, state, x = inputs(SMALL, t=1)
    params |= {"w_gk2": jnp.zeros((3, 4)), "w_k": jnp.zeros((8, 4))}
    before = jnp.ones_like(state.S)
    _, after = apply(SMALL, params, state._replace(S=before), x)
    np.testing.assert_allclose(after.S, np.exp(-np.log(2) / 16) * before, rtol=1e-5)


def test_no_convolution_no_rows():
    assert len(jax.tree.leaves(SMALL.init_state(2))) == 1
    assert "conv" not in SMALL.init(jax.random.key(0))
    convolved = dataclasses.replace(SMALL, use_short_conv=True)
    assert convolved.init_state(2).conv.shape == (2, 3, 4 + 4 + 8)


test_bad_fields = bad_fields(
    SMALL,
    ("kv_heads", 3, "a divisor of heads = 2"),
    ("expand_k", 0.1, "a multiple of heads = 2"),
    ("expand_v", 0.0, "a multiple of heads = 2"),
    ("gate_logit_normalizer", 0.0, "> 0"),
    ("clamp_min", 0.5, "<= 0"),
    ("gate_low_rank_dim", 0, "at least 1"),
    ("conv_size", 1, "at least 2"),
)
