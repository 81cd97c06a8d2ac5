"""The diagonal recurrence, the definition: one token after another."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.scan import scan_tokens

Values = Array | tuple[Array, Array]
"""Real numbers, or complex ones as (real, imag)."""


@jax.jit
def diagonal_scan(
    x: Values, log_decay: Array, phase: Array | None, state: Values, start: Array | None
) -> tuple[Values, Values]:
    """Arrays as in the public op; state is given, and its dtype is the one to compute in."""
    dtype = jax.tree.leaves(state)[0].dtype

    def step(h, now):
        x, g, angle = jax.tree.map(lambda a: a.astype(dtype), now)
        radius = jnp.exp(g)
        if angle is None:
            h = radius * h + x
        else:
            (real, imag), cos, sin = h, radius * jnp.cos(angle), radius * jnp.sin(angle)
            h = cos * real - sin * imag + x[0], cos * imag + sin * real + x[1]
        return h, h

    return scan_tokens(step, state, (x, log_decay, phase), start=start)
