"""The state of a linear recurrence from chunk to chunk: the one part of it that is sequential.

With S the state that enters a chunk and S' the one that leaves it,

    R  = (I + A)^-1 (U - W S)          corrected values (delta rules; A is strictly lower triangular)
    S' = D S + Kr^T R + Kv^T V         what is kept, what is written corrected, what is written as it is

All that is given has the decays and the documents of the chunk in it: D is 0 where a document begins inside, rows of a
document that has ended weigh nothing in Kr and Kv, rows of one that began inside nothing in W. So a chunk is an affine
map S' = M S + E, and so is any number of chunks: `summary` gives the pair (M, E), `compose` joins two pairs. That, and
the reverse scan of `chunk_states`, is what a sequence cut over devices has to exchange.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels.compat import match_varying
from pallas_kernels.triangular import Precision, unit_lower_inverse


class Write(NamedTuple):
    """Values written as they are, with the keys k."""

    k: Float[Array, "n b h c k"]
    v: Float[Array, "n b h c v"]


class Correction(NamedTuple):
    """Values (I + A)^-1 (u - w S), written with the keys k. A is read below its diagonal only."""

    k: Float[Array, "n b h c k"]
    A: Float[Array, "n b h c c"]
    u: Float[Array, "n b h c v"]
    w: Float[Array, "n b h c k"]


class Chunks(NamedTuple):
    """n chunks of c tokens. through is D, one factor or one for each key channel, None for 1."""

    through: Float[Array, "n b #h #k 1"] | None
    write: Write | None
    correction: Correction | None


class States(NamedTuple):
    """The state entering each chunk, the corrected values R of its tokens, and the state that leaves the last chunk."""

    entering: Float[Array, "n b h k v"]
    corrected: Any  # Float[Array, "n b h c v"]; None without a correction
    final: Float[Array, "b h k v"]


class Affine(NamedTuple):
    """The map S' = M S + E of a stretch of tokens. M is a matrix, or the factors of a diagonal one as a column."""

    M: Float[Array, "b h k k"] | Float[Array, "b h #k 1"]
    E: Float[Array, "b h k v"]


def chunk_states(
    chunks: Chunks,
    state: Float[Array, "b h k v"],
    inverse_precision: Precision = "float32",
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> States:
    """The states of n chunks, one after another, from the one that enters the first.

    Backward, with L the gradient of the state that leaves a chunk and dS, dR those of its entering state and of R:

        dY = (I + A)^-T (dR + Kr L)         L of the chunk before = dS + D L - W^T dY
        dU = dY    dW = -dY S^T    dA = -dY R^T below the diagonal    dKr = R L^T    dKv = V L^T    dV = Kv L

    so that only L is sequential, and neither (I + A)^-1 W nor (I + A)^-1 U is ever formed. Kept for it are the inverse,
    the states and R. Reverse mode only.

    Args:
      inverse_precision: of the products that make (I + A)^-1, see `unit_lower_inverse`.
      precision: of all other products.
    """
    chunks, state = match_varying((chunks, state))
    return _chunk_states(chunks, state, inverse_precision, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _chunk_states(chunks: Chunks, state: Array, inverse_precision: Precision, precision: lax.Precision) -> States:
    return _forward(chunks, state, inverse_precision, precision)[0]


def _forward(
    chunks: Chunks, state: Array, inverse_precision: Precision, precision: lax.Precision
) -> tuple[States, tuple[Chunks, Array | None, States]]:
    dot = functools.partial(jnp.matmul, precision=precision)
    through, write, correction = chunks
    T = None if correction is None else unit_lower_inverse(correction.A, inverse_precision)
    written = None if write is None else dot(write.k.mT, write.v)

    def chunk(S, now):
        through, written, T, correction = now
        R, after = None, S if through is None else through * S
        if correction is not None:
            R = dot(T, correction.u - dot(correction.w, S))
            after = after + dot(correction.k.mT, R)
        return after if written is None else after + written, (S, R)

    final, (S, R) = _scan(chunk, state, (through, written, T, correction))
    states = States(S, R, final)
    return states, (chunks, T, states)


def _backward(_: Precision, precision: lax.Precision, kept: Any, cotangents: Any) -> tuple[Chunks, Array]:
    dot = functools.partial(jnp.matmul, precision=precision)
    (through, write, correction), T, (S, R, _) = kept
    dS, dR, dfinal = cotangents

    def chunk(L, now):
        through, T, correction, dS, dR = now
        dY, before = None, dS + (L if through is None else through * L)
        if correction is not None:
            dY = dot(T.mT, dR + dot(correction.k, L))
            before = before - dot(correction.w.mT, dY)
        return before, (L, dY)

    dstate, (L, dY) = _scan(chunk, dfinal, (through, T, correction, dS, dR), reverse=True)
    if through is not None:
        summed = tuple(axis for axis, size in enumerate(through.shape) if size == 1)
        through = jnp.sum(S * L, summed, keepdims=True)
    if write is not None:
        write = Write(dot(write.v, L.mT), dot(write.k, L))
    if correction is not None:
        correction = Correction(dot(R, L.mT), -jnp.tril(dot(dY, R.mT), -1), dY, -dot(dY, S.mT))
    return Chunks(through, write, correction), dstate


_chunk_states.defvjp(_forward, _backward)


def summary(
    chunks: Chunks, inverse_precision: Precision = "float32", precision: lax.Precision = lax.Precision.HIGHEST
) -> Affine:
    """The map of n chunks together: M a matrix with a correction, else the product of `through`.

    With a correction, one run of `chunk_states` on the values [V | 0] from the state [0 | I] gives [E | M].
    """
    through, write, correction = chunks
    if correction is None:
        if write is None:
            raise ValueError("summary: chunks have neither a write nor a correction, need at least one of them")
        shape = (*write.v.shape[1:3], write.k.shape[-1], write.v.shape[-1])
        M = jnp.ones((*shape[:2], 1, 1), write.v.dtype) if through is None else jnp.prod(through, 0)
        empty = jnp.zeros(shape, write.v.dtype)
        return Affine(M, chunk_states(chunks, empty, inverse_precision, precision).final)

    (_, b, h, _, d), e, dtype = correction.k.shape, correction.u.shape[-1], correction.u.dtype

    def beside_zeros(x: Array) -> Array:
        return jnp.concatenate([x, jnp.zeros((*x.shape[:-1], d), x.dtype)], -1)

    write = None if write is None else write._replace(v=beside_zeros(write.v))
    wide = Chunks(through, write, correction._replace(u=beside_zeros(correction.u)))
    unit = jnp.broadcast_to(jnp.eye(d, e + d, e, dtype=dtype), (b, h, d, e + d))
    both = chunk_states(wide, unit, inverse_precision, precision).final
    return Affine(both[..., e:], both[..., :e])


def compose(first: Affine, second: Affine) -> Affine:
    """The map of `first` and then `second`: M = M2 M1, E = M2 E1 + E2. Associative; products in full precision."""
    (M1, E1), (M2, E2) = first, second
    if M2.shape[-1] == 1:
        return Affine(M2 * M1, M2 * E1 + E2)
    dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return Affine(M2 * M1.mT if M1.shape[-1] == 1 else dot(M2, M1), dot(M2, E1) + E2)


def _scan(step: Callable[..., Any], state: Array, chunks: Any, reverse: bool = False) -> tuple[Any, Any]:
    """lax.scan over the leading axis of chunks, without a loop for a single chunk."""
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        state, out = step(state, jax.tree.map(lambda a: a[0], chunks))
        return state, jax.tree.map(lambda a: a[None], out)
    return lax.scan(step, match_varying(state, chunks), chunks, reverse=reverse)
