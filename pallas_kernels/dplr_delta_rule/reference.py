"""The delta rule with a transition of diagonal plus rank one, the definition: one token after another."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.scan import scan_tokens


@functools.partial(jax.jit, static_argnames=("chunk_size", "inverse_precision"))
def dplr_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    log_decay: Array,
    state: Array,
    start: Array | None,
    *,
    chunk_size: int = 1,
    inverse_precision: str = "float32",
) -> tuple[Array, Array]:
    """Arrays as in the public op; state is given, and its dtype is the one to compute in. The settings belong to
    chunks; there are none here."""

    def read(S, k):
        return jnp.einsum("bhk,bhkv->bhv", k, S, precision=lax.Precision.HIGHEST)

    def write(k, v):
        return k[..., :, None] * v[..., None, :]

    def step(S, now):
        q, k, v, a, b, g = jax.tree.map(lambda x: x.astype(S.dtype), now)
        S = jnp.exp(g)[..., None] * S + write(b, read(S, a)) + write(k, v)
        return S, read(S, q)

    return scan_tokens(step, state, (q, k, v, a, b, log_decay), start=start)
