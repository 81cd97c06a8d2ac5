"""The delta rule, the definition: one row after another."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.scan import scan_tokens


@functools.partial(jax.jit, static_argnames=("chunk_size", "inverse_precision"))
def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    erase: Array,
    write: Array,
    log_decay: Array | None,
    state: Array,
    start: Array | None,
    *,
    chunk_size: int = 1,
    inverse_precision: str = "float32",
) -> tuple[Array, Array]:
    """q, k [b t hk k], v [b t h v], erase [b t h] or [b t h k], write [b t h] or [b t h v], log_decay None, [b t h] or
    [b t h k], start [b t] or None, state [b h k v] in the dtype to compute in. The settings belong to chunks; there are
    none here."""
    groups = v.shape[2] // k.shape[2]
    rates = (erase, write, log_decay)
    erase, write, log_decay = jax.tree.map(lambda a: a if a.ndim == 4 else a[..., None], rates)

    def read(S, k):
        return jnp.einsum("bhk,bhkv->bhv", k, S, precision=lax.Precision.HIGHEST)

    def step(S, now):
        q, k, v, erase, write, g = jax.tree.map(lambda a: a.astype(S.dtype), now)
        q, k = (jnp.repeat(a, groups, axis=1) for a in (q, k))
        if g is not None:
            S = jnp.exp(g)[..., None] * S
        u = write * v - read(S, erase * k)
        S = S + k[..., :, None] * u[..., None, :]
        return S, read(S, q)

    return scan_tokens(step, state, (q, k, v, erase, write, log_decay), start=start)
