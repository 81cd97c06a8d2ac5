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

from memjax.layers import heads, linear, positions, rotary, wide
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import Recurrence, conv_weight, convolved, gated_output
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention


class RetNetState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    count: Int[Array, " b"]  # valid tokens since the document began
    conv: Float[Array, "b w c"] | tuple[()] = ()  # float32, the last conv_size - 1 rows of q, k, v; () without one


@dataclass(frozen=True)
class RetNet(Recurrence):
    """Multi-scale retention over x [b, t, dim].

    kv_heads: heads of k and v, a divisor of `heads` (None: as many); query head j reads kv head
    j // (heads / kv_heads). Keys have dim * expand_k channels over all `heads`, an even number in each, values
    dim * expand_v. theta: base of the rotary frequencies. use_short_conv: q, k and v pass a causal convolution of width
    conv_size and silu. use_gate: the output is multiplied by silu(x W_g).
    """

    dim: int
    heads: int = 8
    kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 2.0
    theta: float = 10_000.0
    use_short_conv: bool = False
    conv_size: int = 4
    use_gate: bool = True
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v")

    def __post_init__(self):
        at_least(self, 1, "dim", "heads")
        at_least(self, 2, "conv_size")
        for name, least in (("expand_k", 2 * self.heads), ("expand_v", self.heads)):
            width = self.dim * getattr(self, name)
            if width < 1 or width % least:
                raise ValueError(
                    f"RetNet: {name} is {getattr(self, name)}, needs dim * {name} (here {width:g}) "
                    f"to be a multiple of {least}"
                )
        if self.hkv < 1 or self.heads % self.hkv:
            raise ValueError(f"RetNet: kv_heads is {self.kv_heads}, needs a divisor of heads = {self.heads}")
        if self.theta <= 0:
            raise ValueError(f"RetNet: theta is {self.theta}, needs > 0")

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

    @property
    def log_decay(self) -> np.ndarray:
        """log gamma [heads], float64."""
        return np.log1p(-(2.0 ** -(5.0 + np.arange(self.heads))))

    def param_specs(self):
        d, (q, k, v), o = self.dim, self.qkv, self.heads * self.v
        return {
            "w_q": dense(d, q),
            "w_k": dense(d, k),
            "w_v": dense(d, v),
            **({"w_g": dense(d, o)} if self.use_gate else {}),
            "w_o": dense(o, d, ("heads", "model")),
            **({"conv": conv_weight(self.conv_size, q + k + v)} if self.use_short_conv else {}),
            "norm": Param((self.v,), ("value",), constant(1), "vector"),
        }

    def state_specs(self, batch):
        S = Slot((batch, self.heads, self.k, self.v), ("batch", "heads", "key", "value"))
        count = Slot((batch,), ("batch",), jnp.int32)
        if not self.use_short_conv:
            return specs(RetNetState, S=S, count=count)
        conv = Slot((batch, self.conv_size - 1, sum(self.qkv)), ("batch", None, None))
        return specs(RetNetState, S=S, count=count, conv=conv)

    def tensors(self):
        conv = depthwise(*((f"{n}_conv1d.weight", width) for n, width in zip("qkv", self.qkv, strict=True)))
        return {
            "w_q": matrix("q_proj.weight"),
            "w_k": matrix("k_proj.weight"),
            "w_v": matrix("v_proj.weight"),
            **({"w_g": matrix("g_proj.weight")} if self.use_gate else {}),
            "w_o": matrix("o_proj.weight"),
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
