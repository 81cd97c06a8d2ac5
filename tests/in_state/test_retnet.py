"""RetNet against its parallel form and the recurrence, in numpy, and its rates and positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.retnet import RetNet
from tests.in_state.layer import apply, bad_fields, float64, inputs, qkv, rms_norm, silu

SMALL = RetNet(dim=8, heads=2)


def turned(x, position, theta):
    """x with channel i and i + d/2 turned as a plane, by the angle position * theta**(-2i/d)."""
    half, y = len(x) // 2, np.zeros_like(x)
    for i in range(half):
        angle = position * theta ** (-i / half)
        y[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        y[i + half] = x[i] * np.sin(angle) + x[i + half] * np.cos(angle)
    return y


def paper(memory, params, x):
    """y and the final state, in float64, with loops over everything that the equations index."""
    p, x = float64(params, x)
    (b, t, _), h, hkv, k, v = x.shape, memory.heads, memory.hkv, memory.k, memory.v
    q, key, value = qkv(memory, p, x, (h, k), (hkv, k), (hkv, v))
    S, y = np.zeros((b, h, k, v)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((h, v))
            for j in range(h):
                gamma, kv = 1 - 2.0 ** (-5 - j), j // (h // hkv)
                S[i, j] = gamma * S[i, j] + np.outer(turned(key[i, s, kv], s, memory.theta), value[i, s, kv])
                o[j] = k**-0.5 * S[i, j].T @ turned(q[i, s, j], s, memory.theta)
            o = rms_norm(o, p["norm"], memory.norm_eps).reshape(-1)
            y[i, s] = (o * silu(x[i, s] @ p["w_g"]) if memory.use_gate else o) @ p["w_o"]
    return y, S


@pytest.mark.parametrize(
    "memory",
    [
        SMALL,
        RetNet(dim=8, heads=4, kv_heads=2, theta=100.0, use_short_conv=True, use_gate=False),
        RetNet(dim=8, heads=2, kv_heads=1, expand_k=2.0, expand_v=0.5, use_short_conv=True, conv_size=2, norm_eps=1e-3),
    ],
    ids=["plain", "shared heads, convolution, no gate", "wide keys"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=2e-6)
    np.testing.assert_array_equal(state.count, 19)


def test_the_first_head_keeps_31_of_32():
    params, state, x = inputs(RetNet(dim=8, heads=1), t=1)
    params |= {"w_k": jnp.zeros((8, 8))}
    before = jnp.ones_like(state.S)
    _, after = apply(RetNet(dim=8, heads=1), params, state._replace(S=before), x)
    np.testing.assert_allclose(after.S, 0.96875 * before, rtol=1e-6)


def test_the_parallel_form():
    """O = ((Q K^T) * D) V k**-0.5 with D[n, m] = gamma**(n - m): of q and k only the distance n - m is seen."""
    memory = RetNet(dim=4, heads=1)
    params, state, x = inputs(memory, t=6, batch=1)
    o, _ = memory.recall(params, state, x)
    q, k, v = (np.asarray(x[0] @ params[w], np.float64) for w in ("w_q", "w_k", "w_v"))
    want = np.zeros((6, 8))
    for n in range(6):
        for m in range(n + 1):
            want[n] += 0.96875 ** (n - m) * (q[n] @ turned(k[m], m - n, memory.theta)) * v[m] * 4**-0.5
    np.testing.assert_allclose(o[0, :, 0], want, rtol=1e-4, atol=1e-6)


def test_the_rates_of_many_heads():
    np.testing.assert_allclose(np.exp(RetNet(dim=16).log_decay[[0, 1, 7]]), [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 4096])


test_bad_fields = bad_fields(
    SMALL,
    ("kv_heads", 3, "a divisor of heads = 2"),
    ("expand_k", 0.25, "a multiple of 4"),
    ("expand_v", 0.1, "a multiple of heads = 2"),
    ("theta", 0.0, "> 0"),
    ("heads", 0, "at least 1"),
    ("conv_size", 1, "at least 2"),
)
