"""What the chunked forms of the recurrences share: chunks, decays between two tokens, documents inside a chunk.

A decay between two tokens is the exponential of a sum of the log decays between them. It is never the difference of
two cumulative sums: after many steps of -20 such a difference has lost the digits of a step of -0.01, here they are all
kept. No exponent is positive if no log decay is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.compat import match_varying
from pallas_kernels.triangular import join_blocks


def chunk_length(t: int, chunk_size: int) -> int:
    """chunk_size, or for a shorter sequence the smallest power of two that holds it."""
    return min(chunk_size, 1 << (t - 1).bit_length())


def split(x: Array, c: int) -> Array:
    """[b t h ...] to chunks [n b h c ...], the last one filled up with zeros."""
    b, t = x.shape[:2]
    n = -(-t // c)
    x = jnp.pad(x, ((0, 0), (0, n * c - t)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(b, n, c, *x.shape[2:]), (1, 3), (0, 2))


def merge(x: Array, t: int) -> Array:
    """Chunks [n b h c ...] to [b t h ...]."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]


def matmul_for(dtype: Any) -> Callable[[Array, Array], Array]:
    """The product of accumulated arrays, given the dtype of the inputs.

    Full precision where they are float32 or wider. Inputs of 16 bits carry no more than the fast passes keep.
    """
    precision = lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else lax.Precision.DEFAULT
    return lambda x, y: jnp.matmul(x, y, precision=precision)


class Documents(NamedTuple):
    """Which document each row of a chunk belongs to, as masks that broadcast over heads."""

    same: Array  # [n b 1 c c] bool, rows r and i are of one document
    entered: Array  # [n b 1 c 1] bool, the row is of the document that was open when the chunk began
    leaving: Array  # [n b 1 c 1] bool, the row is of the document still open when the chunk ends
    whole: Array  # [n b 1 1 1] bool, no document begins inside the chunk


def documents(start: Array | None, c: int) -> Documents | None:
    """start [b t] bool, True where a document begins."""
    if start is None:
        return None
    number = jnp.cumsum(split(start[:, :, None], c), axis=-1, dtype=jnp.int32)  # [n b 1 c]
    first, last = number == 0, number == number[..., -1:]
    same = number[..., :, None] == number[..., None, :]
    return Documents(same, first[..., None], last[..., None], first[..., -1:, None])


class Decays(NamedTuple):
    """Decay factors at the borders of a chunk; None is a factor of 1. They are 0 where a document begins in between."""

    enter: Array | None  # e^{G_r}, from the entering state to row r, [n b h c 1|k]
    leave: Array | None  # e^{G_C - G_i}, from row i to the leaving state, [n b h c 1|k]
    through: Array | None  # e^{G_C}, from the entering to the leaving state, [n b h 1|k 1]


def scale(x: Array, factor: Array | None) -> Array:
    """x with every row times its factor."""
    return x if factor is None else x * factor


def _borders(G: Array, tail: Array, docs: Documents | None) -> Decays:
    """From G_r and G_C - G_i, both [n b h c 1|k]."""
    enter, leave, through = jnp.exp(G), jnp.exp(tail), jnp.exp(G[..., -1, :])[..., None]
    if docs is None:
        return Decays(enter, leave, through)
    return Decays(_where(docs.entered, enter), _where(docs.leaving, leave), _where(docs.whole, through))


def _where(mask: Array, x: Array) -> Array:
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def scalar_decays(log_decay: Array | None, docs: Documents | None, c: int, dtype: Any) -> tuple[Array, Decays]:
    """log_decay [n b h c] or None: the decay D [n b h c c] from row i to row r, 0 for i > r, and those at the borders.

    Axes of D that would repeat one value have size 1.
    """
    causal = jnp.tri(c, dtype=jnp.bool)[None, None, None]
    seen = causal if docs is None else causal & docs.same
    if log_decay is None:
        borders = (None, None, None) if docs is None else (docs.entered, docs.leaving, docs.whole)
        return seen.astype(dtype), Decays(*(mask if mask is None else mask.astype(dtype) for mask in borders))
    # between[r, i] = sum of g_j over i < j <= r; 0 above the diagonal, so that exp is safe there before the mask
    after = _where(jnp.tri(c, k=-1, dtype=jnp.bool)[None, None, None], log_decay[..., :, None])
    between = jnp.matmul(jnp.tri(c, dtype=dtype), after, precision=lax.Precision.HIGHEST)
    D = _where(seen, jnp.exp(between))
    G = between[..., :, 0] + log_decay[..., :1]
    return D, _borders(G[..., None], between[..., -1, :, None], docs)


def channel_decays(
    q: Array, k: Array, log_decay: Array, docs: Documents | None, dot: Callable[[Array, Array], Array]
) -> tuple[Array, Decays]:
    """q, k, log_decay [n b h c k]: the scores P[r, i], 0 for i > r, and the decays at the borders.

    P[r, i] = sum over channels of q_r k_i e^{G_r - G_i} by binary halving: blocks of size b = 1, 2, 4, ... are joined
    in pairs. A row r of the odd block sees a row i of the even block through the border between them: the decay from i
    to the border times the decay from the border to r. So one matrix product scores all such pairs, with a decay per
    channel, and every pair belongs to exactly one b.
    """
    *lead, c, d = q.shape
    P = jnp.sum(q * k, -1)[..., None, None]  # [... c 1 1], c blocks of one row
    # sums of log decays inside a block, up to a row and after it
    G, tail = log_decay[..., None, :], jnp.zeros_like(log_decay[..., None, :])
    for b in (1 << level for level in range(c.bit_length() - 1)):
        q1 = q.reshape(*lead, c // (2 * b), 2, b, d)[..., 1, :, :]
        k0 = k.reshape(*lead, c // (2 * b), 2, b, d)[..., 0, :, :]
        (P0, P1), (G0, G1), (tail0, tail1) = ((a[..., 0::2, :, :], a[..., 1::2, :, :]) for a in (P, G, tail))
        P = join_blocks(P0, dot(q1 * jnp.exp(G1), (k0 * jnp.exp(tail0)).mT), P1)
        G = jnp.concatenate([G0, G0[..., -1:, :] + G1], -2)
        tail = jnp.concatenate([tail0 + G1[..., -1:, :], tail1], -2)
    P, G, tail = P[..., 0, :, :], G[..., 0, :, :], tail[..., 0, :, :]
    if docs is not None:
        P = _where(docs.same, P)
    return P, _borders(G, tail, docs)


def scan_chunks(step: Callable[[Array, Any], tuple[Array, Any]], state: Array, chunks: Any) -> tuple[Array, Any]:
    """lax.scan over the leading axis of chunks, without a loop for a single chunk."""
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        state, out = step(state, jax.tree.map(lambda a: a[0], chunks))
        return state, jax.tree.map(lambda a: a[None], out)
    return lax.scan(step, match_varying(state, chunks), chunks)
