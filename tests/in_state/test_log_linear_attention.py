"""Log-linear attention against the equations of the paper, one pair of tokens at a time in numpy, and its limits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.log_linear_attention import LogLinearAttention, log_linear_attention
from pallas_kernels import linear_attention
from pallas_kernels.compat import QUICK_COMPILE
from tests.in_state.layer import apply, inputs, sigmoid

SMALL = LogLinearAttention(dim=6, max_length=32, head_dim=6, state_size=4)

op = jax.jit(log_linear_attention, static_argnames=("chunk_size", "implementation"), compiler_options=QUICK_COMPILE)


def dense(q, k, v, log_decay, lam):
    """o by numpy, a pair of tokens at a time. Levels above the last are the last."""
    o = np.zeros(v.shape)
    for i, s, j in np.ndindex(v.shape[:3]):
        for r in range(s + 1):
            level = min((s ^ r).bit_length(), lam.shape[-1] - 1)
            weight = lam[i, s, j, level] * np.exp(log_decay[i, r + 1 : s + 1, j].sum()) * (q[i, s, j] @ k[i, r, j])
            o[i, s, j] += weight * v[i, r, j]
    return o


def paper(memory, params, x):
    """y in float64, by loops."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), h, (d, n, _) = x.shape, memory.heads, memory.xBC
    z, rows, dt, dl = np.split(x @ p["w_in"], np.cumsum([d, d + 2 * n, h]), -1)
    padded = np.concatenate([np.zeros((b, memory.conv_size - 1, d + 2 * n)), rows], 1)
    rows = p["conv_bias"] + sum(p["conv"][j] * padded[:, j : j + t] for j in range(memory.conv_size))
    x, B, C = np.split(rows * sigmoid(rows), [d, d + n], -1)
    x = x.reshape(b, t, h, -1)
    k, q = (np.repeat(a.reshape(b, t, memory.groups, -1), h // memory.groups, 2) for a in (B, C))
    dt = np.log1p(np.exp(dt + p["dt_bias"]))
    lam = np.log1p(np.exp(p["L"] * dl.reshape(b, t, h, -1)))
    y = dense(q, k, dt[..., None] * x, -np.exp(p["A_log"]) * dt, lam) + p["D"][:, None] * x
    y = (y.reshape(b, t, -1) * z * sigmoid(z)).reshape(b, t, memory.groups, -1)
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + memory.norm_eps)
    return (y.reshape(b, t, -1) * p["norm"]) @ p["w_out"]


@pytest.mark.parametrize(
    "memory",
    [
        SMALL,
        LogLinearAttention(dim=6, max_length=32, head_dim=3, state_size=4, groups=2, conv_size=2, norm_eps=1e-3),
        LogLinearAttention(dim=6, max_length=4, head_dim=6, state_size=4),
    ],
    ids=["plain", "groups, narrow convolution", "longer than max_length"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    y, state = apply(memory, params, state, x)
    np.testing.assert_allclose(y, paper(memory, params, x), rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(state.count, [19, 19])


# ---------------------------------------------------------------------------------------------- the op


def arguments(t, levels, b=2, h=2, d=3, e=4):
    """q, k, v, log_decay, lam, float32."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q, k, v = draw(b, t, h, d), draw(b, t, h, d), draw(b, t, h, e)
    return q, k, v, -0.3 * rng.random((b, t, h), np.float32), rng.random((b, t, h, levels), np.float32)


def empty(levels, b=2, h=2, d=3, e=4):
    """No state."""
    return jnp.zeros((b, levels - 1, h, d, e)), jnp.zeros(b, jnp.int32)


def test_the_step_form_is_the_mask_form_and_occupies_a_slot_for_each_bit():
    args = arguments(70, 8)
    want, S = dense(*args), empty(8)
    for t in range(70):
        o, *S = op(*(a[:, t : t + 1] for a in args), *S, implementation="reference")
        np.testing.assert_allclose(o[:, 0], want[:, t], rtol=1e-4, atol=1e-5)
        occupied = np.asarray(S[0]).any((2, 3, 4))
        assert (occupied == [bool((t + 1) >> bit & 1) for bit in range(7)]).all()
    np.testing.assert_array_equal(S[1], [70, 70])


@pytest.mark.parametrize("levels", [8, 4], ids=["long enough", "longer than all levels"])
def test_chunks_are_the_mask_form_from_any_position(levels):
    args = arguments(70, levels)
    want = dense(*args)
    first, last = ([a[:, cut] for a in args] for cut in (slice(13), slice(13, None)))
    o, *S = op(*first, *empty(levels), implementation="reference")
    more, *end = op(*last, *S, chunk_size=16, implementation="xla")
    np.testing.assert_allclose(np.concatenate([o, more], 1), want, rtol=1e-4, atol=1e-5)
    _, *other = op(*last, *S, implementation="reference")
    np.testing.assert_allclose(end[0], other[0], rtol=1e-4, atol=1e-5)
    if levels == 4:  # the rest stands in the last slot, which stays occupied
        assert np.asarray(end[0])[:, -1].any() and np.isfinite(end[0]).all()


def test_packed_rows_of_different_positions():
    """Documents begin inside chunks, padding stands anywhere: both forms count each row for itself."""
    rng, args = np.random.default_rng(1), arguments(53, 7)
    masks = {"valid": rng.random((2, 53)) < 0.7, "start": rng.random((2, 53)) < 0.08}
    S = jnp.asarray(rng.standard_normal((2, 6, 2, 3, 4)), jnp.float32), jnp.asarray([63, 5], jnp.int32)
    want, *want_S = op(*args, *S, **masks, implementation="reference")
    got, *got_S = op(*args, *S, **masks, chunk_size=16, implementation="xla")
    np.testing.assert_allclose(got[masks["valid"]], want[masks["valid"]], rtol=1e-4, atol=1e-5)
    for a, b in zip(got_S, want_S, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_weights_of_one_give_linear_attention():
    q, k, v, log_decay, lam = arguments(37, 7)
    for g in (log_decay, jnp.zeros_like(log_decay)):
        o, S, _ = op(q, k, v, g, jnp.ones_like(lam), *empty(7))
        want, want_S = jax.jit(linear_attention)(q, k, v, g)
        np.testing.assert_allclose(o, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(S.sum(1), want_S, rtol=1e-4, atol=1e-5)


def test_level_0_alone_sees_the_token_itself():
    q, k, v, log_decay, lam = arguments(37, 7)
    lam[..., 1:] = 0
    o, _, _ = op(q, k, v, log_decay, lam, *empty(7))
    np.testing.assert_allclose(o, (lam[..., 0] * (q * k).sum(-1))[..., None] * v, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_slots():
    args = arguments(41, 7)
    rng = np.random.default_rng(1)
    S, count = jnp.asarray(rng.standard_normal((2, 6, 2, 3, 4)), jnp.float32), jnp.asarray([37, 6], jnp.int32)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
    @functools.partial(jax.grad, argnums=1)
    def grads(implementation, inputs):
        o, S, _ = log_linear_attention(*inputs, count, chunk_size=16, implementation=implementation)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(S))

    for got, want in zip(grads("xla", (*args, S)), grads("reference", (*args, S)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
        assert np.abs(np.asarray(want)).max() > 1e-2


def test_levels_that_do_not_fit_the_slots_are_refused():
    with pytest.raises(ValueError, match="lam has 5 levels, needs 7, one above S"):
        op(*arguments(3, 5), *empty(7))


def test_states_grow_with_the_logarithm():
    assert [LogLinearAttention(dim=64, max_length=m).levels for m in (2, 4, 16384)] == [2, 3, 15]
    assert SMALL.init_state(3).S.shape == (3, 5, 2, 4, 6)


@pytest.mark.parametrize(
    "field, value, needs",
    [
        ("max_length", 24, "a power of two"),
        ("max_length", 1, "at least 2"),
        ("head_dim", 5, "a divisor of expand \\* dim = 12"),
        ("groups", 3, "a divisor of the heads, 2"),
        ("conv_size", 1, "at least 2"),
    ],
)
def test_bad_fields(field, value, needs):
    with pytest.raises(ValueError, match=f"LogLinearAttention: {field} is {value}, needs {needs}"):
        dataclasses.replace(SMALL, **{field: value})
