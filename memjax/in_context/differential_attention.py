"""Differential attention: the difference of two softmax maps, in which what both see by accident cancels.

Heads come in pairs. The two of a pair read the same values, of both, with maps of their own; a learned share of the
second reading is taken from the first, and the rest is normalised.

Paper: Ye et al., Differential transformer, arXiv 2410.05258 (2024). Pairs of interleaved heads, no positions: SambaY,
arXiv 2507.06607.

State:  Ring: k, v [b c h d] with c = window; count [b] int32.
Update: a_j = softmax(d**-0.5 q_j k_j^T) [v_1; v_2], j = 1, 2: the even and the odd heads
        o = (1 - lambda_init) RMSNorm(a_1 - lambda a_2), of width 2d, its halves in the places of the two heads
        lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init;  lambda_init = 0.8 - 0.6 e^{-0.3 layer}

Differs from the paper: nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from memjax.layers import (
    Ring,
    attention,
    check_cache_dtype,
    heads,
    linear,
    merge,
    positions,
    ring_append,
    rms_norm,
    rotary,
    wide,
)
from memjax.memory import How, Memory, Param, at_least, constant, dense, normal
from memjax.tensors import matrix, same

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


@dataclass(frozen=True)
class DifferentialAttention(Memory):
    """Causal differential attention over x [b, t, dim] that sees `window` tokens, the current one included.

    heads: an even number, two to a pair. kv_heads: heads of k and v, even and a divisor of `heads` (None: as many);
    inside each half query head i reads kv head i // (heads / kv_heads). head_dim: None is dim / heads.
    layer: the number of the layer in the network, from 0, counting those that don't attend: what lambda begins with.
    rotary: rotary positions of base theta. cache_dtype: k and v are rounded to it.
    """

    dim: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int = 4096
    layer: int = 0
    rotary: bool = True
    theta: float = 10_000.0
    norm_eps: float = 1e-5
    cache_dtype: str = "float32"

    def __post_init__(self):
        at_least(self, 1, "dim", "window")
        at_least(self, 2, "heads", "kv_heads")
        at_least(self, 0, "layer")
        if self.heads % 2:
            raise ValueError(f"DifferentialAttention: heads is {self.heads}, needs an even number")
        if self.hkv % 2 or self.heads % self.hkv:
            raise ValueError(
                f"DifferentialAttention: kv_heads is {self.kv_heads}, needs an even divisor of heads = {self.heads}"
            )
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"DifferentialAttention: heads is {self.heads}, needs a divisor of dim = {self.dim}, or a head_dim"
            )
        if self.d < 1 or (self.rotary and self.d % 2):
            raise ValueError(f"DifferentialAttention: head_dim is {self.d}, needs an even number for rotary positions")
        check_cache_dtype(self)

    @property
    def hkv(self) -> int:
        """Heads of k and v."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def d(self) -> int:
        """Width of a head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def lambda_init(self) -> float:
        """The share that is taken away before training."""
        return 0.8 - 0.6 * math.exp(-0.3 * self.layer)

    def param_specs(self):
        hd, kv = self.heads * self.d, self.hkv * self.d
        return {
            "w_q": dense(self.dim, hd),
            "w_k": dense(self.dim, kv, ("model", "kv_heads")),
            "w_v": dense(self.dim, kv, ("model", "kv_heads")),
            "w_o": dense(hd, self.dim, ("heads", "model")),
            **{name: Param((self.d,), (None,), normal(0.1), "vector") for name in LAMBDAS},
            "norm": Param((2 * self.d,), (None,), constant(1), "vector"),
        }

    def state_specs(self, batch):
        return Ring.specs(batch, self.window, self.hkv, self.d, self.cache_dtype)

    def tensors(self):
        linears = {f"w_{name}": matrix(f"{name}_proj.weight") for name in "qkvo"}
        return {**linears, **{name: same(name) for name in LAMBDAS}, "norm": same("subln.weight")}

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        q = heads(linear(x, params["w_q"]), self.heads)
        k, v = (heads(linear(x, params[w]), self.hkv) for w in ("w_k", "w_v"))
        if self.rotary:
            position, _ = positions(state.count, x.shape[1], valid, start)
            q, k = rotary(q, position, self.theta), rotary(k, position, self.theta)
        k, v, visible, state = ring_append(state, k, v, valid, start)
        return linear(merge(self.difference(params, q, k, v, visible)), params["w_o"]), state

    def difference(
        self,
        params: dict,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b u g d"],
        v: Float[Array, "b u g d"],
        visible: Bool[Array, "b t u"],
    ) -> Float[Array, "b t h d"]:
        """What the heads read, before the output projection."""
        q1, k1, q2, k2 = (wide(params[name]) for name in LAMBDAS)
        share = jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + self.lambda_init
        # both halves in one call: first the even heads, then the odd ones; zeros make q and k as wide as the values
        by_half = lambda a: jnp.concatenate([a[:, :, 0::2], a[:, :, 1::2]], 2)  # noqa: E731
        widened = lambda a: jnp.pad(by_half(a), [(0, 0)] * 3 + [(0, self.d)])  # noqa: E731
        values = v.reshape(*v.shape[:2], -1, 2 * self.d)
        a = attention(widened(q), widened(k), jnp.concatenate([values] * 2, 2), visible, self.d**-0.5)
        a1, a2 = jnp.split(wide(a), 2, 2)
        o = (1 - self.lambda_init) * rms_norm(a1 - share[None, None, None, None] * a2, params["norm"], self.norm_eps)
        return o.reshape(q.shape).astype(q.dtype)
