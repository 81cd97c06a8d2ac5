"""Gated DeltaNet-2: Kimi Delta Attention in which what is erased and what is written are chosen apart, per channel.

In place of the one rate beta, an erase gate says how much each key channel takes away of what it recalls, and a write
gate how much of each value channel is written.

Paper: Gated DeltaNet-2: decoupling erase and write in linear attention, arXiv 2605.22791 (2026).

State:  S [b h k v] float32, the associations of each value head; conv, the last rows before the convolution.
Update: Sbar = diag(e^{g_t}) S_{t-1};  u_t = w_t * v_t - Sbar^T (b_t * k_t);  S_t = Sbar + k_t u_t^T
        o_t = k**-0.5 S_t^T q_t
        b_t = sigmoid(x_t W_b);  w_t = sigmoid(x_t W_w);  g_t = -exp(A_log) softplus(x_t W_f1 W_f2 + dt_bias), or with a
        lower bound l < 0  g_t = l sigmoid(exp(A_log) (x_t W_f1 W_f2 + dt_bias))
        y_t = W_o (RMSNorm(o_t) * sigmoid(x_t W_g1 W_g2 + b_g))

Differs from the paper: only the recurrence is held against it. How x becomes q, k, v, g, b and w and o becomes y is
that of flash-linear-attention's layer, and that of KDA but for the heads: what belongs to key channels (g, b) belongs
to the key heads, and value heads share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from memjax.heads import DecayingKeys
from memjax.layers import gate, heads, l2_norm
from memjax.memory import How, dense, specs
from memjax.recurrence import convolved
from memjax.tensors import matrix
from pallas_kernels.delta_rule import IMPLEMENTATIONS, delta_rule


class GatedDeltaNet2State(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of q, k, v before the convolution


@dataclass(frozen=True)
class GatedDeltaNet2(DecayingKeys):
    """Gated DeltaNet-2 over x [b, t, dim].

    heads, v_heads, head_dim, expand_v, conv_size: those of `GroupedValues`; decays and erase gates belong to the key
    heads, write gates to the value heads. allow_neg_eigval: the erase gate runs from 0 to 2 instead of 1. lower_bound:
    as in `DecayingKeys`.
    """

    heads: int = 16
    head_dim: int = 128
    expand_v: float = 1.0

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_f1", "w_f2", "w_b", "w_w")

    @property
    def decays(self) -> int:
        return self.heads

    def param_specs(self):
        _, k, v = self.qkv
        return {
            **super().param_specs(),  # w_q, w_k, w_v, w_o, conv, norm; w_f1, w_f2, A_log, dt_bias; w_g1, w_g2, b_g
            "w_b": dense(self.dim, k, kind="gate"),
            "w_w": dense(self.dim, v, kind="gate"),
        }

    def state_specs(self, batch):
        return specs(GatedDeltaNet2State, **self.slots(batch))

    def tensors(self):
        return {**super().tensors(), "w_b": matrix("b_proj.weight"), "w_w": matrix("w_proj.weight")}

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k, v = silu(conv(x W)), then q and k of length 1
        (q, k, v), conv = convolved(params, ("w_q", "w_k", "w_v"), state.conv, x, **masks, how=how)
        q, k, v = l2_norm(heads(q, self.heads)), l2_norm(heads(k, self.heads)), heads(v, self.hv)
        # b = sigmoid(x W_b), w = sigmoid(x W_w), from the unconvolved x and in float32
        b = jax.nn.sigmoid(heads(gate(x, params["w_b"]), self.heads)) * (2 if self.allow_neg_eigval else 1)
        w = jax.nn.sigmoid(heads(gate(x, params["w_w"]), self.hv))
        # g = -exp(A_log) softplus(x W_f1 W_f2 + dt_bias)
        g = self.log_decay(params, x)
        # S_t = diag(e^g) S_{t-1} + k u^T, o = k**-0.5 S^T q
        q = q * self.head_dim**-0.5
        b, g = (jnp.repeat(a, self.hv // self.heads, 2) for a in (b, g))
        o, S = delta_rule(
            q, k, v, None, g, erase=b, write=w, initial_state=state.S, **masks, implementation=how.implementation
        )
        return o, GatedDeltaNet2State(S, conv)
