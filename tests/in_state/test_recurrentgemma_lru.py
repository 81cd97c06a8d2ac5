"""RecurrentGemma's recurrent block against the equations of the paper, one token after another, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.recurrentgemma_lru import RecurrentGemmaLRU
from tests.in_state.layer import apply, inputs, sigmoid

SMALL = RecurrentGemmaLRU(dim=6, heads=2, lru_width=8)
COMPLEX = dataclasses.replace(SMALL, only_real=False)


def in_blocks(x, w, b):
    """x [e] times the blocks of w [h i j], plus b [h j], side by side."""
    parts = x.reshape(len(w), -1)
    return np.concatenate([parts[j] @ w[j] + b[j] for j in range(len(w))])


def paper(memory, params, x):
    """y and the final h (complex where the numbers are), in float64, with loops over rows and tokens."""
    p, u = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), e, w = u.shape, memory.e, memory.conv_size
    x = u @ p["w_x"] + p["b_x"]
    padded = np.concatenate([np.zeros((b, w - 1, e)), x], 1)
    x = sum(p["conv"][j] * padded[:, j : j + t] for j in range(w)) + p["conv_bias"]
    branch = u @ p["w_y"] + p["b_y"]
    branch = 0.5 * branch * (1 + np.tanh(np.sqrt(2 / np.pi) * (branch + 0.044715 * branch**3)))
    y, last = np.zeros((b, t, e)), []
    for i in range(b):
        h = np.zeros(memory.numbers, complex)
        for s in range(t):
            r, gate = (sigmoid(in_blocks(x[i, s], p[f"w_{g}"], p[f"b_{g}"])) for g in "ai")
            log_a = -memory.c * r * np.log1p(np.exp(p["a_param"]))
            now = x[i, s] if memory.only_real else x[i, s, : e // 2] + 1j * x[i, s, e // 2 :]
            phase = 0 if memory.only_real else p["a_imag"] * r
            h = np.exp(log_a + 1j * phase) * h + (np.sqrt(1 - np.exp(2 * log_a)) if s else 1) * gate * now
            y[i, s] = h.real if memory.only_real else np.concatenate([h.real, h.imag])
        last.append(y[i, -1])
    return (y * branch) @ p["w_o"] + p["b_o"], np.stack(last)


@pytest.mark.parametrize(
    "memory",
    [SMALL, RecurrentGemmaLRU(dim=6, heads=1, conv_size=2, c=2.0), COMPLEX],
    ids=["plain", "one head, narrow convolution", "complex"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)
    params = {n: a + 0.3 * jax.random.normal(jax.random.key(len(n)), a.shape) for n, a in params.items()}
    y, state = apply(memory, params, state, x)
    want_y, want_h = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.h, want_h, rtol=1e-4, atol=2e-6)
    assert state.count.tolist() == [19, 19]


def recurrence(memory, t=5):
    """rg_lru's arguments: parameters, x, a state."""
    params, state, x = inputs(memory, t=t)
    x = jnp.concatenate([x, x[..., :2]], -1)
    return params, x, jax.random.normal(jax.random.key(1), state.h.shape)


@pytest.mark.parametrize("memory", [SMALL, COMPLEX], ids=["real", "complex"])
def test_the_first_token_is_written_whole_whatever_was_before(memory):
    params, x, h = recurrence(memory)
    first = jnp.arange(5)[None] == jnp.array([[0], [3]])
    y, _ = memory.rg_lru(params, x, h, first, start=first)
    i = np.stack([sigmoid(in_blocks(a, *(np.asarray(params[n]) for n in ("w_i", "b_i")))) for a in (x[0, 0], x[1, 3])])
    want = np.stack([x[0, 0], x[1, 3]]) * np.tile(i, 1 if memory.only_real else 2)
    np.testing.assert_allclose(np.stack([y[0, 0], y[1, 3]]), want, rtol=1e-5)


def test_a_shut_gate_freezes_the_state():
    params, x, h = recurrence(SMALL)
    params |= {"b_a": jnp.full((2, 4), -300.0)}
    never = jnp.zeros((2, 5), bool)
    y, last = SMALL.rg_lru(params, x, h, never)
    np.testing.assert_array_equal(last, h)
    np.testing.assert_array_equal(y, jnp.broadcast_to(h[:, None], y.shape))
    gradient = jax.grad(lambda p: SMALL.rg_lru(p, x, h, never)[0].sum())(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_the_gradient_of_a_nearly_shut_gate_is_bounded():
    """1 - a^2 is 2e-8: without the bound its square root would have a gradient of 4e3."""
    memory = RecurrentGemmaLRU(dim=1, heads=1)
    x, h, never = jnp.ones((1, 1, 1)), jnp.zeros((1, 1)), jnp.zeros((1, 1), bool)
    zeros = {n: jnp.zeros_like(a) for n, a in memory.init(jax.random.key(0)).items()}
    a_param = np.log(np.expm1(1e-8 / 4)).astype(np.float32)  # r is 1/2: log a = -1e-8

    def write(a):
        return memory.rg_lru(zeros | {"a_param": a[None]}, x, h, never)[0].sum()

    slope = jax.grad(write)(jnp.asarray(a_param))
    # i/2 ... dy/dlog a = -i a^2 / sqrt(max(1 - a^2, 1e-6 / 4)), i = 1/2; dlog a/da_param = -4 sigmoid(a_param)
    np.testing.assert_allclose(slope, 0.5 * 1000 * 2 * 4 * sigmoid(np.float64(a_param)), rtol=1e-4)


def test_white_input_gives_a_state_of_its_size():
    memory = RecurrentGemmaLRU(dim=64, heads=1)
    params = memory.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 200, 64))
    y, _ = jax.jit(memory.rg_lru)(params, x, jnp.zeros((8, 64)), jnp.arange(200)[None] + jnp.zeros((8, 1), int) == 0)
    assert 0.05 < (y[:, 100:] ** 2).mean() <= 1


def test_initial_radius():
    radius = jnp.exp(-jax.nn.softplus(RecurrentGemmaLRU(dim=4096).init(jax.random.key(0))["a_param"]))
    assert 0.9 <= radius.min() < 0.902 and 0.998 < radius.max() <= 0.9991
    np.testing.assert_allclose(jnp.mean(radius**2), (0.9**2 + 0.999**2) / 2, atol=3e-3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"heads": 3}, "lru_width is 8, needs a multiple of heads = 3"),
        ({"heads": 8, "only_real": False}, r"lru_width is 8, needs a multiple of 2 \* heads = 16"),
        ({"c": 0.0}, "c is 0.0, needs > 0"),
        ({"heads": 0}, "heads is 0, needs at least 1"),
        ({"conv_size": 1}, "conv_size is 1, needs at least 2"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=f"RecurrentGemmaLRU: {message}"):
        dataclasses.replace(SMALL, **fields)
