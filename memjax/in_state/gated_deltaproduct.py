"""Gated DeltaProduct: Gated DeltaNet that writes several associations at every token.

Each write is a generalised Householder reflection of the state, and the product of n of them turns it: with beta up to
2 the memory follows permutations and rotations that one write can't, and so keeps track of the state of a machine.

Paper: Siems, Carstensen, Zela, Hutter, Pontil, Grazzi, DeltaProduct: improving state-tracking in linear RNNs via
Householder products, arXiv 2502.10297 (2025).

State:  S [b h k v] float32, the associations of each value head; conv, the last rows before the convolution.
Update: S <- e^{g_t} S;  then for j = 1..n:  S <- S + beta_{t,j} k_{t,j} (v_{t,j} - S^T k_{t,j})^T
        o_t = k**-0.5 S^T q_t
        g_t = -exp(A_log) softplus(x_t W_a + dt_bias);  beta_{t,j} = 2 sigmoid(x_t W_b)_j

Differs from the paper: nothing. The order of the n writes among the columns of W_k, W_v and W_b is that of
flash-linear-attention.
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
from memjax.memory import How, Param, at_least, dense, specs
from memjax.recurrence import convolved, gated_output, inverse_softplus_of_dt, log_rate
from memjax.tensors import matrix, same
from pallas_kernels.delta_rule import IMPLEMENTATIONS, delta_rule


class GatedDeltaProductState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of q, k, v before the convolution


@dataclass(frozen=True)
class GatedDeltaProduct(GroupedValues):
    """Gated DeltaProduct over x [b, t, dim].

    heads, v_heads, head_dim, expand_v, conv_size: those of `GroupedValues`; the convolution runs over tokens.
    num_householder: writes a token. use_forget_gate: the state is multiplied by e^{g_t} once a token. allow_neg_eigval:
    beta runs from 0 to 2 instead of 1. use_gate: the output is multiplied by silu(x W_g).
    """

    heads: int = 6
    head_dim: int = 256
    expand_v: float = 2.0
    num_householder: int = 2
    use_forget_gate: bool = True
    allow_neg_eigval: bool = True
    use_gate: bool = True

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "num_householder")

    @property
    def own(self) -> tuple[str, ...]:
        return ("w_k", "w_v", "w_a", "w_b") if self.use_forget_gate else ("w_k", "w_v", "w_b")

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Widths of q, and of k and v for all writes of a token."""
        q, k, v = super().qkv
        return q, self.num_householder * k, self.num_householder * v

    def param_specs(self):
        d, hv = self.dim, self.hv
        forget = {
            "w_a": dense(d, hv, kind="gate"),
            "A_log": Param((hv,), ("heads",), log_rate(1e-4), "gate"),
            "dt_bias": Param((hv,), ("heads",), inverse_softplus_of_dt, "gate"),
        }
        return {
            **super().param_specs(),  # w_q, w_k, w_v, w_o, conv, norm
            **(forget if self.use_forget_gate else {}),
            "w_b": dense(d, self.num_householder * hv, kind="gate"),
            **({"w_g": dense(d, hv * self.v)} if self.use_gate else {}),
        }

    def state_specs(self, batch):
        return specs(GatedDeltaProductState, **self.slots(batch))

    def tensors(self):
        forget = {"w_a": matrix("a_proj.weight"), "A_log": same("A_log"), "dt_bias": same("dt_bias")}
        return {
            **super().tensors(),
            **(forget if self.use_forget_gate else {}),
            "w_b": matrix("b_proj.weight"),
            **({"w_g": matrix("g_proj.weight")} if self.use_gate else {}),
            "norm": same("o_norm.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        n, (b, t, _) = self.num_householder, x.shape
        # q, k, v = silu(conv(x W)), then q and every k of length 1; columns n h k of a token are its n rows of h k
        (q, k, v), conv = convolved(params, ("w_q", "w_k", "w_v"), state.conv, x, **masks, how=how)
        q, k = l2_norm(heads(q, self.heads)), l2_norm(k.reshape(b, t * n, self.heads, self.head_dim))
        v = v.reshape(b, t * n, self.hv, self.v)
        # beta = 2 sigmoid(x W_b), g = -exp(A_log) softplus(x W_a + dt_bias), both from the unconvolved x, in float32
        beta = jax.nn.sigmoid(gate(x, params["w_b"])) * (2 if self.allow_neg_eigval else 1)
        beta, log_decay = beta.reshape(b, t * n, self.hv), None
        if self.use_forget_gate:
            dt = jax.nn.softplus(gate(x, params["w_a"], params["dt_bias"]))
            log_decay = -jnp.exp(row(params["A_log"], dt)) * dt
        # S <- e^g S, then n times S <- S + k u^T, o = k**-0.5 S^T q
        q = q * self.head_dim**-0.5
        o, S = delta_rule(
            q,
            k,
            v,
            beta,
            log_decay,
            num_householder=n,
            initial_state=state.S,
            **masks,
            implementation=how.implementation,
        )
        return o, GatedDeltaProductState(S, conv)

    def output(self, params, o, x):
        # y = W_o (RMSNorm(o) * silu(x W_g))
        z = jax.nn.silu(linear(x, params["w_g"])) if self.use_gate else None
        return gated_output(params, o, self.norm_eps, z)
