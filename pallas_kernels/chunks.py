"""What the chunked forms of the recurrences share: chunks, spans of chunks, decays between two tokens of a chunk.

A decay between two tokens is the product of the factors e^{log_decay} between them. It is never the exponential of a
difference of two cumulative sums: after many steps of -20 such a difference has lost the digits of a step of -0.01, a
product keeps them all. No factor is above 1 if no log decay is positive, and none is divided by.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.compat import match_varying
from pallas_kernels.scan import only
from pallas_kernels.triangular import halves, join_blocks

SPAN = 8
"""Chunks that are computed side by side, before the next SPAN of them. Only inputs, outputs and the states between
spans are kept for the backward pass, which computes each span again: more chunks cost more memory."""


def chunk_length(t: int, chunk_size: int) -> int:
    """chunk_size, or for a shorter sequence the smallest power of two that holds it."""
    return min(chunk_size, 1 << (t - 1).bit_length())


SpanFunction = Callable[[Array, Any, Array | None], tuple[Array, Array]]


def scan_spans(span: SpanFunction, state: Array, inputs: Any, start: Array | None, c: int) -> tuple[Array, Array]:
    """Runs `span(state, inputs, start) -> (state, o)` over time, SPAN chunks of c tokens at a time: (o, final state).

    inputs: a tree of floats [b t ...]. span sees a t that is a multiple of c, filled up with zeros, and holds no array.

    Backward, span by span from the last: each is computed again from the state that entered it.
    """
    t = jax.tree.leaves(inputs)[0].shape[1]
    chunks = -(-t // c)
    length = -(-chunks // -(-chunks // SPAN)) * c
    state, inputs, start = match_varying((state, inputs, start))
    if fill := -t % length:

        def pad(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, fill)) + ((0, 0),) * (x.ndim - 2))

        inputs, start = jax.tree.map(pad, (inputs, start))
    if t <= length:
        state, o = span(state, inputs, start)
    else:
        found: Any = _scan_spans(span, length, state, inputs, start)
        o, state = found
    return o[:, :t], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan_spans(span: SpanFunction, length: int, state: Array, inputs: Any, start: Array | None) -> Any:
    return _forward(span, length, state, inputs, start)[0]


def _forward(span: SpanFunction, length: int, state: Array, inputs: Any, start: Array | None) -> tuple[Any, Any]:
    spans = jax.tree.leaves(inputs)[0].shape[1] // length

    def turn(i, held):
        state, o, entered = held
        after, now = span(state, *_cut((inputs, start), i, length))
        return after, _paste(o, now, i * length), lax.dynamic_update_index_in_dim(entered, state, i, 0)

    o = jax.eval_shape(span, state, *_cut((inputs, start), 0, length))[1]
    o = jnp.zeros((o.shape[0], spans * length, *o.shape[2:]), o.dtype)
    entered = jnp.zeros((spans, *state.shape), state.dtype)
    state, o, entered = lax.fori_loop(0, spans, turn, match_varying((state, o, entered), inputs))
    return (o, state), (entered, inputs, start)


def _backward(span: SpanFunction, length: int, kept: Any, cotangents: Any) -> tuple[Any, Any, None]:
    entered, inputs, start = kept
    do, dstate = cotangents

    def turn(turns, held):
        i = entered.shape[0] - 1 - turns
        dstate, dinputs = held
        now, begins = _cut((inputs, start), i, length)
        state = lax.dynamic_index_in_dim(entered, i, 0, keepdims=False)
        _, vjp = jax.vjp(lambda state, now: span(state, now, begins), state, now)
        dstate, dnow = vjp((dstate, *_cut((do,), i, length)))
        return dstate, jax.tree.map(lambda x, dx: _paste(x, dx.astype(x.dtype), i * length), dinputs, dnow)

    # in the dtype of the state: on CPUs a write into a bfloat16 array rewrites the whole of it
    dinputs = jax.tree.map(lambda x: jnp.zeros(x.shape, entered.dtype), inputs)
    held = match_varying((dstate, dinputs), do, kept)
    dstate, dinputs = lax.fori_loop(0, entered.shape[0], turn, held)
    return dstate, jax.tree.map(lambda x, dx: dx.astype(x.dtype), inputs, dinputs), None


_scan_spans.defvjp(_forward, _backward)


def _cut(tree: Any, i: Array | int, length: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * length, length, 1), tree)


def _paste(x: Array, part: Array, at: Array | int) -> Array:
    return lax.dynamic_update_slice_in_dim(x, part, at, 1)


def split(x: Array, c: int) -> Array:
    """[b t h ...] to chunks [n b h c ...]; t is a multiple of c."""
    x = x.reshape(x.shape[0], -1, c, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def merge(x: Array) -> Array:
    """Chunks [n b h c ...] to [b t h ...]."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def precision_for(*arrays: Array) -> lax.Precision:
    """Of products of arrays: full, unless all are bfloat16, which is what the fast passes of accelerators keep."""
    narrow = all(a.dtype == jnp.bfloat16 for a in arrays)
    return lax.Precision.DEFAULT if narrow else lax.Precision.HIGHEST


def factors(log_decay: Array | None, start: Array | None, c: int, dtype: Any) -> Array | None:
    """e^{log_decay} in chunks [n b h c 1|k], 0 where a document begins; None where it is always 1.

    A factor of 0 is all that a document's border needs: every decay across it is a product with that factor in it.
    """
    if log_decay is None:
        return None if start is None else split(1 - start[:, :, None, None].astype(dtype), c)
    a = jnp.exp(log_decay.astype(dtype))
    a = a[..., None] if a.ndim == 3 else a
    return split(a if start is None else only(~start, a), c)


class Decays(NamedTuple):
    """The decay from one place of a chunk to another, as products of factors; None is a decay of 1.

    levels: for b = 1, 2, 4, ..., c / 2 and every pair of neighbouring blocks of size b: from the border between them
      to the rows of the second block, and from the rows of the first to the border, [nbh c/2b b 1|k].
    enter: from the entering state to row r; leave: from row i to the leaving state, both [n b h c 1|k].
    through: from the entering to the leaving state, [n b h 1|k 1].
    """

    levels: Sequence[tuple[Array, Array]]
    enter: Array | None
    leave: Array | None
    through: Array | None


def decays(a: Array | None) -> Decays:
    """a [n b h c 1|k], the factor of each row."""
    if a is None:
        return Decays((), None, None, None)
    levels = []
    enter, leave, total = _flat(a), jnp.ones_like(_flat(a)), _flat(a)  # the products inside blocks of one row
    while total.shape[1] > 1:
        total0, total1 = halves(total, 1)
        enter0, enter1 = _pairs(enter, total0.shape[1])
        leave0, leave1 = _pairs(leave, total0.shape[1])
        levels.append((enter1, leave0))
        enter = jnp.stack([enter0, enter1 * total0[:, :, None]], 2).reshape(enter.shape)
        leave = jnp.stack([leave0 * total1[:, :, None], leave1], 2).reshape(leave.shape)
        total = total0 * total1
    return Decays(levels, enter.reshape(a.shape), leave.reshape(a.shape), total.reshape(*a.shape[:3], -1, 1))


def _flat(x: Array) -> Array:
    """[n b h ...] to [nbh ...]: with jax 0.10.2 the CPU backend crashes in large sums over arrays of 7 axes."""
    return x.reshape(-1, *x.shape[3:])


def _pairs(x: Array, pairs: int) -> tuple[Array, Array]:
    """Rows [nbh c x] as pairs of blocks, the first and the second of each, [nbh pairs b x]."""
    x = x.reshape(x.shape[0], pairs, 2, -1, x.shape[-1])
    return x[:, :, 0], x[:, :, 1]


def scale(x: Array, factor: Array | None) -> Array:
    """x with every row times its factor."""
    return x if factor is None else x * factor


def before(enter: Array | None) -> Array | None:
    """Decays up to the row before each row, given those up to each row: 1 and then all but the last."""
    return None if enter is None else jnp.concatenate([jnp.ones_like(enter[..., :1, :]), enter[..., :-1, :]], -2)


def decay_matrix(decays: Decays, c: int, dtype: Any) -> Array:
    """The decay D[r, i] from row i to row r, 0 for i > r, of factors for a whole row: [n b h c c].

    Axes that would repeat one value have size 1.
    """
    if decays.enter is None:
        return jnp.tri(c, dtype=dtype)[None, None, None]
    D = jnp.ones_like(_flat(decays.enter))[..., None]  # c blocks of one row
    for to_rows, from_rows in decays.levels:
        D0, D1 = halves(D, 1)
        D = join_blocks(D0, to_rows * from_rows.mT, D1)
    return D.reshape(*decays.enter.shape[:-1], c)


def channel_scores(
    rows: Array, columns: Array, decays: Decays, dot: Callable[[Array, Array], Array], inclusive: bool = True
) -> Array:
    """sum over channels of row_r column_i times the decay from i to r, for i < r; 0 above the diagonal.

    rows, columns [n b h c k], with a factor for every channel. inclusive: the row is read after its own decay, and the
    diagonal is row_r . column_r. Otherwise the row is read before its own decay, and the diagonal is 0.

    By binary halving: blocks of size 1, 2, 4, ... are joined in pairs. A row of the second block sees a row of the
    first through the border between them, so one product of matrices scores all pairs that meet at this border, and
    every pair meets at exactly one.
    """
    *lead, c, _ = rows.shape
    rows, columns = _flat(rows), _flat(columns)
    P = jnp.sum(rows * columns, -1) if inclusive else jnp.zeros_like(rows[..., 0])
    P = P[..., None, None]  # c blocks of one row
    for to_rows, from_rows in decays.levels:
        (_, row1), (column0, _) = (_pairs(x, to_rows.shape[1]) for x in (rows, columns))
        P0, P1 = halves(P, 1)
        P = join_blocks(P0, dot(scale(row1, to_rows if inclusive else before(to_rows)), (column0 * from_rows).mT), P1)
    return P.reshape(*lead, c, c)
