"""Linear attention in chunks: matrix products inside a chunk, one addition per chunk from state to state.

With G_r the sum of the log decays of rows 1..r of a chunk, S the state that enters it and S' the one that leaves:

    P[r, i] = sum over channels of q_r k_i e^{G_r - G_i}  for i <= r
    O       = (Q * e^G) S + P V
    S'      = e^{G_C} S + (K * e^{G_C - G})^T V

Memory: the entering state of every chunk is kept, [n b h k v].
"""

import jax
from jax import Array

from pallas_kernels import chunks
from pallas_kernels.chunks import scale


def linear_attention(
    q: Array, k: Array, v: Array, log_decay: Array | None, state: Array, start: Array | None, chunk_size: int
) -> tuple[Array, Array]:
    """Arrays as in the public op; state is given, and its dtype is the one to compute in."""
    t, dot, c = q.shape[1], chunks.matmul_for(q.dtype), chunks.chunk_length(q.shape[1], chunk_size)
    docs = chunks.documents(start, c)
    q, k, v, g = jax.tree.map(lambda a: chunks.split(a.astype(state.dtype), c), (q, k, v, log_decay))

    # inside every chunk, all at once
    if g is not None and g.ndim == k.ndim:
        P, decays = chunks.channel_decays(q, k, g, docs, dot)
    else:
        D, decays = chunks.scalar_decays(g, docs, c, state.dtype)
        P = dot(q, k.mT) * D
    written = dot(scale(k, decays.leave).mT, v)

    # from chunk to chunk
    def across(S, now):
        through, written = now
        return scale(S, through) + written, S

    state, S = chunks.scan_chunks(across, state, (decays.through, written))
    return chunks.merge(dot(scale(q, decays.enter), S) + dot(P, v), t), state
