"""What the layers of linear recurrences share: their two halves, projections with a convolution, decays as in Mamba-2.

A `Recurrence` first recalls (writes its state and reads it), then makes y of what it has read. The halves are apart so
that a mixture of memories can let several states recall and mix what they read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from memjax.layers import linear, merge, rms_norm, short_conv
from memjax.memory import How, Memory, Param, normal


@dataclass(frozen=True)
class Recurrence(Memory):
    """A memory in two halves; an architecture writes both, and `apply` follows.

    own: the parameters that each memory of a mixture has for itself, what is written and how strongly; all others are
    common to them.
    """

    own: ClassVar[tuple[str, ...]] = ()

    def recall(
        self,
        params: dict,
        state: Any,
        x: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        start: Bool[Array, "b t"] | None = None,
        how: How = How(),
    ) -> tuple[Float[Array, "b t h v"], Any]:
        """Write x to the state and read it: what was read, and the new state."""
        raise NotImplementedError

    def output(self, params: dict, o: Float[Array, "b t h v"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """y of what was read, and of x, from which gates are made."""
        raise NotImplementedError

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        o, state = self.recall(params, state, x, valid=valid, start=start, how=how)
        return self.output(params, o, x), state


def convolved(
    params: dict,
    names: Sequence[str],
    cache: Float[Array, "b w c"],
    x: Float[Array, "b t d"],
    *,
    activation: str | None = "silu",
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    how: How = How(),
) -> tuple[list[Float[Array, "b t ..."]], Float[Array, "b w c"]]:
    """activation(conv(x W)) for several W side by side, in one convolution with the weight params["conv"], and its new
    cache: the last w valid rows of x W."""
    rows = [linear(x, params[name]) for name in names]
    ends = [sum(r.shape[-1] for r in rows[: i + 1]) for i in range(len(rows) - 1)]
    rows, cache = short_conv(
        jnp.concatenate(rows, -1),
        params["conv"],
        cache,
        valid=valid,
        start=start,
        activation=activation,
        implementation=how.implementation,
    )
    return jnp.split(rows, ends, -1), cache


def conv_weight(width: int, channels: int) -> Param:
    """The weight [width, channels] of a depthwise convolution."""
    return Param((width, channels), (None, None), normal(width**-0.5), "vector")


def gated_output(
    params: dict, o: Float[Array, "b t h v"], eps: float, gate: Float[Array, "b t hv"] | None = None
) -> Float[Array, "b t d"]:
    """W_o (RMSNorm(o) * gate), the norm over each head, then the heads side by side; params "norm" [v] and "w_o"."""
    y = merge(rms_norm(o, params["norm"], eps))
    return linear(y if gate is None else y * gate, params["w_o"])


def log_rate(least: float = 1.0, most: float = 16.0) -> Callable[[Array, tuple[int, ...]], Array]:
    """log U(least, most): the rates of decay of Mamba-2, A = -exp(A_log)."""
    return lambda key, shape: jnp.log(jax.random.uniform(key, shape, jnp.float32, least, most))


def inverse_softplus_of_dt(key: Array, shape: tuple[int, ...]) -> Array:
    """The bias for which softplus gives a step dt, log-uniform between 0.001 and 0.1 (Mamba)."""
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(0.001), math.log(0.1)))
    return dt + jnp.log(-jnp.expm1(-dt))
