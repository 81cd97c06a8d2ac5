"""The delta rule in chunks: the corrections of all tokens of a chunk by one triangular inverse.

With r the erase gate times k, e_r the product of the decays of rows 1..r of a chunk, S the state that enters it and S'
the one that leaves:

    A[r, i] = sum over channels of r_r k_i e_r / e_i  for i < r
    R       = (I + A)^{-1} (write * V - (r * e) S)                (u_t of all tokens)
    P[r, i] = sum over channels of q_r k_i e_r / e_i  for i <= r
    O       = (Q * e) S + P R
    S'      = e_C S + (K * e_C / e)^T R

where no quotient is ever formed: it is the product of the decays in between. W = (I + A)^{-1} (r * e) and
U = (I + A)^{-1} V, which the published chunk forms make first, are not needed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import chunks
from pallas_kernels.chunk_states import Chunks, Correction, chunk_states
from pallas_kernels.chunks import scale
from pallas_kernels.triangular import Precision


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
    chunk_size: int,
    inverse_precision: Precision,
) -> tuple[Array, Array]:
    """Arrays as in the public op, erase and write [b t h] or per channel; state has the dtype to compute in."""
    precision, c = chunks.precision_for(q, k, v), chunks.chunk_length(q.shape[1], chunk_size)
    dot = functools.partial(jnp.matmul, precision=precision)
    full = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # what the inverse and the state touch
    groups = v.shape[2] // k.shape[2]
    channels = log_decay is not None and log_decay.ndim == 4

    def span(state, now, start):
        *dense, g = now
        q, k, v, erase, write = (chunks.split(x if x.ndim == 4 else x[..., None], c).astype(state.dtype) for x in dense)
        decays = chunks.decays(chunks.factors(g, start, c, state.dtype))

        # value head j reads key head j // groups
        repeat = functools.partial(jnp.repeat, repeats=groups, axis=2)
        if channels:
            q, k = repeat(q), repeat(k)
            P, A = chunks.channel_scores(q, k, decays, dot), chunks.channel_scores(erase * k, k, decays, dot)
        else:
            D = chunks.decay_matrix(decays, c, state.dtype)
            P = repeat(dot(q, k.mT)) * D
            if erase.shape[-1] == 1:
                A = erase * repeat(dot(k, k.mT)) * D
            else:
                A = dot(erase * repeat(k), repeat(k).mT) * D
            q, k = repeat(q), repeat(k)

        correction = Correction(scale(k, decays.leave), A, write * v, scale(erase * k, decays.enter))
        states = chunk_states(Chunks(decays.through, None, correction), state, inverse_precision)
        return states.final, chunks.merge(full(scale(q, decays.enter), states.entering) + full(P, states.corrected))

    return chunks.scan_spans(span, state, (q, k, v, erase, write, log_decay), start, c)
