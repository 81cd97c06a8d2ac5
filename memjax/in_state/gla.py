"""Gated linear attention (GLA): linear attention whose state rows fade by gates of their own.

Every key channel has a data-dependent decay, so the state can keep some features and drop others. Writes are additive:
it can't erase one association without fading its whole row.

Paper: Yang, Wang, Shen, Panda, Kim, Gated linear attention transformers with hardware-efficient training,
arXiv 2312.06635 (2023).

State:  S [b h k v] float32, the associations of each head; conv, the last rows before the optional convolution.
Update: S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T;  o_t = k**-0.5 S_t^T q_t
        g_t = logsigmoid(x_t W_gk1 W_gk2 + b_gk) / 16

Differs from the paper: nothing. The optional convolution and the shared key-value heads are those of
flash-linear-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from memjax.heads import GroupedQueries
from memjax.layers import gate, heads, linear
from memjax.memory import How, Param, at_least, constant, dense, specs
from memjax.recurrence import convolved, gated_output
from memjax.tensors import matrix, same
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention


class GatedLinearAttentionState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"] | tuple[()] = ()  # float32, the last conv_size - 1 rows of q, k, v; () without one


@dataclass(frozen=True)
class GatedLinearAttention(GroupedQueries):
    """Gated linear attention over x [b, t, dim].

    heads, kv_heads, expand_k, expand_v: those of `GroupedQueries`; decays belong to the heads of k and v.
    gate_low_rank_dim: rank of the projection to the decay. gate_logit_normalizer divides the log decay: 16 puts fresh
    decays near 0.96. clamp_min: the least log decay (None: no limit).
    use_short_conv: q, k and v pass a causal convolution of width conv_size and silu. use_gate: the output is multiplied
    by silu(x W_g).
    """

    heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float = 16.0
    clamp_min: float | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_gate: bool = True

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_gk1", "w_gk2", "b_gk")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "gate_low_rank_dim")
        at_least(self, 2, "conv_size")
        if self.gate_logit_normalizer <= 0:
            raise ValueError(f"GatedLinearAttention: gate_logit_normalizer is {self.gate_logit_normalizer}, needs > 0")
        if self.clamp_min is not None and self.clamp_min > 0:
            raise ValueError(f"GatedLinearAttention: clamp_min is {self.clamp_min}, needs a log decay <= 0")

    def param_specs(self):
        d, k, low = self.dim, self.hkv * self.k, self.gate_low_rank_dim
        return {
            **super().param_specs(),  # w_q, w_k, w_v, w_o, conv, norm
            "w_gk1": dense(d, low, ("model", None), "gate"),
            "w_gk2": dense(low, k, (None, "heads"), "gate"),
            "b_gk": Param((k,), ("heads",), constant(0), "gate"),
            **({"w_g": dense(d, self.heads * self.v)} if self.use_gate else {}),
        }

    def state_specs(self, batch):
        return specs(GatedLinearAttentionState, **self.slots(batch))

    def tensors(self):
        return {
            **super().tensors(),
            "w_gk1": matrix("gk_proj.0.weight"),
            "w_gk2": matrix("gk_proj.1.weight"),
            "b_gk": same("gk_proj.1.bias"),
            **({"w_g": matrix("g_proj.weight")} if self.use_gate else {}),
            "norm": same("g_norm_swish_gate.weight" if self.use_gate else "g_norm.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k, v = x W, without an activation, or silu(conv(x W))
        (q, k, v), conv = convolved(params, ("w_q", "w_k", "w_v"), state.conv, x, **masks, how=how)
        # g = logsigmoid(x W_gk1 W_gk2 + b) / 16, in float32
        logits = gate(linear(x, params["w_gk1"]), params["w_gk2"], params["b_gk"])
        log_decay = jax.nn.log_sigmoid(logits) / self.gate_logit_normalizer
        if self.clamp_min is not None:
            log_decay = jnp.maximum(log_decay, self.clamp_min)
        # S_t = diag(e^g) S_{t-1} + k v^T, o = k**-0.5 S^T q
        q = heads(q, self.heads) * self.k**-0.5
        k, v, log_decay = (jnp.repeat(heads(a, self.hkv), self.heads // self.hkv, 2) for a in (k, v, log_decay))
        o, S = linear_attention(q, k, v, log_decay, initial_state=state.S, **masks, implementation=how.implementation)
        return o, GatedLinearAttentionState(S, conv)

    def output(self, params, o, x):
        # y = W_o (RMSNorm(o) * silu(x W_g))
        z = jax.nn.silu(linear(x, params["w_g"])) if self.use_gate else None
        return gated_output(params, o, self.norm_eps, z)
