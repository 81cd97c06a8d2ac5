"""Linear attention, the definition: one token after another."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.scan import scan_tokens


@functools.partial(jax.jit, static_argnames="chunk_size")
def linear_attention(
    q: Array, k: Array, v: Array, log_decay: Array | None, state: Array, start: Array | None, *, chunk_size: int = 1
) -> tuple[Array, Array]:
    """Arrays as in the public op; state has the dtype to compute in. There are no chunks here."""
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay[..., None]

    def step(S, now):
        q, k, v, g = jax.tree.map(lambda a: a.astype(S.dtype), now)
        if g is not None:
            S = jnp.exp(g)[..., None] * S
        S = S + k[..., :, None] * v[..., None, :]
        return S, jnp.einsum("bhk,bhkv->bhv", q, S, precision=lax.Precision.HIGHEST)

    return scan_tokens(step, state, (q, k, v, log_decay), start=start)
