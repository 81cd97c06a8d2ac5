"""Mamba-2 against the equations of the paper, one token after another in numpy, and the limits of its step size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import tensors
from memjax.in_state.mamba2 import Mamba2, ssd
from pallas_kernels.linear_attention import linear_attention
from tests.in_state.layer import apply, inputs, sigmoid

SMALL = Mamba2(dim=6, head_dim=3, state_size=5)


def paper(memory, params, x):
    """y and the final state, in float64, with loops over everything that the equations index."""
    p, u = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), h, per_group = u.shape, memory.heads, memory.heads // memory.groups
    d, n, w = memory.d_inner, memory.state_size, memory.head_dim
    widths = [d, d, memory.groups * n, memory.groups * n, h]
    z, xs, B, C, dt = np.split(u @ p["w_in"], np.cumsum(widths)[:-1], -1)
    rows = np.concatenate([xs, B, C], -1)
    padded = np.concatenate([np.zeros((b, memory.conv_size - 1, rows.shape[-1])), rows], 1)
    rows = sum(p["conv"][j] * padded[:, j : j + t] for j in range(memory.conv_size)) + p["conv_bias"]
    xs, B, C = np.split(rows * sigmoid(rows), np.cumsum(widths[1:3]), -1)
    xs, B, C = xs.reshape(b, t, h, w), B.reshape(b, t, -1, n), C.reshape(b, t, -1, n)
    least, most = memory.dt_limit
    dt = np.clip(np.log1p(np.exp(dt + p["dt_bias"])), least, np.inf if most is None else most)
    S, y = np.zeros((b, h, n, w)), np.zeros_like(u)
    for i in range(b):
        for s in range(t):
            o = np.zeros((h, w))
            for j in range(h):
                g = j // per_group
                decay = np.exp(-dt[i, s, j] * np.exp(p["A_log"][j]))
                S[i, j] = decay * S[i, j] + np.outer(B[i, s, g], dt[i, s, j] * xs[i, s, j])
                o[j] = S[i, j].T @ C[i, s, g] + p["D"][j] * xs[i, s, j]
            o = (o.reshape(d) * z[i, s] * sigmoid(z[i, s])).reshape(memory.groups, -1)
            o = o / np.sqrt((o * o).mean(-1, keepdims=True) + memory.norm_eps)
            y[i, s] = (o.reshape(d) * p["norm"]) @ p["w_out"]
    return y, S


@pytest.mark.parametrize(
    "memory",
    [
        SMALL,
        Mamba2(dim=6, expand=4, head_dim=6, state_size=3, groups=2, conv_size=3, norm_eps=1e-3),
        Mamba2(dim=6, head_dim=2, state_size=3, groups=3, dt_limit=(0.02, 0.05)),
    ],
    ids=["one group", "two groups of two heads", "limited steps"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    keys = iter(jax.random.split(jax.random.key(7), len(params)))
    params = {n: a + 0.1 * jax.random.normal(next(keys), a.shape) for n, a in params.items()}  # no bias is 0, no D is 1
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=2e-6)


def drawn(h=4, g=2, t=7):
    """Arguments of `ssd`."""
    shapes = {"x": (2, t, h, 3), "dt": (2, t, h), "A": (h,), "B": (2, t, g, 5), "C": (2, t, g, 5), "D": (h,)}
    keys = jax.random.split(jax.random.key(3), len(shapes))
    args = {n: jax.random.normal(key, shape) for key, (n, shape) in zip(keys, shapes.items(), strict=True)}
    return args | {"dt": jnp.abs(args["dt"]), "A": -jnp.abs(args["A"])}


def test_it_is_linear_attention_with_a_scalar_gate():
    a = drawn(g=4)
    y, S = ssd(**a)
    o, want = linear_attention(a["C"], a["B"], a["dt"][..., None] * a["x"], a["dt"] * a["A"][None, None])
    np.testing.assert_allclose(y, o + a["D"][None, None, :, None] * a["x"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(S, want, rtol=1e-5, atol=1e-6)


def test_adjacent_heads_share_a_group():
    a = drawn()
    alone = a | {n: jnp.stack([a[n][:, :, j // 2] for j in range(4)], 2) for n in "BC"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ssd(**a), ssd(**alone))


def test_a_step_of_0_skips_the_token():
    a = drawn() | {"dt": jnp.zeros((2, 7, 4))}
    before = jnp.ones((2, 4, 5, 3))
    _, after = ssd(**a, initial_state=before)
    np.testing.assert_array_equal(after, before)


def test_a_rate_of_0_only_adds():
    params, state, x = inputs(SMALL)
    params |= {"A_log": jnp.full(4, -200.0)}
    _, once = apply(SMALL, params, state, x)
    _, twice = apply(SMALL, params, state._replace(S=once.S), x)
    np.testing.assert_allclose(twice.S, 2 * once.S, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_has_one_in_proj():
    params, table = SMALL.init(jax.random.key(0)), SMALL.tensors()
    assert params.keys() == table.keys()
    theirs = tensors.write(table, params)
    assert theirs["in_proj.weight"].shape == (12 + 12 + 5 + 5 + 4, 6) and theirs["conv1d.weight"].shape == (22, 1, 4)
    jax.tree.map(np.testing.assert_array_equal, tensors.read(table, theirs), params)


@pytest.mark.parametrize(
    "field, value, needs",
    [
        ("head_dim", 5, "a divisor of expand * dim = 12"),
        ("groups", 3, "a divisor of the heads, 4"),
        ("dt_limit", (0.1, 0.01), "0 <= least <= largest"),
        ("dt_limit", (-1.0, None), "0 <= least <= largest"),
        ("state_size", 0, "at least 1"),
        ("conv_size", 1, "at least 2"),
    ],
)
def test_bad_fields(field, value, needs):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(SMALL, **{field: value})
    assert str(error.value).startswith(f"Mamba2: {field} is {value}, needs ") and needs in str(error.value)
