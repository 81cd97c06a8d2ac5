"""Mamba-2: a selective state-space layer whose decay is one number per head and token.

A step size dt, which depends on the token, scales both what is forgotten and what is written, so a token with dt near 0
is skipped. That makes it linear attention with a scalar gate: q = C, k = B, v = dt x, g = dt A.

Paper: Dao, Gu, Transformers are SSMs: generalized models and efficient algorithms through structured state space
duality, arXiv 2405.21060 (2024).

State:  S [b h n p] float32, n state channels by p channels of the head; conv, the last rows of x, B, C before the
        convolution.
Update: S_t = e^{dt_t A} S_{t-1} + B_t (dt_t x_t)^T;  y_t = S_t^T C_t + D x_t
        x, B, C = silu(conv(u W_in) + bias);  dt = softplus(u W_in + dt_bias);  A = -exp(A_log)

Differs from the paper: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from memjax.layers import row, wide
from memjax.memory import How, Slot, specs
from memjax.state_space import StateSpaceHeads
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention


class Mamba2State(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h n p"]  # float32, the associations; published caches have [b h p n]
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of x, B, C before the convolution


@dataclass(frozen=True)
class Mamba2(StateSpaceHeads):
    """Mamba-2 over x [b, t, dim].

    expand, head_dim, state_size, groups, conv_size: those of `StateSpaceHeads`. dt_limit: least and largest dt (None:
    no limit).
    """

    dt_limit: tuple[float, float | None] = (0.0, None)

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_in", "dt_bias", "A_log")

    def __post_init__(self):
        super().__post_init__()
        least, most = self.dt_limit
        if least < 0 or (most is not None and most < least):
            raise ValueError(f"Mamba2: dt_limit is {self.dt_limit}, needs 0 <= least <= largest")

    def state_specs(self, batch):
        S = Slot((batch, self.heads, self.state_size, self.head_dim), ("batch", "heads", "key", "value"))
        return specs(Mamba2State, S=S, conv=self.conv_slot(batch))

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # z; x, B, C = silu(conv(u W) + bias)
        (z, x, B, C), dt, conv = self.projected(params, state.conv, x, **masks, how=how)
        # dt = softplus(u W + dt_bias) within its limits, A = -exp(A_log), both in float32
        dt = jnp.clip(jax.nn.softplus(dt + row(params["dt_bias"], dt)), *self.dt_limit)
        A = -jnp.exp(params["A_log"])
        # S_t = e^{dt A} S_{t-1} + B (dt x)^T, y = S^T C + D x
        y, S = ssd(x, dt, A, B, C, params["D"], initial_state=state.S, **masks, how=how)
        return y * jax.nn.silu(z), Mamba2State(S, conv)


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"],
    *,
    initial_state: Float[Array, "b h n p"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    how: How = How(),
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h n p"]]:
    """y [b t h p] and the final state of S_t = e^{dt_t A} S_{t-1} + B_t (dt_t x_t)^T, y_t = S_t^T C_t + D x_t.

    A <= 0 and dt >= 0 are final values, in the dtype to accumulate in. Head j reads group j // (h / g) of B and C.
    """
    q, k = (jnp.repeat(a, x.shape[2] // a.shape[2], 2) for a in (C, B))
    v = (dt[..., None] * wide(x)).astype(x.dtype)
    masks: dict[str, Any] = {"valid": valid, "start": start}
    y, S = linear_attention(
        q, k, v, dt * row(A, dt), initial_state=initial_state, **masks, implementation=how.implementation
    )
    return y + row(D[:, None], x) * x, S
