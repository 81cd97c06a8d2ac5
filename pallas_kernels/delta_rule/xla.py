"""The delta rule in chunks: the corrections of all tokens of a chunk by one triangular inverse.

With G_r the sum of the log decays of rows 1..r of a chunk, S the state that enters it and S' the one that leaves:

    A[r, i] = beta_r k_r.k_i e^{G_r - G_i}  for i < r        T = (I + A)^{-1} diag(beta)
    W = T (K * e^G)                                          U = T V
    R = U - W S                                              (u_t of all tokens)
    P[r, i] = q_r.k_i e^{G_r - G_i}  for i <= r
    O  = (Q * e^G) S + P R
    S' = e^{G_C} S + (K * e^{G_C - G})^T R

A row of a later document sees nothing of the entering state: e^G is 0 there, and A joins no two documents.
Memory: the entering state of every chunk is kept, [n b h k v].
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import chunks
from pallas_kernels.chunks import scale
from pallas_kernels.triangular import unit_lower_inverse


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array | None,
    state: Array,
    start: Array | None,
    chunk_size: int,
) -> tuple[Array, Array]:
    """Arrays as in the public op; state is given, and its dtype is the one to compute in."""
    t, dot, c = q.shape[1], chunks.matmul_for(q.dtype), chunks.chunk_length(q.shape[1], chunk_size)
    full = chunks.matmul_for(state.dtype)  # what the inverse and the state touch
    docs = chunks.documents(start, c)
    q, k, v, beta, g = jax.tree.map(lambda a: chunks.split(a.astype(state.dtype), c), (q, k, v, beta, log_decay))
    D, decays = chunks.scalar_decays(g, docs, c, state.dtype)

    # scores once per key head; value head j reads key head j // groups
    groups = v.shape[2] // k.shape[2]
    q, k, qk, kk = (jnp.repeat(a, groups, axis=2) for a in (q, k, dot(q, k.mT), dot(k, k.mT)))

    # inside every chunk, all at once
    A = jnp.tril(beta[..., :, None] * kk * D, -1)
    T = unit_lower_inverse(A) * beta[..., None, :]
    W, U, P = full(T, scale(k, decays.enter)), full(T, v), qk * D

    # from chunk to chunk
    def across(S, now):
        through, k, W, U = now
        R = U - full(W, S)
        return scale(S, through) + full(k.mT, R), (S, R)

    state, (S, R) = chunks.scan_chunks(across, state, (decays.through, scale(k, decays.leave), W, U))
    return chunks.merge(full(scale(q, decays.enter), S) + full(P, R), t), state
