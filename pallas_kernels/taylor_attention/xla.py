"""Taylor attention in chunks. Inside a chunk no feature is formed, with s = q_r.k_i / sqrt(d):

    P[r, i] = 1 + s + s^2/2  for i <= r
    O       = phi(Q) S + P V
    S'      = S + phi(K)^T V

The features, F/d times as wide as q and k, exist for one span of chunks at a time, in the backward pass too.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import chunks
from pallas_kernels.chunk_states import Chunks, Write, chunk_states
from pallas_kernels.chunks import scale
from pallas_kernels.taylor_attention.features import taylor_features


@functools.partial(jax.jit, static_argnames=("compressed", "chunk_size"))
def taylor_attention(
    q: Array, k: Array, v: Array, state: Array, start: Array | None, *, compressed: bool, chunk_size: int
) -> tuple[Array, Array]:
    """Arrays as in the reference."""
    precision, c = chunks.precision_for(q, k, v), chunks.chunk_length(q.shape[1], chunk_size)
    dot = functools.partial(jnp.matmul, precision=precision)
    features = functools.partial(taylor_features, compressed=compressed)

    def span(state, now, start):
        q, k, v = (chunks.split(x.astype(state.dtype), c) for x in now)
        decays = chunks.decays(chunks.factors(None, start, c, state.dtype))  # 0 across borders of documents, else 1
        s = dot(q, k.mT) * q.shape[-1] ** -0.5
        P = (1 + s + 0.5 * s * s) * chunks.decay_matrix(decays, c, state.dtype)
        write = Write(scale(features(k), decays.leave), v)
        states = chunk_states(Chunks(decays.through, write, None), state, precision=precision)
        return states.final, chunks.merge(dot(scale(features(q), decays.enter), states.entering) + dot(P, v))

    return chunks.scan_spans(span, state, (q, k, v), start, c)
