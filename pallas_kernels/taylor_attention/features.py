"""The second-order Taylor expansion of exp as a feature map."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def taylor_features(x: Float[Array, "*b d"], compressed: bool = False) -> Float[Array, "*b f"]:
    """phi(x) = [1, x / d**(1/4), x x^T / sqrt(2 d)] row by row, so that phi(q).phi(k) = 1 + s + s^2/2, s = q.k/sqrt(d).

    compressed: x_i x_j and x_j x_i as one feature, first the squares x_i^2 / sqrt(2 d), then x_i x_j / sqrt(d) for
    i < j, row by row. The same products of features, from little more than half of them.
    """
    d = x.shape[-1]
    if compressed:
        products = [x * x * (0.5 / d) ** 0.5, *(x[..., i : i + 1] * x[..., i + 1 :] * d**-0.5 for i in range(d - 1))]
    else:
        products = [(x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], d * d) * (0.5 / d) ** 0.5]
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x * d**-0.25, *products], -1)


def feature_count(d: int, compressed: bool = False) -> int:
    """How many features a vector of width d has."""
    return 1 + d + (d * (d + 1) // 2 if compressed else d * d)
