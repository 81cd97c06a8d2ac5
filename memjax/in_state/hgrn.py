"""HGRN: a gated linear RNN with a vector as state, whose forget gates have a lower bound that rises with the depth.

What enters is weighted by 1 - f, so each channel is a moving average; the bound makes upper layers forget slowly and
lower ones fast. There are no keys: the state is too small to recall what stood where.

Paper: Qin, Yang, Zhong, Hierarchically gated recurrent neural network for sequence modeling, arXiv 2311.04823 (2023).

State:  h [b d] float32, the averages; conv, the last rows before the optional convolution.
Update: h_t = f_t * h_{t-1} + (1 - f_t) * silu(x_t W_i);  o_t = h_t
        f_t = lb + (1 - lb) sigmoid(x_t W_f);  layer 0: lb = 0;  layer l: lb = (cumsum gam)_l - gam_0,
        gam = softmax of Lambda over the layers

Differs from the paper: the recurrence is real, not complex, as in flash-linear-attention, whose optional convolution is
its own too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from memjax.layers import gate, linear, row, wide
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import Recurrence, conv_weight, convolved, gated_output
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.diagonal_scan import IMPLEMENTATIONS, diagonal_scan


class HGRNState(NamedTuple):
    """What was read so far."""

    h: Float[Array, "b d"]  # float32, the moving averages
    conv: Float[Array, "b w c"] | tuple[()] = ()  # float32, the last conv_size - 1 rows of i, f; () without one


@dataclass(frozen=True)
class HGRN(Recurrence):
    """HGRN over x [b, t, dim], with dim * expand_ratio channels.

    layer, layers: this is number `layer`, counted from 0, of the HGRN layers of a model. With more than one the bounds
    of all of them are one parameter: layer 0 has it, "lower_bounds" [layers, d], and hands the cumulated bounds on as
    the stream "lower_bounds", of which each layer above reads its row; so the layers stand in a `Stack`, not in a
    `Repeat`. A single layer has no bound. use_short_conv: i and f pass a causal convolution of width conv_size.
    """

    dim: int
    expand_ratio: int = 1
    layer: int = 0
    layers: int = 1
    use_short_conv: bool = False
    conv_size: int = 4
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_i", "w_f")

    def __post_init__(self):
        at_least(self, 1, "dim", "expand_ratio", "layers")
        at_least(self, 2, "conv_size")
        if not 0 <= self.layer < self.layers:
            raise ValueError(f"HGRN: layer is {self.layer}, needs 0 to layers - 1 = {self.layers - 1}")

    @property
    def streams(self) -> bool:
        """Whether there are other layers to share bounds with."""
        return self.layers > 1

    @property
    def has_bounds(self) -> bool:
        """Whether the bounds of all layers are its parameter."""
        return self.streams and self.layer == 0

    @property
    def d(self) -> int:
        """Channels of the state."""
        return self.dim * self.expand_ratio

    def param_specs(self):
        bounds = {"lower_bounds": Param((self.layers, self.d), (None, "heads"), constant(0), "gate")}
        return {
            "w_i": dense(self.dim, self.d),
            "w_f": dense(self.dim, self.d, kind="gate"),
            "w_g": dense(self.dim, self.d),
            "w_o": dense(self.d, self.dim, ("heads", "model")),
            **({"conv": conv_weight(self.conv_size, 2 * self.d)} if self.use_short_conv else {}),
            "norm": Param((self.d,), ("heads",), constant(1), "vector"),
            **(bounds if self.has_bounds else {}),
        }

    def state_specs(self, batch):
        h = Slot((batch, self.d), ("batch", "heads"))
        if not self.use_short_conv:
            return specs(HGRNState, h=h)
        return specs(HGRNState, h=h, conv=Slot((batch, self.conv_size - 1, 2 * self.d), ("batch", None, None)))

    def tensors(self):
        conv = depthwise(("i_conv1d.weight", self.d), ("f_conv1d.weight", self.d))
        return {
            "w_i": matrix("i_proj.weight"),
            "w_f": matrix("f_proj.weight"),
            "w_g": matrix("g_proj.weight"),
            "w_o": matrix("o_proj.weight"),
            **({"conv": conv} if self.use_short_conv else {}),
            "norm": same("g_norm.weight"),
            **({"lower_bounds": same("lower_bounds")} if self.has_bounds else {}),
        }

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        if not self.streams:
            return super().apply(params, state, x, valid=valid, start=start, how=how)
        flow, x = x, x.x
        if self.has_bounds:
            gam = jax.nn.softmax(wide(params["lower_bounds"]), 0)
            bounds = jnp.cumsum(gam, 0) - gam[:1]
        else:
            bounds = flow.take("lower_bounds", self)
        o, state = self.recall(
            params, state, x, valid=valid, start=start, how=how, lower_bound=bounds[self.layer] if self.layer else None
        )
        return flow.hand(self.output(params, o, x), lower_bounds=bounds), state

    def recall(
        self,
        params,
        state,
        x,
        *,
        valid=None,
        start=None,
        how: How = How(),
        lower_bound: Float[Array, " d"] | None = None,
    ):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # i = x W_i and the logits of f = x W_f, or conv(x W)
        conv = state.conv
        if self.use_short_conv:
            (i, logits), conv = convolved(params, ("w_i", "w_f"), conv, x, **masks, activation=None, how=how)
        else:
            i, logits = linear(x, params["w_i"]), gate(x, params["w_f"])
        log_f, kept_out = self._forget(wide(logits), lower_bound)
        # h_t = f h_{t-1} + (1 - f) silu(i), o = h
        i = (wide(jax.nn.silu(i)) * kept_out).astype(x.dtype)
        run = diagonal_scan(i, log_f, initial_state=state.h, **masks, implementation=how.implementation)
        h, last = cast(tuple[Array, Array], run)  # not pairs: x is real
        return h[:, :, None], HGRNState(last, conv)

    def _forget(self, logits: Float[Array, "b t d"], lower_bound: Float[Array, " d"] | None):
        """log f and 1 - f, each from the logits: neither loses its digits where the other is near 0."""
        if lower_bound is None:
            if self.layer:
                raise ValueError(f"HGRN: lower_bound is None, layer {self.layer} needs [{self.d}]")
            return jax.nn.log_sigmoid(logits), jax.nn.sigmoid(-logits)
        lb = row(lower_bound, logits)
        return jnp.log(lb + (1 - lb) * jax.nn.sigmoid(logits)), (1 - lb) * jax.nn.sigmoid(-logits)

    def output(self, params, o, x):
        # y = W_o (RMSNorm(o) * silu(x W_g)), the norm over all channels
        return gated_output(params, o, self.norm_eps, jax.nn.silu(linear(x, params["w_g"])))
