"""Taylor attention, the definition: one token after another."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.scan import scan_tokens
from pallas_kernels.taylor_attention.features import taylor_features


@functools.partial(jax.jit, static_argnames=("compressed", "chunk_size"))
def taylor_attention(
    q: Array, k: Array, v: Array, state: Array, start: Array | None, *, compressed: bool, chunk_size: int = 1
) -> tuple[Array, Array]:
    """S_t = S_{t-1} + phi(k) v^T, o_t = S_t^T phi(q). state has the dtype to compute in. There are no chunks here."""

    def step(S, now):
        q, k, v = (a.astype(S.dtype) for a in now)
        S = S + taylor_features(k, compressed)[..., :, None] * v[..., None, :]
        return S, jnp.einsum("bhf,bhfv->bhv", taylor_features(q, compressed), S, precision=lax.Precision.HIGHEST)

    return scan_tokens(step, state, (q, k, v), start=start)
