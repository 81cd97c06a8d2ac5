"""The delta rule, the definition: one token after another."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.scan import scan_tokens


def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None, state: Array, start: Array | None
) -> tuple[Array, Array]:
    """Arrays as in the public op; state is given, and its dtype is the one to compute in."""
    groups = v.shape[2] // k.shape[2]

    def read(S, k):
        return jnp.einsum("bhk,bhkv->bhv", k, S, precision=lax.Precision.HIGHEST)

    def step(S, now):
        q, k, v, beta, g = jax.tree.map(lambda a: a.astype(S.dtype), now)
        q, k = (jnp.repeat(a, groups, axis=1) for a in (q, k))
        if g is not None:
            S = jnp.exp(g)[..., None, None] * S
        u = beta[..., None] * (v - read(S, k))
        S = S + k[..., :, None] * u[..., None, :]
        return S, read(S, q)

    return scan_tokens(step, state, (q, k, v, beta, log_decay), start=start)
