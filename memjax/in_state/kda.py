"""Kimi Delta Attention (KDA): Gated DeltaNet with a forget gate of its own for every key channel.

The rows of the state fade at data-dependent rates, as in gated linear attention, then one association is overwritten,
as in DeltaNet. Kimi Linear has three such layers for every layer of full attention.

Paper: Kimi Team, Kimi Linear: an expressive, efficient attention architecture, arXiv 2510.26692 (2025).

State:  S [b h k v] float32, the associations of each value head; conv, the last rows before the convolution.
Update: Sbar = diag(e^{g_t}) S_{t-1};  u_t = beta_t (v_t - Sbar^T k_t);  S_t = Sbar + k_t u_t^T
        o_t = k**-0.5 S_t^T q_t;  beta_t = sigmoid(x_t W_b)
        g_t = -exp(A_log) softplus(x_t W_f1 W_f2 + dt_bias), or with a lower bound l < 0
        g_t = l sigmoid(exp(A_log) (x_t W_f1 W_f2 + dt_bias))
        y_t = W_o (RMSNorm(o_t) * sigmoid(x_t W_g1 W_g2 + b_g))

Differs from the paper: nothing. Grouped value heads, the doubled beta and the lower bound are those of
flash-linear-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array
from jaxtyping import Float

from memjax.heads import DecayingKeys
from memjax.layers import gate, heads, l2_norm
from memjax.memory import How, dense, specs
from memjax.recurrence import convolved
from memjax.tensors import matrix
from pallas_kernels.delta_rule import IMPLEMENTATIONS, delta_rule


class KDAState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of q, k, v before the convolution


@dataclass(frozen=True)
class KDA(DecayingKeys):
    """Kimi Delta Attention over x [b, t, dim].

    heads, v_heads, head_dim, expand_v, conv_size: those of `GroupedValues`; each value head has decays and a beta of
    its own. allow_neg_eigval: beta runs from 0 to 2 instead of 1. lower_bound: as in `DecayingKeys`.
    """

    heads: int = 16
    head_dim: int = 128
    expand_v: float = 1.0

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_f1", "w_f2", "w_b")

    def param_specs(self):
        return {
            **super().param_specs(),  # w_q, w_k, w_v, w_o, conv, norm; w_f1, w_f2, A_log, dt_bias; w_g1, w_g2, b_g
            "w_b": dense(self.dim, self.hv, kind="gate"),
        }

    def state_specs(self, batch):
        return specs(KDAState, **self.slots(batch))

    def tensors(self):
        return {**super().tensors(), "w_b": matrix("b_proj.weight")}

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k, v = silu(conv(x W)), then q and k of length 1
        (q, k, v), conv = convolved(params, ("w_q", "w_k", "w_v"), state.conv, x, **masks, how=how)
        q, k, v = l2_norm(heads(q, self.heads)), l2_norm(heads(k, self.heads)), heads(v, self.hv)
        # beta = sigmoid(x W_b), g = -exp(A_log) softplus(x W_f1 W_f2 + dt_bias), from the unconvolved x and in float32
        beta = jax.nn.sigmoid(gate(x, params["w_b"])) * (2 if self.allow_neg_eigval else 1)
        log_decay = self.log_decay(params, x)
        # S_t = diag(e^g) S_{t-1} + k u^T, o = k**-0.5 S^T q
        q = q * self.head_dim**-0.5
        o, S = delta_rule(q, k, v, beta, log_decay, initial_state=state.S, **masks, implementation=how.implementation)
        return o, KDAState(S, conv)
