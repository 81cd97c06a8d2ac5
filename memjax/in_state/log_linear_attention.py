"""Log-linear attention: a state for each power of two of distance, instead of one for the whole past.

The past is cut into buckets of 1, 2, 4, ... tokens, the nearest the smallest (a Fenwick tree), and each bucket's state
is read with a weight that depends on the token. The cost of a token grows with the logarithm of the length; the layer
around it is that of Mamba-2.

Paper: Guo, Yang, Goel, Xing, Dao, Kim, Log-linear attention, arXiv 2506.04761 (2025).

State:  S [b l h n p] float32, slot l = 1, 2, ... a bucket of 2^(l-1) tokens or empty; count [b], tokens read; conv, the
        last rows of x, B, C before the convolution. Level 0 is the token itself and has no slot.
Update: o_t = lam_{t,0} (q_t . k_t) v_t + sum_l lam_{t,l} (e^{g_t} S^(l))^T q_t
        S^(m) = k_t v_t^T + e^{g_t} sum_{l<m} S^(l), slots below m are emptied; m - 1 = trailing ones of t = 0, 1, ...
        or: o_t = sum_{s<=t} lam_{t, bit_length(t xor s)} e^{g_{s+1} + ... + g_t} (q_t . k_s) v_s
        q = C, k = B, v = dt x, g = -e^{A_log} dt, lam = softplus(L * dl), dl = u W_in
        x, B, C = silu(conv(u W_in) + bias);  dt = softplus(u W_in + dt_bias)

Differs from the paper: a document may be longer than max_length; the last level then holds all that the others don't.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from memjax.layers import beside, heads, positions, row, scan_tokens, wide
from memjax.memory import How, Param, Slot, at_least, constant, specs
from memjax.state_space import StateSpaceHeads
from memjax.tensors import same
from pallas_kernels import chunks, dispatch
from pallas_kernels.compat import match_varying
from pallas_kernels.scan import only


class LogLinearAttentionState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b l h n p"]  # float32, the associations of each bucket
    count: Int[Array, " b"]  # tokens of the document: bit l - 1 says whether slot l holds a bucket
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of x, B, C before the convolution


@dataclass(frozen=True)
class LogLinearAttention(StateSpaceHeads):
    """Log-linear attention over x [b, t, dim].

    max_length: a power of two, tokens that are told apart by distance; beyond them the last level holds the rest.
    expand, head_dim, state_size, groups, conv_size: those of `StateSpaceHeads`.
    """

    max_length: int = 16384

    implementations: ClassVar[tuple[str, ...]] = ("reference", "xla")
    own: ClassVar[tuple[str, ...]] = ("w_in", "dt_bias", "A_log", "L")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 2, "max_length")
        if self.max_length & (self.max_length - 1):
            raise ValueError(f"LogLinearAttention: max_length is {self.max_length}, needs a power of two")

    @property
    def levels(self) -> int:
        """The token itself and the buckets before it."""
        return self.max_length.bit_length()

    @property
    def gates(self) -> int:
        """Columns of dt and dl."""
        return self.heads * (1 + self.levels)

    def param_specs(self):
        L = Param((self.heads, self.levels), ("heads", None), constant(1), "gate")
        return {**super().param_specs(), "L": L}

    def state_specs(self, batch):
        S = (batch, self.levels - 1, self.heads, self.state_size, self.head_dim)
        return specs(
            LogLinearAttentionState,
            S=Slot(S, ("batch", None, "heads", "key", "value")),
            count=Slot((batch,), ("batch",), jnp.int32),
            conv=self.conv_slot(batch),
        )

    def tensors(self):
        return {**super().tensors(), "L": same("L")}

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        h = self.heads
        # z; x, B, C = silu(conv(u W) + bias)
        (z, x, B, C), gates, conv = self.projected(params, state.conv, x, **masks, how=how)
        k, q = (jnp.repeat(a, h // self.groups, 2) for a in (B, C))
        # dt = softplus(u W + dt_bias), g = -exp(A_log) dt, lam = softplus(L * u W), in float32
        dt, dl = jnp.split(gates, [h], -1)
        dt, dl = jax.nn.softplus(dt + row(params["dt_bias"], dt)), heads(dl, h)
        log_decay, lam = -jnp.exp(row(params["A_log"], dt)) * dt, jax.nn.softplus(row(params["L"], dl) * dl)
        # o_t = sum_s lam_{t, level(t, s)} e^G (q_t . k_s) v_s, and D x beside it
        v = dt[..., None] * wide(x)
        o, S, count = log_linear_attention(
            q, k, v, log_decay, lam, state.S, state.count, **masks, implementation=how.implementation
        )
        o = o.astype(x.dtype) + row(params["D"][:, None], x) * x
        return o * jax.nn.silu(z), LogLinearAttentionState(S, count, conv)


def log_linear_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h"],
    lam: Float[Array, "b t h levels"],
    S: Float[Array, "b l h k v"],
    count: Int[Array, " b"],
    *,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b l h k v"], Int[Array, " b"]]:
    """o_t = sum_{s<=t} lam_{t, level(t,s)} e^{g_{s+1} + ... + g_t} (q_t . k_s) v_s; o, the new slots and count.

    lam: the weights of levels 0 to l. S: slots 1 to l of a document of which `count` tokens were read; the dtype to
    compute in is its own. implementation: "reference" (a scan over tokens, the definition), "xla" (chunks), None: by
    length. Raises ValueError where lam and S differ in levels.
    """
    if lam.shape[-1] != S.shape[1] + 1:
        raise ValueError(f"log_linear_attention: lam has {lam.shape[-1]} levels, needs {S.shape[1] + 1}, one above S")
    t, op, forms = q.shape[1], "log_linear_attention", {"reference": _recurrent, "xla": _chunked}
    position, final = positions(count, t, valid, start)
    arrays, S = dispatch.keep(valid, q, k, v, log_decay, lam), dispatch.initial(S, S.shape, S.dtype, start)
    args = S, arrays, position, final, valid, start
    o, S = dispatch.run(op, implementation, forms, args, t=t, size=S.size, chunk_size=chunk_size)
    return o.astype(v.dtype), S, final


def level(t: Array, s: Array) -> Array:
    """The level at which token t finds token s: the length of t xor s in bits."""
    return 32 - lax.clz(t ^ s)


def one_hot(slot: Array, S: Array) -> Array:
    """1 at the slot of that number, [b ...] -> [b ... l]; 0 is no slot."""
    return jax.nn.one_hot(slot - 1, S.shape[1], dtype=S.dtype)


def merged(S: Array, m: Array) -> Array:
    """The slots with all up to slot m [b] together in slot m, and none below it."""
    slots, m = jnp.arange(1, S.shape[1] + 1, dtype=jnp.int32)[None], m[:, None]
    together = jnp.sum(only(slots <= m, S), 1, keepdims=True)
    return jnp.where(beside(slots == m, S), together, only(slots > m, S))


def _recurrent(S, arrays, position, final, valid, start, *, chunk_size: int):
    """The definition: one token after another. There are no chunks here."""

    def step(S, now):
        (q, k, v, g, lam), t = jax.tree.map(lambda a: a.astype(S.dtype), now[0]), now[1]
        S = jnp.exp(g)[:, None, :, None, None] * S
        o = (lam[..., 0] * jnp.sum(q * k, -1))[..., None] * v
        o = o + jnp.einsum("bhl,blhkv,bhk->bhv", lam[..., 1:], S, q, precision=lax.Precision.HIGHEST)
        m = jnp.minimum(level(t + 1, t), S.shape[1])
        return merged(S, m) + beside(one_hot(m, S), S) * (k[..., :, None] * v[..., None, :])[:, None], o

    return scan_tokens(step, S, (arrays, position), valid=valid, start=start)


def _chunked(S, arrays, position, final, valid, start, *, chunk_size: int):
    """Chunks: every pair of tokens with the weight of its level inside one, the slots from one to the next.

    At position p, what stood in slot l at position n is found at level max(l, level(p, n)), and behind the chunk it
    stands in the slot of that number. So each row of the batch may be at a position of its own.
    """
    (b, t), last = position.shape, S.shape[1]
    c, einsum = chunks.chunk_length(t, chunk_size), functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    arrays, position, start = jax.tree.map(
        lambda a: jnp.pad(a, ((0, 0), (0, -t % c)) + ((0, 0),) * (a.ndim - 2)), (arrays, position, start)
    )

    def chunk(S, now):
        (q, k, v, lam), a, p, n, after = now
        decays: Any = chunks.decays(a[None])
        enter, leave, through = decays.enter[0], decays.leave[0], decays.through[0]
        slots = jnp.maximum(jnp.arange(1, last + 1, dtype=jnp.int32)[None, None], level(p, n[:, None])[..., None])
        levels = jnp.minimum(jnp.concatenate([level(p[:, :, None], p[:, None]), slots], -1), last)
        weight = einsum("bhrl,brul->bhru", lam, jax.nn.one_hot(levels, last + 1, dtype=S.dtype))
        P = einsum("bhrk,bhik->bhri", q, k) * chunks.decay_matrix(decays, c, S.dtype)[0] * weight[..., :c]
        o = einsum("bhri,bhiv->bhrv", P, v) + einsum("bhrl,bhrk,blhkv->bhrv", weight[..., c:], enter * q, S)
        becomes = one_hot(jnp.minimum(level(after[:, None], p), last), S)
        S = merged(through[:, None] * S, jnp.minimum(level(after, n), last))
        return S + einsum("bil,bhik,bhiv->blhkv", becomes, leave * k, v), o

    *rows, g, lam = (a.astype(S.dtype) for a in arrays)
    p = jnp.moveaxis(position.reshape(b, -1, c), 1, 0)
    n = p[..., 0]  # where a document begins here, nothing of the state that enters is read
    now = ([chunks.split(a, c) for a in (*rows, lam)], chunks.factors(g, start, c, S.dtype), p, n)
    now = (*now, jnp.concatenate([n[1:], final[None]]))
    # the backward pass computes each chunk again, from the slots that entered it
    S, o = lax.scan(jax.checkpoint(chunk, prevent_cse=False), match_varying(S, now), now)
    return chunks.merge(o)[:, :t], S
