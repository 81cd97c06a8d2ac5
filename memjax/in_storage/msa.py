"""Memory sparse attention: documents are read once, each alone, and pooled into a store; a question routes to a few.

A layer reads every document on its own and keeps, per chunk of `pool` tokens, the mean key, value and routing key. A
question scores all chunks by cosine, chooses the `top_k` best documents, and attends to their chunks beside itself.
Source: MSA, arXiv 2603.23516. `DocumentAttention` is the layer below the routers: the same attention without a store.

State:  store  k, v, rk [M g d] one row per chunk, shared by all rows; tables of documents; counters
        ring   k, v [b c g d], count [b]: template, question and answer so far
        k, v [b s g d], chosen [b s], documents [b top_k]: what this row chose; after routing nobody touches the store
Verbs:  write  documents (`start` marks each, each row begins one), causal inside the document only, pooled, appended
        apply  a question: every document of x that begins in this call routes by its tokens of this call; tokens of a
               question begun earlier keep its choice. The first `template` tokens neither route nor see the memory
        step   decoding; never routes
Update: s_{t,c} = mean_j cos(rq_{t,j}, R_{c,j//G});  s_d = max_{c in d} max_t s_{t,c};  I = top_k of s_d
        o = softmax over [chunks of I; own tokens <= t],  scale d**-0.5
Differs from the paper: questions begin at position `query_start` = template + top_k, as the released code has it (the
paper: top_k); a last chunk shorter than `pool` is the mean of its own tokens, as in serving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax import layers
from memjax.in_storage.bank import Bank, read
from memjax.layers import (
    Ring,
    attention,
    heads,
    linear,
    merge,
    positions,
    ring_append,
    rms_norm,
    rotary,
    segments,
    wide,
)
from memjax.memory import How, Memory, Param, Slot, at_least, constant, dense, specs

# Scores are reduced in this order: over query heads, over the tokens of a question, over the chunks of a document.
HeadReduce = Literal["mean", "max"]
QueryReduce = Literal["max", "mean", "last"]
ChunkReduce = Literal["max", "mean"]
StoreDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class DocumentAttention(Memory):
    """Causal attention inside each document (`write`) and inside the question (`apply`, `step`), with no store.

    window: tokens of template, question and answer together. query_start: position of the first token after the
    template; 19 is template + top_k of the defaults: set it with them, alike in all layers. qk_norm_init: initial
    value of the norms of q and k (a temperature at initialisation). causal False: the tokens of one `apply` see each
    other both ways, as in pieces that the released code appends to a question.
    """

    dim: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 2048
    template: int = 3
    query_start: int = 19
    theta: float = 5e6
    rotary: bool = True
    qk_norm: bool = True
    norm_eps: float = 1e-6
    qk_norm_init: float = 1.0
    causal: bool = True

    def __post_init__(self):
        at_least(self, 1, "dim", "heads", "kv_heads", "head_dim", "window")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{type(self).__name__}: kv_heads is {self.kv_heads}, needs a divisor of {self.heads} heads"
            )
        if self.rotary and self.head_dim % 2:
            raise ValueError(f"{type(self).__name__}: head_dim is {self.head_dim}, needs an even number to rotate")

    def param_specs(self):
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norm = Param((self.head_dim,), (None,), constant(self.qk_norm_init), "vector")
        return {
            "w_q": dense(self.dim, q),
            "w_k": dense(self.dim, kv, ("model", "kv_heads")),
            "w_v": dense(self.dim, kv, ("model", "kv_heads")),
            "w_o": dense(q, self.dim, ("heads", "model")),
            **({"q_norm": norm, "k_norm": norm} if self.qk_norm else {}),
        }

    def state_specs(self, batch):
        return Ring.specs(batch, self.window, self.kv_heads, self.head_dim)

    def write(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return self._read_documents(params, x, valid, start)[0], state

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        position, _ = positions(state.count, x.shape[1], valid, start)
        q, k, v = self._project(params, x, self._after_template(position))
        k, v, visible, state = self._remember(state, k, v, valid, start)
        return self._output(params, attention(q, k, v, self._seen_by(valid, visible))), state

    def _remember(self, ring, k, v, valid, start):
        b, t = k.shape[:2]
        k, v, visible, ring = ring_append(ring, k, v, valid, start)
        if not self.causal and t > 1:
            here = segments(start, b, t)
            both_ways = here[..., None] == here[:, None]
            both_ways = both_ways if valid is None else both_ways & valid[:, None]
            visible = visible.at[..., -t:].set(both_ways)
        return k, v, visible, ring

    def _read_documents(self, params, x, valid, start):
        """Every document alone, positions from 0: y, keys, values, positions."""
        b, t = x.shape[:2]
        position, _ = positions(jnp.zeros(b, jnp.int32), t, valid, start)
        q, k, v = self._project(params, x, position)
        visible = self._seen_by(valid, layers.within(t, b, valid, start))
        return self._output(params, attention(q, k, v, visible)), k, v, position

    def _after_template(self, position):
        return jnp.where(position >= self.template, position + (self.query_start - self.template), position)

    def _project(self, params, x, position):
        q = heads(linear(x, params["w_q"]), self.heads)
        k, v = (heads(linear(x, params[w]), self.kv_heads) for w in ("w_k", "w_v"))
        if self.qk_norm:
            q, k = rms_norm(q, params["q_norm"], self.norm_eps), rms_norm(k, params["k_norm"], self.norm_eps)
        if self.rotary:
            q, k = rotary(q, position, self.theta), rotary(k, position, self.theta)
        return q, k, v

    def _output(self, params, o):
        return linear(merge(o), params["w_o"])

    @staticmethod
    def _seen_by(valid, visible):
        """Padding attends to nothing, so that its attention output is 0 as in the released code."""
        return visible if valid is None else visible & valid[..., None]


class MSAStore(NamedTuple):
    """What was read, one row per chunk, in the order of writing; shared by all rows of a batch."""

    k: Float[Array, "M g d"]  # mean over the chunk of the keys, after norm and rotation
    v: Float[Array, "M g d"]  # mean over the chunk of the values
    rk: Float[Array, "M g d"]  # mean over the chunk of the routing keys, then unit length per head
    chunk_doc: Int[Array, " M"]  # the document of a chunk; -1: empty or deleted
    doc_start: Int[Array, " N"]  # first chunk of a document
    doc_len: Int[Array, " N"]  # its number of chunks; 0: none
    count: Int[Array, " 3"]  # chunks, documents, and chunks that found no room (the host checks it)


class MSAState(NamedTuple):
    """The store, the rows' own tokens, and what each row chose."""

    store: MSAStore
    ring: Ring
    k: Float[Array, "b s g d"]  # the chunks of the chosen documents
    v: Float[Array, "b s g d"]
    chosen: Bool[Array, "b s"]
    documents: Int[Array, "b n"]  # the chosen documents, best first; -1: none


class Choice(NamedTuple):
    """What the questions of a call chose: S is 1 without `start`, else t + 1 (question 0 began before the call)."""

    scores: Float[Array, "b S N"]  # s_d; -inf: no such document, or nothing asked
    documents: Int[Array, "b S n"]
    k: Float[Array, "b S s g d"]
    v: Float[Array, "b S s g d"]
    chosen: Bool[Array, "b S s"]
    dropped: Int[Array, ""]  # chunks of chosen documents beyond max_chunks, in all rows


@dataclass(frozen=True)
class MSA(DocumentAttention):
    """A router layer. See the file's head for its verbs.

    pool: tokens per chunk. capacity, documents: what the store holds. max_chunks: chunks a question can read; of what
    is more, whole chunks are dropped from the end of the lowest-scored document. router_norm False with
    router_scale = head_dim**-0.5 is the rule of the released serving code, another ranking than the one trained.
    decouple_router False routes with q and the pooled k. equal_routers: w_rk begins equal to w_rq (kv_heads = heads).
    """

    pool: int = 64
    top_k: int = 16
    capacity: int = 4096
    documents: int = 1024
    max_chunks: int = 512
    router_norm: bool = True
    router_scale: float = 1.0
    head_reduce: HeadReduce = "mean"
    query_reduce: QueryReduce = "max"
    chunk_reduce: ChunkReduce = "max"
    decouple_router: bool = True
    equal_routers: bool = False
    store_dtype: StoreDtype = "float32"

    def __post_init__(self):
        super().__post_init__()
        if self.equal_routers and self.kv_heads != self.heads:
            raise ValueError(f"MSA: equal_routers needs kv_heads = heads, got {self.kv_heads} and {self.heads}")
        at_least(self, 1, "pool", "top_k", "capacity", "documents", "max_chunks")
        choices = {
            "head_reduce": HeadReduce,
            "query_reduce": QueryReduce,
            "chunk_reduce": ChunkReduce,
            "store_dtype": StoreDtype,
        }
        for field, known in choices.items():
            if getattr(self, field) not in get_args(known):
                raise ValueError(f"MSA: {field} is {getattr(self, field)!r}, needs one of {get_args(known)}")

    def param_specs(self):
        params = super().param_specs()
        if self.decouple_router:
            rq = dense(self.dim, self.heads * self.head_dim)
            rk = dense(self.dim, self.kv_heads * self.head_dim, ("model", "kv_heads"))
            equal = Param(rk.shape, rk.axes, rk.init, rk.kind, draws_like="w_rq")
            params |= {"w_rq": rq, "w_rk": equal if self.equal_routers else rk}
        return params

    def state_specs(self, batch):
        g, d = self.kv_heads, self.head_dim
        chunk = Slot((self.capacity, g, d), ("chunks", "kv_heads", None), self.store_dtype)
        table = Slot((self.documents,), ("documents",), jnp.int32)
        store = specs(
            MSAStore,
            k=chunk,
            v=chunk,
            rk=chunk,
            chunk_doc=Slot((self.capacity,), ("chunks",), jnp.int32, -1),
            doc_start=table,
            doc_len=table,
            count=Slot((3,), (None,), jnp.int32),
        )
        read = Slot((batch, self.max_chunks, g, d), ("batch", None, "kv_heads", None), self.store_dtype)
        return specs(
            MSAState,
            store=store,
            ring=super().state_specs(batch),
            k=read,
            v=read,
            chosen=Slot((batch, self.max_chunks), ("batch", None), jnp.bool_),
            documents=Slot((batch, self.top_k), ("batch", None), jnp.int32, -1),
        )

    # ------------------------------------------------------------------------------------------ reading documents

    def write(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        y, k, v, position = self._read_documents(params, x, valid, start)
        rk = heads(linear(x, params["w_rk"]), self.kv_heads) if self.decouple_router else k
        return y, state._replace(store=self._append(state.store, k, v, rk, position, valid, start))

    def _append(self, store, k, v, rk, position, valid, start):
        """Pool each chunk in float32 over its own tokens, then put the chunks behind those that are there."""
        b, t = position.shape
        live = jnp.ones((b, t), jnp.bool_) if valid is None else valid
        first = live & (position % self.pool == 0)
        n = b * -(-t // self.pool) if start is None and valid is None else b * t  # static bound of new chunks

        nth = lambda new: (jnp.cumsum(new.ravel().astype(jnp.int32)) - 1).reshape(b, t)  # noqa: E731
        chunk, doc = jnp.where(live, nth(first), n), nth(live & (position == 0))
        add = lambda a: jnp.zeros((n, *a.shape[2:]), a.dtype).at[chunk].add(a, mode="drop")  # noqa: E731
        size = jnp.maximum(add(jnp.ones((b, t, 1, 1), jnp.float32)), 1)
        pool = lambda a: add(wide(a)) / size.astype(wide(a).dtype)  # noqa: E731
        chunk_doc = jnp.full(n, -1, jnp.int32).at[chunk].max(doc, mode="drop")

        capacity, documents = store.chunk_doc.shape[0], store.doc_len.shape[0]
        used = first.sum(dtype=jnp.int32)
        new = jnp.arange(n, dtype=jnp.int32)
        doc = store.count[1] + chunk_doc
        fits = (new < used) & (store.count[0] + new < capacity) & (doc < documents)
        at = jnp.where(fits, store.count[0] + new, capacity)
        put = lambda old, rows: old.at[at].set(rows.astype(old.dtype), mode="drop")  # noqa: E731
        doc_at = jnp.where(fits, doc, documents)
        began = store.doc_start.at[doc_at].add(jnp.where(_changes(chunk_doc), store.count[0] + new, 0), mode="drop")
        stored = fits.sum(dtype=jnp.int32)
        count = jnp.stack([stored, jnp.maximum(chunk_doc.max() + 1, 0), used - stored])
        return MSAStore(
            put(store.k, pool(k)),
            put(store.v, pool(v)),
            put(store.rk, self._unit(pool(rk))),
            store.chunk_doc.at[at].set(doc, mode="drop"),
            began,
            store.doc_len.at[doc_at].add(1, mode="drop"),
            jnp.minimum(store.count + count, jnp.asarray([capacity, documents, 2**30], jnp.int32)),
        )

    def _unit(self, x):
        """x / max(|x|, 1e-12) per head, with a finite gradient at 0."""
        if not self.router_norm:
            return x
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))

    # ------------------------------------------------------------------------------------------ asking

    apply = Memory.apply  # the first two values of apply_with_aux

    def apply_with_aux(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        b, t = x.shape[:2]
        position, _ = positions(state.ring.count, t, valid, start)
        segment = segments(start, b, t)
        carried = state.ring.count > self.template
        asks = (position >= self.template) & ~(carried[:, None] & (segment == 0))
        asks = asks if valid is None else asks & valid
        choice = self.choose(
            state.store, self.queries(params, x, position), asks, segment, questions=1 if start is None else t + 1
        )

        # question 0 keeps the choice of an earlier call, if it made one
        first = lambda old, new: new.at[:, 0].set(jnp.where(layers.beside(carried, old), old, new[:, 0]))  # noqa: E731
        k, v, chosen, documents = (
            first(*pair)
            for pair in zip(
                (state.k, state.v, state.chosen, state.documents),
                (choice.k, choice.v, choice.chosen, choice.documents),
                strict=True,
            )
        )
        y, ring = self.attend(params, state.ring, x, k, v, chosen, valid=valid, start=start)

        # canonical: the last question's choice; nothing while only template tokens were read
        began = ring.count > self.template
        last = jax.vmap(lambda a, i: a[i])
        keep = lambda a, empty: jnp.where(layers.beside(began, a), a, jnp.asarray(empty, a.dtype))  # noqa: E731
        k, v, chosen = (keep(last(a, segment[:, -1]), 0) for a in (k, v, chosen))
        k, v = (jnp.where(chosen[..., None, None], a, jnp.zeros((), a.dtype)) for a in (k, v))
        documents = keep(last(documents, segment[:, -1]), -1)
        aux = {"doc_scores": choice.scores, "documents": choice.documents, "chunks_dropped": choice.dropped}
        return y, MSAState(state.store, ring, k, v, chosen, documents), aux

    def step(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        valid, start = (None if a is None else a[:, None] for a in (valid, start))
        if start is not None:
            clear = lambda a, empty: jnp.where(layers.beside(start[:, 0], a), jnp.asarray(empty, a.dtype), a)  # noqa: E731
            k, v, chosen = (clear(a, 0) for a in (state.k, state.v, state.chosen))
            state = state._replace(k=k, v=v, chosen=chosen, documents=clear(state.documents, -1))
        bank = (a[:, None] for a in (state.k, state.v, state.chosen))
        y, ring = self.attend(params, state.ring, x[:, None], *bank, valid=valid, start=start, questions_begin=False)
        return y[:, 0], state._replace(ring=ring)

    def queries(self, params, x, position) -> Float[Array, "b t h d"]:
        """r̂: the routing queries of each token, unit length per head."""
        if self.decouple_router:
            return self._unit(wide(heads(linear(x, params["w_rq"]), self.heads)))
        return self._unit(wide(self._project(params, x, self._after_template(position))[0]))

    def bank_queries(self, r: Float[Array, "b t h d"]) -> Float[Array, "b t g d"]:
        """As a bank is searched: for the mean over heads, the queries of a group summed first, which is exact."""
        if self.head_reduce == "max":
            return r * self.router_scale
        return r.reshape(*r.shape[:2], self.kv_heads, -1, self.head_dim).sum(3) * (self.router_scale / self.heads)

    def choose(self, store: MSAStore, r, asks, segment, *, questions: int) -> Choice:
        """Score every document for every question, and gather the chunks of the best."""
        rk, r = wide(store.rk), self.bank_queries(r)
        if self.head_reduce == "mean":
            s = jnp.einsum("btgd,cgd->btc", r, rk, precision=jax.lax.Precision.HIGHEST)
        else:
            s = jnp.einsum("btgjd,cgd->btgjc", r.reshape(*r.shape[:2], self.kv_heads, -1, self.head_dim), rk).max(
                (2, 3)
            )
        index = jnp.where(asks, segment, questions)
        s = _reduce_queries(s, index, questions, self.query_reduce)  # [b S M]
        scores = _reduce_chunks(s, store.chunk_doc, store.doc_len.shape[0], self.chunk_reduce)  # [b S N]

        n = min(self.top_k, scores.shape[-1])
        best, documents = jax.lax.top_k(scores, n)  # equal scores: the lower document first
        documents = jnp.where(jnp.isfinite(best), documents, -1).astype(jnp.int32)
        documents = jnp.pad(documents, ((0, 0), (0, 0), (0, self.top_k - n)), constant_values=-1)
        bank = Bank(store.rk[None], store.k[None], store.v[None], store.chunk_doc, store.doc_start, store.doc_len)
        k, v, chosen, dropped = read(bank, 0, documents.reshape(-1, self.top_k), self.max_chunks)
        k, v, chosen = (a.reshape(*scores.shape[:2], *a.shape[1:]) for a in (k, v, chosen))
        return Choice(scores, documents, k, v, chosen, dropped)

    def attend(self, params, ring, x, k, v, chosen, *, valid=None, start=None, questions_begin=True):
        """One softmax over [chosen chunks of the token's question; ring; x]. k, v [b S s g d], chosen [b S s]."""
        b, t = x.shape[:2]
        position, _ = positions(ring.count, t, valid, start)
        q, own_k, own_v = self._project(params, x, self._after_template(position))
        own_k, own_v, visible, ring = self._remember(ring, own_k, own_v, valid, start)
        segment = segments(start, b, t) if questions_begin else jnp.zeros((b, t), jnp.int32)
        of_question = segment[..., None] == jnp.arange(k.shape[1], dtype=jnp.int32)[None, None]
        seen = of_question[..., None] & chosen[:, None] & (position >= self.template)[..., None, None]
        flat = lambda a, own: jnp.concatenate([a.reshape(b, -1, *a.shape[3:]).astype(own.dtype), own], 1)  # noqa: E731
        visible = jnp.concatenate([seen.reshape(b, t, -1), visible], 2)
        return self._output(params, attention(q, flat(k, own_k), flat(v, own_v), self._seen_by(valid, visible))), ring


def _changes(ids):
    """True where an entry differs from the one before it (the first entry: True)."""
    return jnp.concatenate([jnp.ones(1, jnp.bool_), ids[1:] != ids[:-1]])


def _reduce_queries(s, index, questions, how):
    """s [b t M] over the tokens of each question: [b S M], -inf where nothing was asked. index S drops the token."""
    asked = jax.vmap(lambda i: jnp.zeros(questions, jnp.int32).at[i].add(1, mode="drop"))(index)
    if how == "max":
        if questions == 1:
            out = jnp.where((index < 1)[..., None], s, -jnp.inf).max(1, keepdims=True)
        else:
            out = jax.vmap(lambda s, i: jax.ops.segment_max(s, i, questions + 1)[:-1])(s, index)
    elif how == "mean":
        out = jax.vmap(lambda s, i: jax.ops.segment_sum(s, i, questions + 1)[:-1])(s, index)
        out = out / jnp.maximum(asked, 1).astype(s.dtype)[..., None]
    else:
        order = jnp.arange(s.shape[1], dtype=jnp.int32)
        last = jax.vmap(lambda i: jnp.zeros(questions, jnp.int32).at[i].max(order, mode="drop"))(index)
        out = jnp.take_along_axis(s, last[..., None], 1)
    return jnp.where((asked > 0)[..., None], out, -jnp.inf)


def _reduce_chunks(s, chunk_doc, documents, how):
    """s [b S M] over the chunks of each document: [b S N], -inf for documents that are not there."""
    at = jnp.where(chunk_doc < 0, documents, chunk_doc)
    s = jnp.moveaxis(s, 2, 0)
    if how == "max":
        out = jax.ops.segment_max(s, at, documents + 1)[:-1]
    else:
        size = jnp.zeros(documents + 1, s.dtype).at[at].add(1)[:, None, None]
        out = jax.ops.segment_sum(s, at, documents + 1) / jnp.maximum(size, 1)
        out = jnp.where(size > 0, out, -jnp.inf)[:-1]
    return jnp.moveaxis(out, 0, 2)
