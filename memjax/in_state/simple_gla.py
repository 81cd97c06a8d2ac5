"""Simple gated linear attention: every head of linear attention fades by one gate, a number that the token decides.

It is RetNet with learned rates, or GLA with one gate for all the key channels of a head: the chunked form needs no
decay per channel, so it costs as much as linear attention.

Papers: Yang, Wang, Shen, Panda, Kim, Gated linear attention transformers with hardware-efficient training,
arXiv 2312.06635 (2023), with the gate per head of Dao and Gu, Transformers are SSMs, arXiv 2405.21060 (2024).

State:  S [b h k v] float32, the associations of each head; conv, the last rows before the optional convolution.
Update: S_t = e^{g_t} S_{t-1} + k_t v_t^T;  o_t = k**-0.5 S_t^T q_t
        g_t = logsigmoid(x_t W_gk + b_gk) / 16, a number per head

Differs from the papers: neither has this layer. The sheet (retnet.md) gives the recurrence only and leaves open all
around it: projections, convolution, the gate with its bias and divisor, norm and output gate are those of the layer
SimpleGatedLinearAttention of flash-linear-attention.
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


class SimpleGatedLinearAttentionState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"] | tuple[()] = ()  # float32, the last conv_size - 1 rows of q, k, v; () without one


@dataclass(frozen=True)
class SimpleGatedLinearAttention(GroupedQueries):
    """Simple gated linear attention over x [b, t, dim].

    heads, kv_heads, expand_k, expand_v: those of `GroupedQueries`; each query head fades by a gate of its own.
    gate_logit_normalizer divides the log decay: 16 puts fresh decays near 0.96. use_short_conv: q, k and v pass a
    causal convolution of width conv_size and silu.
    """

    heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    gate_logit_normalizer: float = 16.0
    use_short_conv: bool = True
    conv_size: int = 4

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_gk", "b_gk")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 2, "conv_size")
        if self.gate_logit_normalizer <= 0:
            raise ValueError(
                f"SimpleGatedLinearAttention: gate_logit_normalizer is {self.gate_logit_normalizer}, needs > 0"
            )

    def param_specs(self):
        return {
            **super().param_specs(),  # w_q, w_k, w_v, w_o, conv, norm
            "w_gk": dense(self.dim, self.heads, kind="gate"),
            "b_gk": Param((self.heads,), ("heads",), constant(0), "gate"),
            "w_g": dense(self.dim, self.heads * self.v),
        }

    def state_specs(self, batch):
        return specs(SimpleGatedLinearAttentionState, **self.slots(batch))

    def tensors(self):
        return {
            **super().tensors(),
            "w_gk": matrix("gk_proj.weight"),
            "b_gk": same("gk_proj.bias"),
            "w_g": matrix("g_proj.weight"),
            "norm": same("g_norm_swish_gate.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k, v = silu(conv(x W)), or x W without an activation
        (q, k, v), conv = convolved(params, ("w_q", "w_k", "w_v"), state.conv, x, **masks, how=how)
        # g = logsigmoid(x W_gk + b) / 16, in float32
        log_decay = jax.nn.log_sigmoid(gate(x, params["w_gk"], params["b_gk"])) / self.gate_logit_normalizer
        # S_t = e^g S_{t-1} + k v^T, o = k**-0.5 S^T q
        q = heads(q, self.heads) * self.k**-0.5
        k, v = (jnp.repeat(heads(a, self.hkv), self.heads // self.hkv, 2) for a in (k, v))
        o, S = linear_attention(q, k, v, log_decay, initial_state=state.S, **masks, implementation=how.implementation)
        return o, SimpleGatedLinearAttentionState(S, conv)

    def output(self, params, o, x):
        # y = W_o (RMSNorm(o) * silu(x W_g))
        return gated_output(params, o, self.norm_eps, jax.nn.silu(linear(x, params["w_g"])))
