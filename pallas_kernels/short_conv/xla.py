"""The last rows before each token, under `valid` and `start`, and the convolution over them.

Without `valid` the j-th row before a token is a shifted slice. With it, the valid rows of a sequence are first packed
to the left, where slices are right again; what was made of them is gathered back to the tokens' places.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Shaped

from pallas_kernels import dispatch
from pallas_kernels.scan import beside


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
    for name, mask in (("valid", valid), ("start", start)):
        dispatch.check_shape("taps", name, mask, x.shape[:2])
        dispatch.check_bool("taps", name, mask)
    rows, cache, restore = _rows(x, cache, valid, start, fill)
    return [restore(row) for row in rows], cache


def short_conv(x: Array, weight: Array, cache: Array, valid: Array | None, start: Array | None) -> tuple[Array, Array]:
    """Arrays as in the public op, the sum without bias and activation; its dtype is that of weight."""
    rows, cache, restore = _rows(x, cache, valid, start, 0)
    terms = [row.astype(weight.dtype) * weight[j][None, None] for j, row in enumerate(rows)]
    return restore(sum(terms[1:], terms[0])), cache


def _rows(
    x: Array, cache: Array, valid: Array | None, start: Array | None, fill: float | int
) -> tuple[list[Array], Array, Callable[[Array], Array]]:
    """The rows of each token, the new cache, and the function that brings [b t ...] back to the order of the tokens."""
    t, n = x.shape[1], cache.shape[1]
    x = x.astype(cache.dtype)
    document = None if start is None else jnp.cumsum(start, 1, dtype=jnp.int32)
    open_at_end = None if document is None else document[:, -1:]
    slot = newest = None  # where a token stands among the valid ones, and the last n of them: None, where it stands
    if valid is not None:
        count = jnp.cumsum(valid, 1, dtype=jnp.int32)
        order = jnp.argsort(~valid, axis=1, stable=True)
        slot, newest = jnp.maximum(count - 1, 0), count[:, -1:] + jnp.arange(n, dtype=jnp.int32)[None]
        x = _take(jnp.where(beside(valid, x), x, jnp.zeros_like(x)), order)
        document = None if document is None else _take(document, order)

    rows = jnp.concatenate([cache, x], 1)
    windows = [rows[:, j : j + t] for j in range(n)]
    last = rows[:, t:] if newest is None else _take(rows, newest)
    if document is not None:
        # the rows of the cache belong to the document that was open before the call, number 0
        number = jnp.pad(document, ((0, 0), (n, 0)))
        windows = [_keep(number[:, j : j + t] == document, row, fill) for j, row in enumerate(windows)]
        last = _keep((number[:, t:] if newest is None else _take(number, newest)) == open_at_end, last, fill)
    return [*windows, x], last, lambda y: y if slot is None else _take(y, slot)


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, beside(index, x), axis=1)


def _keep(mask: Array, x: Array, fill: float | int) -> Array:
    return jnp.where(beside(mask, x), x, jnp.full((), fill, x.dtype))
