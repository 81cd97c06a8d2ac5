"""RWKV-7: a delta rule whose removal key, write key, decay and rate are all made of the token.

The state fades by channel, what it holds under one key is taken out at a rate per channel, and a value is written under
another key. Around it stand a shift to the token before, low-rank gates, and the values of the first layer, which all
others mix into their own.

Paper: Peng et al., RWKV-7 "Goose" with expressive dynamic state evolution, arXiv 2503.14456 (2025).

State:  S [b h k v] float32, the associations of each head; shift [b 1 d], the token before.
Update: S_t = diag(e^{w_t}) S_{t-1} - (kk_t * a_t) (S_{t-1}^T kk_t)^T + k_t v_t^T;  o_t = S_t^T r_t
        w = -e^{-1/2} sigmoid(lora_w(x^w));  a = sigmoid(lora_a(x^a));  kk = k * k_k / |k * k_k|
        k <- k * (1 + (a - 1) * k_a);  v <- v + (v_first - v) * sigmoid(lora_v(x^v)) above the first layer
        y = W_o ((GroupNorm(o) + (r . (k * r_k)) v) * lora_g(x^g));  x^m = x_t + (x_{t-1} - x_t) * x_m
Channel mixing: y = W_2 relu(W_1 (x_t + (x_{t-1} - x_t) * x_k))^2, the block that follows in a model.

Differs from the paper: nothing. A value_dim of its own is that of flash-linear-attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn.initializers import orthogonal
from jaxtyping import Float

from memjax.layers import gate, heads, linear, merge, row, taps, wide
from memjax.memory import How, Initializer, Kind, Memory, Param, Slot, at_least, constant, specs
from memjax.tensors import matrix, same
from pallas_kernels.dplr_delta_rule import IMPLEMENTATIONS, dplr_delta_rule

LEAST_LOG_DECAY = -math.exp(-0.5)
MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""The streams made of a token and the one before it; the share of the latter begins as 1 - (n / dim)^power."""

RANKS = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
"""Of the low-rank maps, as multiples of sqrt(dim)."""


class RWKV7State(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    shift: Float[Array, "b one d"]  # float32, the token before


@dataclass(frozen=True)
class RWKV7(Memory):
    """RWKV-7's time mixing over x [b, t, dim].

    layer: its number among `layers`, from 0; initialisation follows it. The first layer hands its values on as the
    stream "v_first" [b t value_dim], every other one needs them: stack them with `Stack`, the first below a `Repeat`.
    head_dim: channels of a head of r and k. value_dim: channels of v over all heads (None: dim).
    *_low_rank_dim: of the maps to the decay w, the rate a, the share of v_first and the output gate (None: the sizes of
    the paper, 2.5, 2.5, 1.7 and 5 times sqrt(dim) rounded to multiples of 32).
    """

    dim: int
    head_dim: int = 64
    value_dim: int | None = None
    layer: int = 0
    layers: int = 1
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    norm_eps: float = 1e-5

    streams: ClassVar[bool] = True
    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS

    def __post_init__(self):
        at_least(self, 1, "dim", "head_dim", "value_dim")
        at_least(self, 1, "decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
        if self.dim % self.head_dim:
            raise ValueError(f"RWKV7: head_dim is {self.head_dim}, needs a divisor of dim = {self.dim}")
        if self.values % self.heads:
            raise ValueError(f"RWKV7: value_dim is {self.value_dim}, needs a multiple of the {self.heads} heads")
        at_least(self, 0, "layer")
        at_least(self, self.layer + 1, "layers")

    @property
    def heads(self) -> int:
        """Heads."""
        return self.dim // self.head_dim

    @property
    def values(self) -> int:
        """Channels of v over all heads."""
        return self.dim if self.value_dim is None else self.value_dim

    def rank(self, m: str) -> int:
        """Rank of the low-rank map to w, a, v or g."""
        ranks = self.decay_low_rank_dim, self.a_low_rank_dim, self.v_low_rank_dim, self.gate_low_rank_dim
        rank = dict(zip(RANKS, ranks, strict=True))[m]
        return max(32, round(RANKS[m] * self.dim**0.5 / 32) * 32) if rank is None else rank

    def param_specs(self):
        d, v, maps = self.dim, self.values, self._maps()
        share, early = ((1, 1, d), (None, None, "model")), 1 - self.layer / self.layers
        out = {m: v if m in "vg" else d for m in maps}
        return {
            **{f"x_{m}": Param(*share, _shares(power * early), "vector") for m, power in MIXES.items()},
            **{f"w_{m}1": Param((d, self.rank(m)), ("model", None), constant(0), maps[m]) for m in maps},
            **{f"w_{m}2": Param((self.rank(m), out[m]), (None, "heads"), orthogonal(0.1), maps[m]) for m in maps},
            **{f"b_{m}": Param((out[m],), ("heads",), self._bias(m), "gate") for m in maps if m != "g"},
            "w_r": Param((d, d), ("model", "heads"), orthogonal()),
            "w_k": Param((d, d), ("model", "heads"), orthogonal(0.1)),
            "w_v": Param((d, v), ("model", "heads"), orthogonal()),
            "w_o": Param((v, d), ("heads", "model"), constant(0)),
            "k_k": Param((d,), ("heads",), lambda key, shape: 0.71 - 0.1 * _line(-0.5, 0.5, d), "vector"),
            "k_a": Param((d,), ("heads",), constant(1.02), "vector"),
            "r_k": Param((self.heads, self.head_dim), ("heads", "key"), constant(-0.04), "vector"),
            "norm": Param((v,), ("heads",), constant(((self.layer + 1) / self.layers) ** 0.7), "vector"),
            "norm_bias": Param((v,), ("heads",), constant(0), "vector"),
        }

    def state_specs(self, batch):
        S = Slot((batch, self.heads, self.head_dim, self.values // self.heads), ("batch", "heads", "key", "value"))
        return specs(RWKV7State, S=S, shift=Slot((batch, 1, self.dim), ("batch", None, "model")))

    def tensors(self):
        maps = self._maps()
        return {
            **{name: same(name) for name in (*(f"x_{m}" for m in MIXES), "k_k", "k_a", "r_k")},
            **{f"w_{m}": matrix(f"{m}_proj.weight") for m in "rkvo"},
            **{f"w_{m}1": matrix(f"{m}_lora.lora.0.weight") for m in maps},
            **{f"w_{m}2": matrix(f"{m}_lora.lora.2.weight") for m in maps},
            **{f"b_{m}": same(f"{m}_lora.lora.2.bias") for m in maps if m != "g"},
            "norm": same("g_norm.weight"),
            "norm_bias": same("g_norm.bias"),
        }

    def _maps(self) -> dict[str, Kind]:
        """The low-rank maps, and the kind of their parameters."""
        return {"w": "gate", "a": "gate", **({"v": "gate"} if self.layer else {}), "g": "matrix"}

    def _bias(self, m: str) -> Initializer:
        """Of the map to w, a or v: from slow to fast channels over the width and over each head."""

        def init(key, shape):
            line, z = _line(-0.5, 0.5, shape[0]), _line(-1.0, 1.0, self.head_dim)
            if m == "v":
                return 0.73 - 0.4 * line
            zigzag = jnp.tile(z * jnp.abs(z), self.heads)
            if m == "a":
                return -0.19 + 0.3 * zigzag + 0.4 * line
            bend = 1 + (self.layer / max(self.layers - 1, 1)) ** 0.3
            return -5.5 + 6 * _line(0.0, 1.0, shape[0]) ** bend + 2.5 * zigzag

        return init

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        flow, x, p = x, x.x, params
        # x^m = x + d * x_m for each stream m, d = x_{t-1} - x_t
        d, shift = _to_the_token_before(x, state.shift, valid, start)
        mixed = {m: x + d * row(p[f"x_{m}"], x) for m in MIXES}
        r, k, v = (linear(mixed[m], p[f"w_{m}"]) for m in "rkv")
        # w and a in float32; v on its way to that of the first layer
        w = LEAST_LOG_DECAY * jax.nn.sigmoid(gate(jnp.tanh(linear(mixed["w"], p["w_w1"])), p["w_w2"], p["b_w"]))
        a = jax.nn.sigmoid(gate(linear(mixed["a"], p["w_a1"]), p["w_a2"], p["b_a"]))
        if self.layer:
            share = jax.nn.sigmoid(gate(linear(mixed["v"], p["w_v1"]), p["w_v2"], p["b_v"]))
            v = v + (flow.take("v_first", self) - v) * share.astype(v.dtype)
        else:
            flow = flow.hand(x, v_first=v)
        # kk of length 1 from the k that is not yet changed
        kk = heads(wide(k) * row(p["k_k"], a), self.heads)
        kk = kk * lax.rsqrt(jnp.maximum(jnp.sum(kk * kk, -1, keepdims=True), 1e-24))
        k = (wide(k) * (1 + (a - 1) * row(p["k_a"], a))).astype(x.dtype)
        r, k, v, a, w = (heads(z, self.heads) for z in (r, k, v, a, w))
        # S_t = diag(e^w) S_{t-1} - (kk a) (S_{t-1}^T kk)^T + k v^T, o = S^T r
        masks: dict[str, Any] = {"valid": valid, "start": start}
        o, S = dplr_delta_rule(
            r, k, v, -kk, kk * a, w, initial_state=state.S, **masks, implementation=how.implementation
        )
        # y = W_o ((GroupNorm(o) + (r . (k * r_k)) v) * g)
        o = merge(_standardised(o, self.head_dim * self.norm_eps))
        bonus = jnp.sum(r * k * row(p["r_k"], k), -1, keepdims=True) * v
        o = o * row(p["norm"], o) + row(p["norm_bias"], o) + merge(bonus)
        g = linear(jax.nn.sigmoid(linear(mixed["g"], p["w_g1"])), p["w_g2"])
        return flow._replace(x=linear(o * g, p["w_o"])), RWKV7State(S, shift)


class RWKV7ChannelMixingState(NamedTuple):
    """What the next call reads of this one."""

    shift: Float[Array, "b one d"]  # float32, the token before


@dataclass(frozen=True)
class RWKV7ChannelMixing(Memory):
    """RWKV-7's feed-forward block over x [b, t, dim], which sees the token before. hidden: its width (None: 4 dim).

    layer: its number among `layers`, from 0; initialisation follows it.
    """

    dim: int
    hidden: int | None = None
    layer: int = 0
    layers: int = 1

    def __post_init__(self):
        at_least(self, 1, "dim", "hidden")
        at_least(self, 0, "layer")
        at_least(self, self.layer + 1, "layers")

    def param_specs(self):
        d, hidden = self.dim, 4 * self.dim if self.hidden is None else self.hidden
        return {
            "x_k": Param((d,), ("model",), _shares((1 - self.layer / self.layers) ** 4), "vector"),
            "w_1": Param((d, hidden), ("model", "mlp"), orthogonal()),
            "w_2": Param((hidden, d), ("mlp", "model"), constant(0)),
        }

    def state_specs(self, batch):
        return specs(RWKV7ChannelMixingState, shift=Slot((batch, 1, self.dim), ("batch", None, "model")))

    def tensors(self):
        return {"x_k": same("x_k"), "w_1": matrix("key.weight"), "w_2": matrix("value.weight")}

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        d, shift = _to_the_token_before(x, state.shift, valid, start)
        inner = jax.nn.relu(linear(x + d * row(params["x_k"], x), params["w_1"]))
        return linear(inner * inner, params["w_2"]), RWKV7ChannelMixingState(shift)


def _to_the_token_before(x, shift, valid, start):
    """x_{t-1} - x_t, and the new shift."""
    (before, _), shift = taps(x, shift, valid, start)
    return before.astype(x.dtype) - x, shift


def _standardised(o: Float[Array, "b t h v"], eps: float) -> Float[Array, "b t h v"]:
    """Mean 0 and variance 1 in each head, in float32."""
    x = wide(o)
    x = x - x.mean(-1, keepdims=True)
    return (x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)).astype(o.dtype)


def _line(first: float, last: float, n: int) -> Array:
    return jnp.linspace(first, last, n, dtype=jnp.float32)


def _shares(power: float) -> Initializer:
    return lambda key, shape: jnp.broadcast_to(1 - _line(0.0, 1 - 1 / shape[-1], shape[-1]) ** power, shape)
