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

from memjax.layers import gate, heads, linear
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import Recurrence, conv_weight, convolved, gated_output
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention


class SimpleGatedLinearAttentionState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"] | tuple[()] = ()  # float32, the last conv_size - 1 rows of q, k, v; () without one


@dataclass(frozen=True)
class SimpleGatedLinearAttention(Recurrence):
    """Simple gated linear attention over x [b, t, dim].

    kv_heads: heads of k and v, a divisor of `heads` (None: as many); query head j reads kv head
    j // (heads / kv_heads), and fades by a gate of its own. Keys have dim * expand_k channels over all `heads`, values
    dim * expand_v. gate_logit_normalizer divides the log decay: 16 puts fresh decays near 0.96. use_short_conv: q, k
    and v pass a causal convolution of width conv_size and silu.
    """

    dim: int
    heads: int = 4
    kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    gate_logit_normalizer: float = 16.0
    use_short_conv: bool = True
    conv_size: int = 4
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_gk", "b_gk")

    def __post_init__(self):
        at_least(self, 1, "dim", "heads")
        at_least(self, 2, "conv_size")
        for name in ("expand_k", "expand_v"):
            width = self.dim * getattr(self, name)
            if width < 1 or width % self.heads:
                raise ValueError(
                    f"SimpleGatedLinearAttention: {name} is {getattr(self, name)}, needs dim * {name} (here {width:g}) "
                    f"to be a multiple of heads = {self.heads}"
                )
        if self.hkv < 1 or self.heads % self.hkv:
            raise ValueError(
                f"SimpleGatedLinearAttention: kv_heads is {self.kv_heads}, needs a divisor of heads = {self.heads}"
            )
        if self.gate_logit_normalizer <= 0:
            raise ValueError(
                f"SimpleGatedLinearAttention: gate_logit_normalizer is {self.gate_logit_normalizer}, needs > 0"
            )

    @property
    def hkv(self) -> int:
        """Heads of k and v."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def k(self) -> int:
        """Width of a key head."""
        return int(self.dim * self.expand_k) // self.heads

    @property
    def v(self) -> int:
        """Width of a value head."""
        return int(self.dim * self.expand_v) // self.heads

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Widths of q, k and v."""
        return self.heads * self.k, self.hkv * self.k, self.hkv * self.v

    def param_specs(self):
        d, (q, k, v), o = self.dim, self.qkv, self.heads * self.v
        return {
            "w_q": dense(d, q),
            "w_k": dense(d, k),
            "w_v": dense(d, v),
            "w_g": dense(d, o),
            "w_o": dense(o, d, ("heads", "model")),
            "w_gk": dense(d, self.heads, kind="gate"),
            "b_gk": Param((self.heads,), ("heads",), constant(0), "gate"),
            **({"conv": conv_weight(self.conv_size, q + k + v)} if self.use_short_conv else {}),
            "norm": Param((self.v,), ("value",), constant(1), "vector"),
        }

    def state_specs(self, batch):
        S = Slot((batch, self.heads, self.k, self.v), ("batch", "heads", "key", "value"))
        if not self.use_short_conv:
            return specs(SimpleGatedLinearAttentionState, S=S)
        conv = Slot((batch, self.conv_size - 1, sum(self.qkv)), ("batch", None, None))
        return specs(SimpleGatedLinearAttentionState, S=S, conv=conv)

    def tensors(self):
        conv = depthwise(*((f"{n}_conv1d.weight", width) for n, width in zip("qkv", self.qkv, strict=True)))
        return {
            "w_q": matrix("q_proj.weight"),
            "w_k": matrix("k_proj.weight"),
            "w_v": matrix("v_proj.weight"),
            "w_g": matrix("g_proj.weight"),
            "w_o": matrix("o_proj.weight"),
            "w_gk": matrix("gk_proj.weight"),
            "b_gk": same("gk_proj.bias"),
            **({"conv": conv} if self.use_short_conv else {}),
            "norm": same("g_norm_swish_gate.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k, v = silu(conv(x W)), or x W without an activation
        names, conv = ("w_q", "w_k", "w_v"), state.conv
        if self.use_short_conv:
            (q, k, v), conv = convolved(params, names, conv, x, **masks, how=how)
        else:
            q, k, v = (linear(x, params[w]) for w in names)
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
