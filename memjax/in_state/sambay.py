"""SambaY: a decoder whose upper half reads what its lower half remembers.

The lower half alternates state space layers and sliding windows, and ends in one layer of full attention. The upper
half has no memory of its own: its layers attend to those keys and values by turns with gated memory units, which gate
what the last state space layer has read. So there is one cache, and half of the upper layers don't even read that.

Paper: Ren et al., Decoder-hybrid-decoder architecture for efficient reasoning with long generation, arXiv 2507.06607
(2025).

State:  those of the lower half: of every state space layer and window, and one Ring k, v [b c hkv d] of the full
        attention. The streams "memory" [b t m] and "kv" live within a call only.
Update: GMU: y = (m * silu(x W_1)) W_2;  nGMU: y = (RMSNorm(m * silu(x W_1)) w) W_2
        layers i < L/2: even linear, odd window;  L/2: the one whose m is saved;  L/2 + 1: full attention;
        above: even GMU, odd cross-attention to the keys and values of L/2 + 1;  no positions are encoded
        every layer: h += mixer(norm(h)), h += SwiGLU(norm(h))

Differs from the paper: the residual stream has the dtype of x, not float32; weights begin normal, not uniform.

A prompt needs the upper half for its last token only. The state that `apply` gives does not depend on it, so where
y is not used (`jax.jit` of a function that returns the state) XLA leaves it out; `step` then reads the last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.blocks import Layout, block, repeated
from memjax.combinators import Stack
from memjax.layers import Ring, attention, check_cache_dtype, heads, linear, merge, ring_append, rms_norm, row
from memjax.memory import How, Memory, Param, at_least, constant, dense
from memjax.tensors import matrix, same


@dataclass(frozen=True)
class GatedMemoryUnit(Memory):
    """Gates the stream "memory" [b t memory_dim], what a layer below has read of its state, and keeps none itself.

    norm: RMSNorm after the gate, over each of `groups` of the channels (nGMU, for memories of Mamba-2 or Gated
    DeltaNet).
    """

    dim: int
    memory_dim: int
    norm: bool = False
    groups: int = 1
    norm_eps: float = 1e-5

    streams: ClassVar[bool] = True

    def __post_init__(self):
        at_least(self, 1, "dim", "memory_dim", "groups")
        if self.memory_dim % self.groups:
            raise ValueError(
                f"GatedMemoryUnit: groups is {self.groups}, needs a divisor of memory_dim = {self.memory_dim}"
            )

    def param_specs(self):
        norm = Param((self.memory_dim,), ("heads",), constant(1), "vector")
        return {
            "w_1": dense(self.dim, self.memory_dim),
            "w_2": dense(self.memory_dim, self.dim, ("heads", "model")),
            **({"norm": norm} if self.norm else {}),
        }

    def tensors(self):
        norm = {"norm": same("norm.weight")} if self.norm else {}
        return {"w_1": matrix("in_proj.weight"), "w_2": matrix("out_proj.weight"), **norm}

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        m = x.take("memory", self)
        if m.shape[-1] != self.memory_dim:
            raise ValueError(f"GatedMemoryUnit: memory_dim is {self.memory_dim}, the stream has {m.shape[-1]} channels")
        z = m.astype(x.x.dtype) * jax.nn.silu(linear(x.x, params["w_1"]))
        if self.norm:
            ones = jnp.ones(self.memory_dim // self.groups, z.dtype)
            z = merge(rms_norm(heads(z, self.groups), ones, self.norm_eps)) * row(params["norm"], z)
        return x.hand(linear(z, params["w_2"])), state


@dataclass(frozen=True)
class CrossAttention(Memory):
    """Softmax attention to the stream "kv", the keys and values of a layer below; without positions and a state.

    head_dim: None is dim / heads. `heads` is a multiple of the heads of the keys.
    """

    dim: int
    heads: int
    head_dim: int | None = None

    streams: ClassVar[bool] = True

    def __post_init__(self):
        at_least(self, 1, "dim", "heads", "head_dim")
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"{type(self).__name__}: heads is {self.heads}, needs a divisor of dim = {self.dim}, or a head_dim"
            )

    @property
    def d(self) -> int:
        """Width of a head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    def param_specs(self):
        hd = self.heads * self.d
        return {"w_q": dense(self.dim, hd), "w_o": dense(hd, self.dim, ("heads", "model"))}

    def read(self, params, x, kv):
        """What x [b t dim] reads in kv: keys and values [b u hkv d], and who sees whom [b t u]."""
        return linear(merge(attention(heads(linear(x, params["w_q"]), self.heads), *kv)), params["w_o"])

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return x.hand(self.read(params, x.x, x.take("kv", self))), state


@dataclass(frozen=True)
class SharedAttention(CrossAttention):
    """Causal attention that sees the last `capacity` tokens and hands on the stream "kv": keys and values
    [b u kv_heads head_dim], and who sees whom [b t u]. Without positions.

    kv_heads: a divisor of `heads` (None: as many). k and v are rounded to cache_dtype.
    """

    kv_heads: int | None = None
    capacity: int = 4096
    cache_dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "kv_heads", "capacity")
        if self.heads % self.hkv:
            raise ValueError(f"SharedAttention: kv_heads is {self.kv_heads}, needs a divisor of heads = {self.heads}")
        check_cache_dtype(self)

    @property
    def hkv(self) -> int:
        """Heads of k and v."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def param_specs(self):
        w = dense(self.dim, self.hkv * self.d, ("model", "kv_heads"))
        return {**super().param_specs(), "w_k": w, "w_v": w}

    def state_specs(self, batch):
        return Ring.specs(batch, self.capacity, self.hkv, self.d, self.cache_dtype)

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        k, v = (heads(linear(x.x, params[w]), self.hkv) for w in ("w_k", "w_v"))
        *kv, state = ring_append(state, k, v, valid, start)
        return x.hand(self.read(params, x.x, kv), kv=tuple(kv)), state


@dataclass(frozen=True)
class SambaY(Layout):
    """`layers` decoder layers, a multiple of 4 and at least 8, with feed-forwards of `hidden` channels.

    linear, window: the mixers of the lower half, such as Mamba and SlidingWindowAttention(rotary=False). saved: the one
    of layer L/2, which hands on the stream "memory", such as Mamba(hands_on=True); memory_dim: its channels (None:
    2 dim). heads, kv_heads, head_dim, capacity, cache_dtype: of the full attention, and what fits of the
    cross-attention. norm, groups: of the gated memory units.
    """

    linear: Memory
    window: Memory
    saved: Memory
    layers: int
    hidden: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    capacity: int = 4096
    cache_dtype: str = "float32"
    memory_dim: int | None = None
    norm: bool = False
    groups: int = 1
    eps: float = 1e-5

    streams: ClassVar[bool] = False  # they begin and end in it

    def __post_init__(self):
        at_least(self, 8, "layers")
        at_least(self, 1, "hidden")
        if self.layers % 4:
            raise ValueError(f"SambaY: layers is {self.layers}, needs a multiple of 4")
        self._same_width()
        _ = self.full, self.gmu, self.cross  # their checks

    @property
    def full(self) -> SharedAttention:
        """Layer L/2 + 1."""
        dims = (self.dim, self.heads, self.head_dim)
        return SharedAttention(*dims, self.kv_heads, self.capacity, self.cache_dtype)

    @property
    def gmu(self) -> GatedMemoryUnit:
        """The even layers above."""
        memory_dim = 2 * self.dim if self.memory_dim is None else self.memory_dim
        return GatedMemoryUnit(self.dim, memory_dim, self.norm, self.groups)

    @property
    def cross(self) -> CrossAttention:
        """The odd layers above."""
        return CrossAttention(self.dim, self.heads, self.head_dim)

    @property
    def body(self) -> Memory:
        linear, window, saved, full, gmu, cross = (
            block(m, self.hidden, self.eps)
            for m in (self.linear, self.window, self.saved, self.full, self.gmu, self.cross)
        )
        lower, upper = Stack((linear, window)), Stack((gmu, cross))
        pairs = self.layers // 4
        return Stack((repeated(lower, pairs), saved, full, repeated(upper, pairs - 1)))
