"""What memories share, against plain Python: positions, the ring, attention, rotary positions, norms, dtypes."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memjax import layers
from memjax.layers import Ring, attention, gate, l2_norm, linear, positions, ring_append, rms_norm, rotary

B, T, C = 2, 7, 3
append = jax.jit(ring_append)
MASKS = arrays(bool, (B, T))


def simulate(count, valid, start):
    """Position of each token of a row and which document it is in, counted from 0."""
    position, document, out = count, 0, []
    for v, s in zip(valid, start, strict=True):
        if s:
            position, document = 0, document + 1
        out.append((position, document))
        position += v
    return out, position


@hypothesis.given(valid=MASKS, start=MASKS, count=st.integers(0, 5))
def test_positions_count_valid_tokens_since_start(valid, start, count):
    got, new = jax.jit(positions, static_argnums=1)(jnp.full(B, count, jnp.int32), T, valid, start)
    for r in range(B):
        want, last = simulate(count, valid[r], start[r])
        assert got[r].tolist() == [p for p, _ in want] and new[r] == last
        np.testing.assert_array_equal(layers.segments(jnp.asarray(start), B, T)[r], [d for _, d in want])


def test_positions_without_masks():
    got, new = positions(jnp.array([3, 0]), 2)
    assert got.tolist() == [[3, 4], [0, 1]] and new.tolist() == [5, 2]


def tokens(n):
    """Distinct k and v [B n 1 1]: k is the number of the token, v its negative."""
    k = (1 + jnp.arange(B * n, dtype=jnp.float32)).reshape(B, n, 1, 1)
    return k, -k


@hypothesis.given(valid=MASKS, start=MASKS, cut=st.sampled_from([0, 1, 2, T - 1]), masked=st.booleans())
@hypothesis.example(valid=np.ones((B, T), bool), start=np.zeros((B, T), bool), cut=2, masked=False)
def test_the_ring_shows_the_last_tokens_of_the_document(valid, start, cut, masked):
    """Two calls, cut anywhere: each token sees exactly the last C valid tokens of its document, itself included."""
    if not masked:
        valid, start = np.ones_like(valid), np.zeros_like(start)
    k, v = tokens(T)
    ring, seen = Ring(jnp.zeros((B, C, 1, 1)), jnp.zeros((B, C, 1, 1)), jnp.zeros(B, jnp.int32)), []
    for part in (slice(0, cut), slice(cut, T)):
        if part.start == part.stop:
            continue
        tokens_only = (valid[:, part], start[:, part]) if masked else (None, None)
        keys, values, visible, ring = append(ring, k[:, part], v[:, part], *tokens_only)
        for r in range(B):
            seen.append([(r, sorted(np.asarray(keys)[r, row, 0, 0].tolist())) for row in np.asarray(visible)[r]])
            sees = np.asarray(visible)[r].any(0)
            np.testing.assert_array_equal(keys[r, sees], -values[r, sees])
    of_row = {r: [s for call in seen for i, s in call if i == r] for r in range(B)}
    for r in range(B):
        document, held = [], []
        for t in range(T):
            document = [] if start[r, t] else document
            if valid[r, t]:
                document = document + [float(k[r, t, 0, 0])]
                assert of_row[r][t] == document[-C:], (r, t)
            held = document[-C:]
        slots = np.zeros(C)
        for i, key in enumerate(held):
            slots[(len(document) - len(held) + i) % C] = key
        np.testing.assert_array_equal(ring.k[r, :, 0, 0], slots)  # what can't be reached is zero
        np.testing.assert_array_equal(ring.v[r, :, 0, 0], -slots)
        assert ring.count[r] == len(document)


def test_the_ring_rounds_inside_the_call():
    ring = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), Ring.specs(1, 4, 1, 1, jnp.bfloat16))
    k = jnp.full((1, 2, 1, 1), 1.001)
    keys, _, _, new = append(ring, k, k)
    assert keys.dtype == new.k.dtype == jnp.bfloat16 and float(new.k.max()) == 1.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_is_softmax_over_what_is_visible(dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        jax.random.normal(key, (2, n, h, 4), dtype) for key, n, h in zip(keys, (3, 5, 5), (4, 2, 2), strict=False)
    )
    visible = jax.random.bernoulli(keys[3], 0.6, (2, 3, 5)).at[0, 1].set(False).at[:, 0].set(True)
    o = attention(q, k, v, visible, 0.7)
    assert o.dtype == dtype
    q64, k64, v64 = (np.asarray(a, np.float64) for a in (q, k, v))
    k64, v64 = np.repeat(k64, 2, 2), np.repeat(v64, 2, 2)
    e = np.exp(0.7 * np.einsum("bthd,buhd->bthu", q64, k64)) * np.asarray(visible)[:, :, None]
    want = np.einsum("bthu,buhd->bthd", e / np.maximum(e.sum(-1, keepdims=True), 1e-30), v64)
    np.testing.assert_allclose(np.asarray(o, np.float64), want, atol=1e-6 if dtype == jnp.float32 else 0.03)
    assert not o[0, 1].any()  # sees nothing: exactly 0


def test_attention_that_sees_nothing_has_finite_gradients():
    q = jnp.ones((1, 2, 1, 2))
    grad = jax.grad(lambda q: attention(q, q, q, jnp.zeros((1, 2, 2), bool)).sum())(q)
    assert not grad.any()


def test_within_is_causal_and_by_document():
    valid, start = jnp.array([[True, False, True, True]]), jnp.array([[True, False, False, True]])
    assert layers.within(4, 1, valid, start)[0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(layers.within(4, 1, None, None)[0], np.tri(4))


@hypothesis.given(at=st.integers(0, 500), by=st.integers(0, 30), shift=st.integers(0, 500))
@hypothesis.settings(max_examples=20)
def test_rotary_keeps_relative_positions(at, by, shift):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def dot(i, j):
        turned = [rotary(a, jnp.array([[p]]), 100.0) for a, p in ((q, i), (k, j))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert dot(at + by, at) == pytest.approx(dot(at + by + shift, at + shift), abs=1e-3)


def test_rotary_turns_pairs_of_halves():
    x = jnp.arange(1.0, 5.0)[None, None, None]
    z = np.array([1 + 3j, 2 + 4j]) * np.exp(1j * 3 * np.array([1, 100.0**-0.5]))
    np.testing.assert_allclose(rotary(x, jnp.array([[3]]), 100.0)[0, 0, 0], [*z.real, *z.imag], rtol=1e-5)
    np.testing.assert_array_equal(rotary(x, jnp.zeros((1, 1), jnp.int32)), x)
    assert rotary(x.astype(jnp.bfloat16), jnp.array([[3]])).dtype == jnp.bfloat16


def test_rms_norm_rounds_before_the_weight():
    """The order of Qwen3 and Llama: normalise in float32, cast, then scale."""
    x = jnp.array([[1.0, 2.0, 3.0, 7.0]], jnp.bfloat16)
    w = jnp.array([1.0, 1.01, 3.0, 0.3])
    normed = np.asarray(x, np.float32) / np.sqrt((np.asarray(x, np.float32) ** 2).mean() + 1e-5)
    want = jnp.asarray(normed).astype(jnp.bfloat16) * w.astype(jnp.bfloat16)[None]
    np.testing.assert_array_equal(rms_norm(x, w), want)
    assert (rms_norm(x, w) != jnp.asarray(normed * np.asarray(w)).astype(jnp.bfloat16)).any()
    np.testing.assert_allclose(rms_norm(jnp.full((1, 2), 3.0), jnp.ones(2), eps=7.0), 3 / 4, rtol=1e-6)


def test_l2_norm_at_zero():
    grad = jax.grad(lambda x: l2_norm(x).sum())(jnp.zeros(3))
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(l2_norm(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-5)


def test_the_dtype_of_x_is_kept_and_gates_are_wide():
    x, w, bias = jnp.full((2, 3), 1 / 3, jnp.bfloat16), jnp.full((3, 5), 1 / 3), jnp.full(5, 1e-3)
    assert linear(x, w, bias).dtype == jnp.bfloat16
    g = gate(x, w, bias)
    exact = 3 * float(jnp.bfloat16(1 / 3)) ** 2 + 1e-3
    assert g.dtype == jnp.float32
    np.testing.assert_allclose(g, exact, rtol=1e-6)
    assert abs(float(linear(x, w, bias)[0, 0]) - exact) > 1e-5
    grads = jax.grad(lambda x, w: gate(x, w).sum(), (0, 1))(x, w)
    assert [a.dtype for a in grads] == [jnp.bfloat16, jnp.float32]


def test_heads_split_and_merge():
    x = jnp.arange(12.0).reshape(1, 2, 6)
    assert layers.heads(x, 2)[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    np.testing.assert_array_equal(layers.merge(layers.heads(x, 2)), x)
