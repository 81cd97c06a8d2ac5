"""Differential attention against the paper's formula in numpy, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_context.differential_attention import LAMBDAS, DifferentialAttention

SMALL = DifferentialAttention(dim=8, heads=8, kv_heads=4, head_dim=3, window=5, layer=2, rotary=False)
T = 9
apply = jax.jit(lambda memory, *args: memory.apply(*args), static_argnums=0)


def inputs(memory, t=T, batch=2):
    keys = jax.random.split(jax.random.key(0), 3)
    params = memory.init(keys[0])
    params["norm"] = 1 + jax.random.normal(keys[2], params["norm"].shape)
    return params, memory.init_state(batch), jax.random.normal(keys[1], (batch, t, memory.dim))


def paper(memory, params, x):
    """One pair of heads, one row and one token after another, in float64."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), d, shared = x.shape, memory.d, memory.heads // memory.hkv
    q, k, v = ((x @ p[w]).reshape(b, t, -1, d) for w in ("w_q", "w_k", "w_v"))
    start = 0.8 - 0.6 * np.exp(-0.3 * memory.layer)
    lam = np.exp(p["lambda_q1"] @ p["lambda_k1"]) - np.exp(p["lambda_q2"] @ p["lambda_k2"]) + start
    o = np.zeros((b, t, memory.heads, d))
    for r in range(b):
        for i in range(t):
            seen = slice(max(0, i - memory.window + 1), i + 1)
            for pair in range(memory.heads // 2):
                kv = pair // shared
                values = np.concatenate([v[r, seen, 2 * kv], v[r, seen, 2 * kv + 1]], -1)
                a = []
                for j in (0, 1):
                    e = np.exp(k[r, seen, 2 * kv + j] @ q[r, i, 2 * pair + j] * d**-0.5)
                    a.append(e / e.sum() @ values)
                z = a[0] - lam * a[1]
                z = (1 - start) * z / np.sqrt((z * z).mean() + memory.norm_eps) * p["norm"]
                o[r, i, 2 * pair], o[r, i, 2 * pair + 1] = z[:d], z[d:]
    return o.reshape(b, t, -1) @ p["w_o"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": None, "window": T + 3, "layer": 0, "norm_eps": 1e-2}],
    ids=["groups and a window", "full"],
)
def test_equals_the_paper(changes):
    memory = dataclasses.replace(SMALL, **changes)
    params, state, x = inputs(memory)
    y, _ = apply(memory, params, state, x)
    np.testing.assert_allclose(y, paper(memory, params, x), rtol=1e-4, atol=5e-6)


def heads_of(memory, seed=1):
    """Random q, k, v [b t h d] of its heads, and a causal mask."""
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (
        jax.random.normal(key, (1, T, h, memory.d))
        for key, h in zip(keys, (memory.heads, memory.hkv, memory.hkv), strict=True)
    )
    return q, k, v, jnp.tril(jnp.ones((1, T, T), bool))


def normed(memory, a):
    return (1 - memory.lambda_init) * a / np.sqrt((a * a).mean(-1, keepdims=True) + memory.norm_eps)


def first_map(memory, q, k, v):
    """What the even heads read [t pairs 2d]."""
    e = np.exp(np.einsum("thd,uhd->htu", q[0, :, 0::2], k[0, :, 0::2]) * memory.d**-0.5) * np.tri(T)
    return np.einsum("htu,uhd->thd", e / e.sum(-1, keepdims=True), v[0].reshape(T, -1, 2 * memory.d))


def test_without_a_share_it_is_attention():
    memory = dataclasses.replace(SMALL, kv_heads=None)
    q, k, v, visible = heads_of(memory)
    params = {name: jnp.zeros(3) for name in LAMBDAS} | {"norm": jnp.ones(6)}
    log_less = np.log(1 + memory.lambda_init)  # exp(l_q2 . l_k2) = 1 + lambda_init: lambda = 0
    params |= {"lambda_q2": jnp.array([log_less, 0.0, 0.0], jnp.float32), "lambda_k2": jnp.array([1.0, 0.0, 0.0])}
    o = memory.difference(params, q, k, v, visible)
    want = normed(memory, first_map(memory, *map(np.asarray, (q, k, v))))
    np.testing.assert_allclose(o.reshape(T, -1, 6), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share, sign", [(0.5, 1), (2.5, -1)])
def test_equal_maps_leave_one_of_them(share, sign):
    memory = dataclasses.replace(SMALL, kv_heads=None)
    q, k, v, visible = heads_of(memory)
    q, k = (jnp.repeat(a[:, :, 0::2], 2, 2) for a in (q, k))
    params = {name: jnp.zeros(3) for name in LAMBDAS} | {"norm": jnp.ones(6)}
    more = np.log(1 + share - memory.lambda_init)
    params |= {"lambda_q1": jnp.array([more, 0.0, 0.0], jnp.float32), "lambda_k1": jnp.array([1.0, 0.0, 0.0])}
    o = memory.difference(params, q, k, v, visible)
    want = sign * normed(dataclasses.replace(memory, norm_eps=0.0), first_map(memory, *map(np.asarray, (q, k, v))))
    np.testing.assert_allclose(o.reshape(T, -1, 6), want, rtol=1e-3, atol=2e-4)


def test_rotary_positions_are_relative():
    memory = dataclasses.replace(SMALL, head_dim=4, rotary=True)
    params, state, x = inputs(memory, batch=1)
    later, _ = apply(memory, params, state._replace(count=jnp.array([7], jnp.int32)), x)
    now, _ = apply(memory, params, state, x)
    turned_off, _ = apply(dataclasses.replace(memory, rotary=False), params, state, x)
    np.testing.assert_allclose(now[:, 5:], later[:, 5:], rtol=1e-3, atol=1e-4)
    assert np.abs(now - turned_off).max() > 1e-3


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 7}, "heads is 7, needs an even number"),
        ({"kv_heads": 3}, "kv_heads is 3, needs an even divisor of heads = 8"),
        ({"kv_heads": 6}, "kv_heads is 6, needs an even divisor of heads = 8"),
        ({"heads": 6, "kv_heads": 6, "head_dim": None}, "heads is 6, needs a divisor of dim = 8"),
        ({"rotary": True}, "head_dim is 3, needs an even number"),
        ({"layer": -1}, "layer is -1, needs at least 0"),
        ({"window": 0}, "window is 0, needs at least 1"),
        ({"cache_dtype": "int8"}, "cache_dtype is 'int8', needs one of"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=f"DifferentialAttention: {message}"):
        dataclasses.replace(SMALL, **fields)
