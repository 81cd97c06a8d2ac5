"""What the linear recurrences of q, k and v share: projections, the state of each head, and checks of their widths.

`GroupedValues` are the heads of the gated delta rules, `DecayingKeys` those of Kimi Delta Attention, `ExpandedHeads`
those of DeltaNet, `GroupedQueries` those of linear attention. An architecture adds the sizes that it is used with, its
gates, its recurrence and its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from memjax.layers import gate, heads, linear, row
from memjax.memory import Param, Slot, at_least, constant, dense
from memjax.recurrence import Recurrence, conv_weight, gated_output, inverse_softplus_of_dt, log_rate
from memjax.tensors import Tensor, depthwise, matrix, same


class Heads(Recurrence):
    """A recurrence of q, k and v, which are projections of x, with a matrix S as state of each head.

    Its parameters begin with w_q, w_k, w_v, w_o, "norm" [v] and, where q, k and v pass a causal convolution, "conv".
    """

    # Not a dataclass, so that these two take no place in the order of the fields, before those without a default.
    use_short_conv: ClassVar[bool] = True  # a field where there is a choice
    conv_size: ClassVar[int]  # width of the convolution, a field where there may be one

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Widths of q, k and v."""
        raise NotImplementedError

    @property
    def S_shape(self) -> tuple[int, int, int]:
        """Heads, keys and values of S."""
        raise NotImplementedError

    def param_specs(self) -> dict[str, Param]:
        d, (q, k, v), (h, _, width) = self.dim, self.qkv, self.S_shape
        return {
            "w_q": dense(d, q),
            "w_k": dense(d, k),
            "w_v": dense(d, v),
            "w_o": dense(h * width, d, ("heads", "model")),
            "norm": Param((width,), ("value",), constant(1), "vector"),
            **({"conv": conv_weight(self.conv_size, q + k + v)} if self.use_short_conv else {}),
        }

    def slots(self, batch: int) -> dict[str, Slot]:
        """S and, where there is a convolution, conv, its last rows."""
        S = Slot((batch, *self.S_shape), ("batch", "heads", "key", "value"))
        if not self.use_short_conv:
            return {"S": S}
        return {"S": S, "conv": Slot((batch, self.conv_size - 1, sum(self.qkv)), ("batch", None, None))}

    def tensors(self) -> dict[str, Tensor]:
        """All but "norm", whose name differs."""
        projections = {f"w_{n}": matrix(f"{n}_proj.weight") for n in "qkvo"}
        conv = depthwise(*((f"{n}_conv1d.weight", width) for n, width in zip("qkv", self.qkv, strict=True)))
        return {**projections, **({"conv": conv} if self.use_short_conv else {})}


@dataclass(frozen=True)
class GroupedValues(Heads):
    """Several value heads may read with one key head, each from a state of its own.

    heads: query and key heads, of width head_dim. v_heads: value heads, a multiple of `heads` (None: as many); value
    head j reads with key head j // (v_heads / heads), and has a state [head_dim, head_dim * expand_v]. conv_size: width
    of the causal convolution on q, k and v.
    """

    dim: int
    heads: int
    head_dim: int
    expand_v: float
    v_heads: int | None = None
    conv_size: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self):
        at_least(self, 1, "dim", "heads", "head_dim")
        at_least(self, 2, "conv_size")
        name = type(self).__name__
        if self.hv < 1 or self.hv % self.heads:
            raise ValueError(f"{name}: v_heads is {self.v_heads}, needs a multiple of heads = {self.heads}")
        if self.v < 1 or self.v != self.head_dim * self.expand_v:
            width = f"{self.head_dim} * {self.expand_v}"
            raise ValueError(f"{name}: expand_v is {self.expand_v}, needs head_dim * expand_v = {width} to be whole")

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
        return self.heads * self.head_dim, self.heads * self.head_dim, self.hv * self.v

    @property
    def S_shape(self) -> tuple[int, int, int]:
        return self.hv, self.head_dim, self.v


@dataclass(frozen=True)
class DecayingKeys(GroupedValues):
    """Each key channel has a decay of its own, made, as the output gate is, by a projection of low rank.

    allow_neg_eigval: what is erased is doubled, so that a write can flip an association. lower_bound: the least log
    decay, from -5 to 0, approached by a sigmoid (None: a softplus, without a bound).
    """

    allow_neg_eigval: bool = False
    lower_bound: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.lower_bound is not None and not -5 <= self.lower_bound < 0:
            name = type(self).__name__
            raise ValueError(f"{name}: lower_bound is {self.lower_bound}, needs a log decay of at least -5 and below 0")

    @property
    def decays(self) -> int:
        """Heads with decays of their own."""
        return self.hv

    def param_specs(self):
        (h, k, low), d = self.S_shape, self.dim
        f, v = self.decays * k, h * low
        return {
            **super().param_specs(),
            "w_f1": dense(d, low, ("model", None), "gate"),
            "w_f2": dense(low, f, (None, "heads"), "gate"),
            "A_log": Param((self.decays,), ("heads",), log_rate() if self.lower_bound is None else constant(0), "gate"),
            "dt_bias": Param((f,), ("heads",), inverse_softplus_of_dt, "gate"),
            "w_g1": dense(d, low, ("model", None)),
            "w_g2": dense(low, v, (None, "heads")),
            "b_g": Param((v,), ("heads",), constant(0), "vector"),
        }

    def tensors(self):
        low_rank = {f"w_{n}{i + 1}": matrix(f"{n}_proj.{i}.weight") for n in "fg" for i in range(2)}
        vectors = {"A_log": same("A_log"), "dt_bias": same("dt_bias"), "b_g": same("g_proj.1.bias")}
        return {**super().tensors(), **low_rank, **vectors, "norm": same("o_norm.weight")}

    def log_decay(self, params: dict, x: Float[Array, "b t d"]) -> Float[Array, "b t h k"]:
        """-exp(A_log) softplus(f), or lower_bound sigmoid(exp(A_log) f), with f = x W_f1 W_f2 + dt_bias in float32."""
        f = heads(gate(linear(x, params["w_f1"]), params["w_f2"], params["dt_bias"]), self.decays)
        rate, least = jnp.exp(row(params["A_log"][:, None], f)), self.lower_bound
        return -rate * jax.nn.softplus(f) if least is None else least * jax.nn.sigmoid(rate * f)

    def output(self, params, o, x):
        # y = W_o (RMSNorm(o) * sigmoid(x W_g1 W_g2 + b_g))
        z = jax.nn.sigmoid(linear(linear(x, params["w_g1"]), params["w_g2"], params["b_g"]))
        return gated_output(params, o, self.norm_eps, z)


@dataclass(frozen=True)
class ExpandedHeads(Heads):
    """Keys have dim * expand_k channels over all `heads`, values dim * expand_v."""

    dim: int
    heads: int
    expand_k: float
    expand_v: float

    def __post_init__(self):
        at_least(self, 1, "dim", "heads")
        for field in ("expand_k", "expand_v"):
            width = self.dim * getattr(self, field)
            if width < 1 or width % self.heads:
                raise ValueError(
                    f"{type(self).__name__}: {field} is {getattr(self, field)}, needs dim * {field} (here {width:g}) "
                    f"to be a multiple of heads = {self.heads}"
                )

    @property
    def hkv(self) -> int:
        """Heads of k and v."""
        return self.heads

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
        return self.heads * self.k, self.hkv * self.k, self.hkv * self.v

    @property
    def S_shape(self) -> tuple[int, int, int]:
        return self.heads, self.k, self.v


@dataclass(frozen=True)
class GroupedQueries(ExpandedHeads):
    """Several query heads may share one head of k and v, each with a state of its own.

    kv_heads: heads of k and v, a divisor of `heads` (None: as many); query head j reads kv head
    j // (heads / kv_heads).
    """

    kv_heads: int | None = None
    norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        if self.hkv < 1 or self.heads % self.hkv:
            name = type(self).__name__
            raise ValueError(f"{name}: kv_heads is {self.kv_heads}, needs a divisor of heads = {self.heads}")

    @property
    def hkv(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads
