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
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from memjax.layers import gate, heads, linear, merge, row, wide
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import Recurrence, conv_weight, convolved, gated_output
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention


class HGRN2State(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"] | tuple[()] = ()  # float32, the last conv_size - 1 rows of q, f, i; () without one


@dataclass(frozen=True)
class HGRN2(Recurrence):
    """HGRN2 over x [b, t, dim].

    expand_ratio: width of a key and of a value; there are dim / expand_ratio heads. layer, layers: this is number
    `layer`, counted from 0, of the HGRN2 layers of a model. With more than one the bounds of all of them are one
    parameter: layer 0 has it, "lower_bounds" [layers, dim], and hands the cumulated bounds on as the stream
    "lower_bounds", of which each layer above reads its row; so the layers stand in a `Stack`, not in a `Repeat`. A
    single layer has no bound. use_short_conv: q, f and i pass a causal convolution of width conv_size.
    """

    dim: int
    expand_ratio: int = 128
    layer: int = 0
    layers: int = 1
    use_short_conv: bool = False
    conv_size: int = 4
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_f", "w_i")

    def __post_init__(self):
        at_least(self, 1, "dim", "expand_ratio", "layers")
        at_least(self, 2, "conv_size")
        if self.dim % self.expand_ratio:
            raise ValueError(f"HGRN2: expand_ratio is {self.expand_ratio}, needs a divisor of dim = {self.dim}")
        if not 0 <= self.layer < self.layers:
            raise ValueError(f"HGRN2: layer is {self.layer}, needs 0 to layers - 1 = {self.layers - 1}")

    @property
    def streams(self) -> bool:
        """Whether there are other layers to share bounds with."""
        return self.layers > 1

    @property
    def has_bounds(self) -> bool:
        """Whether the bounds of all layers are its parameter."""
        return self.streams and self.layer == 0

    @property
    def heads(self) -> int:
        """Heads of width expand_ratio."""
        return self.dim // self.expand_ratio

    def param_specs(self):
        d = self.dim
        return {
            "w_q": dense(d, d),
            "w_f": dense(d, d, kind="gate"),
            "w_i": dense(d, d),
            "w_o": dense(d, d, ("heads", "model")),
            **({"conv": conv_weight(self.conv_size, 3 * d)} if self.use_short_conv else {}),
            "norm": Param((d,), ("heads",), constant(1), "vector"),
            **(
                {"lower_bounds": Param((self.layers, d), (None, "heads"), constant(0), "gate")}
                if self.has_bounds
                else {}
            ),
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
            "w_q": matrix("q_proj.weight"),
            "w_f": matrix("f_proj.weight"),
            "w_i": matrix("i_proj.weight"),
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
        # q = silu(x W_q), the logits of f = x W_f, v = x W_i; or conv(x W)
        conv = state.conv
        if self.use_short_conv:
            (q, logits, v), conv = convolved(params, ("w_q", "w_f", "w_i"), conv, x, **masks, activation=None, how=how)
        else:
            q, logits, v = linear(x, params["w_q"]), gate(x, params["w_f"]), linear(x, params["w_i"])
        log_f, k = self._forget(wide(logits), lower_bound)
        # S_t = diag(f) S_{t-1} + (1 - f) v^T, o = k**-0.5 S^T q
        q = jax.nn.silu(q) * self.expand_ratio**-0.5
        q, k, v, log_f = (heads(a, self.heads) for a in (q, k.astype(x.dtype), v, log_f))
        o, S = linear_attention(q, k, v, log_f, initial_state=state.S, **masks, implementation=how.implementation)
        return o, HGRN2State(S, conv)

    def _forget(self, logits: Float[Array, "b t d"], lower_bound: Float[Array, " d"] | None):
        """log f and 1 - f, each from the logits: neither loses its digits where the other is near 0."""
        if lower_bound is None:
            if self.layer:
                raise ValueError(f"HGRN2: lower_bound is None, layer {self.layer} needs [{self.dim}]")
            return jax.nn.log_sigmoid(logits), jax.nn.sigmoid(-logits)
        lb = row(lower_bound, logits)
        return jnp.log(lb + (1 - lb) * jax.nn.sigmoid(logits)), (1 - lb) * jax.nn.sigmoid(-logits)

    def output(self, params, o, x):
        # y = W_o RMSNorm(o), the norm over the heads together
        return gated_output(params, merge(o)[:, :, None], self.norm_eps)
