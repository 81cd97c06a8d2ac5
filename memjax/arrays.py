"""The legend of axes, and the converters of other people's document layouts to `valid` and `start`.

Arrays are batch-first, and one letter means one thing in every signature and docstring:

    b  batch: independent rows                      k  key (and query) dimension of a head
    t  time: positions of a row                     v  value dimension of a head
    h  heads                                        d  model dimension, the width between layers
    n  number of chunks, of layers, of documents    s  slots of a memory
    c  position in a chunk, or the capacity of a cache

So q and k are [b, t, h, k], v is [b, t, h, v], x and y are [b, t, d], log_decay is [b, t, h] or [b, t, h, k], a matrix
state is [b, h, k, v], and a key-value cache is [b, c, h, k]. In annotations a single letter carries a leading space,
`Float[Array, " t"]`: a linter would otherwise take the string for the name of a type.

A memory knows only one description of which tokens belong together, two bool arrays [b, t]:

    valid  False: padding; it changes neither the state nor any valid output
    start  True: a document begins here, and nothing before it may be seen

The converters below make that pair from the three layouts in use. Each sets `start` at the first valid token of each
document, and never at padding. They describe whole rows: convert first and cut the pair with the tokens, because a
piece of a row that is converted by itself would begin a document at the cut. All three also run under `jax.jit`,
where shapes are still checked but values can't be.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Int


def from_segment_ids(
    segment_ids: Int[Array | np.ndarray, "b t"], padding: int = 0
) -> tuple[Bool[Array, "b t"], Bool[Array, "b t"]]:
    """`valid` and `start` of packed rows in which each token carries the number of its document.

    A document is a run of equal ids; padding inside the run doesn't end it. An id that comes back after another one
    is a new document: [1, 1, 2, 1] holds three.

    Args:
      segment_ids: signed integers [b, t].
      padding: the id of padding. Negative ids are padding too, so `padding=-1` leaves 0 for the first document.

    Returns:
      valid, start: bool [b, t].

    Raises:
      ValueError: segment_ids is not [b, t], or not of a signed integer dtype.

    Example:
      >>> valid, start = from_segment_ids(np.array([[7, 7, 0, 7, 8, 0]]))
      >>> valid.astype(int).tolist(), start.astype(int).tolist()
      ([[1, 1, 0, 1, 1, 0]], [[1, 0, 0, 0, 1, 0]])
    """
    ids = _integers("segment_ids", segment_ids, "b t")
    valid = (ids != padding) & (ids >= 0)
    # Padding is transparent: a valid token is compared with the last valid one before it, wherever that stands.
    where = jnp.where(valid, jnp.arange(ids.shape[1], dtype=jnp.int32)[None], -1)
    latest = jax.lax.cummax(where, axis=1)
    before = jnp.pad(latest, ((0, 0), (1, 0)), constant_values=-1)[:, : ids.shape[1]]
    previous = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=1)
    return valid, valid & ((before < 0) | (previous != ids))


def from_cu_seqlens(
    cu_seqlens: Int[Array | np.ndarray, " n_plus_1"], t: int
) -> tuple[Bool[Array, "1 t"], Bool[Array, "1 t"]]:
    """`valid` and `start` of one packed row, from the cumulative lengths that variable-length attention kernels take.

    Document i is the slice cu_seqlens[i] : cu_seqlens[i + 1] of the row; what follows the last one is padding. Empty
    documents are allowed and leave no trace.

    Args:
      cu_seqlens: signed integers [n + 1], from 0 and never falling; the last is the number of valid tokens.
      t: length of the row, at least cu_seqlens[-1].

    Returns:
      valid, start: bool [1, t].

    Raises:
      ValueError: cu_seqlens is not a non-empty vector of signed integers, or (outside jit) does not begin at 0,
        falls, or ends after t.

    Example:
      >>> valid, start = from_cu_seqlens(np.array([0, 2, 5]), t=6)
      >>> valid.astype(int).tolist(), start.astype(int).tolist()
      ([[1, 1, 1, 1, 1, 0]], [[1, 0, 1, 0, 0, 0]])
    """
    ends = _integers("cu_seqlens", cu_seqlens, "n+1")
    if ends.shape[0] == 0:
        raise ValueError("cu_seqlens: got no entries, need at least [0]")
    if (known := _values(ends)) is not None:
        if known[0] != 0:
            raise ValueError(f"cu_seqlens[0]: got {known[0]}, need 0")
        if (falls := np.flatnonzero(known[1:] < known[:-1])).size:
            i = falls[0]
            raise ValueError(
                f"cu_seqlens: got {known[i]} before {known[i + 1]} at entry {i}, need values that never fall"
            )
        if known[-1] > t:
            raise ValueError(f"cu_seqlens[-1]: got {known[-1]}, need at most t = {t}")
    valid = jnp.arange(t, dtype=ends.dtype) < ends[-1]
    start = jnp.zeros(t, bool).at[ends[:-1]].set(True, mode="drop") & valid
    return valid[None], start[None]


def from_lengths(
    lengths: Int[Array | np.ndarray, " b"], t: int, side: str = "right"
) -> tuple[Bool[Array, "b t"], Bool[Array, "b t"]]:
    """`valid` and `start` of padded rows that hold one document each.

    Args:
      lengths: signed integers [b], between 0 and t.
      t: length of the rows.
      side: where the padding stands, "right" (usual in training) or "left" (usual in batched generation).

    Returns:
      valid, start: bool [b, t]. A row of length 0 has neither.

    Raises:
      ValueError: lengths is not [b] of a signed integer dtype, side is neither of the two, or (outside jit) a length
        is negative or greater than t.

    Example:
      >>> valid, start = from_lengths(np.array([2, 3]), t=4, side="left")
      >>> valid.astype(int).tolist(), start.astype(int).tolist()
      ([[0, 0, 1, 1], [0, 1, 1, 1]], [[0, 0, 1, 0], [0, 1, 0, 0]])
    """
    lengths = _integers("lengths", lengths, "b")
    if side not in ("right", "left"):
        raise ValueError(f"side: got {side!r}, need 'right' or 'left' (the side the padding stands on)")
    if (known := _values(lengths)) is not None and (wrong := np.flatnonzero((known < 0) | (known > t))).size:
        raise ValueError(f"lengths[{wrong[0]}]: got {known[wrong[0]]}, need between 0 and t = {t}")
    position = jnp.arange(t, dtype=lengths.dtype)[None]
    first = jnp.zeros_like(lengths) if side == "right" else t - lengths
    valid = (position >= first[:, None]) & (position < (first + lengths)[:, None])
    return valid, valid & (position == first[:, None])


def _integers(name: str, x: Array | np.ndarray, axes: str) -> Array:
    """x as a jax array, if it has the axes named (separated by spaces) and a signed integer dtype."""
    x = jnp.asarray(x)
    if x.ndim != len(axes.split()):
        raise ValueError(f"{name}: got shape {list(x.shape)}, need [{', '.join(axes.split())}]")
    if not jnp.issubdtype(x.dtype, jnp.signedinteger):
        raise ValueError(f"{name}: got dtype {x.dtype}, need a signed integer")
    return x


def _values(x: Array) -> np.ndarray | None:
    """The entries of x, or None while it is traced."""
    return None if isinstance(x, Tracer) else np.asarray(x)
