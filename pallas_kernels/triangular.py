"""The inverse of a unit lower triangular matrix by doubling, and the block step it shares with decays.

With X0, X1 the inverses of two neighbouring diagonal blocks of size b, that of the block of size 2b around them is

    [ X0              0  ]
    [ -X1 A10 X0      X1 ]

and b doubles from 1 to c. Every intermediate is itself an inverse, so nothing grows beyond the result. A product of
powers, (I - A)(I + A^2)(I + A^4)..., is the same on paper and loses every digit when keys are alike.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from pallas_kernels import dispatch

Precision = Literal["float32", "bf16x3", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16x3", "bf16")

SMALL = 4
"""Blocks up to this size are multiplied by sums of products, which fuse; a matrix product for each would only cost."""


def halves(x: Array, axis: int) -> tuple[Array, Array]:
    """The even and the odd entries along an axis: the blocks of each pair that is to be joined."""
    even = lax.slice_in_dim(x, 0, None, 2, axis)
    return even, lax.slice_in_dim(x, 1, None, 2, axis)


def join_blocks(even: Array, cross: Array, odd: Array) -> Array:
    """[[even, 0], [cross, odd]]: lower triangular blocks [..., b, b] to [..., 2b, 2b]."""
    upper = jnp.concatenate([even, jnp.zeros_like(cross)], -1)
    return jnp.concatenate([upper, jnp.concatenate([cross, odd], -1)], -2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_lower_inverse(A: Float[Array, "*batch c c"], precision: Precision = "float32") -> Float[Array, "*batch c c"]:
    """(I + A)^-1 for A strictly lower triangular; what stands on and above the diagonal of A is not read.

    Args:
      A: [... c c], c a power of two.
      precision: of the products; sums are in the dtype of A. "float32": A as it is. "bf16x3": each factor as the sum of
        two bfloat16, about 16 bits in all. "bf16": each factor rounded to bfloat16, 8 bits.

    The largest error of an entry for c = 64 and keys of pairwise cosine 0.9 is 2e-7, 2e-5 and 6e-3 with beta = 1; with
    beta = 2 it is 3e-6, 3e-4 and 0.1.

    Raises ValueError if c is no power of two, or for an unknown precision.
    """
    c = A.shape[-1]
    if c & (c - 1):
        raise ValueError(f"unit_lower_inverse: A has shape {list(A.shape)}, needs a last axis that is a power of two")
    dispatch.check_choice("unit_lower_inverse", "precision", precision, PRECISIONS)
    below = []  # for b = c/2, ..., 2, 1: the blocks of A left of each odd diagonal block, [N c/2b b b]
    diagonal = A.reshape(-1, 1, c, c)
    while (b := diagonal.shape[-1] // 2) > 0:
        below.append(diagonal[..., b:, :b])
        diagonal = jnp.stack([diagonal[..., :b, :b], diagonal[..., b:, b:]], 2).reshape(-1, c // b, b, b)
    X = jnp.ones_like(diagonal)
    for A10 in reversed(below):
        X0, X1 = halves(X, 1)
        X = join_blocks(X0, -_dot(_dot(X1, A10, precision), X0, precision), X1)
    return X.reshape(A.shape)


@unit_lower_inverse.defjvp
def _(precision, primals, tangents):
    (A,), (dA,) = primals, tangents
    X = unit_lower_inverse(A, precision)
    return X, -_dot(_dot(X, jnp.tril(dA, -1), precision), X, precision)


def _dot(x: Array, y: Array, precision: Precision) -> Array:
    if precision == "float32":
        return _product(x, y, x.dtype)
    (x0, x1), (y0, y1) = _in_two(x), _in_two(y)
    product = _product(x0, y0, x.dtype)
    return product if precision == "bf16" else product + _product(x0, y1, x.dtype) + _product(x1, y0, x.dtype)


def _in_two(x: Array) -> tuple[Array, Array]:
    """x as a bfloat16 and what that leaves, as a bfloat16 too."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(x.dtype)).astype(jnp.bfloat16)


def _product(x: Array, y: Array, dtype: DTypeLike) -> Array:
    if x.shape[-1] <= SMALL:
        return jnp.sum(x.astype(dtype)[..., :, :, None] * y.astype(dtype)[..., None, :, :], -2)
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)
