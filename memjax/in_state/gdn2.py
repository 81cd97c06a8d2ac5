"""Gated DeltaNet-2: Kimi Delta Attention in which what is erased and what is written are chosen apart, per channel.

In place of the one rate beta, an erase gate says how much each key channel takes away of what it recalls, and a write
gate how much of each value channel is written.

Paper: Gated DeltaNet-2: decoupling erase and write in linear attention, arXiv 2605.22791 (2026).

State:  S [b h k v] float32, the associations of each value head; conv, the last rows before the convolution.
Update: Sbar = diag(e^{g_t}) S_{t-1};  u_t = w_t * v_t - Sbar^T (b_t * k_t);  S_t = Sbar + k_t u_t^T
        o_t = k**-0.5 S_t^T q_t
        b_t = sigmoid(x_t W_b);  w_t = sigmoid(x_t W_w);  g_t = -exp(A_log) softplus(x_t W_f1 W_f2 + dt_bias), or with a
        lower bound l < 0  g_t = l sigmoid(exp(A_log) (x_t W_f1 W_f2 + dt_bias))

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

from memjax.heads import GroupedValues
from memjax.layers import gate, heads, l2_norm, linear, row
from memjax.memory import How, Param, constant, dense, specs
from memjax.recurrence import convolved, gated_output, inverse_softplus_of_dt, log_rate
from memjax.tensors import matrix, same
from pallas_kernels.delta_rule import IMPLEMENTATIONS, delta_rule


class GatedDeltaNet2State(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of q, k, v before the convolution


@dataclass(frozen=True)
class GatedDeltaNet2(GroupedValues):
    """Gated DeltaNet-2 over x [b, t, dim].

    heads, v_heads, head_dim, expand_v, conv_size: those of `GroupedValues`; decays and erase gates belong to the key
    heads, write gates to the value heads. allow_neg_eigval: the erase gate runs from 0 to 2 instead of 1, so that a
    write can flip an association. lower_bound: the least log decay, from -5 to 0, approached by a sigmoid (None: a
    softplus, without a bound).
    """

    heads: int = 16
    head_dim: int = 128
    expand_v: float = 1.0
    allow_neg_eigval: bool = False
    lower_bound: float | None = None

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_f1", "w_f2", "w_b", "w_w")

    def __post_init__(self):
        super().__post_init__()
        if self.lower_bound is not None and not -5 <= self.lower_bound < 0:
            raise ValueError(
                f"GatedDeltaNet2: lower_bound is {self.lower_bound}, needs a log decay of at least -5 and below 0"
            )

    def param_specs(self):
        d, (_, k, v), low = self.dim, self.qkv, self.v
        A_log = log_rate() if self.lower_bound is None else constant(0)
        return {
            **super().param_specs(),  # w_q, w_k, w_v, w_o, conv, norm
            "w_b": dense(d, k, kind="gate"),
            "w_w": dense(d, v, kind="gate"),
            "w_f1": dense(d, low, ("model", None), "gate"),
            "w_f2": dense(low, k, (None, "heads"), "gate"),
            "A_log": Param((self.heads,), ("heads",), A_log, "gate"),
            "dt_bias": Param((k,), ("heads",), inverse_softplus_of_dt, "gate"),
            "w_g1": dense(d, low, ("model", None)),
            "w_g2": dense(low, v, (None, "heads")),
            "b_g": Param((v,), ("heads",), constant(0), "vector"),
        }

    def state_specs(self, batch):
        return specs(GatedDeltaNet2State, **self.slots(batch))

    def tensors(self):
        return {
            **super().tensors(),
            "w_b": matrix("b_proj.weight"),
            "w_w": matrix("w_proj.weight"),
            "w_f1": matrix("f_proj.0.weight"),
            "w_f2": matrix("f_proj.1.weight"),
            "A_log": same("A_log"),
            "dt_bias": same("dt_bias"),
            "w_g1": matrix("g_proj.0.weight"),
            "w_g2": matrix("g_proj.1.weight"),
            "b_g": same("g_proj.1.bias"),
            "norm": same("o_norm.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k, v = silu(conv(x W)), then q and k of length 1
        (q, k, v), conv = convolved(params, ("w_q", "w_k", "w_v"), state.conv, x, **masks, how=how)
        q, k, v = l2_norm(heads(q, self.heads)), l2_norm(heads(k, self.heads)), heads(v, self.hv)
        # b = sigmoid(x W_b), w = sigmoid(x W_w), from the unconvolved x and in float32
        b = jax.nn.sigmoid(heads(gate(x, params["w_b"]), self.heads)) * (2 if self.allow_neg_eigval else 1)
        w = jax.nn.sigmoid(heads(gate(x, params["w_w"]), self.hv))
        # g = -exp(A_log) softplus(x W_f1 W_f2 + dt_bias)
        f = heads(gate(linear(x, params["w_f1"]), params["w_f2"], params["dt_bias"]), self.heads)
        rate, least = jnp.exp(row(params["A_log"][:, None], f)), self.lower_bound
        g = -rate * jax.nn.softplus(f) if least is None else least * jax.nn.sigmoid(rate * f)
        # S_t = diag(e^g) S_{t-1} + k u^T, o = k**-0.5 S^T q
        q = q * self.head_dim**-0.5
        b, g = (jnp.repeat(a, self.hv // self.heads, 2) for a in (b, g))
        o, S = delta_rule(
            q,
            k,
            v,
            None,
            g,
            erase=b,
            write=w,
            initial_state=state.S,
            **masks,
            implementation=how.implementation,
        )
        return o, GatedDeltaNet2State(S, conv)

    def output(self, params, o, x):
        # y = W_o (RMSNorm(o) * sigmoid(x W_g1 W_g2 + b_g))
        z = jax.nn.sigmoid(linear(linear(x, params["w_g1"]), params["w_g2"], params["b_g"]))
        return gated_output(params, o, self.norm_eps, z)
