"""The short convolution, the definition: one token after another."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.scan import only, scan_tokens


@functools.partial(jax.jit, static_argnames="activation")
def short_conv(
    x: Array,
    weight: Array,
    cache: Array,
    valid: Array | None,
    start: Array | None,
    bias: Array | None,
    activation: str | None,
) -> tuple[Array, Array]:
    """Arrays as in the public op."""
    dtype = dispatch.accumulator(x, weight, cache, bias)
    weight = weight.astype(dtype)

    def step(rows, x):
        rows = jnp.concatenate([rows, x[:, None]], 1)
        return rows[:, 1:], jnp.sum(rows.astype(dtype) * weight[None], 1)

    y, cache = scan_tokens(step, cache, x.astype(cache.dtype), valid=valid, start=start)
    if bias is not None:
        y = y + bias.astype(dtype)[None, None]
    y = (jax.nn.silu(y) if activation == "silu" else y).astype(x.dtype)
    return only(valid, y), cache
