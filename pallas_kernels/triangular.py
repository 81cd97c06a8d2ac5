"""The inverse of a unit lower triangular matrix by doubling, and the block step it shares with per-channel decays.

With X0, X1 the inverses of two neighbouring diagonal blocks of size b, that of the block of size 2b around them is

    [ X0              0  ]
    [ -X1 A10 X0      X1 ]

and b doubles from 1 to c. Every intermediate is itself an inverse, so nothing grows beyond the result. A product of
powers, (I - A)(I + A^2)(I + A^4)..., is the same on paper and loses every digit when keys are alike.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


def join_blocks(even: Array, cross: Array, odd: Array) -> Array:
    """[[even, 0], [cross, odd]]: lower triangular blocks [..., b, b] to [..., 2b, 2b]."""
    upper = jnp.concatenate([even, jnp.zeros_like(cross)], -1)
    return jnp.concatenate([upper, jnp.concatenate([cross, odd], -1)], -2)


@jax.custom_jvp
def unit_lower_inverse(A: Float[Array, "*batch c c"]) -> Float[Array, "*batch c c"]:
    """(I + A)^-1 for A strictly lower triangular; what stands on and above the diagonal of A is not read.

    c is a power of two (ValueError otherwise). Products are in the dtype of A at full precision.
    """
    c = A.shape[-1]
    if c & (c - 1):
        raise ValueError(f"unit_lower_inverse: A has shape {list(A.shape)}, needs a last axis that is a power of two")
    below = []  # for b = c/2, ..., 2, 1: the blocks of A left of each odd diagonal block, [..., c/2b, b, b]
    diagonal = A[..., None, :, :]
    while (b := diagonal.shape[-1] // 2) > 0:
        below.append(diagonal[..., b:, :b])
        halves = jnp.stack([diagonal[..., :b, :b], diagonal[..., b:, b:]], -3)
        diagonal = halves.reshape(*A.shape[:-2], c // b, b, b)
    X = jnp.ones_like(diagonal)
    for A10 in reversed(below):
        X0, X1 = X[..., 0::2, :, :], X[..., 1::2, :, :]
        X = join_blocks(X0, -_dot(_dot(X1, A10), X0), X1)
    return X[..., 0, :, :]


@unit_lower_inverse.defjvp
def _(primals, tangents):
    (A,), (dA,) = primals, tangents
    X = unit_lower_inverse(A)
    return X, -_dot(_dot(X, jnp.tril(dA, -1)), X)


def _dot(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
