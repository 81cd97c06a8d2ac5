"""What several memories share: projections, norms, gates, token masks, positions, rotary, the ring cache, attention.

Everything here obeys `valid` and `start` as the contract says (`memjax.memory.Memory`), so that an architecture's file
is its mathematics. Convolutions and token recurrences come from `pallas_kernels` and are re-exported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from memjax.memory import Slot, specs
from pallas_kernels.scan import beside as beside
from pallas_kernels.scan import scan_tokens as scan_tokens
from pallas_kernels.short_conv import short_conv as short_conv
from pallas_kernels.short_conv import taps as taps

# ---------------------------------------------------------------------------------------------- dtypes and projections


def wide(x: Array) -> Array:
    """x in the dtype to accumulate in: float32, or float64 where x is (the laws' finite differences)."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def row(w: Array, like: Array) -> Array:
    """A parameter vector (or a few trailing axes) beside `like`, in its dtype."""
    return w.astype(like.dtype).reshape((1,) * (like.ndim - w.ndim) + w.shape)


def linear(
    x: Float[Array, "*b i"], w: Float[Array, "i o"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "*b o"]:
    """x W (+ bias) in the dtype of x: the one place where float32 parameters meet the compute dtype."""
    y = jnp.einsum("...i,io->...o", x, w.astype(x.dtype))
    return y if bias is None else y + row(bias, y)


def gate(
    x: Float[Array, "*b i"], w: Float[Array, "i o"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "*b o"]:
    """x W (+ bias) for gates, decays and logits: product in the dtype of x, accumulated and returned in float32."""
    accumulate = wide(x).dtype
    y = jnp.einsum("...i,io->...o", x, w.astype(x.dtype), preferred_element_type=accumulate)
    return y if bias is None else y + row(bias, y)


def heads(x: Float[Array, "*b hd"], h: int) -> Float[Array, "*b h d"]:
    """Split the last axis into h heads."""
    return x.reshape(*x.shape[:-1], h, -1)


def merge(x: Float[Array, "*b h d"]) -> Float[Array, "*b hd"]:
    """Concatenate the heads."""
    return x.reshape(*x.shape[:-2], -1)


# ---------------------------------------------------------------------------------------------- norms


def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, " d"], eps: float = 1e-5) -> Float[Array, "*b d"]:
    """x / rms(x) in float32, cast to the dtype of x, then times the weight (the order of Qwen3 and Llama)."""
    x32 = wide(x)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)).astype(x.dtype) * row(weight, x)


def l2_norm(x: Float[Array, "*b d"], eps: float = 1e-6) -> Float[Array, "*b d"]:
    """x / sqrt(|x|^2 + eps), computed in float32: the gradient is finite at x = 0."""
    x32 = wide(x)
    return (x32 * lax.rsqrt(jnp.sum(x32 * x32, -1, keepdims=True) + eps)).astype(x.dtype)


# ---------------------------------------------------------------------------------------------- valid and start


def segments(start: Bool[Array, "b t"] | None, b: int, t: int) -> Int[Array, "b t"]:
    """Number of documents begun in the call up to each token; 0 is the document that was open before it."""
    return jnp.zeros((b, t), jnp.int32) if start is None else jnp.cumsum(start, 1, dtype=jnp.int32)


def positions(
    count: Int[Array, " b"], t: int, valid: Bool[Array, "b t"] | None = None, start: Bool[Array, "b t"] | None = None
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    """Position of each token in its document, and the new count: only valid tokens count, `start` begins again at 0."""
    one = jnp.ones((count.shape[0], t), jnp.int32) if valid is None else valid.astype(jnp.int32)
    seen = count[:, None] + jnp.cumsum(one, 1, dtype=jnp.int32) - one
    if start is not None:
        seen = seen - lax.cummax(jnp.where(start, seen, 0), axis=1)
    return seen, seen[:, -1] + one[:, -1]


# ---------------------------------------------------------------------------------------------- rotary


def rotary(x: Float[Array, "b t h d"], position: Int[Array, "b t"], theta: float = 10_000.0) -> Float[Array, "b t h d"]:
    """Rotate the halves of each head by position * theta**(-2i/d); cos and sin in float32, then in the dtype of x."""
    half = x.shape[-1] // 2
    dtype = wide(x).dtype
    frequency = jnp.power(jnp.asarray(theta, dtype), -jnp.arange(half, dtype=dtype) / half)
    angle = position[..., None, None].astype(dtype) * frequency[None, None, None]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


# ---------------------------------------------------------------------------------------------- the ring cache


CACHE_DTYPES = ("float32", "bfloat16", "float16")


def check_cache_dtype(memory: Any) -> None:
    """For `__post_init__`: ValueError where `cache_dtype` is none of CACHE_DTYPES."""
    if memory.cache_dtype not in CACHE_DTYPES:
        name = type(memory).__name__
        raise ValueError(f"{name}: cache_dtype is {memory.cache_dtype!r}, needs one of {CACHE_DTYPES}")


class Ring(NamedTuple):
    """The last c keys and values of a document; token p of the document stands in slot p % c."""

    k: Float[Array, "b c h d"]
    v: Float[Array, "b c h d"]
    count: Int[Array, " b"]  # valid tokens since the document began

    @staticmethod
    def specs(batch: int, capacity: int, h: int, d: int, dtype: Any = jnp.float32) -> Any:
        """The declaration of a ring, for `state_specs`."""
        rows = Slot((batch, capacity, h, d), ("batch", None, "kv_heads", None), dtype)
        return specs(Ring, k=rows, v=rows, count=Slot((batch,), ("batch",), jnp.int32))


def ring_append(
    ring: Ring,
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b u h d"], Float[Array, "b u h d"], Bool[Array, "b t u"], Ring]:
    """Keys and values a call can see, who sees whom (causal, same document, at most c tokens back), and the new ring.

    k and v are rounded to the dtype of the ring, so that a call sees what a later call will. u is c + t; for t = 1 the
    token is written first and the ring itself is read, without a copy: the slot it takes has just left the window.
    """
    (b, c), t = ring.k.shape[:2], k.shape[1]
    k, v = k.astype(ring.k.dtype), v.astype(ring.v.dtype)
    position, count = positions(ring.count, t, valid, start)
    segment = segments(start, b, t)
    slots = jnp.arange(c, dtype=jnp.int32)[None]

    live = (segment == segment[:, -1:]) & (position >= count[:, None] - c)
    if valid is not None:
        live &= valid
    slot = jnp.where(live, position % c, c)  # c is out of range: dropped
    batch_index = jnp.arange(b, dtype=jnp.int32)[:, None]
    began = None if start is None else start.any(1)

    def store(old, new):
        if began is not None:  # canonical: what can't be reached is zero
            old = jnp.where(beside(began, old), jnp.zeros((), old.dtype), old)
        return old.at[batch_index, slot].set(new, mode="drop")

    new = Ring(store(ring.k, k), store(ring.v, v), count)
    if t == 1:
        newest = count[:, None] - 1
        return new.k, new.v, (newest - (newest - slots) % c >= 0)[:, None], new

    newest = ring.count[:, None] - 1
    held = newest - (newest - slots) % c  # position that stands in each slot, negative if none
    key_position = jnp.concatenate([held, position], 1)[:, None]
    own = segment if valid is None else jnp.where(valid, segment, -1)
    key_segment = jnp.concatenate([jnp.where(held >= 0, 0, -1), own], 1)
    age = position[..., None] - key_position
    before = jnp.arange(c + t, dtype=jnp.int32)[None] <= c + jnp.arange(t, dtype=jnp.int32)[:, None]
    visible = (segment[..., None] == key_segment[:, None]) & (age >= 0) & (age < c) & before[None]
    return jnp.concatenate([ring.k, k], 1), jnp.concatenate([ring.v, v], 1), visible, new


# ---------------------------------------------------------------------------------------------- attention


def within(t: int, b: int, valid: Bool[Array, "b t"] | None, start: Bool[Array, "b t"] | None) -> Bool[Array, "b t t"]:
    """Who sees whom in a call that begins with nothing behind it: causal, the same document, valid keys only."""
    segment = segments(start, b, t)
    order = jnp.arange(t, dtype=jnp.int32)
    visible = (segment[..., None] == segment[:, None]) & (order[None] <= order[:, None])[None]
    return visible if valid is None else visible & valid[:, None]


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b u g d"],
    v: Float[Array, "b u g d"],
    visible: Bool[Array, "b t u"],
    scale: float | None = None,
) -> Float[Array, "b t h d"]:
    """Softmax attention by jax.nn.dot_product_attention; the query heads of a group g are adjacent, scale d**-0.5.

    Softmax in float32. A row that sees nothing gives exactly 0.
    """
    if q.dtype == jnp.float64:
        return _attention64(q, k, v, visible, q.shape[-1] ** -0.5 if scale is None else scale)
    m = visible[:, None]
    with jax.numpy_dtype_promotion("standard"):  # jax's own code promotes bfloat16 logits
        o = jax.nn.dot_product_attention(
            q, k.astype(q.dtype), v.astype(q.dtype), mask=m, scale=scale, implementation="xla"
        )
    return jnp.where(visible.any(-1)[..., None, None], o, jnp.zeros((), o.dtype))


def _attention64(q, k, v, visible, scale):
    """The same in float64: jax's own rounds its softmax to float32, too coarse for finite differences."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = jnp.einsum("btgrd,bugd->bgrtu", grouped, k.astype(q.dtype)) * scale
    m = visible[:, None, None]
    weights = jnp.where(m, jax.nn.softmax(jnp.where(m, logits, jnp.finfo(q.dtype).min), -1), 0.0)
    return jnp.einsum("bgrtu,bugd->btgrd", weights, v.astype(q.dtype)).reshape(q.shape[:3] + v.shape[-1:])
