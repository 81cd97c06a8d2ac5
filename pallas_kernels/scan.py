"""Any token recurrence, over padded and packed sequences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, PyTree

from pallas_kernels.compat import match_varying


def beside(mask: Array, like: Array) -> Array:
    """A mask [b, ...] with axes of size 1 appended, so that it broadcasts against `like` [b, ..., more axes]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def only(mask: Array | None, x: Array, fill: float | int = 0) -> Array:
    """x [b ...] where the mask [b], [b t] is True and `fill` elsewhere, whatever stands there; all of x without one."""
    return x if mask is None else jnp.where(beside(mask, x), x, jnp.full((), fill, x.dtype))


def scan_tokens(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: PyTree[Array],
    inputs: PyTree[Array],
    *,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    empty: PyTree[Array] | None = None,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Runs `step(state, inputs_t) -> (state, y_t)` over the time axis of inputs: (y [b t ...], final state).

    state:   arrays [b ...]; step returns them with the same shapes and dtypes.
    inputs:  arrays [b t ...]; step sees them as [b ...].
    valid:   False: the token is skipped. The state passes by it unchanged and step sees zeros in place of its inputs,
             so that whatever stands there reaches neither a value nor a gradient; its y is what step makes of zeros.
    start:   True: the state is set to `empty` before this token, even where valid is False.
    empty:   arrays that broadcast against those of state, zeros by default. A learned one gets its gradient.

    Raises ValueError if inputs hold no array.
    """
    leaves = jax.tree.leaves(inputs)
    if not leaves:
        raise ValueError("scan_tokens: inputs hold no array, needs at least one [b t ...]")
    if empty is None:
        empty = jax.tree.map(jnp.zeros_like, state)
    else:
        empty = jax.tree.map(lambda e, s: jnp.broadcast_to(e, s.shape).astype(s.dtype), empty, state)
    inputs = jax.tree.map(lambda a: only(valid, a), inputs)

    def select(mask: Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(beside(mask, n), n, o), new, old)

    def token(state: Any, now: Any) -> tuple[Any, Any]:
        inputs, valid, start = now
        if start is not None:
            state = select(start, empty, state)
        new, y = step(state, inputs)
        return (new if valid is None else select(valid, new, state)), y

    now = (inputs, valid, start)
    if leaves[0].shape[1] == 1:  # decoding: a loop of one turn would only cost
        state, y = token(state, jax.tree.map(lambda a: a[:, 0], now))
        return jax.tree.map(lambda a: a[:, None], y), state
    state, y = lax.scan(token, match_varying(state, empty, now), jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), now))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), y), state
