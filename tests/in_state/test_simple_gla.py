"""Simple gated linear attention against its equations, one token after another in numpy, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import tensors
from memjax.in_state.simple_gla import SimpleGatedLinearAttention
from tests.in_state.layer import apply, bad_fields, float64, inputs, qkv, rms_norm, silu

SMALL = SimpleGatedLinearAttention(dim=8, heads=2, use_short_conv=False)


def paper(memory, params, x, log_decay=None):
    """y and the final state, in float64, with loops over everything that the equations index."""
    p, x = float64(params, x)
    (b, t, _), h, hkv, k, v = x.shape, memory.heads, memory.hkv, memory.k, memory.v
    q, key, value = qkv(memory, p, x, (h, k), (hkv, k), (hkv, v))
    g = -np.log1p(np.exp(-(x @ p["w_gk"] + p["b_gk"]))) / memory.gate_logit_normalizer
    g = g if log_decay is None else np.full_like(g, log_decay)
    S, y = np.zeros((b, h, k, v)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((h, v))
            for j in range(h):
                kv = j // (h // hkv)
                S[i, j] = np.exp(g[i, s, j]) * S[i, j] + np.outer(key[i, s, kv], value[i, s, kv])
                o[j] = k**-0.5 * S[i, j].T @ q[i, s, j]
            o = rms_norm(o, p["norm"], memory.norm_eps).reshape(-1)
            y[i, s] = (o * silu(x[i, s] @ p["w_g"])) @ p["w_o"]
    return y, S


@pytest.mark.parametrize(
    "memory",
    [
        SMALL,
        SimpleGatedLinearAttention(dim=8, heads=4, kv_heads=2, expand_k=0.5, expand_v=2.0, gate_logit_normalizer=1.0),
        SimpleGatedLinearAttention(dim=8, heads=2, kv_heads=1, conv_size=2, norm_eps=1e-3),
    ],
    ids=["no convolution", "shared heads", "one kv head, narrow convolution"],
)
def test_equals_its_equations(memory):
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("log_decay", [0.0, np.log(0.96875)], ids=["linear attention", "one rate, as a RetNet head"])
def test_a_constant_gate(log_decay):
    params, state, x = inputs(SMALL)
    logit = -np.log(np.expm1(-16 * log_decay)) if log_decay else 1e3
    params |= {"w_gk": jnp.zeros((8, 2)), "b_gk": jnp.full(2, logit, jnp.float32)}
    y, _ = apply(SMALL, params, state, x)
    np.testing.assert_allclose(y, paper(SMALL, params, x, log_decay)[0], rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_tensor():
    memory = dataclasses.replace(SMALL, use_short_conv=True)
    params, table = memory.init(jax.random.key(0)), memory.tensors()
    assert params.keys() == table.keys()
    again = tensors.read(table, tensors.write(table, params))
    jax.tree.map(np.testing.assert_array_equal, again, params)


test_bad_fields = bad_fields(
    SMALL,
    ("kv_heads", 3, "a divisor of heads = 2"),
    ("expand_k", 0.1, "a multiple of heads = 2"),
    ("expand_v", 0.0, "a multiple of heads = 2"),
    ("gate_logit_normalizer", 0.0, "> 0"),
    ("heads", 0, "at least 1"),
    ("conv_size", 1, "at least 2"),
)
