"""A bank: pooled keys, values and routing keys of a corpus, searched by document and read back by chunk.

The bank is a pytree of arrays and knows no model. Its leaves live on a device (jax arrays: every function runs under
jit), in host memory (numpy), or on disk (`memjax.in_storage.bank_files`: anything with `shape` and `dtype` that
`leaf[layer, chunks]` reads as numpy); leaves may differ, say `rk` on a device beside `k` and `v` in host memory.

Search: s_{t,c} = <q_t, rk_c>;  s_c = max_t s_{t,c};  s_d = max_{c in d} s_c;  the `top_k` best documents, exactly,
        ties to the lower document. Accumulated in float32 from keys in the bank's dtype, 16384 chunks at a time.
Source: MSA, arXiv 2603.23516 (memory bank, Memory Parallel).

Axes: n router layers, M chunks, N documents, h key-value heads, d their width, b rows, q query tokens, s chunks read.
A whole bank is sharded by documents: search each shard, then `merge_top_k` the answers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from memjax.errors import BankError

TILE = 16384  # chunks scored at a time
SMALLEST_TILE = 256  # below it a dot product's rounding depends on the number of chunks, and ties between shards break
ROWS = 64  # query vectors scored at a time: enough to feed a matrix product, few enough to stay in cache


class Bank(NamedTuple):
    """The leaves of a bank. Chunks of a document are contiguous; documents stand in the order of their numbers."""

    rk: Shaped[Any, "n M h d"]  # routing keys, unit length per head; 0 where deleted
    k: Shaped[Any, "n M h d"]  # mean of the chunk's keys
    v: Shaped[Any, "n M h d"]  # mean of the chunk's values
    chunk_doc: Int[Any, " M"]  # int32, the document of a chunk; -1: empty or deleted
    doc_start: Int[Any, " N"]  # int32, first chunk of a document; -1: spare
    doc_len: Int[Any, " N"]  # int32, its number of chunks; 0: deleted or spare


# ---------------------------------------------------------------------------------------------- growing and shrinking


def empty(layers: int, kv_heads: int, head_dim: int, dtype: Any = jnp.bfloat16) -> Bank:
    """A bank of no documents, in host memory."""
    rows = np.zeros((layers, 0, kv_heads, head_dim), dtype)
    none = np.zeros(0, np.int32)
    return Bank(rows, rows, rows, none, none, none)


def reserve(bank: Bank, chunks: int, documents: int) -> Bank:
    """The bank with room for `chunks` and `documents` in all, so that `append` works on a device, where shapes stay."""
    if chunks < bank.k.shape[1] or documents < bank.doc_len.shape[0]:
        has = f"{bank.k.shape[1]} chunks and {bank.doc_len.shape[0]} documents"
        raise BankError(f"reserve: got {chunks} chunks and {documents} documents, the bank already holds {has}")
    xp = _library(bank, "reserve")

    def more(a, axis, size, fill):
        return xp.concatenate(
            [a, xp.full((*a.shape[:axis], size - a.shape[axis], *a.shape[axis + 1 :]), fill, a.dtype)], axis
        )

    return Bank(
        rk=more(bank.rk, 1, chunks, 0),
        k=more(bank.k, 1, chunks, 0),
        v=more(bank.v, 1, chunks, 0),
        chunk_doc=more(bank.chunk_doc, 0, chunks, -1),
        doc_start=more(bank.doc_start, 0, documents, -1),
        doc_len=more(bank.doc_len, 0, documents, 0),
    )


def used(bank: Bank) -> tuple[int, int]:
    """Chunks and documents in use, the deleted ones before the last document included. Reads values: not under jit."""
    start, length = np.asarray(bank.doc_start), np.asarray(bank.doc_len)
    return int(np.max(start + length, initial=0, where=start >= 0)), int((start >= 0).sum())


def append(
    bank: Bank,
    k: Shaped[Any, "n m h d"],
    v: Shaped[Any, "n m h d"],
    rk: Shaped[Any, "n m h d"],
    doc_len: Int[Any, " p"],
) -> Bank:
    """p more documents of doc_len[i] >= 1 chunks each, numbered after the last; arrays are rounded to the bank's dtype.

    In host memory the bank grows (one copy a call: append many documents at once, or write files with `BankWriter`).
    On a device the documents go into spare room, see `reserve`. Not under jit, since what fits depends on values.

    Raises:
      BankError: too little room on the device, counts that disagree, shapes of another bank, a bank on disk.
    """
    xp = _library(bank, "append")
    lengths = np.asarray(doc_len, np.int64)
    m, p = int(lengths.sum()), len(lengths)
    if lengths.min(initial=1) < 1:
        raise BankError(f"append: doc_len[{int(lengths.argmin())}] is {lengths.min()}, needs at least one chunk")
    want = (bank.k.shape[0], m, *bank.k.shape[2:])
    for name, a in (("k", k), ("v", v), ("rk", rk)):
        if a.shape != want:
            raise BankError(f"append: {name} is {list(a.shape)}, needs {list(want)} for {m} chunks in doc_len")
    at, first = used(bank)
    if xp is jnp:
        for name, need, size in (("chunks", at + m, bank.k.shape[1]), ("documents", first + p, bank.doc_len.shape[0])):
            if need > size:
                raise BankError(f"append: needs room for {need} {name}, the bank on the device has {size}; see reserve")

    def put(old, new, axis, at):
        before, after = ((slice(None),) * axis + (part,) for part in (slice(at), slice(at + new.shape[axis], None)))
        return xp.concatenate([old[before], xp.asarray(new).astype(old.dtype), old[after]], axis)

    starts = at + np.cumsum(lengths) - lengths
    return Bank(
        rk=put(bank.rk, rk, 1, at),
        k=put(bank.k, k, 1, at),
        v=put(bank.v, v, 1, at),
        chunk_doc=put(bank.chunk_doc, np.repeat(np.arange(first, first + p), lengths), 0, at),
        doc_start=put(bank.doc_start, starts, 0, first),
        doc_len=put(bank.doc_len, lengths, 0, first),
    )


def delete(bank: Bank, document: int) -> Bank:
    """The bank without one document, whose chunks are never chosen again; no other changes its number or its bits."""
    xp = _library(bank, "delete")
    length = int(bank.doc_len[document]) if 0 <= document < bank.doc_len.shape[0] else 0
    if not length:
        raise BankError(
            f"delete: no document {document}; the bank has {int((np.asarray(bank.doc_len) > 0).sum())} documents"
        )
    gone = bank.chunk_doc == document
    return bank._replace(
        rk=xp.where(gone[None, :, None, None], xp.zeros((), bank.rk.dtype), bank.rk),
        chunk_doc=xp.where(gone, xp.int32(-1), bank.chunk_doc),
        doc_len=xp.where(xp.arange(bank.doc_len.shape[0]) == document, xp.int32(0), bank.doc_len),
    )


def bytes_per_chunk(bank: Bank) -> int:
    """Bytes of one chunk over all router layers: its key, value and routing key."""
    return sum(a.shape[0] * a.shape[2] * a.shape[3] * np.dtype(a.dtype).itemsize for a in bank[:3])


def nbytes(bank: Bank) -> int:
    """Bytes of all leaves, wherever they live."""
    return sum(int(np.prod(a.shape, dtype=np.int64)) * np.dtype(a.dtype).itemsize for a in bank)


# ---------------------------------------------------------------------------------------------- search


def route(
    bank: Bank,
    layer: int,
    queries: Float[Array | np.ndarray, "b q g d"],
    routes: Bool[Array | np.ndarray, "b q"],
    *,
    top_k: int,
    head_reduce: Literal["mean", "max"] = "mean",
    query_reduce: Literal["max", "mean", "last"] = "max",
    chunk_reduce: Literal["max", "mean"] = "max",
) -> tuple[Float[Array, "b top_k"], Int[Array, "b top_k"]]:
    """The best documents of one layer for each row.

    Args:
      queries: for head_reduce "mean" one vector per key-value head (g = h): the unit routing queries of its group
        summed and divided by the number of query heads, which is exact. For "max" the unit queries of all heads
        (g = H), in groups of H / h.
      routes: which tokens ask; the others, and padding, count for nothing.
      top_k: documents per row; query_reduce, chunk_reduce: over the tokens of a row, over the chunks of a document.

    Returns:
      scores [b, top_k] float32, best first, and documents [b, top_k] int32, ties to the lower number. Where a row asks
      nothing or there are fewer documents: -inf and -1.

    A bank on a device is searched in one jitted function, whose largest array is [N, b]. One in host memory or on disk
    is read tile by tile through the same function outside jit: equal bit for bit on CPU, within 1e-6 elsewhere.
    """
    if not 0 <= layer < bank.rk.shape[0]:
        raise ValueError(f"route: layer is {layer}, the bank has {bank.rk.shape[0]}")
    (_, chunks, h, d), (_, _, g, width) = bank.rk.shape, queries.shape
    if width != d or (g % h if head_reduce == "max" else g != h):
        raise ValueError(
            f"route: queries are {list(queries.shape)} for head_reduce={head_reduce!r}, the bank has {h} x {d}"
        )
    if routes.shape != queries.shape[:2] or top_k < 1:
        raise ValueError(
            f"route: routes is {list(routes.shape)}, needs {list(queries.shape[:2])}; top_k is {top_k}, needs >= 1"
        )
    for name, found, known in (
        ("head_reduce", head_reduce, ("mean", "max")),
        ("query_reduce", query_reduce, ("max", "mean", "last")),
        ("chunk_reduce", chunk_reduce, ("max", "mean")),
    ):
        if found not in known:
            raise ValueError(f"route: {name} is {found!r}, needs one of {known}")
    reduce = _Reduce(head_reduce, query_reduce, chunk_reduce)
    if isinstance(bank.rk, jax.Array):
        return _route_on_device(
            bank.rk, bank.chunk_doc, bank.doc_len, layer, queries, routes, reduce=reduce, top_k=top_k
        )
    queries, routes = jnp.asarray(queries), jnp.asarray(routes)
    totals = _no_scores(len(bank.doc_len), queries, reduce)
    tile = _tile(chunks)
    for at in range(0, chunks, tile):
        some = slice(at, min(at + tile, chunks))
        keys, docs = np.asarray(bank.rk[layer, some]), np.asarray(bank.chunk_doc[some])
        if spare := tile - len(docs):
            keys = np.concatenate([keys, np.zeros((spare, h, d), keys.dtype)])
            docs = np.concatenate([docs, np.full(spare, -1, docs.dtype)])
        totals = _add_tile(totals, keys, docs, queries, routes, reduce=reduce)
    return _best_documents(totals, jnp.asarray(bank.doc_len), reduce=reduce, top_k=top_k)


def merge_top_k(
    scores: Float[Array, "*b w"], documents: Int[Array, "*b w"], top_k: int
) -> tuple[Float[Array, "*b top_k"], Int[Array, "*b top_k"]]:
    """The best of the answers of several shards, laid side by side with documents numbered for the whole bank.

    Exact, because the top of a union is the top of the tops: highest score first, ties to the lower document, -1 last.
    Inside a shard documents must stand in the order of their whole-bank numbers.
    """
    order, ids = lax.sort((-scores, jnp.where(documents < 0, jnp.iinfo(documents.dtype).max, documents)), num_keys=2)
    width = [(0, 0)] * (scores.ndim - 1) + [(0, max(0, top_k - scores.shape[-1]))]
    scores = jnp.pad(-order[..., :top_k], width, constant_values=-jnp.inf)
    ids = jnp.pad(ids[..., :top_k], width, constant_values=-1)
    return scores, jnp.where(scores == -jnp.inf, -1, ids).astype(documents.dtype)


class _Reduce(NamedTuple):
    head: str
    query: str
    chunk: str


def _tile(chunks: int) -> int:
    """Chunks of a tile: a power of two, so that a chunk's score has the same bits in any bank."""
    return min(TILE, max(SMALLEST_TILE, 1 << (chunks.bit_length() - 1))) if chunks else SMALLEST_TILE


def _no_scores(documents: int, queries: Array, reduce: _Reduce) -> Float[Array, "N b"]:
    fill = -jnp.inf if reduce.chunk == "max" else 0
    return jnp.full((documents, queries.shape[0]), fill, jnp.promote_types(queries.dtype, jnp.float32))


@partial(jax.jit, static_argnames=("reduce", "top_k"))
def _route_on_device(rk, chunk_doc, doc_len, layer, queries, routes, *, reduce: _Reduce, top_k: int):
    chunk_doc, doc_len, queries = jnp.asarray(chunk_doc), jnp.asarray(doc_len), jnp.asarray(queries)
    totals = _no_scores(doc_len.shape[0], queries, reduce)
    chunks, tile = rk.shape[1], _tile(rk.shape[1])
    if 0 < chunks < tile:
        keys = jnp.pad(lax.dynamic_index_in_dim(rk, layer, keepdims=False), ((0, tile - chunks), (0, 0), (0, 0)))
        totals = _add_tile(
            totals, keys, jnp.pad(chunk_doc, (0, tile - chunks), constant_values=-1), queries, routes, reduce=reduce
        )
    elif chunks:

        def add(totals, at):
            begin = jnp.minimum(at, chunks - tile)  # the last tile reaches back; what it sees again is masked
            docs = lax.dynamic_slice_in_dim(chunk_doc, begin, tile)
            docs = jnp.where(begin + jnp.arange(tile) < at, -1, docs)

            def score(totals):
                keys = lax.dynamic_slice(rk, (layer, begin, 0, 0), (1, tile, *rk.shape[2:]))[0]
                return _add_tile(totals, keys, docs, queries, routes, reduce=reduce)

            # Spare tiles cost nothing. Nor can XLA hoist out of a branch the conversion of the whole bank to float32.
            return lax.cond((docs >= 0).any(), score, lambda totals: totals, totals), None

        totals = lax.scan(add, totals, jnp.arange(0, chunks, tile))[0]
    return _best_documents(totals, doc_len, reduce=reduce, top_k=top_k)


@partial(jax.jit, static_argnames="reduce", donate_argnames="totals")
def _add_tile(totals, keys, docs, queries, routes, *, reduce: _Reduce):
    """totals [N, b] with the scores of one tile of chunks in it."""
    scores = _chunk_scores(keys, queries, routes, reduce).T
    docs = jnp.where(docs < 0, totals.shape[0], docs)  # a negative index would count from the end
    at = totals.at[docs]
    return at.max(scores, mode="drop") if reduce.chunk == "max" else at.add(scores, mode="drop")


def _chunk_scores(keys, queries, routes, reduce: _Reduce) -> Float[Array, "b c"]:
    """s_c of one tile, [b, q, c] never whole: heads first, then tokens."""
    dtype = jnp.promote_types(queries.dtype, jnp.float32)
    keys, queries = keys.astype(dtype), queries.astype(dtype)  # CPUs have no fast bfloat16 product
    (c, h, d), b = keys.shape, queries.shape[0]
    asks = routes.any(1)
    if reduce.query == "last":
        last = routes.shape[1] - 1 - jnp.argmax(routes[:, ::-1], 1)
        queries, routes = jnp.take_along_axis(queries, last[:, None, None, None], 1), asks[:, None]
    group = min(routes.shape[1], max(1, ROWS // b))
    spare = -routes.shape[1] % group
    queries = jnp.pad(queries, ((0, 0), (0, spare), (0, 0), (0, 0))).reshape(b, -1, group, h, queries.shape[2] // h, d)
    routes = jnp.pad(routes, ((0, 0), (0, spare))).reshape(b, -1, group)

    def add(total, some):
        q, asking = some  # [b, group, h, heads per h, d]
        if reduce.head == "mean":
            s = lax.dot_general(
                q.reshape(b * group, h * d),
                keys.reshape(c, h * d),
                (((1,), (1,)), ((), ())),
                precision=lax.Precision.HIGHEST,
            ).reshape(b, group, c)
        else:
            s = jnp.einsum("bthgd,chd->bthgc", q, keys, precision=lax.Precision.HIGHEST).max((2, 3))
        if reduce.query == "mean":
            return total + jnp.where(asking[..., None], s, 0).sum(1), None
        return jnp.maximum(total, jnp.where(asking[..., None], s, -jnp.inf).max(1)), None

    start = jnp.full((b, c), 0 if reduce.query == "mean" else -jnp.inf, dtype)
    total, _ = lax.scan(add, start, (jnp.moveaxis(queries, 1, 0), jnp.moveaxis(routes, 1, 0)))
    if reduce.query == "mean":
        total = total / jnp.maximum(routes.sum((1, 2)), 1).astype(dtype)[:, None]
    return jnp.where(asks[:, None], total, -jnp.inf)


@partial(jax.jit, static_argnames=("reduce", "top_k"))
def _best_documents(totals, doc_len, *, reduce: _Reduce, top_k: int):
    if reduce.chunk == "mean":
        totals = totals / jnp.maximum(doc_len, 1).astype(totals.dtype)[:, None]
    scores = jnp.where((doc_len > 0)[:, None], totals, -jnp.inf).T
    scores = jnp.where(scores == 0, 0, scores)  # -0.0 would lose a tie against 0.0
    scores = jnp.pad(scores, ((0, 0), (0, max(0, top_k - scores.shape[1]))), constant_values=-jnp.inf)
    best, documents = lax.top_k(scores, top_k)
    return best.astype(jnp.float32), jnp.where(best == -jnp.inf, -1, documents).astype(jnp.int32)


# ---------------------------------------------------------------------------------------------- reading back


def read(
    bank: Bank, layer: int, documents: Int[Array | np.ndarray, "b top_k"], max_chunks: int
) -> tuple[Float[Array, "b s h d"], Float[Array, "b s h d"], Bool[Array, "b s"], Int[Array, ""]]:
    """Keys and values of all chunks of the chosen documents, in corpus order, in s = max_chunks places.

    Args:
      documents: best first, as `route` returns them; -1: none. Distinct in a row.
      max_chunks: static. Where a row needs more, whole chunks are left out from the end of its lowest-scored document.

    Returns:
      k, v [b, s, h, d] in the bank's dtype, 0 where mask [b, s] is False, and the number of chunks left out.

    With `k` and `v` on a device it runs under jit, and a number past the last document reads nothing; in host memory or
    on disk such a number is a BankError.
    """
    if not 0 <= layer < bank.k.shape[0]:
        raise ValueError(f"read: layer is {layer}, the bank has {bank.k.shape[0]}")
    if max_chunks < 1:
        raise ValueError(f"read: max_chunks is {max_chunks}, needs at least 1")
    if isinstance(bank.k, jax.Array):
        chunks, mask, dropped = _chosen_chunks(bank.doc_start, bank.doc_len, documents, max_chunks=max_chunks)
        return *_gather(bank.k, bank.v, layer, chunks, mask), mask, dropped
    if (most := int(np.max(documents, initial=-1))) >= len(bank.doc_len):
        raise BankError(f"read: documents has {most}, the bank has {len(bank.doc_len)} documents")
    chunks, mask, dropped = _chosen_chunks(bank.doc_start, bank.doc_len, documents, max_chunks=max_chunks)
    seen = np.asarray(mask)
    wanted, place = np.unique(np.asarray(chunks)[seen], return_inverse=True)  # rows share documents: read each once

    def fetch(leaf):
        out = np.zeros((*seen.shape, *leaf.shape[2:]), leaf.dtype)
        if wanted.size:
            out[seen] = np.asarray(leaf[layer, wanted])[place]
        return jnp.asarray(out)

    return fetch(bank.k), fetch(bank.v), mask, dropped


@partial(jax.jit, static_argnames="max_chunks")
def _chosen_chunks(doc_start, doc_len, documents, *, max_chunks: int):
    """Chunk numbers [b, s] in corpus order, which of them are meant [b, s], how many found no place."""
    doc_start, doc_len, documents = jnp.asarray(doc_start), jnp.asarray(doc_len), jnp.asarray(documents)
    if not doc_len.shape[0]:
        none = jnp.zeros((documents.shape[0], max_chunks), jnp.int32)
        return none, none > 0, jnp.zeros((), jnp.int32)
    here = (documents >= 0) & (documents < doc_len.shape[0])
    at = jnp.where(here, documents, 0)
    length = jnp.where(here, doc_len[at], 0)
    before = jnp.cumsum(length, 1) - length  # best first: the lowest-scored document finds no room first
    kept = jnp.clip(max_chunks - before, 0, length)
    start = jnp.where(here, doc_start[at], jnp.iinfo(doc_start.dtype).max)
    start, kept = lax.sort((start, kept.astype(start.dtype)), num_keys=1)
    end = jnp.cumsum(kept, 1)
    place = jnp.arange(max_chunks, dtype=end.dtype)
    which = (place[None, :, None] >= end[:, None]).sum(2)
    mask = which < documents.shape[1]
    which = jnp.minimum(which, documents.shape[1] - 1)
    first = jnp.take_along_axis(start - (end - kept), which, 1)  # minus the places filled before
    chunks = jnp.where(mask, first + place[None], 0)
    return chunks.astype(jnp.int32), mask, (length.sum() - kept.sum()).astype(jnp.int32)


@jax.jit
def _gather(k, v, layer, chunks, mask):
    k, v = jnp.asarray(k), jnp.asarray(v)
    if not k.shape[1]:
        return tuple(jnp.zeros((*mask.shape, *a.shape[2:]), a.dtype) for a in (k, v))
    keep = mask[..., None, None]
    return tuple(jnp.where(keep, a[layer, chunks], jnp.zeros((), a.dtype)) for a in (k, v))


def _library(bank: Bank, verb: str):
    """jnp or numpy, whichever holds the bank."""
    if all(isinstance(a, np.ndarray) for a in bank):
        return np
    if all(isinstance(a, jax.Array) for a in bank):
        return jnp
    raise BankError(f"{verb}: the leaves must be all in host memory or all on a device; for files see bank_files")
