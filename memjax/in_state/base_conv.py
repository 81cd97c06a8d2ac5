"""BaseConv: a short convolution gated by its own input, the local mixer of Based.

It sees the current token and the two before it, and multiplies them by a projection of the current one: enough to
compare neighbours, which linear attention does badly.

Paper: Arora, Eyuboglu, Zhang, Timalsina, Alberti, Zinsley, Zou, Rudra, Re, Simple linear attention language models
balance the recall-throughput tradeoff, arXiv 2402.18668 (2024).

State:  conv [b w c], the last rows before the convolution.
Update: u1, u2 = split(x W_in + b_in);  y = (silu(conv(u1) + b_conv) * u2) W_out + b_out

Differs from the paper: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from memjax.layers import linear, short_conv
from memjax.memory import How, Memory, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import conv_weight
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.short_conv import IMPLEMENTATIONS


class BaseConvState(NamedTuple):
    """What the next call reads of this one."""

    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows before the convolution, oldest first


@dataclass(frozen=True)
class BaseConv(Memory):
    """A gated convolution over x [b, t, dim], of width conv_size, inside dim * expand channels."""

    dim: int
    expand: int = 2
    conv_size: int = 3

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS

    def __post_init__(self):
        at_least(self, 1, "dim", "expand")
        at_least(self, 2, "conv_size")

    @property
    def inner(self) -> int:
        """Channels of the convolution."""
        return self.dim * self.expand

    def param_specs(self):
        d, c = self.dim, self.inner
        return {
            "w_in": dense(d, 2 * c, ("model", "mlp")),
            "b_in": Param((2 * c,), ("mlp",), constant(0), "vector"),
            "conv": conv_weight(self.conv_size, c),
            "b_conv": Param((c,), (None,), constant(0), "vector"),
            "w_out": dense(c, d, ("mlp", "model")),
            "b_out": Param((d,), ("model",), constant(0), "vector"),
        }

    def state_specs(self, batch):
        return specs(BaseConvState, conv=Slot((batch, self.conv_size - 1, self.inner), ("batch", None, "mlp")))

    def tensors(self):
        return {
            "w_in": matrix("in_proj.weight"),
            "b_in": same("in_proj.bias"),
            "conv": depthwise("conv.conv.weight"),
            "b_conv": same("conv.conv.bias"),
            "w_out": matrix("out_proj.weight"),
            "b_out": same("out_proj.bias"),
        }

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        u1, u2 = jnp.split(linear(x, params["w_in"], params["b_in"]), 2, -1)
        u1, conv = short_conv(
            u1,
            params["conv"],
            state.conv,
            valid=valid,
            start=start,
            bias=params["b_conv"],
            activation="silu",
            implementation=how.implementation,
        )
        return linear(u1 * u2, params["w_out"], params["b_out"]), BaseConvState(conv)
