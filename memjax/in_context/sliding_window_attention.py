"""Sliding-window attention: softmax over the last `window` tokens of the document.

Inside the window nothing is lost, behind it nothing is known. The keys and values stand in a ring, so the cost of a
token and the size of the state don't depend on what was read before.

Paper: Beltagy, Peters, Cohan, Longformer: the long-document transformer, arXiv 2004.05150 (2020). The ring cache is
that of Jiang et al., Mistral 7B, arXiv 2310.06825 (2023), the positions those of Su et al., RoFormer, arXiv 2104.09864.

State:  Ring: k, v [b c h d] with c = window, keys rotated at their position in the document; count [b] int32.
Update: o_t = sum_i softmax_i(d**-0.5 q_t . k_i) v_i over i = t - window + 1 .. t of the same document

Differs from the paper: nothing. The local attention of RecurrentGemma (De et al., Griffin, arXiv 2402.19427) has
kv_heads=1, rotary_share=0.5 and output_bias=True; its window of w sees w + 1 keys, here window=w + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

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
)
from memjax.memory import How, Memory, Param, at_least, constant, dense


@dataclass(frozen=True)
class SlidingWindowAttention(Memory):
    """Causal attention over x [b, t, dim] that sees `window` tokens, the current one included.

    kv_heads: heads of k and v, a divisor of `heads` (None: as many). head_dim: None is dim / heads.
    theta: base of the rotary positions; rotary=False leaves positions out. rotary_share: how much of each head turns,
    from its first channel on. qk_norm: RMSNorm of each head of q and k before the rotation, as in Qwen3. output_bias:
    of the output projection. cache_dtype: k and v are rounded to it in the ring, and inside a call too, so that a call
    sees what a later one will.
    """

    dim: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int = 4096
    theta: float = 10_000.0
    rotary: bool = True
    rotary_share: float = 1.0
    qk_norm: bool = False
    output_bias: bool = False
    norm_eps: float = 1e-6
    cache_dtype: str = "float32"

    def __post_init__(self):
        at_least(self, 1, "dim", "heads", "window")
        if self.hkv < 1 or self.heads % self.hkv:
            raise ValueError(
                f"SlidingWindowAttention: kv_heads is {self.kv_heads}, needs a divisor of heads = {self.heads}"
            )
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"SlidingWindowAttention: heads is {self.heads}, needs a divisor of dim = {self.dim}, or a head_dim"
            )
        if self.d < 1 or (self.rotary and self.d % 2):
            raise ValueError(f"SlidingWindowAttention: head_dim is {self.d}, needs an even number for rotary positions")
        if self.rotary and self.d * self.rotary_share not in range(2, self.d + 1, 2):
            raise ValueError(
                f"SlidingWindowAttention: rotary_share is {self.rotary_share}, needs an even part of the {self.d} "
                "channels of a head"
            )
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
    def turned(self) -> int:
        """Channels of a head that turn."""
        return int(self.d * self.rotary_share)

    def param_specs(self):
        hd, kv = self.heads * self.d, self.hkv * self.d
        norm = Param((self.d,), (None,), constant(1), "vector")
        return {
            "w_q": dense(self.dim, hd),
            "w_k": dense(self.dim, kv, ("model", "kv_heads")),
            "w_v": dense(self.dim, kv, ("model", "kv_heads")),
            "w_o": dense(hd, self.dim, ("heads", "model")),
            **({"b_o": Param((self.dim,), ("model",), constant(0), "vector")} if self.output_bias else {}),
            **({"norm_q": norm, "norm_k": norm} if self.qk_norm else {}),
        }

    def state_specs(self, batch):
        return Ring.specs(batch, self.window, self.hkv, self.d, self.cache_dtype)

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        q = heads(linear(x, params["w_q"]), self.heads)
        k, v = (heads(linear(x, params[w]), self.hkv) for w in ("w_k", "w_v"))
        if self.qk_norm:
            q, k = rms_norm(q, params["norm_q"], self.norm_eps), rms_norm(k, params["norm_k"], self.norm_eps)
        if self.rotary:
            position, _ = positions(state.count, x.shape[1], valid, start)
            q, k = (self._rotated(a, position) for a in (q, k))
        k, v, visible, state = ring_append(state, k, v, valid, start)
        return linear(merge(attention(q, k, v, visible)), params["w_o"], params.get("b_o")), state

    def _rotated(self, x, position):
        turned = rotary(x[..., : self.turned], position, self.theta)
        return turned if self.turned == self.d else jnp.concatenate([turned, x[..., self.turned :]], -1)
