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

from memjax.heads import GroupedValues
from memjax.layers import gate, heads, l2_norm, linear, row
from memjax.memory import How, Param, dense, specs
from memjax.recurrence import convolved, gated_output, inverse_softplus_of_dt, log_rate
from memjax.tensors import matrix, same
from pallas_kernels.delta_rule import IMPLEMENTATIONS, delta_rule


class GatedDeltaNetState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of q, k, v before the convolution


@dataclass(frozen=True)
class GatedDeltaNet(GroupedValues):
    """Gated DeltaNet over x [b, t, dim].

    heads, v_heads, head_dim, expand_v, conv_size: those of `GroupedValues`. allow_neg_eigval: beta runs from 0 to 2
    instead of 1, so that a write can flip an association. use_gate: the output is multiplied by silu(x W_g).
    """

    heads: int = 6
    head_dim: int = 256
    expand_v: float = 2.0
    allow_neg_eigval: bool = False
    use_gate: bool = True

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_a", "w_b")

    def param_specs(self):
        d, hv = self.dim, self.hv
        return {
            **super().param_specs(),  # w_q, w_k, w_v, w_o, conv, norm
            "w_a": dense(d, hv, kind="gate"),
            "A_log": Param((hv,), ("heads",), log_rate(1e-4), "gate"),
            "dt_bias": Param((hv,), ("heads",), inverse_softplus_of_dt, "gate"),
            "w_b": dense(d, hv, kind="gate"),
            **({"w_g": dense(d, hv * self.v)} if self.use_gate else {}),
        }

    def state_specs(self, batch):
        return specs(GatedDeltaNetState, **self.slots(batch))

    def tensors(self):
        return {
            **super().tensors(),
            "w_a": matrix("a_proj.weight"),
            "A_log": same("A_log"),
            "dt_bias": same("dt_bias"),
            "w_b": matrix("b_proj.weight"),
            **({"w_g": matrix("g_proj.weight")} if self.use_gate else {}),
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
