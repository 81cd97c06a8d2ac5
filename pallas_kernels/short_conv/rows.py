"""The last rows before each token, under `valid` and `start`.

Without `valid` the j-th row before a token is a shifted slice. With it, the valid tokens of a sequence have places,
counted from the left; the rows of a token are found by its place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Shaped

from pallas_kernels import dispatch
from pallas_kernels.scan import beside, only


def taps(
    x: Shaped[Array, "b t *rest"],
    cache: Shaped[Array, "b n *rest"],
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    fill: float | int = 0,
) -> tuple[list[Shaped[Array, "b t *rest"]], Shaped[Array, "b n *rest"]]:
    """The n rows before each token and its own: n + 1 arrays like x, oldest first, and the new cache.

    x:      [b t ...] of any dtype, cast to that of the cache.
    cache:  [b n ...], the last n rows before this call, oldest first. It holds `fill` where a document has none.
    valid:  False where a token is skipped: it is no row of any other token. Its own rows are arbitrary but finite.
    start:  True where a document begins, even if the token itself is not valid.
    fill:   what the rows of another document read as.

    Raises ValueError if shapes don't fit.
    """
    if x.ndim < 2:
        raise ValueError(f"taps: x has shape {list(x.shape)}, needs [b t ...]")
    dispatch.check_shape("taps", "cache", cache, (x.shape[0], *cache.shape[1:2], *x.shape[2:]))
    dispatch.check_masks("taps", x.shape[:2], valid=valid, start=start)
    n = cache.shape[1]
    places = find_places(valid, start, x.shape[1], n)
    rows = jnp.concatenate([cache, only(valid, x.astype(cache.dtype))], 1)
    return windows_of(rows, n, places, fill=fill), last_of(rows, n, places, fill)


class Packed(NamedTuple):
    """Where the valid tokens stand.

    slot:    [b t], the place of each token: its number among the valid ones, 0 for those before the first.
    source:  [b n+t], where in [cache, x] the rows stand, by place.
    filled:  [b t], whether there is a token at the place.
    newest:  [b n], where in `source` the last rows stand.
    """

    slot: Array
    source: Array
    filled: Array
    newest: Array


class Places(NamedTuple):
    """Where the rows stand, and which of them a token sees.

    packed:       None without `valid`: the place of a token is its own.
    same:         for j < n, [b t] by place: whether row j belongs to the document of the token. None: all do.
    same_at_end:  [b n], whether the last rows belong to the document that is open at the end. None: all do.
    """

    packed: Packed | None
    same: list[Array] | None
    same_at_end: Array | None


def find_places(valid: Array | None, start: Array | None, t: int, n: int) -> Places:
    """valid, start [b t] or None; n rows before each of the t tokens."""
    packed = None
    if valid is not None:
        count = jnp.cumsum(valid, 1, dtype=jnp.int32)
        place, total, slot = jnp.arange(n + t, dtype=jnp.int32), count[:, -1:], jnp.maximum(count - 1, 0)
        # a scatter of the numbers n, n + 1, ...: a sort of 64K flags takes many times as long
        put = jax.vmap(lambda to: place.at[to].set(place[n:], mode="drop"))
        source = put(jnp.where(valid, slot + n, n + t))
        packed = Packed(slot, source, place[None, :t] < total, total + place[None, :n])
    if start is None:
        return Places(packed, None, None)
    document = jnp.cumsum(start, 1, dtype=jnp.int32)
    open_at_end = document[:, -1:]
    if packed is not None:
        document = take(document, packed.source[:, n:] - n)
    # the rows of the cache belong to the document that was open before the call, number 0
    number = jnp.pad(document, ((0, 0), (n, 0)))
    last = number[:, t:] if packed is None else take(number, packed.newest)
    return Places(packed, [number[:, j : j + t] == document for j in range(n)], last == open_at_end)


def windows_of(rows: Array, n: int, places: Places, first: int = 0, fill: float | int = 0) -> list[Array]:
    """The n + 1 rows of each token, oldest first. rows: [cache, x], or its part for the tokens from `first` on."""
    t, packed, same = rows.shape[1] - n, places.packed, places.same
    if packed is None:
        windows = [rows[:, j : j + t] for j in range(n + 1)]
        same = None if same is None else [mask[:, first : first + t] for mask in same]
    else:
        windows = [take(rows, take(packed.source, packed.slot + j)) for j in range(n + 1)]
        same = None if same is None else [take(mask, packed.slot) for mask in same]
    if same is None:
        return windows
    return [*(only(mask, row, fill) for mask, row in zip(same, windows[:n], strict=True)), windows[n]]


def last_of(rows: Array, n: int, places: Places, fill: float | int = 0) -> Array:
    """The last n of the rows [cache, x]."""
    packed = places.packed
    last = rows[:, rows.shape[1] - n :] if packed is None else take(rows, take(packed.source, packed.newest))
    return only(places.same_at_end, last, fill)


def spread_last(dlast: Array, places: Places, size: int) -> Array:
    """The gradient of `size` rows by place, from that of the last n."""
    n, packed = dlast.shape[1], places.packed
    dlast = only(places.same_at_end, dlast)
    if packed is None or n == 0:
        return jnp.pad(dlast, ((0, 0), (size - n, 0), (0, 0)))
    index = jnp.arange(size, dtype=jnp.int32)[None] - packed.newest[:, :1]
    return only((index >= 0) & (index < n), take(dlast, index))


def take(x: Array, index: Array) -> Array:
    """x [b t ...] at the times index [b s] of each row: [b s ...]. Times out of range read the nearest."""
    return jnp.take_along_axis(x, beside(index, x), axis=1, mode="clip")
