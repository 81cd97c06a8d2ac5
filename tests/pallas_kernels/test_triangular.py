"""The inverse of a unit lower triangular matrix, with the keys that break inverses by powers of the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.triangular import unit_lower_inverse
from tests.pallas_kernels.compare import compiled, error


def correlations(c, cosine, beta):
    """A = beta tril(K K^T, -1) for c unit keys with the given pairwise cosine, three matrices, float64."""
    draw = np.random.default_rng(c)
    keys = draw.standard_normal((3, c, 128))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    common = np.ones(128) / 128**0.5
    keys = (1 - cosine) ** 0.5 * (keys - (keys @ common)[..., None] * common) + cosine**0.5 * common
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    return beta * np.tril(keys @ keys.mT, -1)


@pytest.mark.parametrize(("beta", "limit"), [(1, 1e-6), (2, 1e-5)])
@pytest.mark.parametrize("cosine", [0, 0.9, 1])
@pytest.mark.parametrize("c", [1, 2, 64])
def test_float32_error(c, cosine, beta, limit):
    A = correlations(c, cosine, beta)
    got = compiled(unit_lower_inverse)(jnp.asarray(A, jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.linalg.inv(np.eye(c) + A), rtol=0, atol=limit)


@pytest.mark.parametrize(("precision", "beta", "limit"), [("bf16x3", 1, 3e-5), ("bf16x3", 2, 5e-4), ("bf16", 1, 1e-2)])
def test_error_of_fewer_bits(precision, beta, limit):
    """And no better than the bits allow: a precision that is not obeyed would pass the limit alone."""
    A = correlations(64, 0.9, beta)
    got = compiled(lambda A: unit_lower_inverse(A, precision))(jnp.asarray(A, jnp.float32))
    assert limit / 200 < np.abs(got - np.linalg.inv(np.eye(64) + A)).max() < limit
    assert got.dtype == jnp.float32


def test_reads_only_below_the_diagonal():
    A = correlations(8, 0.9, 1).astype(np.float32)
    poisoned = jnp.asarray(np.where(np.tri(8, k=-1, dtype=bool), A, np.nan))
    np.testing.assert_array_equal(unit_lower_inverse(poisoned), unit_lower_inverse(jnp.asarray(A)))


def test_derivatives():
    """Both modes, against those of the general inverse."""
    with jax.enable_x64(True):
        A = jnp.asarray(correlations(16, 0.9, 1))
        dA = jnp.asarray(np.random.default_rng(0).standard_normal(A.shape))

        def general(A):
            return jnp.linalg.inv(jnp.eye(16)[None] + jnp.tril(A, -1))

        for f in (
            lambda inverse: jax.jvp(inverse, (A,), (dA,))[1],
            lambda inverse: jax.grad(lambda A: (inverse(A) * dA).sum())(A),
        ):
            assert error(f(unit_lower_inverse), f(general)) < 1e-12


def test_size_must_be_a_power_of_two():
    with pytest.raises(ValueError, match=r"A has shape \[12, 12\], needs .* power of two"):
        unit_lower_inverse(jnp.zeros((12, 12)))


@pytest.mark.usefixtures("as_user")
def test_unknown_precision():
    with pytest.raises(ValueError, match="precision is 'tf32', needs one of float32, bf16x3, bf16"):
        unit_lower_inverse(jnp.zeros((4, 4)), "tf32")
