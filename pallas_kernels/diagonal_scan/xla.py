"""The diagonal recurrence, in place and with a backward pass that is a recurrence of the same form, run from the end:

    l_t = dh_t + conj(a_{t+1}) l_{t+1};   dx_t = l_t;   with w_t = conj(a_t) l_t:
    dlog_decay_t = <w_t, h_{t-1}>;   dphase_t = <w_t, i h_{t-1}>;   dinitial_state = w_1

Where a dependent step costs more than its arithmetic, time is cut into n chunks of c tokens that go side by side: once
for what each chunk leaves of a state of zeros and the product of its decays, once over the n chunks for the states that
enter them, once more for the tokens. That is 2c + n steps instead of t. Decays are only ever multiplied, so that a
factor of 0 or of e^-20 is as exact as any other.

Memory: the backward pass keeps the gates and h.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.compat import match_varying
from pallas_kernels.diagonal_scan.reference import Values
from pallas_kernels.scan import only


@functools.partial(jax.jit, static_argnames="chunk_size")
def diagonal_scan(
    x: Values,
    log_decay: Array,
    phase: Array | None,
    state: Values,
    start: Array | None,
    chunk_size: int | None = None,
) -> tuple[Values, Values]:
    """Arrays as in the public op; state is given, and its dtype is the one to compute in.

    chunk_size: tokens per chunk. None: all of them on CPUs, where a step costs next to nothing and a second reading of
    the inputs more than it saves; about sqrt(t) on other platforms.
    """
    if start is not None:
        log_decay = only(~start, log_decay, -jnp.inf)
    dtype = jax.tree.leaves(state)[0].dtype
    gates, x = jax.tree.map(lambda a: a.astype(dtype), ((log_decay, phase), x))
    gates, x, state = match_varying((gates, x, state))
    return _scan(chunk_size, gates, x, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk_size: int | None, gates: Any, x: Values, state: Values) -> tuple[Values, Values]:
    return _by_platform(_forward, chunk_size, gates, x, state)


def _scan_fwd(chunk_size, gates, x, state):
    h, final = _by_platform(_forward, chunk_size, gates, x, state)
    return (h, final), (gates, h, state)


def _scan_bwd(chunk_size, kept, cotangents):
    return _by_platform(_backward, chunk_size, *kept, *cotangents)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _by_platform(run: Callable[..., Any], chunk_size: int | None, gates: Any, *args: Any) -> Any:
    t = gates[0].shape[1]
    whole, cut = (functools.partial(run, c) for c in (t, chunk_size or 1 << (t.bit_length() // 2)))
    return cut(gates, *args) if chunk_size else lax.platform_dependent(gates, *args, cpu=whole, default=cut)


def _forward(c: int, gates: Any, x: Values, state: Values) -> tuple[Values, Values]:
    t = gates[0].shape[1]
    gates, x = _split((gates, x), c)

    def step(h, now, _):
        gates, x = now
        h = _add(_times(_decay(gates), h), x)
        return h, h

    h, final = _run(step, state, (gates, x), x)
    return _merge(h, t), final


def _backward(c: int, gates: Any, h: Values, state: Values, dh: Values, dfinal: Values) -> tuple[Any, Values, Values]:
    t = gates[0].shape[1]
    gates, h, dh = _split((gates, h, dh), c)
    # the state before the first token of each chunk
    entered = jax.tree.map(lambda s, a: jnp.concatenate([s[:, None], a[:, :-1, -1]], 1), state, h)

    def step(w, now, i):
        gates, dh = now
        dx = _add(dh, w)
        before = jax.tree.map(lambda s, a: jnp.where(i == 0, s, _at(a, jnp.maximum(i - 1, 0))), entered, h)
        if gates[1] is None:
            w = _times(_decay(gates), dx)
            return w, ((w * before, None), dx)
        (real, imag), cos, sin = before, *_decay(gates)
        w = _times((cos, -sin), dx)
        return w, ((w[0] * real + w[1] * imag, w[1] * real - w[0] * imag), dx)

    (dgates, dx), dstate = _run(step, dfinal, (gates, dh), (gates, dh), reverse=True)
    return *_merge((dgates, dx), t), dstate


def _run(step: Callable[..., Any], state: Values, inputs: Any, like: Any, reverse: bool = False) -> tuple[Any, Values]:
    """step(state, inputs_i, i) -> (state, y_i) over all tokens: (y, the last state).

    inputs, y: [b n c ...], the gates first. like: arrays of the shapes and dtypes of y. reverse: last token first.
    """
    first = jax.tree.map(lambda a: a[:, :, 0], inputs)
    n = first[0][0].shape[1]
    if n > 1:

        def through_chunk(held, now, i):
            state, product = held
            return (step(state, now, i)[0], _times(_decay(now[0], reverse), product)), None

        nothing = jax.tree.map(jnp.zeros_like, first[1])
        one = _decay(jax.tree.map(jnp.zeros_like, first[0]))
        ends, _ = _along(through_chunk, (nothing, one), inputs, None, reverse)

        def across(state, now):
            end, product = now
            return _add(_times(product, state), end), state

        ends = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), ends)
        _, entering = lax.scan(across, match_varying(state, ends), ends, reverse=reverse)
        entering = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), entering)
    else:
        entering = jax.tree.map(lambda a: a[:, None], state)
    last, y = _along(step, entering, inputs, like, reverse)
    return y, jax.tree.map(lambda a: a[:, 0 if reverse else -1], last)


def _along(step: Callable[..., Any], carry: Any, inputs: Any, like: Any, reverse: bool) -> tuple[Any, Any]:
    """lax.scan over the axis c of [b n c ...], in either direction, without its transposes: they cost more than it."""
    c = jax.tree.leaves(inputs)[0].shape[2]

    def turn(i, held):
        carry, y = held
        i = c - 1 - i if reverse else i
        carry, now = step(carry, jax.tree.map(lambda a: _at(a, i), inputs), i)
        return carry, jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, i, 2), y, now)

    return lax.fori_loop(0, c, turn, match_varying((carry, jax.tree.map(jnp.zeros_like, like)), inputs))


def _at(a: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(a, i, 2, keepdims=False)


def _split(tree: Any, c: int) -> Any:
    """Arrays [b t ...] as [b n c ...]. The zeros that fill the last chunk, gates and inputs, change no state."""

    def split(a):
        if left := -a.shape[1] % c:
            a = jnp.pad(a, [(0, left if axis == 1 else 0) for axis in range(a.ndim)])
        return a.reshape(a.shape[0], -1, c, *a.shape[2:])

    return jax.tree.map(split, tree)


def _merge(tree: Any, t: int) -> Any:
    return jax.tree.map(lambda a: a.reshape(a.shape[0], -1, *a.shape[3:])[:, :t], tree)


def _decay(gates: tuple[Array, Array | None], conjugate: bool = False) -> Values:
    radius, phase = jnp.exp(gates[0]), gates[1]
    if phase is None:
        return radius
    return radius * jnp.cos(phase), radius * jnp.sin(-phase if conjugate else phase)


def _times(a: Any, b: Any) -> Any:
    if not isinstance(a, tuple):
        return a * b
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)
