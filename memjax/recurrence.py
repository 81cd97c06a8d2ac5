"""What the layers of linear recurrences share: their two halves, projections with a convolution, decays as in Mamba-2,
forget gates with a lower bound as in HGRN, heads of Taylor features as in Based.

A `Recurrence` first recalls (writes its state and reads it), then makes y of what it has read. The halves are apart so
that a mixture of memories can let several states recall and mix what they read. `memjax.heads` has those whose heads
are normalised after the reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from memjax.layers import linear, merge, rms_norm, row, short_conv, wide
from memjax.memory import How, Memory, Param, Slot, at_least, constant, dense, normal
from memjax.tensors import matrix, same
from pallas_kernels.taylor_attention import feature_count


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


@dataclass(frozen=True)
class LowerBounded(Recurrence):
    """A recurrence of d channels whose forget gates have a lower bound that rises with the depth.

    layer, layers: this is number `layer`, counted from 0, of the layers of its class in a model. With more than one the
    bounds of all of them are one parameter: layer 0 has it, "lower_bounds" [layers, d], and hands the cumulated bounds
    on as the stream "lower_bounds", of which each layer above reads its row; so the layers stand in a `Stack`, not in a
    `Repeat`. A single layer has no bound.
    """

    dim: int
    layer: int = 0
    layers: int = 1

    def __post_init__(self):
        at_least(self, 1, "dim", "layers")
        if not 0 <= self.layer < self.layers:
            name = type(self).__name__
            raise ValueError(f"{name}: layer is {self.layer}, needs 0 to layers - 1 = {self.layers - 1}")

    @property
    def d(self) -> int:
        """Channels of the forget gate."""
        raise NotImplementedError

    @property
    def streams(self) -> bool:
        """Whether there are other layers to share bounds with."""
        return self.layers > 1

    @property
    def has_bounds(self) -> bool:
        """Whether the bounds of all layers are its parameter."""
        return self.streams and self.layer == 0

    def param_specs(self):
        bounds = {"lower_bounds": Param((self.layers, self.d), (None, "heads"), constant(0), "gate")}
        return bounds if self.has_bounds else {}

    def tensors(self):
        return {"lower_bounds": same("lower_bounds")} if self.has_bounds else {}

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        if not self.streams:
            return super().apply(params, state, x, valid=valid, start=start, how=how)
        flow, x = x, x.x
        # lb = (cumsum gam)_l - gam_0, gam = softmax of Lambda over the layers
        if self.has_bounds:
            gam = jax.nn.softmax(wide(params["lower_bounds"]), 0)
            bounds = jnp.cumsum(gam, 0) - gam[:1]
        else:
            bounds = flow.take("lower_bounds", self)
        lb = bounds[self.layer] if self.layer else None
        o, state = self.recall(params, state, x, valid=valid, start=start, how=how, lower_bound=lb)
        return flow.hand(self.output(params, o, x), lower_bounds=bounds), state

    def recall(
        self,
        params: dict,
        state: Any,
        x: Float[Array, "b t dim"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        start: Bool[Array, "b t"] | None = None,
        how: How = How(),
        lower_bound: Float[Array, " d"] | None = None,
    ) -> tuple[Float[Array, "b t h v"], Any]:
        """As every recurrence's; lower_bound: the least f of this layer, None in layer 0."""
        raise NotImplementedError

    def forget(
        self, logits: Float[Array, "b t d"], lower_bound: Float[Array, " d"] | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
        """log f and 1 - f of f = lb + (1 - lb) sigmoid(logits): neither loses its digits where the other is near 0."""
        if lower_bound is None:
            if self.layer:
                name = type(self).__name__
                raise ValueError(f"{name}: lower_bound is None, layer {self.layer} needs [{self.d}]")
            return jax.nn.log_sigmoid(logits), jax.nn.sigmoid(-logits)
        lb = row(lower_bound, logits)
        return jnp.log(lb + (1 - lb) * jax.nn.sigmoid(logits)), (1 - lb) * jax.nn.sigmoid(-logits)


class TaylorHeads(Recurrence):
    """A recurrence of the Taylor features of q and k, divided by their sum: heads without a norm or a gate."""

    # Not a dataclass: each architecture has these fields, in an order of its own.
    heads: ClassVar[int]
    feature_dim: ClassVar[int]  # width of a head of q and k
    head_v_dim: ClassVar[int | None]  # width of a head of v, None for dim / heads
    compressed: ClassVar[bool]  # each product of two features once
    eps: ClassVar[float]  # added to the denominator

    def __post_init__(self):
        at_least(self, 1, "dim", "heads", "feature_dim", "head_v_dim")
        name = type(self).__name__
        if self.head_v_dim is None and self.dim % self.heads:
            raise ValueError(f"{name}: heads is {self.heads}, needs a divisor of dim = {self.dim}, or a head_v_dim")
        if self.eps <= 0:
            raise ValueError(f"{name}: eps is {self.eps}, needs > 0")

    @property
    def v(self) -> int:
        """Width of a value head."""
        return self.dim // self.heads if self.head_v_dim is None else self.head_v_dim

    def param_specs(self):
        d, k, v = self.dim, self.heads * self.feature_dim, self.heads * self.v
        return {"w_q": dense(d, k), "w_k": dense(d, k), "w_v": dense(d, v), "w_o": dense(v, d, ("heads", "model"))}

    def S_slot(self, batch: int) -> Slot:
        """Sums of features times values, and in the last column of the features alone."""
        f = feature_count(self.feature_dim, self.compressed)
        return Slot((batch, self.heads, f, self.v + 1), ("batch", "heads", "key", "value"))

    def tensors(self):
        return {**{f"w_{n}": matrix(f"proj_{n}.weight") for n in "qkv"}, "w_o": matrix("out_proj.weight")}

    def output(self, params, o, x):
        return linear(merge(o), params["w_o"])


def convolved(
    params: dict,
    names: Sequence[str],
    cache: Float[Array, "b w c"] | tuple[()],
    x: Float[Array, "b t d"],
    *,
    activation: Literal["silu"] | None = "silu",
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    how: How = How(),
) -> tuple[list[Float[Array, "b t ..."]], Any]:
    """activation(conv(x W)) for several W side by side, in one convolution with the weight params["conv"], and its new
    cache: the last w valid rows of x W. With the cache () there is no convolution: x W without an activation, and ().
    """
    rows = [linear(x, params[name]) for name in names]
    if isinstance(cache, tuple):
        return rows, cache
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
