"""The last rows before each token, under `valid` and `start`, and the convolution over them, forward and backward.

Without `valid` the j-th row before a token is a shifted slice. With it, the valid tokens of a sequence have places,
counted from the left; the rows of a token are found by its place.

The backward keeps the arguments and nothing else: the n = w - 1 shifted copies of x that autodiff keeps are n times its
memory. With the rows r = [cache, x], by place, it repeats the sum and takes

    z_t = bias + sum_j weight_j r_{t+j}        dz_t = dy_t activation'(z_t)
    dr_s = sum_j weight_j dz_{s-j}             dweight_j = sum_t dz_t r_{t+j}

On a CPU it does so block by block from the last to the first, where dz and the products stay in the processor's cache.
A block needs the rows that were carried into it, and its gradient of these goes to the block before.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Shaped

from pallas_kernels import dispatch
from pallas_kernels.compat import match_varying
from pallas_kernels.scan import beside

CPU_BLOCK = 2**15
"""Entries of x in a block of the backward on CPUs. From 2**13 to 2**16 it makes little difference."""


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
    n = cache.shape[1]
    places = _places(valid, start, x.shape[1], n)
    rows = jnp.concatenate([cache, _only(valid, x.astype(cache.dtype))], 1)
    return _windows(rows, n, places, fill=fill), _last(rows, n, places, fill)


def short_conv(
    x: Array,
    weight: Array,
    cache: Array,
    valid: Array | None,
    start: Array | None,
    bias: Array | None,
    activation: str | None,
) -> tuple[Array, Array]:
    """Arrays as in the public op. It has a derivative in reverse mode only."""
    return _short_conv(activation, *match_varying((x, weight, cache, valid, start, bias)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _short_conv(activation, x, weight, cache, valid, start, bias):
    (_, t, _), n, dtype = x.shape, cache.shape[1], dispatch.accumulator(x, weight, cache, bias)
    places = _places(valid, start, t, n)
    own = _only(valid, x).astype(cache.dtype)
    rows = jnp.concatenate([cache, own], 1)

    def outputs(rows, first):
        z = _sum(_windows(rows, n, places, first), weight, bias, dtype)
        return _activate(z, activation).astype(x.dtype)

    if valid is not None or t <= n:
        y = _only(valid, outputs(rows, 0))
    else:  # in two parts, so that [cache, x] is never made
        y = jnp.concatenate([outputs(jnp.concatenate([cache, own[:, :n]], 1), 0), outputs(own, n)], 1)
    return y, _last(rows, n, places)


def _forward(activation, *args):
    return _short_conv(activation, *args), args


def _backward(activation, args, cotangents):
    x, _, cache, *_ = args
    b, t, c = x.shape
    block = min(t, max(CPU_BLOCK // (b * c), 16, cache.shape[1]))
    whole, blocks = (functools.partial(_gradients, activation, size) for size in (t, block))
    if block == t:
        return whole(args, cotangents)
    return lax.platform_dependent(args, cotangents, cpu=blocks, default=whole)


_short_conv.defvjp(_forward, _backward)


def _gradients(activation, size, args, cotangents):
    """The gradients of the arguments, `size` tokens at a time; None for the masks."""
    x, weight, cache, valid, start, bias = args
    dy, dlast = cotangents
    t, n, dtype = x.shape[1], cache.shape[1], dispatch.accumulator(x, weight, cache, bias)

    def block(first, size):
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, size, 1), (x, valid, start, dy))

    def carry(cache, first):
        x, valid, start, _ = block(first, size)
        rows = jnp.concatenate([cache, _only(valid, x.astype(cache.dtype))], 1)
        return _last(rows, n, _places(valid, start, size, n)), cache

    def back(grads, now, size=size):
        (dx, dcache, shared), (first, cache) = grads, now
        x, valid, start, dy = block(first, size)
        part, dcache, more = _block_gradients(activation, (x, weight, cache, valid, start, bias), (dy, dcache), dtype)
        dx = lax.dynamic_update_slice_in_dim(dx, part, first, 1)
        return (dx, dcache, jax.tree.map(jnp.add, shared, more)), None

    shared = jax.tree.map(lambda a: jnp.zeros(a.shape, dtype), (weight, bias))
    # dx in `dtype`: on CPUs a write into a bfloat16 array rewrites the whole of it
    grads = match_varying((jnp.zeros(x.shape, dtype), dlast.astype(dtype), shared), args, cotangents)
    firsts = jnp.arange(t // size, dtype=jnp.int32) * size
    last, caches = lax.scan(carry, cache, firsts)
    if rest := t % size:
        grads, _ = back(grads, (t - rest, last), rest)
    (dx, dcache, (dweight, dbias)), _ = lax.scan(back, grads, (firsts, caches), reverse=True)
    dbias = None if bias is None else dbias.astype(bias.dtype)
    return dx.astype(x.dtype), dweight.astype(weight.dtype), dcache.astype(cache.dtype), None, None, dbias


def _block_gradients(activation, args, cotangents, dtype):
    """dx, dcache and (dweight, dbias), all in `dtype`."""
    x, weight, cache, valid, start, bias = args
    dy, dlast = cotangents
    t, n = x.shape[1], cache.shape[1]
    places = _places(valid, start, t, n)
    packed = places.packed
    if packed is not None:  # everything below goes by place
        x, dy = (_only(packed.filled, _take(a, packed.source[:, n:] - n)) for a in (x, dy))
    rows = jnp.concatenate([cache, x.astype(cache.dtype)], 1).astype(dtype)
    windows = _windows(rows, n, places._replace(packed=None))
    z, pull = jax.vjp(functools.partial(_activate, activation=activation), _sum(windows, weight, bias, dtype))
    (dz,) = pull(dy.astype(dtype))

    drows = _spread(dlast, places, n + t)
    for j in range(n + 1):
        d = dz if places.same is None or j == n else _only(places.same[j], dz)
        drows = drows + jnp.pad(d * weight[j].astype(dtype)[None, None], ((0, 0), (j, n - j), (0, 0)))
    dweight = jnp.stack([(dz * row).sum((0, 1)) for row in windows])
    dx = drows[:, n:] if packed is None else _only(valid, _take(drows[:, n:], packed.slot))
    return dx, drows[:, :n], (dweight, None if bias is None else dz.sum((0, 1)))


class _Packed(NamedTuple):
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


class _Places(NamedTuple):
    """Where the rows stand, and which of them a token sees.

    packed:       None without `valid`: the place of a token is its own.
    same:         for j < n, [b t] by place: whether row j belongs to the document of the token. None: all do.
    same_at_end:  [b n], whether the last rows belong to the document that is open at the end. None: all do.
    """

    packed: _Packed | None
    same: list[Array] | None
    same_at_end: Array | None


def _places(valid: Array | None, start: Array | None, t: int, n: int) -> _Places:
    packed = None
    if valid is not None:
        count = jnp.cumsum(valid, 1, dtype=jnp.int32)
        place, total, slot = jnp.arange(n + t, dtype=jnp.int32), count[:, -1:], jnp.maximum(count - 1, 0)
        # a scatter of the numbers n, n + 1, ...: a sort of 64K flags takes many times as long
        put = jax.vmap(lambda to: place.at[to].set(place[n:], mode="drop"))
        source = put(jnp.where(valid, slot + n, n + t))
        packed = _Packed(slot, source, place[None, :t] < total, total + place[None, :n])
    if start is None:
        return _Places(packed, None, None)
    document = jnp.cumsum(start, 1, dtype=jnp.int32)
    open_at_end = document[:, -1:]
    if packed is not None:
        document = _take(document, packed.source[:, n:] - n)
    # the rows of the cache belong to the document that was open before the call, number 0
    number = jnp.pad(document, ((0, 0), (n, 0)))
    last = number[:, t:] if packed is None else _take(number, packed.newest)
    return _Places(packed, [number[:, j : j + t] == document for j in range(n)], last == open_at_end)


def _windows(rows: Array, n: int, places: _Places, first: int = 0, fill: float | int = 0) -> list[Array]:
    """The n + 1 rows of each token, oldest first. rows: [cache, x], or its part for the tokens from `first` on."""
    t, packed, same = rows.shape[1] - n, places.packed, places.same
    if packed is None:
        windows = [rows[:, j : j + t] for j in range(n + 1)]
        same = None if same is None else [mask[:, first : first + t] for mask in same]
    else:
        windows = [_take(rows, _take(packed.source, packed.slot + j)) for j in range(n + 1)]
        same = None if same is None else [_take(mask, packed.slot) for mask in same]
    if same is None:
        return windows
    return [*(_only(mask, row, fill) for mask, row in zip(same, windows[:n], strict=True)), windows[n]]


def _last(rows: Array, n: int, places: _Places, fill: float | int = 0) -> Array:
    """The last n of the rows [cache, x]."""
    packed = places.packed
    last = rows[:, rows.shape[1] - n :] if packed is None else _take(rows, _take(packed.source, packed.newest))
    return _only(places.same_at_end, last, fill)


def _spread(dlast: Array, places: _Places, size: int) -> Array:
    """The gradient of `size` rows by place, from that of the last n."""
    n, packed = dlast.shape[1], places.packed
    dlast = _only(places.same_at_end, dlast)
    if packed is None or n == 0:
        return jnp.pad(dlast, ((0, 0), (size - n, 0), (0, 0)))
    index = jnp.arange(size, dtype=jnp.int32)[None] - packed.newest[:, :1]
    return _only((index >= 0) & (index < n), _take(dlast, index))


def _sum(windows: list[Array], weight: Array, bias: Array | None, dtype: DTypeLike) -> Array:
    terms = [row.astype(dtype) * weight[j].astype(dtype)[None, None] for j, row in enumerate(windows)]
    z = sum(terms[1:], terms[0])
    return z if bias is None else z + bias.astype(dtype)[None, None]


def _activate(z: Array, activation: str | None) -> Array:
    return jax.nn.silu(z) if activation == "silu" else z


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, beside(index, x), axis=1, mode="clip")


def _only(mask: Array | None, x: Array, fill: float | int = 0) -> Array:
    return x if mask is None else jnp.where(beside(mask, x), x, jnp.full((), fill, x.dtype))
