"""RetNet: linear attention whose every head fades at one fixed rate, from fast to slow over the heads.

Retention multiplies the state of head h by 1 - 2**(-5-h) at every token, and rotates q and k by their position. The
rates are constants: nothing that is read can make it keep or drop anything.

Paper: Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei, Retentive network: a successor to transformer for large language
models, arXiv 2307.08621 (2023).

State:  S [b h k v] float32, the associations of each head; count [b] int32, the position of the next token; conv, the
        last rows before the optional convolution.
Update: S_t = gamma_h S_{t-1} + k_t v_t^T;  o_t = k**-0.5 S_t^T q_t;  gamma_h = 1 - 2**(-5-h), h = 0, 1, ...

Differs from the paper: q and k turn by plain rotary positions instead of xPos, and each head has an RMSNorm instead of
a group norm and normalised scores, as in flash-linear-attention; so do the optional convolution and the shared
key-value heads come from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from memjax.heads import GroupedQueries
from memjax.layers import heads, linear, positions, rotary, wide
from memjax.memory import How, Slot, at_least, dense, specs
from memjax.recurrence import convolved, gated_output
from memjax.tensors import matrix, same
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention


class RetNetState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    count: Int[Array, " b"]  # valid tokens since the document began
    conv: Float[Array, "b w c"] | tuple[()] = ()  # float32, the last conv_size - 1 rows of q, k, v; () without one


@dataclass(frozen=True)
class RetNet(GroupedQueries):
    """Multi-scale retention over x [b, t, dim].

    heads, kv_heads, expand_k, expand_v: those of `GroupedQueries`; each key has an even number of channels. theta: base
    of the rotary frequencies. use_short_conv: q, k and v pass a causal convolution of width conv_size and silu.
    use_gate: the output is multiplied by silu(x W_g).
    """

    heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 2.0
    theta: float = 10_000.0
    use_short_conv: bool = False
    conv_size: int = 4
    use_gate: bool = True

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 2, "conv_size")
        if self.k % 2:
            raise ValueError(
                f"RetNet: expand_k is {self.expand_k}, needs dim * expand_k (here {self.heads * self.k}) "
                f"to be a multiple of {2 * self.heads}, twice the heads"
            )
        if self.theta <= 0:
            raise ValueError(f"RetNet: theta is {self.theta}, needs > 0")

    @property
    def log_decay(self) -> np.ndarray:
        """log gamma [heads], float64."""
        return np.log1p(-(2.0 ** -(5.0 + np.arange(self.heads))))

    def param_specs(self):
        return {
            **super().param_specs(),  # w_q, w_k, w_v, w_o, conv, norm
            **({"w_g": dense(self.dim, self.heads * self.v)} if self.use_gate else {}),
        }

    def state_specs(self, batch):
        return specs(RetNetState, count=Slot((batch,), ("batch",), jnp.int32), **self.slots(batch))

    def tensors(self):
        return {
            **super().tensors(),
            **({"w_g": matrix("g_proj.weight")} if self.use_gate else {}),
            "norm": same("g_norm_swish_gate.weight" if self.use_gate else "g_norm.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k, v = x W, without an activation, or silu(conv(x W))
        (q, k, v), conv = convolved(params, ("w_q", "w_k", "w_v"), state.conv, x, **masks, how=how)
        # q and k turned by their positions in the document
        position, count = positions(state.count, x.shape[1], **masks)
        q = rotary(heads(q, self.heads), position, self.theta) * self.k**-0.5
        k = rotary(heads(k, self.hkv), position, self.theta)
        k, v = (jnp.repeat(a, self.heads // self.hkv, 2) for a in (k, heads(v, self.hkv)))
        # S_t = gamma S_{t-1} + k v^T, o = k**-0.5 S^T q
        log_decay = jnp.broadcast_to(jnp.asarray(self.log_decay, wide(x).dtype), (*x.shape[:2], self.heads))
        o, S = linear_attention(q, k, v, log_decay, initial_state=state.S, **masks, implementation=how.implementation)
        return o, RetNetState(S, count, conv)

    def output(self, params, o, x):
        # y = W_o (RMSNorm(o) * silu(x W_g))
        z = jax.nn.silu(linear(x, params["w_g"])) if self.use_gate else None
        return gated_output(params, o, self.norm_eps, z)
