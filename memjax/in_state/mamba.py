"""Mamba: a state space model that selects what to remember.

Every channel has a small diagonal state of its own, and the current token decides how far it steps, what it writes and
what it reads: a step of 0 skips the token, a large one forgets all before it.

Paper: Gu, Dao, Mamba: linear-time sequence modeling with selective state spaces, arXiv 2312.00752 (2023).

State:  ssm [b d n] float32, n numbers for each of d = expand * dim channels; conv, the last rows of x.
Update: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;  m_t = h_t C_t + D x_t;  y_t = W_o (m_t * silu(z_t))
        (x, z) = u W_in;  x = silu(conv(x) + bias);  (r, B, C) = x W_x
        dt = softplus(r W_dt + dt_bias);  A = -exp(A_log)

Differs from the paper: the input is discretised as dt B (Euler), as in the published code; the text has the zero-order
hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from memjax.layers import gate, linear, merge, row, scan_tokens, short_conv
from memjax.memory import Flow, How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import Recurrence, inverse_softplus_of_dt
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.diagonal_scan import IMPLEMENTATIONS, diagonal_scan

SPAN = 64
"""Tokens whose states exist at the same time."""


class MambaState(NamedTuple):
    """What was read so far."""

    ssm: Float[Array, "b d n"]  # float32, the state of each channel
    conv: Float[Array, "b w d"]  # float32, the last conv_size - 1 rows of x before the convolution


@dataclass(frozen=True)
class Mamba(Recurrence):
    """Mamba over x [b, t, dim].

    state_size: n, numbers in the state of a channel. conv_size: width of the causal convolution on x. expand: channels
    for each of dim. dt_rank: rank of the projection to dt (None: dim / 16, rounded up).
    hands_on: what was read, m before the gate silu(z), is handed on as the stream "memory" [b t d], for layers above
    that read it instead of a state of their own (the gated memory units of SambaY).
    """

    dim: int
    state_size: int = 16
    conv_size: int = 4
    expand: int = 2
    dt_rank: int | None = None
    hands_on: bool = False

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_x", "w_dt", "dt_bias")

    def __post_init__(self):
        at_least(self, 1, "dim", "state_size", "expand", "dt_rank")
        at_least(self, 2, "conv_size")

    @property
    def streams(self) -> bool:
        return self.hands_on

    @property
    def inner(self) -> int:
        """Channels."""
        return self.expand * self.dim

    @property
    def rank(self) -> int:
        """Rank of the projection to dt."""
        return math.ceil(self.dim / 16) if self.dt_rank is None else self.dt_rank

    def param_specs(self):
        d, n, r = self.inner, self.state_size, self.rank
        return {
            "w_in": dense(self.dim, 2 * d),
            "conv": Param((self.conv_size, d), (None, "heads"), _uniform(self.conv_size**-0.5), "vector"),
            "conv_bias": Param((d,), ("heads",), _uniform(self.conv_size**-0.5), "vector"),
            "w_x": dense(d, r + 2 * n, ("heads", None)),
            "w_dt": Param((r, d), (None, "heads"), _uniform(r**-0.5), "gate"),
            "dt_bias": Param((d,), ("heads",), inverse_softplus_of_dt, "gate"),
            "A_log": Param((d, n), ("heads", None), _log_of_the_naturals, "gate"),
            "D": Param((d,), ("heads",), constant(1), "vector"),
            "w_o": dense(d, self.dim, ("heads", "model")),
        }

    def state_specs(self, batch):
        ssm = Slot((batch, self.inner, self.state_size), ("batch", "heads", None))
        return specs(MambaState, ssm=ssm, conv=Slot((batch, self.conv_size - 1, self.inner), ("batch", None, "heads")))

    def tensors(self):
        return {
            "w_in": matrix("in_proj.weight"),
            "conv": depthwise("conv1d.weight"),
            "conv_bias": same("conv1d.bias"),
            "w_x": matrix("x_proj.weight"),
            "w_dt": matrix("dt_proj.weight"),
            "dt_bias": same("dt_proj.bias"),
            "A_log": same("A_log"),
            "D": same("D"),
            "w_o": matrix("out_proj.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        how_and_where: dict[str, Any] = {"valid": valid, "start": start, "implementation": how.implementation}
        # x = silu(conv(u W_in) + bias)
        x, conv = short_conv(
            linear(x, params["w_in"][:, : self.inner]),
            params["conv"],
            state.conv,
            bias=params["conv_bias"],
            activation="silu",
            **how_and_where,
        )
        # (r, B, C) = x W_x, dt = softplus(r W_dt + dt_bias), the latter in float32
        r, B, C = jnp.split(linear(x, params["w_x"]), (self.rank, self.rank + self.state_size), -1)
        dt = jax.nn.softplus(gate(r, params["w_dt"], params["dt_bias"]))
        # h_t = exp(dt A) h_{t-1} + dt x B^T, m = h C + D x
        m, ssm = selective_scan(x, dt, -jnp.exp(params["A_log"].astype(dt.dtype)), B, C, state.ssm, **how_and_where)
        m = m + row(params["D"], m) * x.astype(m.dtype)
        return m.astype(x.dtype)[:, :, None], MambaState(ssm, conv)

    def output(self, params, o, x):
        # y = W_o (m * silu(z))
        z = linear(x, params["w_in"][:, self.inner :])
        return linear(merge(o) * jax.nn.silu(z), params["w_o"])

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        flow = x if isinstance(x, Flow) else Flow(x, {})
        m, state = self.recall(params, state, flow.x, valid=valid, start=start, how=how)
        y = self.output(params, m, flow.x)
        return (flow.hand(y, memory=merge(m)) if self.hands_on else y), state


def selective_scan(
    x: Float[Array, "b t d"],
    dt: Float[Array, "b t d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    ssm: Float[Array, "b d n"],
    *,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    implementation: str | None = None,
    span: int = SPAN,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d n"]]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T from h_0 = ssm: h_t C_t [b t d] in the dtype of dt, and the last h.

    States are made `span` tokens at a time and made again in the backward pass, which keeps those between spans only:
    all of them would be n times the memory of x. dt: the step, > 0 and wide (float32). A: negative.
    """
    t = x.shape[1]
    n = -(-t // span)
    c = -(-t // n)

    def cut(a):  # a step of 0 changes nothing: the zeros at the end
        a = jnp.pad(a, [(0, n * c - t if axis == 1 else 0) for axis in range(a.ndim)])
        return a.reshape(a.shape[0], n, c, *a.shape[2:])

    def through_span(h, now):
        (x, dt, B, C), valid, start = now
        x, B, C = (a.astype(dt.dtype) for a in (x, B, C))
        h, last = diagonal_scan(
            (dt * x)[..., None] * B[:, :, None],
            dt[..., None] * A[None, None],
            initial_state=h,
            valid=valid,
            start=start,
            implementation=implementation,
        )
        return last, jnp.sum(h * C[:, :, None], -1)

    through_span = jax.checkpoint(through_span, prevent_cse=False)
    y, ssm = scan_tokens(through_span, ssm, jax.tree.map(cut, ((x, dt, B, C), valid, start)))
    return y.reshape(x.shape[0], n * c, -1)[:, :t], ssm


def _uniform(bound: float) -> Callable[[Array, tuple[int, ...]], Array]:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _log_of_the_naturals(key: Array, shape: tuple[int, ...]) -> Array:
    """log 1, log 2, ..., log n in every channel: the rates of S4D-real."""
    return jnp.broadcast_to(jnp.log(1 + jnp.arange(shape[-1], dtype=jnp.float32)), shape)
