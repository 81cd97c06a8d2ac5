"""Linear attention against the equations of the paper, one token after another in numpy, and its feature maps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import tensors
from memjax.in_state.linear_attention import MAPS, LinearAttention
from tests.in_state.layer import apply, inputs

SMALL = LinearAttention(dim=8, heads=2, feature_map="elu", normalize=True)


def features(memory, p, n, x):
    """phi of one row of q or k."""
    match memory.feature_map:
        case "elementwise_product":
            return (x @ p[f"A_{n}"] + p[f"a_{n}"]) * (x @ p[f"B_{n}"] + p[f"b_{n}"])
        case "elu":
            return np.where(x > 0, x + 1, np.exp(x))
        case "relu":
            return x * (x > 0)
        case "hedgehog":
            y = 2 * (x @ p[f"L_{n}"] + p[f"l_{n}"])
            e = np.exp(np.concatenate([y, -y]))
            return e / e.sum()
        case "t2r":
            return np.maximum(x @ p[f"L_{n}"], 0)
        case "dpfp":
            r = np.maximum(np.concatenate([x, -x]), 0)
            return np.array([r[i] * r[i - j] for j in range(1, memory.nu + 1) for i in range(len(r))])
    return x


def paper(memory, params, x):
    """y, S and z, in float64, with loops over everything that the equations index."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), h, shared, k, v = x.shape, memory.heads, memory.heads // memory.hkv, memory.features, memory.v
    q, key, value = x @ p["w_q"], x @ p["w_k"], x @ p["w_v"]
    S, z, y = np.zeros((b, h, k, v)), np.zeros((b, h, k)), np.zeros_like(x)
    cut = lambda a, j, width: a[j * width : (j + 1) * width]  # noqa: E731
    for i in range(b):
        for s in range(t):
            o = np.zeros((h, v))
            for j in range(h):
                fq = features(memory, p, "q", cut(q[i, s], j, memory.k))
                fk = features(memory, p, "k", cut(key[i, s], j // shared, memory.k))
                fq = fq / (fq.sum() + 1e-4) if memory.norm_q else fq
                fk = fk / (fk.sum() + 1e-4) if memory.norm_k else fk
                S[i, j] += np.outer(fk, cut(value[i, s], j // shared, v))
                z[i, j] += fk
                o[j] = k**-0.5 * S[i, j].T @ fq
                if memory.normalize:
                    o[j] /= k**-0.5 * fq @ z[i, j] + 1e-10
            o = o / np.sqrt((o * o).mean(-1, keepdims=True) + memory.norm_eps) * p["norm"]
            y[i, s] = o.reshape(-1) @ p["w_o"]
    return y, S, z


@pytest.mark.parametrize(
    "memory",
    [
        LinearAttention(dim=8, heads=2),
        SMALL,
        LinearAttention(dim=8, heads=2, feature_map="identity", expand_k=0.5, expand_v=2.0),
        LinearAttention(dim=8, heads=4, kv_heads=2, feature_map="hedgehog", normalize=True),
        LinearAttention(dim=8, heads=2, feature_map="t2r"),
        LinearAttention(dim=8, heads=2, feature_map="dpfp", nu=3, norm_q=True, norm_k=True),
        LinearAttention(dim=8, heads=2, feature_map="relu", norm_k=True, norm_eps=1e-3),
    ],
    ids=lambda m: m.feature_map,
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    keys = iter(jax.random.split(jax.random.key(7), len(params)))
    params = {n: a + 0.1 * jax.random.normal(next(keys), a.shape) for n, a in params.items()}  # no bias is 0
    y, state = apply(memory, params, state, x)
    want_y, want_S, want_z = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=2e-6)
    if memory.normalize:
        np.testing.assert_allclose(state.z, want_z, rtol=1e-4, atol=2e-6)


def test_the_past_has_no_order():
    params, state, x = inputs(SMALL)
    _, once = apply(SMALL, params, state, x)
    _, again = apply(SMALL, params, state, x[:, ::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), once, again)


def test_identity_is_a_masked_product():
    memory = LinearAttention(dim=4, heads=1, feature_map="identity")
    params, state, x = inputs(memory, t=6, batch=1)
    o, _ = memory.recall(params, state, x)
    q, k, v = (np.asarray(x[0] @ params[w]) for w in ("w_q", "w_k", "w_v"))
    np.testing.assert_allclose(o[0, :, 0], np.tril(q @ k.T) @ v * 4**-0.5, rtol=1e-4, atol=1e-6)


def test_normalised_outputs_are_averages_of_the_values():
    params, state, x = inputs(SMALL, t=12)
    alike = params | {"w_v": jnp.broadcast_to(params["w_v"][:, :1], (8, 8))}
    values = np.asarray(x @ params["w_v"][:, 0])
    o, _ = SMALL.recall(alike, state, x)
    least, most = np.minimum.accumulate(values, 1), np.maximum.accumulate(values, 1)
    assert (o >= least[..., None, None] - 1e-5).all() and (o <= most[..., None, None] + 1e-5).all()
    np.testing.assert_allclose(o[:, 0, 0, 0], values[:, 0], rtol=1e-5)


def test_hedgehog_begins_with_softmax_of_its_input():
    params = LinearAttention(dim=8, heads=2, feature_map="hedgehog").init(jax.random.key(0))
    np.testing.assert_array_equal(params["L_q"], np.eye(4))
    np.testing.assert_array_equal(params["l_k"], 0)


@pytest.mark.parametrize("name", MAPS)
def test_every_parameter_has_a_tensor(name):
    memory = LinearAttention(dim=8, heads=2, feature_map=name)
    params, table = memory.init(jax.random.key(0)), memory.tensors()
    assert params.keys() == table.keys()
    again = tensors.read(table, tensors.write(table, params))
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kv_heads": 3}, "kv_heads is 3, needs a divisor of heads = 2"),
        ({"expand_k": 0.1}, "expand_k is 0.1, needs .*a multiple of heads = 2"),
        ({"expand_v": 0.0}, "expand_v is 0.0, needs .*a multiple of heads = 2"),
        ({"feature_map": "exp"}, "feature_map is 'exp', needs one of elementwise_product, elu"),
        ({"feature_map": "identity"}, "normalize is True, needs a feature map that is never negative"),
        ({"nu": 0}, "nu is 0, needs at least 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=f"LinearAttention: {message}"):
        dataclasses.replace(SMALL, **fields)
