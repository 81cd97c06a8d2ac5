"""The short convolution, the definition: one token after another."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.scan import scan_tokens


def short_conv(x: Array, weight: Array, cache: Array, valid: Array | None, start: Array | None) -> tuple[Array, Array]:
    """Arrays as in the public op, the sum without bias and activation; its dtype is that of weight."""

    def step(rows, x):
        rows = jnp.concatenate([rows, x[:, None]], 1)
        return rows[:, 1:], jnp.sum(rows.astype(weight.dtype) * weight[None], 1)

    return scan_tokens(step, cache, x.astype(cache.dtype), valid=valid, start=start)
