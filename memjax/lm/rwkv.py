"""What RWKV's language models have and others do not: LayerNorms with a bias, in front of the first layer too."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from memjax.combinators import Combinator
from memjax.layers import row, wide
from memjax.lm.model import LanguageModel
from memjax.memory import How, Memory, Param, at_least, constant, on_x
from memjax.tensors import same


def layer_norm(
    x: Float[Array, "*b d"], weight: Float[Array, " d"], bias: Float[Array, " d"] | None, eps: float
) -> Float[Array, "*b d"]:
    """(x - mean) / sqrt(variance + eps) in float32, cast to the dtype of x, then times the weight, plus the bias."""
    x32 = wide(x)
    x32 = x32 - jnp.mean(x32, -1, keepdims=True)
    y = (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)).astype(x.dtype) * row(weight, x)
    return y if bias is None else y + row(bias, x)


@dataclass(frozen=True)
class LayerNorm(Memory):
    """LayerNorm(x); it keeps no state. bias: False leaves it out. Source: Ba et al. 2016, arXiv 1607.06450."""

    dim: int
    eps: float = 1e-5
    bias: bool = True

    def __post_init__(self):
        at_least(self, 1, "dim")

    def param_specs(self):
        bias = {"bias": Param((self.dim,), ("model",), constant(0), "vector")} if self.bias else {}
        return {"weight": Param((self.dim,), ("model",), constant(1), "vector"), **bias}

    def tensors(self):
        return {name: same(name) for name in self.param_specs()}

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return layer_norm(x, params["weight"], params.get("bias"), self.eps), state


@dataclass(frozen=True)
class Normed(Combinator):
    """x + memory(norm(x)), for a norm that is a memory."""

    memory: Memory
    norm: Memory

    def __post_init__(self):
        self._same_width()

    def param_specs(self):
        return {"norm": self.norm.param_specs(), "memory": self.memory.param_specs()}

    def state_specs(self, batch):
        return {"norm": self.norm.state_specs(batch), "memory": self.memory.state_specs(batch)}

    def thread(self, call, params, state, x):
        normed, norm_state, norm_aux = call(self.norm, params["norm"], state["norm"], x)
        y, memory_state, aux = call(self.memory, params["memory"], state["memory"], normed)
        return on_x(jnp.add, y, x), {"norm": norm_state, "memory": memory_state}, {"norm": norm_aux, "memory": aux}


@dataclass(frozen=True)
class RWKVLanguageModel(LanguageModel):
    """A `LanguageModel` whose last norm is a LayerNorm. bias: of that norm."""

    bias: bool = True

    def param_specs(self):
        return {**super().param_specs(), "norm": LayerNorm(self.dim, self.eps, self.bias).param_specs()}

    def last_norm(self, params, h):
        return layer_norm(h, params["weight"], params.get("bias"), self.eps)
