"""Based against the equations of the paper, one token after another in numpy, and the stack it is made for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.combinators import Stack
from memjax.in_context.sliding_window_attention import SlidingWindowAttention
from memjax.in_state.base_conv import BaseConv
from memjax.in_state.based import Based
from memjax.layers import attention, within
from memjax.lm import LanguageModel, block
from tests.in_state.layer import apply, inputs

SMALL = Based(dim=6, heads=2, feature_dim=3)


def features(x, compressed):
    """phi of one vector, feature by feature."""
    d = len(x)
    first = [1.0, *(a / d**0.25 for a in x)]
    if compressed:
        cross = [x[i] * x[j] / np.sqrt(d) for i in range(d) for j in range(i + 1, d)]
        return np.array([*first, *(a * a / np.sqrt(2 * d) for a in x), *cross])
    return np.array([*first, *(a * b / np.sqrt(2 * d) for a in x for b in x)])


def paper(memory, params, x):
    """y and the final S beside z, in float64, with loops over everything that the equations index."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), h, v = x.shape, memory.heads, memory.v
    q, key, value = ((x @ p[w]).reshape(b, t, h, -1) for w in ("w_q", "w_k", "w_v"))
    f = len(features(q[0, 0, 0], memory.compressed))
    S, z, y = np.zeros((b, h, f, v)), np.zeros((b, h, f)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((h, v))
            for j in range(h):
                phi_q, phi_k = (features(a[i, s, j], memory.compressed) for a in (q, key))
                S[i, j] += np.outer(phi_k, value[i, s, j])
                z[i, j] += phi_k
                o[j] = S[i, j].T @ phi_q / (phi_q @ z[i, j] + memory.eps)
            y[i, s] = o.reshape(-1) @ p["w_o"]
    return y, np.concatenate([S, z[..., None]], -1)


@pytest.mark.parametrize(
    "memory",
    [SMALL, Based(dim=6, heads=3, feature_dim=4, head_v_dim=5, compressed=True, eps=0.1)],
    ids=["full", "compressed, other values, large eps"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=5e-6)


def test_compressed_features_give_the_same():
    params, state, x = inputs(SMALL, t=19)
    compressed = dataclasses.replace(SMALL, compressed=True)
    want, _ = apply(SMALL, params, state, x)
    y, new = apply(compressed, params, compressed.init_state(2), x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=2e-6)
    assert new.S.shape == (2, 2, 10, 4) and state.S.shape == (2, 2, 13, 4)


def test_is_an_average_of_the_values():
    params, state, x = inputs(SMALL)
    x = x.at[..., 0].set(1.0)
    constant = params | {"w_v": jnp.zeros((6, 6)).at[0].set(jnp.arange(1.0, 7)), "w_o": jnp.eye(6)}
    y, _ = apply(SMALL, constant, state, x)
    np.testing.assert_allclose(y, jnp.broadcast_to(jnp.arange(1.0, 7)[None, None], y.shape), rtol=1e-5)
    y, _ = apply(SMALL, params, state, x)
    scaled, _ = apply(SMALL, params | {"w_v": -3 * params["w_v"]}, state, x)
    np.testing.assert_allclose(scaled, -3 * y, rtol=1e-5, atol=5e-6)


def test_the_window_beside_it_reaches_from_all_to_nothing():
    """Of the paper's window only its reach is not ours: it counts the tokens before the current one, we count all."""
    memory = SlidingWindowAttention(dim=6, heads=2, window=7, rotary=False)
    params, state, x = inputs(memory)
    y, _ = apply(memory, params, state, x)
    q, k, v = ((x @ params[w]).reshape(2, 7, 2, 3) for w in ("w_q", "w_k", "w_v"))
    full = attention(q, k, v, within(7, 2, None, None))
    np.testing.assert_allclose(y, full.reshape(2, 7, 6) @ params["w_o"], rtol=1e-4, atol=1e-6)
    itself = dataclasses.replace(memory, window=1)
    y, _ = apply(itself, params, itself.init_state(2), x)
    np.testing.assert_allclose(y, x @ params["w_v"] @ params["w_o"], rtol=1e-4, atol=1e-6)


def test_the_stack_of_the_paper():
    linear, conv = SMALL, BaseConv(dim=6)
    window = SlidingWindowAttention(dim=6, heads=2, window=3, rotary=False)
    at = (1,)
    mixers = [linear if i in at else window if i - 1 in at else conv for i in range(4)]
    assert mixers == [conv, linear, window, conv]
    model = LanguageModel(Stack(tuple(block(m, hidden=12) for m in mixers)), vocab=11)
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
    logits, state = apply(model, model.init(jax.random.key(1)), model.init_state(2), ids)
    assert logits.shape == (2, 9, 11) and np.isfinite(logits).all()
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, model.init_state(2))


@pytest.mark.parametrize(
    "field, value, needs",
    [
        ("heads", 4, "a divisor of dim = 6"),
        ("feature_dim", 0, "at least 1"),
        ("head_v_dim", 0, "at least 1"),
        ("eps", 0.0, "> 0"),
    ],
)
def test_bad_fields(field, value, needs):
    with pytest.raises(ValueError, match=f"Based: {field} is {value}, needs .*{needs}"):
        dataclasses.replace(SMALL, **{field: value})
