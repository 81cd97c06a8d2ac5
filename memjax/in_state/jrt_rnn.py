"""JRT-RNN: prefix linear attention, a linear attention that reads the prompt as a whole before its first output.

A causal state must decide what to keep before it has seen the question. Here the first tokens of a document are also
encoded, by keys and values of their own, and every token sees the sum of them all; after the prompt it is Based.

Paper: Arora, Timalsina, Singhal, Spector, Eyuboglu, Zhao, Rao, Rudra, Re, Just read twice: closing the recall gap for
recurrent language models, arXiv 2407.05483 (2024).

State:  S [b h f v+1] float32: sums of phi(k) v^T, encoder and decoder together, and in the last column z, of phi(k)
        count [b] int32, tokens of the document so far
Update: Se = sum_{j < M} phi(x_j W_ke) (x_j W_ve)^T;  ze = sum_{j < M} phi(x_j W_ke)
        S_i = Se + sum_{j <= i} phi(k_j) v_j^T;  z_i = ze + sum_{j <= i} phi(k_j)
        o_i = S_i^T phi(q_i) / (phi(q_i).z_i + eps),  phi the Taylor expansion of exp to second order, as in Based
Prefix: the encoded tokens of a document are those among its first M = enc_length (positions count valid tokens) that
        are in the same `apply` as its first token. Tokens of a later call are never encoded, and `step`, which is
        decoding, encodes none. So a prompt is one call: with M above its length, prompts of different lengths are
        encoded whole. Inside that call outputs see later tokens and a cut would change them; after it the memory is
        causal and may be cut anywhere.

Differs from the paper: M counts valid tokens, where the released code counts padding too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from memjax.layers import beside, heads, linear, positions, segments
from memjax.memory import How, Slot, at_least, dense, specs
from memjax.recurrence import TaylorHeads
from memjax.tensors import matrix
from pallas_kernels.taylor_attention import IMPLEMENTATIONS, taylor_attention


class PrefixLinearAttentionState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h f v+1"]  # float32, the associations of each feature, and in the last column their sum z
    count: Int[Array, " b"]  # valid tokens since the document began


@dataclass(frozen=True)
class PrefixLinearAttention(TaylorHeads):
    """Prefix linear attention over x [b, t, dim].

    enc_length: tokens of a document that are encoded, 0 for none (`Based`). The other fields are those of `Based`:
    feature_dim, the width of a head of q and k; head_v_dim, that of a head of v (None: dim / heads); compressed, each
    product of two features once; eps, added to the denominator.
    """

    dim: int
    heads: int = 16
    feature_dim: int = 16
    head_v_dim: int | None = None
    enc_length: int = 1024
    compressed: bool = False
    eps: float = 1e-12

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_k_enc", "w_v_enc")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "enc_length")

    def param_specs(self):
        k, v = dense(self.dim, self.heads * self.feature_dim), dense(self.dim, self.heads * self.v)
        return {**super().param_specs(), "w_k_enc": k, "w_v_enc": v}

    def state_specs(self, batch):
        count = Slot((batch,), ("batch",), jnp.int32)
        return specs(PrefixLinearAttentionState, S=self.S_slot(batch), count=count)

    def tensors(self):
        encoder = {"w_k_enc": matrix("proj_k_enc.weight"), "w_v_enc": matrix("proj_v_enc.weight")}
        return {**super().tensors(), **encoder}

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How(), encode: bool = True):
        """encode: False reads as decoding does, by the causal sums alone."""
        b, t, _ = x.shape
        position, count = positions(state.count, t, valid, start)
        q, k, v = (heads(linear(x, params[w]), self.heads) for w in ("w_q", "w_k", "w_v"))
        order = None
        if encode and self.enc_length:
            # each document behind its own encoded tokens, as one sequence: in it all sums are causal
            segment = segments(start, b, t)
            encoded = (position < self.enc_length) & ((segment > 0) | (state.count == 0)[:, None])
            encoded, valid = (encoded, jnp.ones((b, t), bool)) if valid is None else (encoded & valid, valid)
            if start is None:  # one document a row: nobody else's tokens are in between
                first = jnp.argsort(~encoded, 1, stable=True)[:, : self.enc_length]
                x, encoded = _take(x, first), _take(encoded, first)
            ke, ve = (heads(linear(x, params[w]), self.heads) for w in ("w_k_enc", "w_v_enc"))
            pairs = (jnp.zeros_like(ke), q), (ke, k), (ve, v), (encoded, valid)
            q, k, v, valid = (jnp.concatenate(pair, 1) for pair in pairs)
            if start is not None:
                order, start = _documents(segment)
                q, k, v, valid = (_take(a, order) for a in (q, k, v, valid))
        settings = {"eps": self.eps, "compressed": self.compressed, "implementation": how.implementation}
        o, S = taylor_attention(q, k, v, initial_state=state.S, valid=valid, start=start, **settings)
        o = o[:, -t:] if order is None else _take(o, jnp.argsort(order, 1)[:, -t:])
        return o, PrefixLinearAttentionState(S, count)

    def step(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        x, (valid, start) = x[:, None], (None if a is None else a[:, None] for a in (valid, start))
        o, state = self.recall(params, state, x, valid=valid, start=start, how=how, encode=False)
        return self.output(params, o, x)[:, 0], state


def _documents(segment: Int[Array, "b t"]) -> tuple[Int[Array, "b u"], Bool[Array, "b u"]]:
    """The order in which two copies of a sequence become one of u = 2 t tokens, each document of the first copy before
    the same one of the second, and where documents begin in it."""
    both = jnp.concatenate([segment, segment], 1)
    second = jnp.arange(both.shape[1]) >= segment.shape[1]
    order = jnp.argsort(2 * both + second.astype(both.dtype)[None], 1, stable=True)
    return order, jnp.diff(_take(both, order), axis=1, prepend=jnp.zeros_like(segment[:, :1])) > 0


def _take(a: Float[Array, "b t ..."] | Bool[Array, "b t"] | Int[Array, "b t"], index: Int[Array, "b s"]) -> Array:
    """The tokens at these places."""
    return jnp.take_along_axis(a, beside(index, a), 1)
