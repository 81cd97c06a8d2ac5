"""Taylor attention: its features, the chunked form against the definition, and the definition against plain sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import QUICK_COMPILE
from pallas_kernels.taylor_attention import FORMS, feature_count, taylor_attention, taylor_features

B, T, H, D, E = 2, 45, 2, 3, 4  # chunks of 4: two spans, the last chunk is not full
both = pytest.mark.parametrize("compressed", [False, True], ids=["full", "compressed"])


def arrays(compressed=False, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = {"q": (B, T, H, D), "k": (B, T, H, D), "v": (B, T, H, E)}
    found = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    seen = rng.standard_normal((B, 5, H, D)), rng.standard_normal((B, 5, H, E))
    v = np.concatenate([seen[1], np.ones((B, 5, H, 1))], -1)
    state = jnp.einsum("bthf,bthv->bhfv", taylor_features(jnp.asarray(seen[0]), compressed), jnp.asarray(v))
    return jax.tree.map(jnp.asarray, found | {"initial_state": np.asarray(state, dtype)})


def masks():
    rng = np.random.default_rng(1)
    return {"valid": jnp.asarray(rng.random((B, T)) < 0.8), "start": jnp.asarray(rng.random((B, T)) < 0.1)}


def all_of(found, given, **settings):
    """o, the final state, and the gradients of a fixed sum of both."""

    def loss(found):
        o, state = taylor_attention(**found, **given, chunk_size=4, **settings)
        return sum(jnp.sum(a * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape)) for a in (o, state)), (
            o,
            state,
        )

    grads, (o, state) = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK_COMPILE)(found)
    return {"o": o, "state": state} | grads


@both
def test_features_multiply_to_the_expansion(compressed):
    x, y = np.random.default_rng(0).standard_normal((2, 9, 5))
    phi_x, phi_y = (np.asarray(taylor_features(jnp.asarray(a, jnp.float32), compressed), np.float64) for a in (x, y))
    assert phi_x.shape == (9, feature_count(5, compressed)) == (9, 21 if compressed else 31)
    s = (x * y).sum(-1) / np.sqrt(5)
    np.testing.assert_allclose((phi_x * phi_y).sum(-1), 1 + s + s * s / 2, rtol=1e-6, atol=1e-6)


def test_order_of_the_features():
    x = jnp.asarray([2.0, 3.0])
    root = 2**-0.25
    np.testing.assert_allclose(taylor_features(x), [1, 2 * root, 3 * root, 2, 3, 3, 4.5], rtol=1e-6)
    np.testing.assert_allclose(taylor_features(x, True), [1, 2 * root, 3 * root, 2, 4.5, 6 / np.sqrt(2)], rtol=1e-6)


@both
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_equals_the_reference(compressed, masked):
    with jax.enable_x64(True):
        run = functools.partial(all_of, arrays(compressed), masks() if masked else {}, compressed=compressed)
        want = run(implementation="reference")
        for name, got in run(implementation="xla").items():
            np.testing.assert_allclose(got, want[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_the_reference_is_attention_with_other_weights():
    """From an empty state: a quadratic sum over the valid tokens of the same document."""
    with jax.enable_x64(True):
        found, given = arrays(), masks()
        q, k, v = (found[name] for name in "qkv")
        o, _ = taylor_attention(q, k, v, **given, eps=1e-3, implementation="reference")
    q, k, v, valid, start = (np.asarray(a) for a in (q, k, v, given["valid"], given["start"]))
    document, want = np.cumsum(start, 1), np.zeros_like(v)
    for b in range(B):
        for i in np.flatnonzero(valid[b]):
            seen = [j for j in range(i + 1) if valid[b, j] and document[b, j] == document[b, i]]
            s = np.einsum("hd,jhd->jh", q[b, i], k[b, seen]) / np.sqrt(D)
            weights = 1 + s + s * s / 2
            want[b, i] = np.einsum("jh,jhv->hv", weights, v[b, seen]) / (weights.sum(0)[:, None] + 1e-3)
    np.testing.assert_allclose(o, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("implementation", FORMS)
def test_a_sequence_may_be_cut_anywhere(implementation):
    found, given = arrays(dtype=np.float32), masks()
    call = functools.partial(taylor_attention, chunk_size=4, implementation=implementation)
    o, state = call(**found, **given)
    pieces, now = [], found["initial_state"]
    for piece in (slice(0, 1), slice(1, 18), slice(18, T)):
        tokens = {name: a[:, piece] for name, a in ({name: found[name] for name in "qkv"} | given).items()}
        part, now = call(**tokens, initial_state=now)
        pieces.append(part)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), o, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(now, state, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_what_stands_at_invalid_tokens_reaches_nothing(implementation):
    found, given = arrays(dtype=np.float32), masks()
    poisoned = {
        name: a if name == "initial_state" else jnp.where(given["valid"][..., None, None], a, jnp.nan)
        for name, a in found.items()
    }
    want, got = (all_of(a, given, implementation=implementation) for a in (found, poisoned))
    for name, a in got.items():
        assert np.isfinite(a).all(), name
        np.testing.assert_array_equal(a, want[name], err_msg=name)
    assert not np.asarray(got["o"])[~np.asarray(given["valid"])].any()


def test_bfloat16():
    found = arrays(dtype=np.float32)
    narrow = {name: a if name == "initial_state" else jnp.asarray(a, jnp.bfloat16) for name, a in found.items()}
    rounded = {name: a.astype(jnp.float32) for name, a in narrow.items()}
    o, state = taylor_attention(**narrow, chunk_size=4, implementation="xla")
    want, want_state = taylor_attention(**rounded, chunk_size=4, implementation="reference")
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_allclose(o.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(state, want_state, rtol=1e-5, atol=1e-5)


def test_the_sum_of_weights_does_not_stall():
    """In bfloat16 counting up to 4096 would stop at 256."""
    v = jnp.ones((1, 4096, 1, 1), jnp.bfloat16)
    _, state = taylor_attention(0 * v, 0 * v, v)
    np.testing.assert_array_equal(state[0, 0, 0], [4096, 4096])


def test_features_of_a_long_sequence_are_never_whole():
    t, d = 32768, 8
    shape = jax.ShapeDtypeStruct((1, t, 1, d), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(taylor_attention(q, k, v, implementation="xla")[0])

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 4 * t * feature_count(d)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": jnp.zeros((B, T, H, D + 1))}, "taylor_attention: k has shape"),
        ({"compressed": True}, r"initial_state has shape \[2, 2, 13, 5\], needs \[2, 2, 10, 5\]"),
        ({"chunk_size": 3}, "chunk_size is 3, needs a power of two"),
        ({"implementation": "cuda"}, "implementation is 'cuda', needs None or one of reference, xla"),
        ({"start": jnp.zeros((B, T), jnp.int32)}, "start has dtype int32, needs bool"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        taylor_attention(**{**arrays(dtype=np.float32), **change})
