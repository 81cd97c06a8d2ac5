"""The bank in memory: what is found, what is read back, what growing and deleting leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.errors import BankError
from memjax.in_storage import bank as banks
from memjax.in_storage.bank import Bank

H, D = 2, 8


def some(lengths, layers=2, seed=0, dtype=jnp.bfloat16):
    """A bank in host memory with documents of these lengths and unit routing keys."""
    rng = np.random.default_rng(seed)
    k, v, rk = rng.standard_normal((3, layers, sum(lengths), H, D)).astype(np.float32)
    rk /= np.linalg.norm(rk, axis=-1, keepdims=True)
    return banks.append(banks.empty(layers, H, D, dtype), k, v, rk, np.array(lengths))


def question(b=3, q=5, g=H, seed=1):
    rng = np.random.default_rng(seed)
    routes = rng.random((b, q)) < 0.7
    routes[:, 0] = True
    return jnp.asarray(rng.standard_normal((b, q, g, D)), jnp.float32), jnp.asarray(routes)


def scores_by_hand(bank, layer, queries, routes, head="mean", query="max", chunk="max"):
    """s_d [b, N] of the sheet, document by document, in float64."""
    q, asks, rk = np.asarray(queries, np.float64), np.asarray(routes), np.asarray(bank.rk[layer], np.float64)
    if head == "mean":
        s = np.einsum("bqhd,chd->bqc", q, rk)
    else:
        s = np.einsum("bqhgd,chd->bqhgc", q.reshape(*q.shape[:2], H, -1, D), rk).max((2, 3))
    pick = {"max": lambda a: a.max(0), "mean": lambda a: a.mean(0), "last": lambda a: a[-1]}[query]
    s = np.stack([pick(s[i][asks[i]]) for i in range(len(s))])
    out = np.full((len(s), len(bank.doc_len)), -np.inf)
    for n, (start, length) in enumerate(zip(bank.doc_start, bank.doc_len, strict=True)):
        if length:
            out[:, n] = getattr(s[:, start : start + length], chunk)(1)
    return out


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


def assert_found(got, scores, top_k):
    """Scores within float32 of the ones by hand, documents the same: the seeds leave no near ties."""
    best = np.argsort(-scores, 1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(got[1], best)
    np.testing.assert_allclose(got[0], np.take_along_axis(scores, best, 1), atol=1e-5)


@pytest.mark.parametrize("chunk", ["max", "mean"])
@pytest.mark.parametrize("query", ["max", "mean", "last"])
@pytest.mark.parametrize("head", ["mean", "max"])
def test_route_is_the_sheet(head, query, chunk):
    bank = some([3, 1, 7, 2, 5])
    queries, routes = question(g=H if head == "mean" else 2 * H)
    want = scores_by_hand(bank, 1, queries, routes, head, query, chunk)
    got = banks.route(bank, 1, queries, routes, top_k=4, head_reduce=head, query_reduce=query, chunk_reduce=chunk)
    assert_found(got, want, 4)


@pytest.mark.parametrize("chunks", [200, 256, 257, 16385, 40000])
@pytest.mark.parametrize("chunk", ["max", "mean"])
def test_tiles_cover_every_chunk_once(chunks, chunk):
    lengths = [3] * (chunks // 3) + [chunks % 3] * (chunks % 3 > 0)
    bank = some(lengths, layers=1)
    queries, routes = question(b=2, q=3)
    got = banks.route(jax.device_put(bank), 0, queries, routes, top_k=5, chunk_reduce=chunk)
    assert_found(got, scores_by_hand(bank, 0, queries, routes, chunk=chunk), 5)
    assert_same(banks.route(bank, 0, queries, routes, top_k=5, chunk_reduce=chunk), got)  # host = device, bit for bit


def test_many_questions_and_many_tokens():
    bank = some([4] * 30)
    for b, q in ((1, 200), (100, 3)):
        queries, routes = question(b, q)
        assert_found(banks.route(bank, 0, queries, routes, top_k=3), scores_by_hand(bank, 0, queries, routes), 3)


def test_the_score_matrix_never_exists():
    """Neither [b, q, M] nor the bank in float32 is in the compiled program."""
    chunks, b, q = 1 << 18, 8, 64
    shape = jax.ShapeDtypeStruct
    program = banks._route_on_device.lower(
        shape((1, chunks, H, D), jnp.bfloat16),
        *(shape((n,), jnp.int32) for n in (chunks, chunks // 4)),
        0,
        shape((b, q, H, D), jnp.float32),
        shape((b, q), jnp.bool_),
        reduce=banks._Reduce("mean", "max", "max"),
        top_k=4,
    ).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * chunks * H * D


@pytest.mark.parametrize("where", ["host", "device"])
def test_ties_go_to_the_lower_document(where):
    bank = some([2, 3, 2, 3, 2, 3])
    bank = bank._replace(rk=np.broadcast_to(bank.rk[:, :1], bank.rk.shape))
    bank = jax.device_put(bank) if where == "device" else bank
    queries, routes = question()
    assert banks.route(bank, 0, queries, routes, top_k=4)[1].tolist() == [[0, 1, 2, 3]] * 3


def test_minus_zero_ties_with_zero():
    """top_k alone would put -0.0 below 0.0; whether a product comes out as one or the other depends on the device."""
    totals, reduce = jnp.asarray([[-0.0], [0.0], [-0.0]]), banks._Reduce("mean", "max", "max")
    scores, documents = banks._best_documents(totals, jnp.ones(3, jnp.int32), reduce=reduce, top_k=3)
    assert documents.tolist() == [[0, 1, 2]] and scores.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("where", ["host", "device"])
def test_fewer_documents_than_top_k(where):
    bank = some([2, 3])
    bank = jax.device_put(bank) if where == "device" else bank
    queries, routes = question()
    routes = routes.at[1].set(False)  # a row that asks nothing
    scores, documents = banks.route(bank, 0, queries, routes, top_k=4)
    assert sorted(documents[0].tolist()) == [-1, -1, 0, 1] and documents[0, 2:].tolist() == [-1, -1]
    assert documents[1].tolist() == [-1] * 4 and (scores[1] == -jnp.inf).all()
    assert np.isfinite(scores[0, :2]).all() and (scores[0, 2:] == -jnp.inf).all()


@pytest.mark.parametrize("where", ["host", "device"])
def test_empty_bank(where):
    bank = banks.empty(1, H, D)
    bank = jax.device_put(bank) if where == "device" else bank
    scores, documents = banks.route(bank, 0, *question(), top_k=2)
    assert documents.tolist() == [[-1, -1]] * 3 and (scores == -jnp.inf).all()
    k, v, mask, dropped = banks.read(bank, 0, documents, 4)
    assert k.shape == v.shape == (3, 4, H, D) and not mask.any() and dropped == 0


def test_route_and_read_under_jit():
    bank, (queries, routes) = jax.device_put(some([3, 1, 7])), question()

    @jax.jit
    def search(bank, queries, routes):
        documents = banks.route(bank, 1, queries, routes, top_k=2)[1]
        return banks.read(bank, 1, documents, 9)

    documents = banks.route(bank, 1, queries, routes, top_k=2)[1]
    assert_same(search(bank, queries, routes), banks.read(bank, 1, documents, 9))


# ---------------------------------------------------------------------------------------------- reading


def read_by_hand(bank, layer, documents, max_chunks):
    rows, dropped = [], 0
    for row in documents:
        left, kept = max_chunks, {}
        for n in row:
            length = bank.doc_len[n] if n >= 0 else 0
            kept[n] = min(left, length)
            left -= kept[n]
            dropped += length - kept[n]
        rows.append([bank.doc_start[n] + i for n in sorted(kept) if n >= 0 for i in range(kept[n])])
    mask = np.array([[i < len(r) for i in range(max_chunks)] for r in rows])
    at = np.array([r + [0] * (max_chunks - len(r)) for r in rows])
    keep = mask[..., None, None]
    return *(np.where(keep, np.asarray(a[layer], np.float32)[at], 0) for a in (bank.k, bank.v)), mask, dropped


@pytest.mark.parametrize("max_chunks", [1, 4, 8, 9, 30])
def test_read_in_corpus_order_and_drop_from_the_lowest(max_chunks):
    bank = banks.delete(some([3, 1, 7, 2, 5]), 3)
    documents = np.array([[2, 0, 1], [4, -1, -1], [-1, -1, -1], [0, 4, 2], [1, 3, 0]], np.int32)
    want = read_by_hand(bank, 1, documents, max_chunks)
    assert_same(banks.read(bank, 1, documents, max_chunks), want)
    assert_same(banks.read(jax.device_put(bank), 1, jnp.asarray(documents), max_chunks), want)
    mixed = bank._replace(rk=jnp.asarray(bank.rk))
    assert_same(banks.read(mixed, 1, documents, max_chunks), want)


# ---------------------------------------------------------------------------------------------- laws of the sheet


def take(bank, documents) -> Bank:
    """The bank of these documents, in this order."""
    chunks = np.concatenate([np.arange(bank.doc_start[n], bank.doc_start[n] + bank.doc_len[n]) for n in documents])
    new = banks.empty(bank.k.shape[0], H, D, bank.k.dtype)
    return banks.append(new, bank.k[:, chunks], bank.v[:, chunks], bank.rk[:, chunks], bank.doc_len[list(documents)])


def test_law_1_permuting_the_corpus_changes_nothing():
    bank, (queries, routes) = some([3, 1, 7, 2, 5, 4]), question()
    order = np.array([4, 1, 5, 0, 3, 2])
    scores, documents = banks.route(bank, 0, queries, routes, top_k=3)
    permuted = take(bank, order)
    again, found = banks.route(permuted, 0, queries, routes, top_k=3)
    assert_same((again, order[found]), (scores, documents))
    old, new = banks.read(bank, 0, documents, 16), banks.read(permuted, 0, found, 16)
    for a, b in zip(old[:2], new[:2], strict=True):  # the same set of chunks
        for row_a, row_b in zip(a, b, strict=True):
            assert sorted(np.asarray(row_a, np.float32).reshape(16, -1).tolist()) == sorted(
                np.asarray(row_b, np.float32).reshape(16, -1).tolist()
            )


def test_law_1_documents_never_selected_change_nothing():
    bank, (queries, routes) = some([3, 1, 7, 2]), question()
    before = banks.route(bank, 0, queries, routes, top_k=2)
    assert (np.asarray(before[0]) > 0).all()
    new = np.ones((2, 300, H, D), np.float32)
    more = banks.append(bank, new, new, 0 * new, np.full(100, 3))  # routing keys of which every score is 0
    after = banks.route(more, 0, queries, routes, top_k=2)
    assert_same(after, before)
    assert_same(banks.read(more, 0, after[1], 9), banks.read(bank, 0, before[1], 9))


def sharded(bank, shards, queries, routes, top_k, room=None):
    """Documents dealt greedily to the lightest shard; the union of what each shard finds, with whole-bank numbers."""
    owned = [[] for _ in range(shards)]
    for n in range(len(bank.doc_len)):
        min(owned, key=lambda own: sum(bank.doc_len[own])).append(n)
    found = []
    for own in owned:
        shard = take(bank, own) if own else banks.empty(1, H, D)
        shard = jax.device_put(banks.reserve(shard, *room) if room else shard)
        scores, local = banks.route(shard, 0, queries, routes, top_k=top_k)
        found.append((scores, np.where(local < 0, -1, np.array([*own, -1])[local]).astype(np.int32)))
    return banks.merge_top_k(*(jnp.concatenate(a, 1) for a in zip(*found, strict=True)), top_k)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_law_2_sharded_equals_whole(shards):
    """Bit for bit, with tiles of every size."""
    bank, (queries, routes) = some([300, 7, 1, 600, 2, 90, 400], layers=1), question(b=2, q=3)
    got = sharded(bank, shards, queries, routes, 3)
    assert_same(got, banks.route(bank, 0, queries, routes, top_k=3))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=24),
    shards=st.sampled_from([1, 2, 4, 8]),
    top_k=st.sampled_from([1, 4]),
    same=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_law_2_ties_and_small_shards(lengths, shards, top_k, same, seed):
    """Ties across shards, and shards with fewer than top_k documents or none; with spare room, to compile once."""
    bank, (queries, routes) = some(lengths, layers=1, seed=seed), question(b=2, q=3, seed=seed)
    if same:
        bank = bank._replace(rk=np.broadcast_to(bank.rk[:, :1], bank.rk.shape).copy())
    whole = jax.device_put(banks.reserve(bank, 1000, 24))
    got = sharded(bank, shards, queries, routes, top_k, room=(1000, 24))
    assert_same(got, banks.route(whole, 0, queries, routes, top_k=top_k))


def test_merge_pads_when_there_are_too_few():
    scores, documents = banks.merge_top_k(jnp.asarray([[0.5, -jnp.inf]]), jnp.asarray([[7, -1]]), 4)
    assert documents.tolist() == [[7, -1, -1, -1]] and scores.tolist() == [[0.5, *[-float("inf")] * 3]]


def test_law_5_top_k_beyond_the_documents_selects_everything():
    bank, (queries, routes) = some([3, 1, 7, 2]), question()
    documents = banks.route(bank, 0, queries, routes, top_k=9)[1]
    assert [sorted(row) for row in documents.tolist()] == [[-1] * 5 + [0, 1, 2, 3]] * 3
    k, v, mask, dropped = banks.read(bank, 0, documents, 13)
    assert mask.all() and dropped == 0
    assert_same((k, v), tuple(np.broadcast_to(np.asarray(a[0]), k.shape) for a in (bank.k, bank.v)))


# ---------------------------------------------------------------------------------------------- growing, deleting


def test_law_7_appending_in_blocks_equals_at_once():
    lengths = [3, 1, 7, 2, 5]
    whole = some(lengths)
    grown = banks.empty(2, H, D)
    for n in ([0, 1], [2], [3, 4]):
        part = take(whole, n)
        grown = banks.append(grown, part.k, part.v, part.rk, part.doc_len)
    assert_same(grown, whole)
    room = banks.reserve(jax.device_put(banks.empty(2, H, D)), 20, 6)
    for n in ([0, 1], [2], [3, 4]):
        part = take(whole, n)
        room = banks.append(room, part.k, part.v, part.rk, part.doc_len)
    assert banks.used(room) == (18, 5) and room.k.shape[1] == 20
    queries, routes = question()
    want = banks.route(whole, 0, queries, routes, top_k=6)
    assert_same(banks.route(room, 0, queries, routes, top_k=6), want)
    assert_same(banks.read(room, 0, want[1], 9), banks.read(whole, 0, want[1], 9))


@pytest.mark.parametrize("where", ["host", "device"])
def test_append_then_delete_leaves_the_others_bit_identical(where):
    bank = banks.reserve(some([3, 1, 7]), 20, 6)
    bank = jax.device_put(bank) if where == "device" else bank
    extra = some([2, 4], seed=9)
    grown = banks.append(bank, extra.k, extra.v, extra.rk, extra.doc_len)
    shrunk = banks.delete(banks.delete(grown, 4), 3)
    queries, routes = question()
    before = banks.route(bank, 0, queries, routes, top_k=4)
    assert set(before[1][0].tolist()) == {0, 1, 2, -1}
    assert_same(banks.route(shrunk, 0, queries, routes, top_k=4), before)
    assert_same(banks.read(shrunk, 0, before[1], 12), banks.read(bank, 0, before[1], 12))
    assert_same([a[:, :11] for a in shrunk[:3]], [a[:, :11] for a in bank[:3]])


def test_delete_in_the_middle():
    bank, (queries, routes) = some([3, 1, 7, 2]), question()
    gone = banks.delete(bank, 2)
    assert gone.doc_len.tolist() == [3, 1, 0, 2] and gone.chunk_doc.tolist() == [0, 0, 0, 1, *[-1] * 7, 3, 3]
    assert not np.asarray(gone.rk[:, 4:11], np.float32).any()
    documents = banks.route(gone, 0, queries, routes, top_k=4)[1]
    assert [sorted(r) for r in documents.tolist()] == [[-1, 0, 1, 3]] * 3
    assert_found(banks.route(gone, 0, queries, routes, top_k=3), scores_by_hand(gone, 0, queries, routes), 3)
    assert bank.doc_len.tolist() == [3, 1, 7, 2]  # the bank that was given stays


def test_errors(as_user):
    bank, (queries, routes) = some([3, 1]), question()
    extra = some([2, 4])
    device = banks.reserve(jax.device_put(bank), 8, 9)
    new = (extra.k, extra.v, extra.rk, extra.doc_len)
    with pytest.raises(BankError, match="room for 10 chunks, the bank on the device has 8"):
        banks.append(device, *new)
    with pytest.raises(BankError, match="room for 4 documents, the bank on the device has 3"):
        banks.append(banks.reserve(jax.device_put(bank), 20, 3), *new)
    with pytest.raises(BankError, match=r"k is \[2, 6, 2, 8\], needs \[2, 5, 2, 8\]"):
        banks.append(bank, *new[:3], np.array([2, 3]))
    with pytest.raises(BankError, match=r"doc_len\[1\] is 0"):
        banks.append(bank, *new[:3], np.array([6, 0]))
    for document in (2, -1, 7):
        with pytest.raises(BankError, match=f"no document {document}; the bank has 2"):
            banks.delete(bank, document)
    with pytest.raises(BankError, match="no document 1"):
        banks.delete(banks.delete(bank, 1), 1)
    with pytest.raises(BankError, match="already holds 4 chunks"):
        banks.reserve(bank, 3, 9)
    with pytest.raises(BankError, match="all in host memory or all on a device"):
        banks.delete(bank._replace(rk=jnp.asarray(bank.rk)), 0)
    with pytest.raises(BankError, match="documents has 2, the bank has 2"):
        banks.read(bank, 0, np.array([[2]]), 4)
    with pytest.raises(ValueError, match="max_chunks is 0"):
        banks.read(bank, 0, np.array([[0]]), 0)
    for call in (lambda n: banks.route(bank, n, queries, routes, top_k=1), lambda n: banks.read(bank, n, routes, 1)):
        with pytest.raises(ValueError, match="layer is 2, the bank has 2"):
            call(2)
    with pytest.raises(ValueError, match="queries are"):
        banks.route(bank, 0, queries[..., :4], routes, top_k=1)
    with pytest.raises(ValueError, match="queries are"):
        banks.route(bank, 0, queries[:, :, :1], routes, top_k=1, head_reduce="max")
    with pytest.raises(ValueError, match="top_k is 0"):
        banks.route(bank, 0, queries, routes, top_k=0)
    with pytest.raises(ValueError, match="query_reduce is 'first'"):
        banks.route(bank, 0, queries, routes, top_k=1, query_reduce="first")


def test_bytes():
    bank = some([3, 1, 7])
    assert banks.bytes_per_chunk(bank) == 3 * 2 * H * D * 2
    assert banks.nbytes(bank) == 11 * (banks.bytes_per_chunk(bank) + 4) + 3 * 8
    sheet = banks.empty(1, 8, 128)  # the 4B model: 6144 bytes per chunk and layer
    assert banks.bytes_per_chunk(sheet) == 6144
