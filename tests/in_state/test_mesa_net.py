"""MesaNet against the equations of the paper, one token after another in numpy, its solvers, and its limits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.mesa_net import MesaNet, mesa
from pallas_kernels.compat import QUICK_COMPILE
from tests.in_state.layer import apply, inputs, sigmoid

SMALL = MesaNet(dim=6, heads=2, head_dim=4)

op = jax.jit(mesa, static_argnames=("steps", "guard", "chunk_size"), compiler_options=QUICK_COMPILE)


def paper(memory, params, x):
    """y and the final states, in float64, with loops over everything that the equations index."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), h, d = x.shape, memory.heads, memory.head_dim
    before = np.zeros((b, memory.conv_size - 1, 2 * h * d))
    padded = np.concatenate([before, x @ np.hstack([p["w_q"], p["w_k"]])], 1)
    rows = sum(p["conv"][j] * padded[:, j : j + t] for j in range(memory.conv_size))
    q, k = (a.reshape(b, t, h, d) for a in np.split(rows * sigmoid(rows), 2, -1))
    q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    v = (x @ p["w_v"]).reshape(b, t, h, d)
    beta, decay = sigmoid(x @ p["w_b"] + p["b_b"]), sigmoid(x @ p["w_a"] + p["b_a"])
    Lambda = (np.log1p(np.exp(p["lambda_params"])) + memory.lambda_lower_bound).reshape(h, d)
    H_kk, H_kv, y = np.zeros((b, h, d, d)), np.zeros((b, h, d, d)), np.zeros_like(x)
    for i in range(b):
        for s in range(t):
            o = np.zeros((h, d))
            for j in range(h):
                now = k[i, s, j]
                H_kk[i, j] = decay[i, s, j] * H_kk[i, j] + beta[i, s, j] * np.outer(now, now)
                H_kv[i, j] = decay[i, s, j] * H_kv[i, j] + beta[i, s, j] * np.outer(now, v[i, s, j])
                o[j] = H_kv[i, j].T @ np.linalg.solve(H_kk[i, j] + np.diag(Lambda[j]), q[i, s, j])
            o = o / np.sqrt((o * o).mean(-1, keepdims=True) + memory.norm_eps) * p["norm"]
            z = x[i, s] @ p["w_g"] if memory.use_gate else None
            y[i, s] = (o.reshape(-1) if z is None else o.reshape(-1) * z * sigmoid(z)) @ p["w_o"]
    return y, H_kk, H_kv


@pytest.mark.parametrize(
    "memory",
    [
        SMALL,
        MesaNet(
            dim=6, heads=1, head_dim=3, conv_size=2, lambda_lower_bound=0.0, steps=None, use_gate=True, norm_eps=1e-3
        ),
    ],
    ids=["conjugate gradients", "direct, gate, narrow convolution"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)
    y, state = apply(memory, params, state, x)
    want_y, H_kk, H_kv = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.H_kk, H_kk, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.H_kv, H_kv, rtol=1e-4, atol=2e-6)


# ---------------------------------------------------------------------------------------------- the op


def arguments(b=2, t=11, h=2, d=5, e=3, dtype=np.float64):
    """q, k of length 1, v, beta, log_decay, Lambda, and the states of a document that is already open."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    q, k, earlier = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in draw(3, b, t, h, d))
    rest = draw(b, t, h, e), sigmoid(draw(b, t, h)), np.log(sigmoid(2 + draw(b, t, h))), 0.25 + rng.random((h, d))
    states = np.einsum("bthk,bthl->bhkl", earlier, earlier), draw(b, h, d, e)
    return tuple(a.astype(dtype) for a in (q, k, *rest, *states))


@functools.partial(jax.jit, static_argnames=("steps", "chunk_size"), compiler_options=QUICK_COMPILE)
def graded(args, do, **how):
    """o and the states, and the gradients of a function of o."""

    def loss(args):
        out = mesa(*args, **how)
        return jnp.sum(out[0] * do), out

    return jax.value_and_grad(loss, has_aux=True)(args)


def test_conjugate_gradients_end_at_the_direct_solution():
    args = arguments(t=45)  # more chunks than are computed side by side, the last one not full
    with jax.enable_x64(True):
        do = np.cos(np.arange(args[2].size)).reshape(args[2].shape)
        (_, want), want_grads = graded(args, do, steps=None, chunk_size=4)
        (_, got), grads = graded(args, do, steps=30, chunk_size=8)
    for a, b in zip(jax.tree.leaves((got, grads)), jax.tree.leaves((want, want_grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(want[0], direct(*args), rtol=1e-9, atol=1e-11)


def direct(q, k, v, beta, log_decay, Lambda, H_kk, H_kv):
    """o by numpy, a token and a head at a time."""
    o = np.zeros_like(v)
    for i, s, j in np.ndindex(v.shape[:3]):
        later = lambda r, i=i, s=s, j=j: np.exp(log_decay[i, r : s + 1, j].sum())  # noqa: E731
        A, B = later(0) * H_kk[i, j] + np.diag(Lambda[j]), later(0) * H_kv[i, j]
        for r in range(s + 1):
            A = A + later(r + 1) * beta[i, r, j] * np.outer(k[i, r, j], k[i, r, j])
            B = B + later(r + 1) * beta[i, r, j] * np.outer(k[i, r, j], v[i, r, j])
        o[i, s, j] = B.T @ np.linalg.solve(A, q[i, s, j])
    return o


def test_the_guard_of_the_published_code_stops_early():
    args = arguments(dtype=np.float32)
    want = direct(*(np.float64(a) for a in args))
    errors = [np.abs(np.asarray(op(*args, guard=guard)[0]) - want).max() for guard in (1e-5, 1e-30)]
    assert 1e-5 < errors[0] < 1e-2 and errors[1] < 5e-6


def test_steps_beyond_the_solution_change_nothing():
    args = arguments(dtype=np.float32)
    do = np.ones_like(args[2])
    (_, few), few_grads = graded(args, do, steps=12)
    (_, many), many_grads = graded(args, do, steps=300)
    for a, b in zip(jax.tree.leaves((few, few_grads)), jax.tree.leaves((many, many_grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_query_no_answer():
    q, *rest = arguments(dtype=np.float32)
    (_, (o, *_)), grads = graded((np.zeros_like(q), *rest), np.ones_like(rest[1]))
    assert not np.asarray(o).any() and all(np.isfinite(g).all() for g in grads)


def test_a_large_lambda_gives_linear_attention():
    *args, Lambda, H_kk, H_kv = arguments(t=1)
    with jax.enable_x64(True):
        o, _, H_kv = op(*args, np.full_like(Lambda, 1e6), H_kk, H_kv)
    np.testing.assert_allclose(1e6 * np.asarray(o)[:, 0], np.einsum("bhkv,bhk->bhv", H_kv, args[0][:, 0]), rtol=1e-4)


def test_orthonormal_keys_are_divided_by_one_and_lambda():
    q, k, v, *_, H_kk, H_kv = arguments(t=5, d=5)
    k, seen = np.broadcast_to(np.eye(5)[None, :, None], k.shape), np.tri(5)  # token s has seen keys 0 to s
    ones, lam = np.ones(q.shape[:3]), 0.7
    with jax.enable_x64(True):
        o, _, _ = op(q, k, v, ones, 0 * ones, np.full((2, 5), lam), 0 * H_kk, 0 * H_kv)
    np.testing.assert_allclose(o, np.einsum("bshk,sk,bkhv->bshv", q, seen / (1 + lam), v), rtol=1e-9, atol=1e-12)


def test_it_is_ridge_regression_in_context():
    q, k, _, *_, H_kk, H_kv = arguments()
    v, ones = k @ np.random.default_rng(1).standard_normal((5, 3)), np.ones(q.shape[:3])
    with jax.enable_x64(True):
        o, _, _ = op(q, k, v, ones, 0 * ones, np.full((2, 5), 0.1), 0 * H_kk, 0 * H_kv)
    K, V = k[0, :, 0], v[0, :, 0]
    W = np.linalg.solve(K.T @ K + 0.1 * np.eye(5), K.T @ V)
    np.testing.assert_allclose(o[0, -1, 0], W.T @ q[0, -1, 0], rtol=1e-9, atol=1e-12)


def test_lambda_begins_at_one():
    params = dataclasses.replace(SMALL, lambda_lower_bound=0.5).init(jax.random.key(0))
    np.testing.assert_allclose(jax.nn.softplus(params["lambda_params"]) + 0.5, 1, rtol=1e-6)


@pytest.mark.parametrize(
    "field, value, needs",
    [
        ("head_dim", 0, "at least 1"),
        ("steps", 0, "at least 1"),
        ("conv_size", 1, "at least 2"),
        ("lambda_lower_bound", 1.0, "0 <= it < 1"),
    ],
)
def test_bad_fields(field, value, needs):
    with pytest.raises(ValueError, match=f"MesaNet: {field} is {value}, needs {needs}"):
        dataclasses.replace(SMALL, **{field: value})
