"""Linear attention in chunks: matrix products inside a chunk, one addition per chunk from state to state.

With e_r the product of the decays of rows 1..r of a chunk, S the state that enters it and S' the one that leaves:

    P[r, i] = sum over channels of q_r k_i e_r / e_i  for i <= r
    O       = (Q * e) S + P V
    S'      = e_C S + (K * e_C / e)^T V

where no quotient is ever formed: it is the product of the decays in between.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import chunks
from pallas_kernels.chunk_states import Chunks, Write, chunk_states
from pallas_kernels.chunks import scale


@functools.partial(jax.jit, static_argnames="chunk_size")
def linear_attention(
    q: Array, k: Array, v: Array, log_decay: Array | None, state: Array, start: Array | None, *, chunk_size: int
) -> tuple[Array, Array]:
    """Arrays as in the public op; state is given, and its dtype is the one to compute in."""
    precision, c = chunks.precision_for(q, k, v), chunks.chunk_length(q.shape[1], chunk_size)
    dot = functools.partial(jnp.matmul, precision=precision)

    def span(state, now, start):
        *qkv, g = now
        q, k, v = (chunks.split(x.astype(state.dtype), c) for x in qkv)
        decays = chunks.decays(chunks.factors(g, start, c, state.dtype))
        if g is not None and g.ndim == 4:
            P = chunks.channel_scores(q, k, decays, dot)
        else:
            P = dot(q, k.mT) * chunks.decay_matrix(decays, c, state.dtype)
        write = Write(scale(k, decays.leave), v)
        states = chunk_states(Chunks(decays.through, write, None), state, precision=precision)
        return states.final, chunks.merge(dot(scale(q, decays.enter), states.entering) + dot(P, v))

    return chunks.scan_spans(span, state, (q, k, v, log_decay), start, c)
