"""Gated DeltaNet: the delta rule with a forget gate.

The state is multiplied by a learned, data-dependent scalar, then one association in it is overwritten: v_t replaces
what the key k_t recalled. The gate clears what is old, the delta rule keeps a repeated key from piling up values.

Paper: Yang, Kautz, Hatamizadeh, Gated delta networks: improving Mamba2 with delta rule, arXiv 2412.06464 (2024).

State:  S [b h k v] float32, the associations of each value head; conv, the last rows before the convolution.
Update: Sbar = e^{g_t} S_{t-1};  u_t = beta_t (v_t - Sbar^T k_t);  S_t = Sbar + k_t u_t^T;  o_t = k**-0.5 S_t^T q_t
        g_t = -exp(A_log) softplus(x_t W_a + dt_bias);  beta_t = sigmoid(x_t W_b)

Differs from the paper: nothing. Grouped value heads and the doubled beta are those of flash-linear-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from memjax.layers import gate, heads, l2_norm, linear, row
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import Recurrence, conv_weight, convolved, gated_output, inverse_softplus_of_dt, log_rate
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.delta_rule import IMPLEMENTATIONS, delta_rule


class GatedDeltaNetState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of q, k, v before the convolution


@dataclass(frozen=True)
class GatedDeltaNet(Recurrence):
    """Gated DeltaNet over x [b, t, dim].

    heads: query and key heads. v_heads: value heads, a multiple of `heads` (None: as many); value head j reads with
    key head j // (v_heads / heads), and each has its own state [head_dim, head_dim * expand_v].
    conv_size: width of the causal convolution on q, k and v. allow_neg_eigval: beta runs from 0 to 2 instead of 1, so
    that a write can flip an association. use_gate: the output is multiplied by silu(x W_g).
    """

    dim: int
    heads: int = 6
    v_heads: int | None = None
    head_dim: int = 256
    expand_v: float = 2.0
    conv_size: int = 4
    allow_neg_eigval: bool = False
    use_gate: bool = True
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_a", "w_b")

    def __post_init__(self):
        at_least(self, 1, "dim", "heads", "head_dim")
        at_least(self, 2, "conv_size")
        if self.hv < 1 or self.hv % self.heads:
            raise ValueError(f"GatedDeltaNet: v_heads is {self.v_heads}, needs a multiple of heads = {self.heads}")
        if self.v < 1 or self.v != self.head_dim * self.expand_v:
            width = f"{self.head_dim} * {self.expand_v}"
            raise ValueError(
                f"GatedDeltaNet: expand_v is {self.expand_v}, needs head_dim * expand_v = {width} to be whole"
            )

    @property
    def hv(self) -> int:
        """Value heads."""
        return self.heads if self.v_heads is None else self.v_heads

    @property
    def v(self) -> int:
        """Width of a value head."""
        return int(self.head_dim * self.expand_v)

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Widths of q, k and v."""
        return self.heads * self.head_dim, self.heads * self.head_dim, self.hv * self.v

    def param_specs(self):
        d, (q, k, v), hv = self.dim, self.qkv, self.hv
        w_g = {"w_g": dense(d, v)} if self.use_gate else {}
        return {
            "w_q": dense(d, q),
            "w_k": dense(d, k),
            "w_v": dense(d, v),
            "w_a": dense(d, hv, kind="gate"),
            "w_b": dense(d, hv, kind="gate"),
            **w_g,
            "w_o": dense(v, d, ("heads", "model")),
            "A_log": Param((hv,), ("heads",), log_rate(1e-4), "gate"),
            "dt_bias": Param((hv,), ("heads",), inverse_softplus_of_dt, "gate"),
            "conv": conv_weight(self.conv_size, q + k + v),
            "norm": Param((self.v,), ("value",), constant(1), "vector"),
        }

    def state_specs(self, batch):
        S = Slot((batch, self.hv, self.head_dim, self.v), ("batch", "heads", "key", "value"))
        conv = Slot((batch, self.conv_size - 1, sum(self.qkv)), ("batch", None, None))
        return specs(GatedDeltaNetState, S=S, conv=conv)

    def tensors(self):
        w_g = {"w_g": matrix("g_proj.weight")} if self.use_gate else {}
        return {
            "w_q": matrix("q_proj.weight"),
            "w_k": matrix("k_proj.weight"),
            "w_v": matrix("v_proj.weight"),
            "w_a": matrix("a_proj.weight"),
            "w_b": matrix("b_proj.weight"),
            **w_g,
            "w_o": matrix("o_proj.weight"),
            "A_log": same("A_log"),
            "dt_bias": same("dt_bias"),
            "conv": depthwise(*((f"{n}_conv1d.weight", width) for n, width in zip("qkv", self.qkv, strict=True))),
            "norm": same("o_norm.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k, v = silu(conv(x W)), then q and k of length 1
        (q, k, v), conv = convolved(params, ("w_q", "w_k", "w_v"), state.conv, x, **masks, how=how)
        q, k, v = l2_norm(heads(q, self.heads)), l2_norm(heads(k, self.heads)), heads(v, self.hv)
        # beta = sigmoid(x W_b), g = -exp(A_log) softplus(x W_a + dt_bias), both from the unconvolved x and in float32
        beta = jax.nn.sigmoid(gate(x, params["w_b"])) * (2 if self.allow_neg_eigval else 1)
        dt = jax.nn.softplus(gate(x, params["w_a"], params["dt_bias"]))
        log_decay = -jnp.exp(row(params["A_log"], dt)) * dt
        # S_t = e^g S_{t-1} + k u^T, o = k**-0.5 S^T q
        q = q * self.head_dim**-0.5
        o, S = delta_rule(q, k, v, beta, log_decay, initial_state=state.S, **masks, implementation=how.implementation)
        return o, GatedDeltaNetState(S, conv)

    def output(self, params, o, x):
        # y = W_o (RMSNorm(o) * silu(x W_g))
        z = jax.nn.silu(linear(x, params["w_g"])) if self.use_gate else None
        return gated_output(params, o, self.norm_eps, z)
