"""DeltaNet against the equations of the paper, one token after another in numpy, and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.delta_net import DeltaNet
from tests.in_state.layer import apply, inputs, sigmoid

SMALL = DeltaNet(dim=8, heads=2)
ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "relu": lambda x: np.maximum(x, 0),
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "identity": lambda x: x,
}


def l2(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def by_sum(x):
    total = x.sum(-1, keepdims=True)
    return x / np.where(total == 0, 1, total)


def paper(memory, params, x):
    """y and the final state, in float64, with loops over everything that the equations index."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), h, k, v = x.shape, memory.heads, memory.k, memory.v
    padded = np.concatenate(
        [np.zeros((b, memory.conv_size - 1, sum(memory.qkv))), x @ np.hstack([p["w_q"], p["w_k"], p["w_v"]])], 1
    )
    rows = sum(p["conv"][j] * padded[:, j : j + t] for j in range(memory.conv_size))
    act, norm = ACTIVATIONS[memory.qk_activation], {"l2": l2, "sum": by_sum}[memory.qk_norm]
    q, key, value = np.split(rows, np.cumsum(memory.qkv)[:-1], -1)
    q, key = (norm(act(a).reshape(b, t, h, k)) for a in (q, key))
    value = ACTIVATIONS["silu"](value).reshape(b, t, h, v)
    beta = sigmoid(x @ p["w_b"]) if memory.use_beta else np.ones((b, t, h))
    beta = beta * (2 if memory.allow_neg_eigval else 1)
    S, y = np.zeros((b, h, k, v)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((h, v))
            for j in range(h):
                now = key[i, s, j]
                S[i, j] = (np.eye(k) - beta[i, s, j] * np.outer(now, now)) @ S[i, j]
                S[i, j] += beta[i, s, j] * np.outer(now, value[i, s, j])
                o[j] = k**-0.5 * S[i, j].T @ q[i, s, j]
            o = o / np.sqrt((o * o).mean(-1, keepdims=True) + memory.norm_eps) * p["norm"]
            z = x[i, s] @ p["w_g"] if memory.use_gate else None
            y[i, s] = (o.reshape(-1) if z is None else o.reshape(-1) * z * sigmoid(z)) @ p["w_o"]
    return y, S


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"expand_k": 0.5, "expand_v": 1.5, "allow_neg_eigval": True, "use_gate": True, "norm_eps": 1e-3},
        {"qk_activation": "elu", "qk_norm": "sum", "conv_size": 2},
        {"qk_activation": "relu", "qk_norm": "sum", "heads": 1},
        {"qk_activation": "identity", "use_beta": False},
    ],
    ids=["plain", "beta to 2, gate", "elu over its sum", "relu over its sum", "no activation, no beta"],
)
def test_equals_the_paper(fields):
    memory = dataclasses.replace(SMALL, **fields)
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=2e-6)


def beta(params, x, logit):
    """The same rate at every token: x[..., 0] is 1, and only it feeds beta."""
    return params | {"w_b": jnp.zeros_like(params["w_b"]).at[0].set(logit)}, x.at[..., 0].set(1.0)


def only_now(params):
    """The convolution reads the token itself alone, as it is."""
    return params | {"conv": jnp.zeros_like(params["conv"]).at[-1].set(1.0)}


def test_without_a_rate_nothing_changes():
    params, state, x = inputs(SMALL)
    params, x = beta(params, x, -200.0)
    before = jax.random.normal(jax.random.key(2), state.S.shape)
    _, after = apply(SMALL, params, state._replace(S=before), x)
    np.testing.assert_array_equal(after.S, before)


def test_a_full_rate_stores_the_value_and_storing_it_again_changes_nothing():
    memory = dataclasses.replace(SMALL, qk_activation="identity")
    params, state, x = inputs(memory, t=1)
    params, x = beta(only_now(params), x, 200.0)
    before = state._replace(S=jax.random.normal(jax.random.key(2), state.S.shape))
    _, once = apply(memory, params, before, x)
    key, value = l2(np.asarray(x[:, 0] @ params["w_k"]).reshape(2, 2, 4)), np.asarray(x[:, 0] @ params["w_v"])
    value = ACTIVATIONS["silu"](value).reshape(2, 2, 4)
    np.testing.assert_allclose(np.einsum("bhkv,bhk->bhv", once.S, key), value, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(once.S - before.S)).max() > 0.1
    _, twice = apply(memory, params, once, x)
    np.testing.assert_allclose(twice.S, once.S, rtol=1e-5, atol=1e-5)


def test_orthonormal_keys_make_it_linear_attention():
    memory = DeltaNet(dim=8, heads=1, qk_activation="identity", use_beta=False)
    params, state, _ = inputs(memory)
    params = only_now(params) | {"w_k": jnp.eye(8)}
    _, after = apply(memory, params, state, jnp.eye(8)[None].repeat(2, 0))  # one token for every unit key
    values = ACTIVATIONS["silu"](np.asarray(params["w_v"]))
    np.testing.assert_allclose(after.S[0, 0], values, rtol=1e-5, atol=1e-5)


def test_without_values_the_state_never_grows():
    memory = dataclasses.replace(SMALL, allow_neg_eigval=True)
    params, state, x = inputs(memory, t=1)
    params = only_now(params) | {"w_v": jnp.zeros_like(params["w_v"])}
    state = state._replace(S=jax.random.normal(jax.random.key(2), state.S.shape))
    for i in range(5):
        before = np.linalg.norm(state.S, axis=(-2, -1))
        _, state = apply(memory, params, state, jax.random.normal(jax.random.key(i), x.shape))
        after = np.linalg.norm(state.S, axis=(-2, -1))
        assert (after <= before * (1 + 1e-6)).all() and (after < before).any()


def test_a_key_that_sums_to_zero_is_finite_and_writes_nothing():
    memory = dataclasses.replace(SMALL, qk_activation="relu", qk_norm="sum")
    params, state, _ = inputs(memory)
    params = only_now(params) | {"w_k": jnp.full_like(params["w_k"], -1.0)}
    x = jnp.ones((2, 3, 8))  # every channel of k is -8, and 0 under relu
    grads = jax.grad(lambda p: apply(memory, p, state, x)[0].sum())(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(apply(memory, params, state, x)[1].S, 0)


@pytest.mark.parametrize(
    "field, value, needs",
    [
        ("expand_k", 0.1, "a multiple of heads = 2"),
        ("expand_v", 0.0, "a multiple of heads = 2"),
        ("qk_activation", "gelu", "one of silu, relu, elu, identity"),
        ("qk_norm", "l1", "one of l2, sum"),
        ("conv_size", 1, "at least 2"),
    ],
)
def test_bad_fields(field, value, needs):
    with pytest.raises(ValueError, match=f"DeltaNet: {field} is {value!r}, needs .*{needs}"):
        dataclasses.replace(SMALL, **{field: value})
