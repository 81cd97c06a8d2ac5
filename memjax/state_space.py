"""The layer of Mamba-2 around a recurrence: its projections, its convolution, its output.

An architecture adds what it makes of dt, the recurrence, and gates of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from memjax.layers import gate, heads, linear, merge, rms_norm, short_conv
from memjax.memory import How, Param, Slot, at_least, constant, dense
from memjax.recurrence import Recurrence, conv_weight, inverse_softplus_of_dt, log_rate
from memjax.tensors import Tensor, depthwise, matrix, same


@dataclass(frozen=True)
class StateSpaceHeads(Recurrence):
    """Heads of x [p] whose state is [n, p]: x, B and C stand for v, k and q, and the output is gated by z.

    expand * dim channels stand in heads of width head_dim. state_size: n, rows of a state. groups: of B and C, a
    divisor of the heads; head h reads group h // (heads / groups), and the output is normalised over each group.
    conv_size: width of the causal convolution on x, B and C.
    """

    dim: int
    expand: int = 2
    head_dim: int = 64
    state_size: int = 128
    groups: int = 1
    conv_size: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self):
        at_least(self, 1, "dim", "expand", "head_dim", "state_size", "groups")
        at_least(self, 2, "conv_size")
        name = type(self).__name__
        if self.d_inner % self.head_dim:
            raise ValueError(f"{name}: head_dim is {self.head_dim}, needs a divisor of expand * dim = {self.d_inner}")
        if self.heads % self.groups:
            raise ValueError(f"{name}: groups is {self.groups}, needs a divisor of the heads, {self.heads}")

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

    @property
    def gates(self) -> int:
        """Columns of w_in behind those of z, x, B and C: dt of each head, and what an architecture has more."""
        return self.heads

    def param_specs(self) -> dict[str, Param]:
        d, h, c = self.d_inner, self.heads, sum(self.xBC)
        return {
            "w_in": dense(self.dim, d + c + self.gates),  # z, x, B, C, dt in this order, one matrix as in checkpoints
            "conv": conv_weight(self.conv_size, c),
            "conv_bias": Param((c,), (None,), constant(0), "vector"),
            "dt_bias": Param((h,), ("heads",), inverse_softplus_of_dt, "gate"),
            "A_log": Param((h,), ("heads",), log_rate(), "gate"),
            "D": Param((h,), ("heads",), constant(1), "vector"),
            "norm": Param((d,), ("heads",), constant(1), "vector"),
            "w_out": dense(d, self.dim, ("heads", "model")),
        }

    def conv_slot(self, batch: int) -> Slot:
        """The last rows of x, B and C before the convolution."""
        return Slot((batch, self.conv_size - 1, sum(self.xBC)), ("batch", None, None))

    def tensors(self) -> dict[str, Tensor]:
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

    def projected(
        self,
        params: dict,
        cache: Float[Array, "b w c"],
        u: Float[Array, "b t d"],
        *,
        valid: Bool[Array, "b t"] | None,
        start: Bool[Array, "b t"] | None,
        how: How,
    ) -> tuple[list[Float[Array, "b t _ _"]], Float[Array, "b t gates"], Float[Array, "b w c"]]:
        """z, x, B, C of each head or group; the columns behind them, in float32; the new cache of the convolution."""
        (d, n, _), w, h, g = self.xBC, params["w_in"], self.heads, self.groups
        # z; x, B, C = silu(conv(u W) + bias)
        z, rows = jnp.split(linear(u, w[:, : -self.gates]), [d], -1)
        masks: dict[str, Any] = {"valid": valid, "start": start, "implementation": how.implementation}
        rows, conv = short_conv(rows, params["conv"], cache, bias=params["conv_bias"], activation="silu", **masks)
        x, B, C = jnp.split(rows, [d, d + n], -1)
        return [heads(z, h), heads(x, h), heads(B, g), heads(C, g)], gate(u, w[:, -self.gates :]), conv

    def output(self, params, o, x):
        # y = W_out RMSNorm(o), the norm over each group, after the gate
        grouped, weight = heads(merge(o), self.groups), params["norm"].reshape(self.groups, -1)
        y = jax.vmap(lambda a, w: rms_norm(a, w, self.norm_eps), (2, 0), 2)(grouped, weight)
        return linear(merge(y), params["w_out"])
