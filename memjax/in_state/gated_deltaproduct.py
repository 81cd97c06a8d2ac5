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

from memjax.layers import gate, heads, l2_norm, linear, row
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import Recurrence, conv_weight, convolved, gated_output, inverse_softplus_of_dt, log_rate
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.delta_rule import IMPLEMENTATIONS, delta_rule


class GatedDeltaProductState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of q, k, v before the convolution


@dataclass(frozen=True)
class GatedDeltaProduct(Recurrence):
    """Gated DeltaProduct over x [b, t, dim].

    num_householder: writes a token. heads: query and key heads. v_heads: value heads, a multiple of `heads` (None: as
    many); value head j reads with key head j // (v_heads / heads), and each has its own state
    [head_dim, head_dim * expand_v]. conv_size: width of the causal convolution on q, k and v, which runs over tokens.
    use_forget_gate: the state is multiplied by e^{g_t} once a token. allow_neg_eigval: beta runs from 0 to 2 instead of
    1. use_gate: the output is multiplied by silu(x W_g).
    """

    dim: int
    heads: int = 6
    v_heads: int | None = None
    head_dim: int = 256
    expand_v: float = 2.0
    num_householder: int = 2
    conv_size: int = 4
    use_forget_gate: bool = True
    allow_neg_eigval: bool = True
    use_gate: bool = True
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS

    def __post_init__(self):
        at_least(self, 1, "dim", "heads", "head_dim", "num_householder")
        at_least(self, 2, "conv_size")
        if self.hv < 1 or self.hv % self.heads:
            raise ValueError(f"GatedDeltaProduct: v_heads is {self.v_heads}, needs a multiple of heads = {self.heads}")
        if self.v < 1 or self.v != self.head_dim * self.expand_v:
            width = f"{self.head_dim} * {self.expand_v}"
            raise ValueError(
                f"GatedDeltaProduct: expand_v is {self.expand_v}, needs head_dim * expand_v = {width} to be whole"
            )

    @property
    def own(self) -> tuple[str, ...]:
        return ("w_k", "w_v", "w_a", "w_b") if self.use_forget_gate else ("w_k", "w_v", "w_b")

    @property
    def hv(self) -> int:
        """Value heads."""
        return self.heads if self.v_heads is None else self.v_heads

    @property
    def v(self) -> int:
        """Width of a value head."""
        return int(self.head_dim * self.expand_v)

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Widths of q, and of k and v for all writes of a token."""
        n, k = self.num_householder, self.heads * self.head_dim
        return k, n * k, n * self.hv * self.v

    def param_specs(self):
        d, (q, k, v), hv, n, o = self.dim, self.qkv, self.hv, self.num_householder, self.hv * self.v
        forget = {
            "w_a": dense(d, hv, kind="gate"),
            "A_log": Param((hv,), ("heads",), log_rate(1e-4), "gate"),
            "dt_bias": Param((hv,), ("heads",), inverse_softplus_of_dt, "gate"),
        }
        return {
            "w_q": dense(d, q),
            "w_k": dense(d, k),
            "w_v": dense(d, v),
            "w_b": dense(d, n * hv, kind="gate"),
            **(forget if self.use_forget_gate else {}),
            **({"w_g": dense(d, o)} if self.use_gate else {}),
            "w_o": dense(o, d, ("heads", "model")),
            "conv": conv_weight(self.conv_size, q + k + v),
            "norm": Param((self.v,), ("value",), constant(1), "vector"),
        }

    def state_specs(self, batch):
        S = Slot((batch, self.hv, self.head_dim, self.v), ("batch", "heads", "key", "value"))
        conv = Slot((batch, self.conv_size - 1, sum(self.qkv)), ("batch", None, None))
        return specs(GatedDeltaProductState, S=S, conv=conv)

    def tensors(self):
        forget = {"w_a": matrix("a_proj.weight"), "A_log": same("A_log"), "dt_bias": same("dt_bias")}
        return {
            "w_q": matrix("q_proj.weight"),
            "w_k": matrix("k_proj.weight"),
            "w_v": matrix("v_proj.weight"),
            "w_b": matrix("b_proj.weight"),
            **(forget if self.use_forget_gate else {}),
            **({"w_g": matrix("g_proj.weight")} if self.use_gate else {}),
            "w_o": matrix("o_proj.weight"),
            "conv": depthwise(*((f"{n}_conv1d.weight", width) for n, width in zip("qkv", self.qkv, strict=True))),
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
