"""Sliding-window attention against softmax attention in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_context.sliding_window_attention import SlidingWindowAttention

SMALL = SlidingWindowAttention(dim=12, heads=4, kv_heads=2, head_dim=6, window=3)
T = 9
apply = jax.jit(lambda memory, *args: memory.apply(*args), static_argnums=0)


def inputs(memory, t=T, batch=2):
    keys = jax.random.split(jax.random.key(0), 2)
    return memory.init(keys[0]), memory.init_state(batch), jax.random.normal(keys[1], (batch, t, memory.dim))


def turned(x, theta):
    """Each pair of channels (i, i + d/2) of x [b, t, h, d] as a complex number, turned by t * theta**(-2i/d)."""
    d = x.shape[-1]
    angle = np.arange(x.shape[1])[:, None, None] * theta ** (-2 * np.arange(d // 2) / d)
    z = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def softmax_attention(memory, params, x, sees):
    """sees [t, t]: which key each query may see."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    b, t, _ = x.shape
    q, k, v = ((x @ p[w]).reshape(b, t, -1, memory.d) for w in ("w_q", "w_k", "w_v"))
    if memory.qk_norm:
        q, k = (
            a / np.sqrt((a * a).mean(-1, keepdims=True) + memory.norm_eps) * p[n]
            for a, n in ((q, "norm_q"), (k, "norm_k"))
        )
    if memory.rotary:
        n = int(memory.d * memory.rotary_share)
        q, k = (np.concatenate([turned(a[..., :n], memory.theta), a[..., n:]], -1) for a in (q, k))
    k, v = (np.repeat(a, memory.heads // memory.hkv, 2) for a in (k, v))
    scores = np.where(sees, np.einsum("bqhd,bkhd->bhqk", q, k) * memory.d**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, -1) @ p["w_o"] + p.get("b_o", 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"theta": 100.0, "qk_norm": True, "norm_eps": 1e-2},
        {"rotary": False, "kv_heads": None, "head_dim": None},
        {"kv_heads": 1, "head_dim": 8, "rotary_share": 0.5, "output_bias": True},
    ],
    ids=["plain", "normed", "no positions, no groups", "half of each head turns, bias"],
)
@pytest.mark.parametrize("window", [1, 3, T, T + 4])
def test_equals_softmax_attention_over_the_window(changes, window):
    memory = dataclasses.replace(SMALL, window=window, **changes)
    params, state, x = inputs(memory)
    if memory.qk_norm:
        params |= {n: 1 + jax.random.normal(jax.random.key(i), (6,)) for i, n in enumerate(("norm_q", "norm_k"))}
    if memory.output_bias:
        params |= {"b_o": jax.random.normal(jax.random.key(2), (12,))}
    age = np.arange(T)[:, None] - np.arange(T)
    y, _ = apply(memory, params, state, x)
    np.testing.assert_allclose(
        y, softmax_attention(memory, params, x, (age >= 0) & (age < window)), rtol=1e-4, atol=2e-6
    )


def test_a_window_as_long_as_the_text_is_full_attention():
    memory = dataclasses.replace(SMALL, window=T)
    params, state, x = inputs(memory)
    y, _ = apply(memory, params, state, x)
    full = softmax_attention(memory, params, x, np.tri(T, dtype=bool))
    np.testing.assert_allclose(y, full, rtol=1e-4, atol=2e-6)
    short, _ = apply(SMALL, params, SMALL.init_state(2), x)
    assert np.abs(short - full).max() > 1e-2


def test_a_narrow_cache_rounds_inside_the_call_too():
    narrow = dataclasses.replace(SMALL, cache_dtype="bfloat16")
    params, state, x = inputs(narrow)
    assert state.k.dtype == jnp.bfloat16
    whole, _ = apply(narrow, params, state, x)
    first, state = apply(narrow, params, state, x[:, :5])
    second, _ = apply(narrow, params, state, x[:, 5:])
    np.testing.assert_allclose(whole, jnp.concatenate([first, second], 1), rtol=1e-5, atol=1e-6)
    exact, _ = apply(SMALL, params, SMALL.init_state(2), x)
    assert 1e-4 < np.abs(whole - exact).max() < 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_heads": 3}, "kv_heads is 3, needs a divisor of heads = 4"),
        ({"heads": 5, "kv_heads": 5, "head_dim": None}, "heads is 5, needs a divisor of dim = 12"),
        ({"head_dim": 3}, "head_dim is 3, needs an even number"),
        ({"rotary_share": 0.5}, "rotary_share is 0.5, needs an even part of the 6 channels of a head"),
        ({"rotary_share": 4 / 3}, "rotary_share is 1.33.*, needs an even part"),
        ({"window": 0}, "window is 0, needs at least 1"),
        ({"cache_dtype": "int8"}, "cache_dtype is 'int8', needs one of"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_odd_heads_need_no_rotary():
    memory = dataclasses.replace(SMALL, head_dim=3, rotary=False)
    y, _ = apply(memory, *inputs(memory))
    assert np.isfinite(y).all()
