"""HGRN2: HGRN with a matrix as state; one minus the forget gate of a key channel is the key.

The forget gate decays the rows of the state and decides what is written to them, so each column is a moving average of
the values; its lower bound rises with the depth, so upper layers forget slowly. What is not forgotten can't be
overwritten either.

Paper: Qin, Yang, Sun, Shen, Li, Sun, Zhong, HGRN2: gated linear RNNs with state expansion, arXiv 2404.07904 (2024).

State:  S [b h k v] float32, the associations of each head; conv, the last rows before the optional convolution.
Update: S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T;  o_t = k**-0.5 S_t^T q_t;  q_t = silu(x_t W_q);  v_t = x_t W_i
        f_t = lb + (1 - lb) sigmoid(x_t W_f);  layer 0: lb = 0;  layer l: lb = (cumsum gam)_l - gam_0,
        gam = softmax of Lambda over the layers

Differs from the paper: nothing. The scale of q and the optional convolution are those of flash-linear-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array
from jaxtyping import Float

from memjax.layers import gate, heads, linear, merge, wide
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import LowerBounded, conv_weight, convolved, gated_output
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention


class HGRN2State(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"] | tuple[()] = ()  # float32, the last conv_size - 1 rows of q, f, i; () without one


@dataclass(frozen=True)
class HGRN2(LowerBounded):
    """HGRN2 over x [b, t, dim].

    expand_ratio: width of a key and of a value; there are dim / expand_ratio heads. layer, layers: which of the HGRN2
    layers of a model this is, for the bounds that they share (`LowerBounded`). use_short_conv: q, f and i pass a causal
    convolution of width conv_size.
    """

    expand_ratio: int = 128
    use_short_conv: bool = False
    conv_size: int = 4
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_f", "w_i")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "expand_ratio")
        at_least(self, 2, "conv_size")
        if self.dim % self.expand_ratio:
            raise ValueError(f"HGRN2: expand_ratio is {self.expand_ratio}, needs a divisor of dim = {self.dim}")

    @property
    def d(self) -> int:
        """Key channels of all heads."""
        return self.dim

    @property
    def heads(self) -> int:
        """Heads of width expand_ratio."""
        return self.dim // self.expand_ratio

    def param_specs(self):
        d = self.dim
        return {
            **super().param_specs(),  # lower_bounds
            "w_q": dense(d, d),
            "w_f": dense(d, d, kind="gate"),
            "w_i": dense(d, d),
            "w_o": dense(d, d, ("heads", "model")),
            **({"conv": conv_weight(self.conv_size, 3 * d)} if self.use_short_conv else {}),
            "norm": Param((d,), ("heads",), constant(1), "vector"),
        }

    def state_specs(self, batch):
        k = self.expand_ratio
        S = Slot((batch, self.heads, k, k), ("batch", "heads", "key", "value"))
        if not self.use_short_conv:
            return specs(HGRN2State, S=S)
        return specs(HGRN2State, S=S, conv=Slot((batch, self.conv_size - 1, 3 * self.dim), ("batch", None, None)))

    def tensors(self):
        conv = depthwise(*((f"{n}_conv1d.weight", self.dim) for n in "qfi"))
        return {
            **super().tensors(),
            "w_q": matrix("q_proj.weight"),
            "w_f": matrix("f_proj.weight"),
            "w_i": matrix("i_proj.weight"),
            "w_o": matrix("o_proj.weight"),
            **({"conv": conv} if self.use_short_conv else {}),
            "norm": same("g_norm.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How(), lower_bound=None):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q = silu(x W_q), the logits of f = x W_f, v = x W_i; or conv(x W)
        conv = state.conv
        if self.use_short_conv:
            (q, logits, v), conv = convolved(params, ("w_q", "w_f", "w_i"), conv, x, **masks, activation=None, how=how)
        else:
            q, logits, v = linear(x, params["w_q"]), gate(x, params["w_f"]), linear(x, params["w_i"])
        log_f, k = self.forget(wide(logits), lower_bound)
        # S_t = diag(f) S_{t-1} + (1 - f) v^T, o = k**-0.5 S^T q
        q = jax.nn.silu(q) * self.expand_ratio**-0.5
        q, k, v, log_f = (heads(a, self.heads) for a in (q, k.astype(x.dtype), v, log_f))
        o, S = linear_attention(q, k, v, log_f, initial_state=state.S, **masks, implementation=how.implementation)
        return o, HGRN2State(S, conv)

    def output(self, params, o, x):
        # y = W_o RMSNorm(o), the norm over the heads together
        return gated_output(params, merge(o)[:, :, None], self.norm_eps)
