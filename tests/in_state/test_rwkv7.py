"""RWKV-7 against the equations of the paper, one token after another in numpy, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.rwkv7 import RWKV7, RWKV7ChannelMixing
from memjax.memory import Flow
from tests.in_state.layer import apply, sigmoid
from tests.in_state.layer import inputs as initial

RANKS = {f"{name}_low_rank_dim": rank for name, rank in (("decay", 3), ("a", 2), ("v", 3), ("gate", 4))}
FIRST = RWKV7(dim=8, head_dim=4, layers=3, **RANKS)
SECOND = dataclasses.replace(FIRST, layer=1)


def inputs(memory, t=7):
    """Parameters that are nowhere 0, the empty state, x and v_first."""
    params, state, x = initial(memory, t)
    keys = jax.random.split(jax.random.key(1), len(params) + 1)
    params = {n: a + 0.3 * jax.random.normal(k, a.shape) for k, (n, a) in zip(keys[1:], params.items(), strict=True)}
    return params, state, x, jax.random.normal(keys[0], (2, t, getattr(memory, "values", 1)))


def paper(memory, params, x, v_first=None):
    """y, the final state and v, in float64, with loops over everything that the equations index."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), h, k = x.shape, memory.heads, memory.head_dim
    d = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1) - x

    def lora(m, activation):
        return activation((x + d * p[f"x_{m}"]) @ p[f"w_{m}1"]) @ p[f"w_{m}2"] + p.get(f"b_{m}", 0)

    r, key, v = ((x + d * p[f"x_{m}"]) @ p[f"w_{m}"] for m in "rkv")
    w = np.exp(-np.exp(-0.5) * sigmoid(lora("w", np.tanh)))
    a, g = sigmoid(lora("a", lambda z: z)), lora("g", sigmoid)
    if v_first is not None:
        v = v + (v_first - v) * sigmoid(lora("v", lambda z: z))
    removal, key = key * p["k_k"], key * (1 + (a - 1) * p["k_a"])
    S, y = np.zeros((b, h, k, memory.values // h)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            out = np.zeros((h, memory.values // h))
            for j in range(h):
                at = slice(j * k, (j + 1) * k)
                to = slice(j * out.shape[1], (j + 1) * out.shape[1])
                kk = removal[i, s, at] / np.linalg.norm(removal[i, s, at])
                transition = np.diag(w[i, s, at]) - np.outer(kk * a[i, s, at], kk)
                S[i, j] = transition @ S[i, j] + np.outer(key[i, s, at], v[i, s, to])
                o = S[i, j].T @ r[i, s, at]
                o = (o - o.mean()) / np.sqrt(o.var() + k * memory.norm_eps) * p["norm"][to] + p["norm_bias"][to]
                out[j] = o + (r[i, s, at] * key[i, s, at] * p["r_k"][j]).sum() * v[i, s, to]
            y[i, s] = (out.reshape(-1) * g[i, s]) @ p["w_o"]
    return y, S, v


@pytest.mark.parametrize(
    "memory",
    [FIRST, dataclasses.replace(FIRST, value_dim=12, norm_eps=1e-2), SECOND],
    ids=["first layer", "wide values", "second layer"],
)
def test_equals_the_paper(memory):
    params, state, x, v_first = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    flow, state = apply(memory, params, state, Flow(x, {"v_first": v_first} if memory.layer else {}))
    want_y, want_S, v = paper(memory, params, x, v_first if memory.layer else None)
    np.testing.assert_allclose(flow.x, want_y, rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=5e-6)
    np.testing.assert_array_equal(state.shift, x[:, -1:])
    np.testing.assert_allclose(flow.shared["v_first"], v_first if memory.layer else v, rtol=1e-4, atol=2e-6)


def test_a_layer_above_the_first_needs_the_values_of_the_first():
    params, state, x, _ = inputs(SECOND)
    with pytest.raises(ValueError, match="RWKV7: needs the stream 'v_first' of a layer below it, here is none"):
        SECOND.apply(params, state, x)


def test_the_share_of_the_first_layers_values():
    params, state, x, v_first = inputs(SECOND)
    params |= {"w_v2": jnp.zeros_like(params["w_v2"])}
    only_first, only_own = (params | {"b_v": jnp.full(8, bias)} for bias in (300.0, -300.0))
    run = lambda params, v_first: apply(SECOND, params, state, Flow(x, {"v_first": v_first}))[0].x  # noqa: E731
    np.testing.assert_array_equal(run(only_own, v_first), run(only_own, 2 * v_first))
    other = only_first | {"w_v": 1 + params["w_v"]}
    np.testing.assert_allclose(run(only_first, v_first), run(other, v_first), rtol=1e-4, atol=1e-5)
    assert np.abs(run(only_first, v_first) - run(only_own, v_first)).max() > 1e-2


def test_the_state_never_grows_by_itself():
    """Where nothing is written: the eigenvalues of a transition are at most 1, and the decays are below."""
    params, state, x, _ = inputs(FIRST, t=19)
    params |= {"w_v": jnp.zeros_like(params["w_v"])}
    before = jax.random.normal(jax.random.key(2), state.S.shape)
    _, after = apply(FIRST, params, state._replace(S=before), Flow(x, {}))
    assert np.linalg.norm(after.S) < np.linalg.norm(before)


def test_initialisation_follows_the_layer():
    first, last = (RWKV7(dim=16, head_dim=8, layer=i, layers=3).init(jax.random.key(0)) for i in (0, 2))
    n = np.arange(16)
    for m, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
        np.testing.assert_allclose(first[f"x_{m}"][0, 0], 1 - (n / 16) ** power, atol=1e-6)
        np.testing.assert_allclose(last[f"x_{m}"][0, 0], 1 - (n / 16) ** (power / 3), atol=1e-6)
    z = np.tile(np.linspace(-1, 1, 8), 2)
    line = n / 15 - 0.5
    np.testing.assert_allclose(first["b_w"], -5.5 + 6 * (n / 15) + 2.5 * z * abs(z), atol=1e-5)
    np.testing.assert_allclose(last["b_w"], -5.5 + 6 * (n / 15) ** 2 + 2.5 * z * abs(z), atol=1e-5)
    np.testing.assert_allclose(first["b_a"], -0.19 + 0.3 * z * abs(z) + 0.4 * line, atol=1e-6)
    np.testing.assert_allclose(last["b_v"], 0.73 - 0.4 * line, atol=1e-6)
    np.testing.assert_allclose(first["norm"], np.full(16, (1 / 3) ** 0.7), rtol=1e-6)
    np.testing.assert_allclose(first["w_k"] @ first["w_k"].T, 0.01 * np.eye(16), atol=1e-6)
    assert "b_v" not in first and not first["w_o"].any() and first["w_g1"].shape == (16, 32)


def test_ranks():
    memory = RWKV7(dim=2048)
    assert [memory.rank(m) for m in "wavg"] == [128, 128, 64, 224]
    assert [FIRST.rank(m) for m in "wavg"] == [3, 2, 3, 4]


def test_channel_mixing_equals_the_paper():
    memory = RWKV7ChannelMixing(dim=6, hidden=10, layer=1, layers=2)
    params, state, x, _ = inputs(memory)
    y, after = apply(memory, params, state, x)
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    for s in range(x.shape[1]):
        before = x[:, s - 1] if s else np.zeros_like(x[:, 0])
        inner = np.maximum((x[:, s] + (before - x[:, s]) * p["x_k"]) @ p["w_1"], 0)
        np.testing.assert_allclose(y[:, s], inner**2 @ p["w_2"], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(after.shift, x[:, -1:])
    share = memory.init(jax.random.key(0))["x_k"]
    np.testing.assert_allclose(share, 1 - (np.arange(6) / 6) ** (1 / 16), atol=1e-6)
    assert RWKV7ChannelMixing(dim=6).param_specs()["w_1"].shape == (6, 24)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head_dim": 3}, "head_dim is 3, needs a divisor of dim = 8"),
        ({"value_dim": 9}, "value_dim is 9, needs a multiple of the 2 heads"),
        ({"layer": -1}, "layer is -1, needs at least 0"),
        ({"layer": 3}, "layers is 3, needs at least 4"),
        ({"a_low_rank_dim": 0}, "a_low_rank_dim is 0, needs at least 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=f"RWKV7: {message}"):
        dataclasses.replace(FIRST, **fields)
