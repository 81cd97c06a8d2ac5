"""The recurrent block of Griffin and RecurrentGemma: a convolution and the real-gated linear recurrent unit (RG-LRU).

Every channel keeps one number, a running mean whose radius the token can only bring closer to 1: a gate slows
forgetting down, and what is written is scaled so that the state stays of the size of its inputs. In the published
models two such blocks stand before each of local attention.

Papers: De et al., Griffin: mixing gated linear recurrences with local attention for efficient language models,
arXiv 2402.19427 (2024); Botev et al., RecurrentGemma, arXiv 2404.07839 (2024).

State:  h [b e] float32; conv, the last rows before the convolution; count [b] int32, tokens of the document so far.
Update: h_t = a_t h_{t-1} + sqrt(1 - |a_t|^2) i_t x_t;  log a_t = -8 r_t softplus(a_param)
        r = sigmoid(x W_a + b_a), i = sigmoid(x W_i + b_i), block-diagonal;  x = conv(u W_x + b_x) + bias
        y = W_o (h * gelu(u W_y + b_y)) + b_o
        A document's first token is written with 1 in place of sqrt(1 - |a|^2).

Differs from the paper: with only_real=False h is e/2 complex numbers, as in the appendix and the published code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from memjax.layers import heads, linear, merge, positions, row, short_conv, wide
from memjax.memory import How, Param, Slot, at_least, constant, dense, normal, specs
from memjax.recurrence import Recurrence
from memjax.tensors import depthwise, matrix, same
from pallas_kernels.diagonal_scan import IMPLEMENTATIONS, diagonal_scan

MAX_SQRT_GRADIENT = 1000.0


class RecurrentGemmaLRUState(NamedTuple):
    """What was read so far."""

    h: Float[Array, "b e"]  # float32; of complex numbers the real parts, then the imaginary ones
    conv: Float[Array, "b w e"]  # float32, the last conv_size - 1 rows before the convolution
    count: Int[Array, " b"]  # tokens of the document so far


@dataclass(frozen=True)
class RecurrentGemmaLRU(Recurrence):
    """The recurrent block over x [b, t, dim].

    lru_width: e, channels of the recurrence (None: dim). heads: blocks of the gates' projections, a divisor of e.
    conv_size: width of the causal convolution. c: the exponent of the radius at an open gate. only_real: False makes
    the recurrence one of e/2 complex numbers.
    """

    dim: int
    heads: int = 4
    lru_width: int | None = None
    conv_size: int = 4
    c: float = 8.0
    only_real: bool = True

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_x", "b_x", "w_a", "b_a", "w_i", "b_i")

    def __post_init__(self):
        at_least(self, 1, "dim", "heads", "lru_width")
        at_least(self, 2, "conv_size")
        if self.c <= 0:
            raise ValueError(f"RecurrentGemmaLRU: c is {self.c}, needs > 0")
        if self.e % (self.heads if self.only_real else 2 * self.heads):
            need = f"heads = {self.heads}" if self.only_real else f"2 * heads = {2 * self.heads}, for complex numbers"
            raise ValueError(f"RecurrentGemmaLRU: lru_width is {self.e}, needs a multiple of {need}")

    @property
    def e(self) -> int:
        """Channels of the recurrence."""
        return self.dim if self.lru_width is None else self.lru_width

    @property
    def numbers(self) -> int:
        """Numbers in the state, each with a decay of its own."""
        return self.e if self.only_real else self.e // 2

    def param_specs(self):
        m, e, n, h = self.dim, self.e, self.numbers, self.heads
        bias = Param((e,), ("heads",), constant(0), "vector")
        w_gate = Param((h, e // h, n // h), ("heads", None, None), normal((e // h) ** -0.5), "gate")
        b_gate = Param((h, n // h), ("heads", None), constant(0), "gate")
        return {
            "w_x": dense(m, e),
            "b_x": bias,
            "w_y": dense(m, e),
            "b_y": bias,
            "conv": Param((self.conv_size, e), (None, "heads"), normal(0.1 * self.conv_size**-0.5), "vector"),
            "conv_bias": bias,
            "w_a": w_gate,
            "b_a": b_gate,
            "w_i": w_gate,
            "b_i": b_gate,
            "a_param": Param((n,), ("heads",), _radius_between_09_and_0999, "gate"),
            **({} if self.only_real else {"a_imag": Param((n,), ("heads",), _small_angle, "gate")}),
            "w_o": dense(e, m, ("heads", "model")),
            "b_o": Param((m,), ("model",), constant(0), "vector"),
        }

    def state_specs(self, batch):
        return specs(
            RecurrentGemmaLRUState,
            h=Slot((batch, self.e), ("batch", "heads")),
            conv=Slot((batch, self.conv_size - 1, self.e), ("batch", None, "heads")),
            count=Slot((batch,), ("batch",), jnp.int32),
        )

    def tensors(self):
        if not self.only_real:  # no published checkpoint has complex numbers
            return {}
        linears = {
            f"{kind}_{ours}": layout(f"linear_{theirs}.{name}")
            for ours, theirs in (("x", "x"), ("y", "y"), ("o", "out"))
            for kind, layout, name in (("w", matrix, "weight"), ("b", same, "bias"))
        }
        return linears | {
            "conv": depthwise("conv_1d.weight"),
            "conv_bias": same("conv_1d.bias"),
            "w_a": same("rg_lru.recurrent_gate_weight"),
            "b_a": same("rg_lru.recurrent_gate_bias"),
            "w_i": same("rg_lru.input_gate_weight"),
            "b_i": same("rg_lru.input_gate_bias"),
            "a_param": same("rg_lru.recurrent_param"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # x = conv(u W_x + b_x) + bias, without an activation
        x, conv = short_conv(
            linear(x, params["w_x"], params["b_x"]),
            params["conv"],
            state.conv,
            bias=params["conv_bias"],
            **masks,
            implementation=how.implementation,
        )
        position, count = positions(state.count, x.shape[1], valid, start)
        y, h = self.rg_lru(params, x, state.h, position == 0, **masks, how=how)
        return y[:, :, None], RecurrentGemmaLRUState(h, conv, count)

    def output(self, params, o, x):
        # y = W_o (h * gelu(x W_y + b_y)) + b_o
        branch = jax.nn.gelu(linear(x, params["w_y"], params["b_y"]), approximate=True)
        return linear(merge(o) * branch, params["w_o"], params["b_o"])

    def rg_lru(
        self,
        params: dict,
        x: Float[Array, "b t e"],
        h: Float[Array, "b e"],
        first: Bool[Array, "b t"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        start: Bool[Array, "b t"] | None = None,
        how: How = How(),
    ) -> tuple[Float[Array, "b t e"], Float[Array, "b e"]]:
        """The recurrence alone: all h_t in the dtype of x, and the last. first: the tokens that begin a document."""
        r, i = (jax.nn.sigmoid(self._gate(x, params[f"w_{g}"], params[f"b_{g}"])) for g in "ai")
        log_decay = -self.c * r * jax.nn.softplus(row(params["a_param"], r))
        # 1 - e^{2 log a} by expm1: exact where a is near 1
        scale = jnp.where(first[..., None], jnp.ones((), r.dtype), _sqrt(-jnp.expm1(2 * log_decay)))
        phase = None if self.only_real else r * row(params["a_imag"], r)
        y, h_last = diagonal_scan(
            jax.tree.map(lambda part: scale * i * part, self._parts(wide(x))),
            log_decay,
            phase,
            initial_state=self._parts(h),
            valid=valid,
            start=start,
            implementation=how.implementation,
        )
        return self._whole(y).astype(x.dtype), self._whole(h_last)

    def _parts(self, h: Array) -> Any:
        """As `diagonal_scan` has numbers: one array, or the real and the imaginary half."""
        return h if self.only_real else tuple(jnp.split(h, 2, -1))

    def _whole(self, parts: Any) -> Array:
        return parts if self.only_real else jnp.concatenate(parts, -1)

    def _gate(self, x, w, bias):
        """x W + bias in blocks, in float32: [b t n]."""
        y = jnp.einsum("bthi,hij->bthj", heads(wide(x), self.heads), w.astype(wide(x).dtype))
        return merge(y + row(bias, y))


@jax.custom_jvp
def _sqrt(x: Array) -> Array:
    """The square root, with a gradient of at most 1000: where the gate is shut it would be infinite."""
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), dx / (2 * jnp.sqrt(jnp.maximum(x, 1 / (4 * MAX_SQRT_GRADIENT**2))))


def _radius_between_09_and_0999(key: Array, shape: tuple[int, ...]) -> Array:
    """softplus^-1(-log radius), the square of the radius uniform."""
    u = jax.random.uniform(key, shape, jnp.float32)
    log_radius = 0.5 * jnp.log(u * (0.999**2 - 0.9**2) + 0.9**2 + 1e-8)
    return jnp.log(jnp.expm1(-log_radius))


def _small_angle(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, 0, 0.1 * math.pi)
