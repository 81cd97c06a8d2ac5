"""The short convolution, forward and backward.

The backward keeps the arguments and nothing else: the n = w - 1 shifted copies of x that autodiff keeps are n times its
memory. With the rows r = [cache, x], by place, it repeats the sum and takes

    z_t = bias + sum_j weight_j r_{t+j}        dz_t = dy_t activation'(z_t)
    dr_s = sum_j weight_j dz_{s-j}             dweight_j = sum_t dz_t r_{t+j}

On a CPU it does so block by block from the last to the first, where dz and the products stay in the processor's cache.
A block needs the rows that were carried into it, and its gradient of these goes to the block before.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels import dispatch
from pallas_kernels.compat import match_varying
from pallas_kernels.scan import only
from pallas_kernels.short_conv.rows import find_places, last_of, spread_last, take, windows_of

CPU_BLOCK = 2**15
"""Entries of x in a block of the backward on CPUs. From 2**13 to 2**16 it makes little difference."""


@functools.partial(jax.jit, static_argnames="activation")
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
    places = find_places(valid, start, t, n)
    own = only(valid, x).astype(cache.dtype)
    rows = jnp.concatenate([cache, own], 1)

    def outputs(rows, first):
        z = _sum(windows_of(rows, n, places, first), weight, bias, dtype)
        return _activate(z, activation).astype(x.dtype)

    if valid is not None or t <= n:
        y = only(valid, outputs(rows, 0))
    else:  # in two parts, so that [cache, x] is never made
        y = jnp.concatenate([outputs(jnp.concatenate([cache, own[:, :n]], 1), 0), outputs(own, n)], 1)
    return y, last_of(rows, n, places)


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
        rows = jnp.concatenate([cache, only(valid, x.astype(cache.dtype))], 1)
        return last_of(rows, n, find_places(valid, start, size, n)), cache

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
    places = find_places(valid, start, t, n)
    packed = places.packed
    if packed is not None:  # everything below goes by place
        x, dy = (only(packed.filled, take(a, packed.source[:, n:] - n)) for a in (x, dy))
    rows = jnp.concatenate([cache, x.astype(cache.dtype)], 1).astype(dtype)
    windows = windows_of(rows, n, places._replace(packed=None))
    z, pull = jax.vjp(functools.partial(_activate, activation=activation), _sum(windows, weight, bias, dtype))
    (dz,) = pull(dy.astype(dtype))

    drows = spread_last(dlast, places, n + t)
    for j in range(n + 1):
        d = dz if places.same is None or j == n else only(places.same[j], dz)
        drows = drows + jnp.pad(d * weight[j].astype(dtype)[None, None], ((0, 0), (j, n - j), (0, 0)))
    dweight = jnp.stack([(dz * row).sum((0, 1)) for row in windows])
    dx = drows[:, n:] if packed is None else only(valid, take(drows[:, n:], packed.slot))
    return dx, drows[:, :n], (dweight, None if bias is None else dz.sum((0, 1)))


def _sum(windows: list[Array], weight: Array, bias: Array | None, dtype: DTypeLike) -> Array:
    terms = [row.astype(dtype) * weight[j].astype(dtype)[None, None] for j, row in enumerate(windows)]
    z = sum(terms[1:], terms[0])
    return z if bias is None else z + bias.astype(dtype)[None, None]


def _activate(z: Array, activation: str | None) -> Array:
    return jax.nn.silu(z) if activation == "silu" else z
