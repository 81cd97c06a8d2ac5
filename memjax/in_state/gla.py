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

from memjax.layers import gate, heads, linear
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import Recurrence, conv_weight, convolved, gated_output
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention


class GatedLinearAttentionState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"] | tuple[()] = ()  # float32, the last conv_size - 1 rows of q, k, v; () without one


@dataclass(frozen=True)
class GatedLinearAttention(Recurrence):
    """Gated linear attention over x [b, t, dim].

    kv_heads: heads of k, v and the decay, a divisor of `heads` (None: as many); query head j reads kv head
    j // (heads / kv_heads). Keys have dim * expand_k channels over all `heads`, values dim * expand_v.
    gate_low_rank_dim: rank of the projection to the decay. gate_logit_normalizer divides the log decay: 16 puts fresh
    decays near 0.96. clamp_min: the least log decay (None: no limit).
    use_short_conv: q, k and v pass a causal convolution of width conv_size and silu. use_gate: the output is multiplied
    by silu(x W_g).
    """

    dim: int
    heads: int = 4
    kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float = 16.0
    clamp_min: float | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_gate: bool = True
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_gk1", "w_gk2", "b_gk")

    def __post_init__(self):
        at_least(self, 1, "dim", "heads", "gate_low_rank_dim")
        at_least(self, 2, "conv_size")
        for name in ("expand_k", "expand_v"):
            width = self.dim * getattr(self, name)
            if width < 1 or width % self.heads:
                raise ValueError(
                    f"GatedLinearAttention: {name} is {getattr(self, name)}, needs dim * {name} (here {width:g}) "
                    f"to be a multiple of heads = {self.heads}"
                )
        if self.hkv < 1 or self.heads % self.hkv:
            raise ValueError(
                f"GatedLinearAttention: kv_heads is {self.kv_heads}, needs a divisor of heads = {self.heads}"
            )
        if self.gate_logit_normalizer <= 0:
            raise ValueError(f"GatedLinearAttention: gate_logit_normalizer is {self.gate_logit_normalizer}, needs > 0")
        if self.clamp_min is not None and self.clamp_min > 0:
            raise ValueError(f"GatedLinearAttention: clamp_min is {self.clamp_min}, needs a log decay <= 0")

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
        d, (q, k, v), low, o = self.dim, self.qkv, self.gate_low_rank_dim, self.heads * self.v
        w_g = {"w_g": dense(d, o)} if self.use_gate else {}
        return {
            "w_q": dense(d, q),
            "w_k": dense(d, k),
            "w_v": dense(d, v),
            **w_g,
            "w_o": dense(o, d, ("heads", "model")),
            "w_gk1": dense(d, low, ("model", None), "gate"),
            "w_gk2": dense(low, k, (None, "heads"), "gate"),
            "b_gk": Param((k,), ("heads",), constant(0), "gate"),
            **({"conv": conv_weight(self.conv_size, q + k + v)} if self.use_short_conv else {}),
            "norm": Param((self.v,), ("value",), constant(1), "vector"),
        }

    def state_specs(self, batch):
        S = Slot((batch, self.heads, self.k, self.v), ("batch", "heads", "key", "value"))
        if not self.use_short_conv:
            return specs(GatedLinearAttentionState, S=S)
        conv = Slot((batch, self.conv_size - 1, sum(self.qkv)), ("batch", None, None))
        return specs(GatedLinearAttentionState, S=S, conv=conv)

    def tensors(self):
        conv = depthwise(*((f"{n}_conv1d.weight", width) for n, width in zip("qkv", self.qkv, strict=True)))
        w_g = {"w_g": matrix("g_proj.weight")} if self.use_gate else {}
        return {
            "w_q": matrix("q_proj.weight"),
            "w_k": matrix("k_proj.weight"),
            "w_v": matrix("v_proj.weight"),
            **w_g,
            "w_o": matrix("o_proj.weight"),
            "w_gk1": matrix("gk_proj.0.weight"),
            "w_gk2": matrix("gk_proj.1.weight"),
            "b_gk": same("gk_proj.1.bias"),
            **({"conv": conv} if self.use_short_conv else {}),
            "norm": same("g_norm_swish_gate.weight" if self.use_gate else "g_norm.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k, v = x W, without an activation, or silu(conv(x W))
        names, conv = ("w_q", "w_k", "w_v"), state.conv
        if self.use_short_conv:
            (q, k, v), conv = convolved(params, names, conv, x, **masks, how=how)
        else:
            q, k, v = (linear(x, params[w]) for w in names)
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
