"""Based: linear attention whose feature map is the Taylor expansion of exp to second order, divided by its sum.

A global but soft memory: weights 1 + s + s^2/2 are never sharp, so the paper pairs it with exact attention in a small
window and with gated short convolutions. Feature dimension and window trade bytes of state against recall.

Paper: Arora, Eyuboglu, Zhang, Timalsina, Alberti, Zinsley, Zou, Rudra, Re, Simple linear attention language models
balance the recall-throughput tradeoff, arXiv 2402.18668 (2024).

State:  S [b h f v+1] float32: sum of phi(k) v^T, and in the last column z, the sum of phi(k).
Update: S_t = S_{t-1} + phi(k_t) v_t^T;  z_t = z_{t-1} + phi(k_t);  o_t = S_t^T phi(q_t) / (phi(q_t).z_t + eps)
        phi(x) = [1, x / d**(1/4), x x^T / sqrt(2 d)],  so phi(q).phi(k) = 1 + s + s^2/2 with s = q.k / sqrt(d)

The paper's model of 360M parameters is made of this layer, `BaseConv` and `SlidingWindowAttention`. A window_size of
256 in its configuration looks back 128 tokens; here the window counts the token itself:

    linear, conv = Based(dim=1024), BaseConv(dim=1024)
    window = SlidingWindowAttention(dim=1024, heads=16, window=129, rotary=False)
    at = (1, 6, 11, 16, 21)
    mixers = [linear if i in at else window if i - 1 in at else conv for i in range(27)]
    model = LanguageModel(Stack(tuple(block(m, hidden=2048) for m in mixers)), vocab=50257)

Differs from the paper: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jax import Array
from jaxtyping import Float

from memjax.layers import heads, linear
from memjax.memory import How, specs
from memjax.recurrence import TaylorHeads
from pallas_kernels.taylor_attention import IMPLEMENTATIONS, taylor_attention


class BasedState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h f v+1"]  # float32, the associations of each feature, and in the last column their sum z


@dataclass(frozen=True)
class Based(TaylorHeads):
    """Taylor linear attention over x [b, t, dim].

    feature_dim: width d of a head of q and k; the state has 1 + d + d^2 rows for each head. compressed: 1 + d +
    d (d + 1) / 2 rows instead, with the same result. head_v_dim: width of a head of v (None: dim / heads). eps is added
    to the denominator.
    """

    dim: int
    heads: int = 16
    feature_dim: int = 16
    head_v_dim: int | None = None
    compressed: bool = False
    eps: float = 1e-12

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v")

    def state_specs(self, batch):
        return specs(BasedState, S=self.S_slot(batch))

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        q, k, v = (heads(linear(x, params[w]), self.heads) for w in ("w_q", "w_k", "w_v"))
        settings = {"eps": self.eps, "compressed": self.compressed, "implementation": how.implementation}
        o, S = taylor_attention(q, k, v, initial_state=state.S, valid=valid, start=start, **settings)
        return o, BasedState(S)
