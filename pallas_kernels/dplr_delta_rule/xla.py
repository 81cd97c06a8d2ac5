"""The DPLR delta rule in chunks: what a token reads of the tokens before it by one triangular inverse.

With e_r the product of the decays of rows 1..r of a chunk, x_r = e_{r-1}, S the state that enters it and S' the one
that leaves, and scores (row, column)[r, i] = sum over channels of row_r column_i times the decays after i up to r:

    A  = -(a, b)  for i < r, without the decay of row r itself; likewise (a, k)
    R  = (I + A)^{-1} ((a, k) V + (a * x) S)              (S_{t-1}^T a_t of all tokens)
    O  = (Q * e) S + (q, k) V + (q, b) R                  (for i <= r)
    S' = e_C S + (K * e_C / e)^T V + (B * e_C / e)^T R

where no quotient is ever formed: it is the product of the decays in between.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import chunks
from pallas_kernels.chunk_states import Chunks, Correction, Write, chunk_states
from pallas_kernels.chunks import channel_scores, scale
from pallas_kernels.scan import only
from pallas_kernels.triangular import Precision


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
    chunk_size: int,
    inverse_precision: Precision,
) -> tuple[Array, Array]:
    """Arrays as in the public op; state is given, and its dtype is the one to compute in."""
    precision, c = chunks.precision_for(q, k, v, a, b), chunks.chunk_length(q.shape[1], chunk_size)
    dot = functools.partial(jnp.matmul, precision=precision)
    full = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # what the inverse and the state touch
    if start is not None:  # a reads the state that start has cleared
        a = only(~start, a)

    def span(state, now, start):
        *dense, g = now
        q, k, v, a, b = (chunks.split(x.astype(state.dtype), c) for x in dense)
        decays = chunks.decays(chunks.factors(g, start, c, state.dtype))
        qk, qb = (channel_scores(q, x, decays, dot) for x in (k, b))
        ak, ab = (channel_scores(a, x, decays, dot, inclusive=False) for x in (k, b))
        correction = Correction(scale(b, decays.leave), -ab, full(ak, v), -scale(a, chunks.before(decays.enter)))
        write = Write(scale(k, decays.leave), v)
        states = chunk_states(Chunks(decays.through, write, correction), state, inverse_precision)
        inside = full(qk, v) + full(qb, states.corrected)
        return states.final, chunks.merge(full(scale(q, decays.enter), states.entering) + inside)

    return chunks.scan_spans(span, state, (q, k, v, a, b, log_decay), start, c)
