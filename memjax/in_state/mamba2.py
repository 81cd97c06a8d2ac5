"""Mamba-2: a selective state-space layer whose decay is one number per head and token.

A step size dt, which depends on the token, scales both what is forgotten and what is written, so a token with dt near 0
is skipped. That makes it linear attention with a scalar gate: q = C, k = B, v = dt x, g = dt A.

Paper: Dao, Gu, Transformers are SSMs: generalized models and efficient algorithms through structured state space
duality, arXiv 2405.21060 (2024).

State:  S [b h n p] float32, n state channels by p channels of the head; conv, the last rows of x, B, C before the
        convolution.
Update: S_t = e^{dt_t A} S_{t-1} + B_t (dt_t x_t)^T;  y_t = S_t^T C_t + D x_t
        x, B, C = silu(conv(u W_in) + bias);  dt = softplus(u W_in + dt_bias);  A = -exp(A_log)

Differs from the paper: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from memjax.layers import gate, heads, linear, merge, rms_norm, row, short_conv, wide
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import Recurrence, conv_weight, inverse_softplus_of_dt, log_rate
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention


class Mamba2State(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h n p"]  # float32, the associations; published caches have [b h p n]
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of x, B, C before the convolution


@dataclass(frozen=True)
class Mamba2(Recurrence):
    """Mamba-2 over x [b, t, dim].

    expand * dim channels stand in heads of width head_dim. state_size: n, rows of the state. groups: of B and C, a
    divisor of the heads; head h reads group h // (heads / groups), and the output is normalised over each group.
    conv_size: width of the causal convolution on x, B and C. dt_limit: least and largest dt (None: no limit).
    """

    dim: int
    expand: int = 2
    head_dim: int = 64
    state_size: int = 128
    groups: int = 1
    conv_size: int = 4
    dt_limit: tuple[float, float | None] = (0.0, None)
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_in", "dt_bias", "A_log")

    def __post_init__(self):
        at_least(self, 1, "dim", "expand", "head_dim", "state_size", "groups")
        at_least(self, 2, "conv_size")
        if self.d_inner % self.head_dim:
            raise ValueError(
                f"Mamba2: head_dim is {self.head_dim}, needs a divisor of expand * dim = {self.expand * self.dim}"
            )
        if self.heads % self.groups:
            raise ValueError(f"Mamba2: groups is {self.groups}, needs a divisor of the heads, {self.heads}")
        least, most = self.dt_limit
        if least < 0 or (most is not None and most < least):
            raise ValueError(f"Mamba2: dt_limit is {self.dt_limit}, needs 0 <= least <= largest")

    @property
    def d_inner(self) -> int:
        """Channels of x and z."""
        return self.expand * self.dim

    @property
    def heads(self) -> int:
        """Heads of width head_dim."""
        return self.d_inner // self.head_dim

    @property
    def xBC(self) -> tuple[int, int, int]:
        """Widths of x, B and C."""
        return self.d_inner, self.groups * self.state_size, self.groups * self.state_size

    def param_specs(self):
        d, h, c = self.d_inner, self.heads, sum(self.xBC)
        return {
            "w_in": dense(self.dim, d + c + h),  # z, x, B, C, dt in this order, one matrix as in checkpoints
            "conv": conv_weight(self.conv_size, c),
            "conv_bias": Param((c,), (None,), constant(0), "vector"),
            "dt_bias": Param((h,), ("heads",), inverse_softplus_of_dt, "gate"),
            "A_log": Param((h,), ("heads",), log_rate(), "gate"),
            "D": Param((h,), ("heads",), constant(1), "vector"),
            "norm": Param((d,), ("heads",), constant(1), "vector"),
            "w_out": dense(d, self.dim, ("heads", "model")),
        }

    def state_specs(self, batch):
        S = Slot((batch, self.heads, self.state_size, self.head_dim), ("batch", "heads", "key", "value"))
        conv = Slot((batch, self.conv_size - 1, sum(self.xBC)), ("batch", None, None))
        return specs(Mamba2State, S=S, conv=conv)

    def tensors(self):
        return {
            "w_in": matrix("in_proj.weight"),
            "conv": depthwise("conv1d.weight"),
            "conv_bias": same("conv1d.bias"),
            "dt_bias": same("dt_bias"),
            "A_log": same("A_log"),
            "D": same("D"),
            "norm": same("norm.weight"),
            "w_out": matrix("out_proj.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        u, w, (d, n, _) = x, params["w_in"], self.xBC
        # z; x, B, C = silu(conv(u W) + bias)
        z, rows = jnp.split(linear(u, w[:, : -self.heads]), [d], -1)
        rows, conv = short_conv(
            rows,
            params["conv"],
            state.conv,
            **masks,
            bias=params["conv_bias"],
            activation="silu",
            implementation=how.implementation,
        )
        x, B, C = jnp.split(rows, [d, d + n], -1)
        # dt = softplus(u W + dt_bias) within its limits, A = -exp(A_log), both in float32
        dt = jnp.clip(jax.nn.softplus(gate(u, w[:, -self.heads :], params["dt_bias"])), *self.dt_limit)
        A = -jnp.exp(params["A_log"])
        x, B, C = heads(x, self.heads), heads(B, self.groups), heads(C, self.groups)
        y, S = ssd(x, dt, A, B, C, params["D"], initial_state=state.S, **masks, how=how)
        return y * jax.nn.silu(heads(z, self.heads)), Mamba2State(S, conv)

    def output(self, params, o, x):
        # y = W_out RMSNorm(o), the norm over each group, after the gate
        grouped, weight = heads(merge(o), self.groups), params["norm"].reshape(self.groups, -1)
        y = jax.vmap(lambda a, w: rms_norm(a, w, self.norm_eps), (2, 0), 2)(grouped, weight)
        return linear(merge(y), params["w_out"])


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"],
    *,
    initial_state: Float[Array, "b h n p"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    how: How = How(),
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h n p"]]:
    """y [b t h p] and the final state of S_t = e^{dt_t A} S_{t-1} + B_t (dt_t x_t)^T, y_t = S_t^T C_t + D x_t.

    A <= 0 and dt >= 0 are final values, in the dtype to accumulate in. Head j reads group j // (h / g) of B and C.
    """
    q, k = (jnp.repeat(a, x.shape[2] // a.shape[2], 2) for a in (C, B))
    v = (dt[..., None] * wide(x)).astype(x.dtype)
    masks: dict[str, Any] = {"valid": valid, "start": start}
    y, S = linear_attention(
        q, k, v, dt * row(A, dt), initial_state=initial_state, **masks, implementation=how.implementation
    )
    return y + row(D[:, None], x) * x, S
