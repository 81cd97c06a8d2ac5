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
from jax import Array
from jaxtyping import Float

from memjax.layers import gate, linear, wide
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import LowerBounded, conv_weight, convolved, gated_output
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.diagonal_scan import IMPLEMENTATIONS, diagonal_scan


class HGRNState(NamedTuple):
    """What was read so far."""

    h: Float[Array, "b d"]  # float32, the moving averages
    conv: Float[Array, "b w c"] | tuple[()] = ()  # float32, the last conv_size - 1 rows of i, f; () without one


@dataclass(frozen=True)
class HGRN(LowerBounded):
    """HGRN over x [b, t, dim], with dim * expand_ratio channels.

    layer, layers: which of the HGRN layers of a model this is, for the bounds that they share (`LowerBounded`).
    use_short_conv: i and f pass a causal convolution of width conv_size.
    """

    expand_ratio: int = 1
    use_short_conv: bool = False
    conv_size: int = 4
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_i", "w_f")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "expand_ratio")
        at_least(self, 2, "conv_size")

    @property
    def d(self) -> int:
        """Channels of the state."""
        return self.dim * self.expand_ratio

    def param_specs(self):
        return {
            **super().param_specs(),  # lower_bounds
            "w_i": dense(self.dim, self.d),
            "w_f": dense(self.dim, self.d, kind="gate"),
            "w_g": dense(self.dim, self.d),
            "w_o": dense(self.d, self.dim, ("heads", "model")),
            **({"conv": conv_weight(self.conv_size, 2 * self.d)} if self.use_short_conv else {}),
            "norm": Param((self.d,), ("heads",), constant(1), "vector"),
        }

    def state_specs(self, batch):
        h = Slot((batch, self.d), ("batch", "heads"))
        if not self.use_short_conv:
            return specs(HGRNState, h=h)
        return specs(HGRNState, h=h, conv=Slot((batch, self.conv_size - 1, 2 * self.d), ("batch", None, None)))

    def tensors(self):
        conv = depthwise(("i_conv1d.weight", self.d), ("f_conv1d.weight", self.d))
        return {
            **super().tensors(),
            "w_i": matrix("i_proj.weight"),
            "w_f": matrix("f_proj.weight"),
            "w_g": matrix("g_proj.weight"),
            "w_o": matrix("o_proj.weight"),
            **({"conv": conv} if self.use_short_conv else {}),
            "norm": same("g_norm.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How(), lower_bound=None):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # i = x W_i and the logits of f = x W_f, or conv(x W)
        conv = state.conv
        if self.use_short_conv:
            (i, logits), conv = convolved(params, ("w_i", "w_f"), conv, x, **masks, activation=None, how=how)
        else:
            i, logits = linear(x, params["w_i"]), gate(x, params["w_f"])
        log_f, kept_out = self.forget(wide(logits), lower_bound)
        # h_t = f h_{t-1} + (1 - f) silu(i), o = h
        i = (wide(jax.nn.silu(i)) * kept_out).astype(x.dtype)
        run = diagonal_scan(i, log_f, initial_state=state.h, **masks, implementation=how.implementation)
        h, last = cast(tuple[Array, Array], run)  # not pairs: x is real
        return h[:, :, None], HGRNState(last, conv)

    def output(self, params, o, x):
        # y = W_o (RMSNorm(o) * silu(x W_g)), the norm over all channels
        return gated_output(params, o, self.norm_eps, jax.nn.silu(linear(x, params["w_g"])))
