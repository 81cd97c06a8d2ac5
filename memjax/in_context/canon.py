"""Canon layer: a short causal convolution added to its input, so that each token carries a little of its neighbours.

Attention without rotary positions copies and routes better behind it. State: the last W - 1 rows [b W-1 d].
Source: Allen-Zhu, Physics of Language Models 4.1 (2025), the residual form.
Update: y_t = x_t + sum_{i<W} w_{W-1-i} * x_{t-i}; the last row of w [W d] belongs to the current token
Differs from the paper: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Array, Float

from memjax.layers import short_conv
from memjax.memory import How, Memory, Param, Slot, at_least, normal, specs
from pallas_kernels.short_conv import IMPLEMENTATIONS


class CanonState(NamedTuple):
    """What the next call reads of this one."""

    conv: Float[Array, "b w d"]  # the rows before the convolution, oldest first


@dataclass(frozen=True)
class Canon(Memory):
    """width: taps, the current token included. init_std: of the taps."""

    dim: int
    width: int = 4
    init_std: float = 0.3

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS

    def __post_init__(self):
        at_least(self, 2, "width")

    def param_specs(self):
        return {"w": Param((self.width, self.dim), (None, "model"), normal(self.init_std), "vector")}

    def state_specs(self, batch):
        return specs(CanonState, conv=Slot((batch, self.width - 1, self.dim), ("batch", None, "model")))

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        y, conv = short_conv(x, params["w"], state.conv, valid=valid, start=start, implementation=how.implementation)
        return x + y, CanonState(conv)
