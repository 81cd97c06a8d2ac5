"""The laws of memory sparse attention's sheet, its routing against numpy, and what its store does when it is full."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.blocks import block
from memjax.combinators import Residual, Stack, total
from memjax.in_storage.msa import MSA, DocumentAttention
from memjax.in_storage.router_loss import router_loss
from pallas_kernels.compat import QUICK_COMPILE
from tests.adapters.msa import Threaded

D, H, G, K = 8, 4, 2, 4
SMALL = MSA(
    dim=D, heads=H, kv_heads=G, head_dim=K, window=24, template=2, query_start=5, theta=100.0,
    pool=3, top_k=2, capacity=24, documents=8, max_chunks=8,
)  # fmt: skip
LENGTHS = (7, 3, 9, 1, 5)  # 3, 1, 3, 1, 2 chunks
WIDTH, ASKED = 9, 6

jit = partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
write = jit(lambda memory, *args, **kw: memory.write(*args, **kw))
apply = jit(lambda memory, *args, **kw: memory.apply_with_aux(*args, **kw))
step = jit(lambda memory, *args, **kw: memory.step(*args, **kw))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def draw(memory, seed=0):
    """Parameters without the symmetry of their start: norms too are drawn."""
    specs, rng = memory.param_specs(), np.random.default_rng(seed)
    return {n: rng.standard_normal(s.shape, np.float32) * (0.4 if len(s.shape) > 1 else 1) for n, s in specs.items()}


PARAMS = draw(SMALL)
DOCUMENTS, X = normal(1, len(LENGTHS), WIDTH, D), normal(2, 2, ASKED, D)
VALID = np.arange(WIDTH)[None] < np.array(LENGTHS)[:, None]


def stored(memory=SMALL, params=PARAMS, documents=DOCUMENTS, valid=VALID):
    return write(memory, params, memory.init_state(len(documents)), documents, valid=valid)


def ask(memory=SMALL, params=PARAMS, x=X, state=None, **kw):
    state = stored(memory, params)[1] if state is None else state
    return apply(memory, params, memory.restart(state, len(x)), x, **kw)


def close(got, want, atol=2e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), got, want)


def with_rows_of(state, row):
    """One row repeated is another batch over the same store."""
    axes = [s.axes for s in jax.tree.leaves(SMALL.state_specs(1))]
    flat, tree = jax.tree.flatten(state)
    return tree.unflatten([a[row : row + 1] if "batch" in x else a for a, x in zip(flat, axes, strict=True)])


# ---------------------------------------------------------------------------------------------- the sheet in numpy


def turned(x, position, theta):
    angle = np.asarray(position)[..., None, None] * theta ** (-2 * np.arange(x.shape[-1] // 2) / x.shape[-1])
    z = (x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Sheet:
    """One row in float64: `qkv` at positions, chunks of a document, scores, and one softmax."""

    def __init__(self, memory, params):
        self.m, self.p = memory, {n: np.asarray(a, np.float64) for n, a in params.items()}

    def qkv(self, x, position):
        q, k, v = ((x @ self.p[w]).reshape(len(x), -1, K) for w in ("w_q", "w_k", "w_v"))
        if self.m.qk_norm:
            q, k = (
                a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-6) * self.p[n]
                for a, n in ((q, "q_norm"), (k, "k_norm"))
            )
        return turned(q, position, self.m.theta), turned(k, position, self.m.theta), v

    def routers(self, x, q, k):
        if not self.m.decouple_router:
            return q, k
        return ((x @ self.p[w]).reshape(len(x), -1, K) for w in ("w_rq", "w_rk"))

    def norm(self, x):
        return unit(x) if self.m.router_norm else x

    def chunks(self, document):
        """(k, v, R) of each chunk."""
        q, k, v = self.qkv(document, np.arange(len(document)))
        _, rk = self.routers(document, q, k)
        cut = [slice(i, i + self.m.pool) for i in range(0, len(document), self.m.pool)]
        return [(k[c].mean(0), v[c].mean(0), self.norm(rk[c].mean(0))) for c in cut]

    def scores(self, question, documents):
        """s_d, from the question without its template."""
        position = np.arange(len(question)) + self.m.query_start
        rq = self.norm(next(iter(self.routers(question, *self.qkv(question, position)[:2]))))
        heads = {"mean": np.mean, "max": np.max}[self.m.head_reduce]
        out = []
        for document in documents:
            R = np.stack([np.repeat(r, H // G, 0) for *_, r in self.chunks(document)])
            s = self.m.router_scale * heads(np.einsum("thk,chk->tch", rq, R), -1)
            s = {"max": s.max(0), "mean": s.mean(0), "last": s[-1]}[self.m.query_reduce]
            out.append({"max": np.max, "mean": np.mean}[self.m.chunk_reduce](s))
        return np.array(out)

    def attend(self, x, documents, after_template):
        """y of a whole row (template, then question) over the chunks of these documents."""
        t = np.arange(len(x))
        position = np.where(t >= self.m.template, t + self.m.query_start - self.m.template, t)
        q, k, v = self.qkv(x, position)
        memory = [c for d in documents for c in self.chunks(d)]
        y = []
        for i in t:
            seen = memory if after_template[i] else []
            keys = np.concatenate([np.stack([c[0] for c in seen]), k[: i + 1]]) if seen else k[: i + 1]
            values = np.concatenate([np.stack([c[1] for c in seen]), v[: i + 1]]) if seen else v[: i + 1]
            s = np.einsum("hk,uhk->hu", q[i], np.repeat(keys, H // G, 1)) * K**-0.5
            w = np.exp(s - s.max(-1, keepdims=True))
            o = np.einsum("hu,uhk->hk", w / w.sum(-1, keepdims=True), np.repeat(values, H // G, 1))
            y.append(o.reshape(-1) @ self.p["w_o"])
        return np.array(y)


TEXTS = [d[:n].astype(np.float64) for d, n in zip(DOCUMENTS, LENGTHS, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_reduce": "max", "query_reduce": "mean"},
        {"query_reduce": "last", "chunk_reduce": "mean", "qk_norm": False},
        {"router_norm": False, "router_scale": K**-0.5, "head_reduce": "max", "chunk_reduce": "mean"},
        {"decouple_router": False, "query_reduce": "mean"},
    ],
    ids=str,
)
def test_routing_and_attention_are_the_sheet(changes):
    memory = dataclasses.replace(SMALL, **changes)
    params = {n: a for n, a in PARAMS.items() if n in memory.param_specs()}
    sheet = Sheet(memory, params)
    y, state, aux = ask(memory, params)
    for r in range(2):
        want = sheet.scores(X[r, memory.template :].astype(np.float64), TEXTS)
        np.testing.assert_allclose(aux["doc_scores"][r, 0, : len(TEXTS)], want, rtol=1e-4, atol=1e-5)
        assert np.isneginf(aux["doc_scores"][r, 0, len(TEXTS) :]).all()
        best = np.argsort(-want)[: memory.top_k]
        assert aux["documents"][r, 0].tolist() == best.tolist() == state.documents[r].tolist()
        row = sheet.attend(X[r].astype(np.float64), [TEXTS[i] for i in best], np.arange(ASKED) >= memory.template)
        np.testing.assert_allclose(y[r], row, rtol=1e-3, atol=1e-4)
    assert state.chosen.sum(1).tolist() == [sum(-(-LENGTHS[i] // 3) for i in row) for row in state.documents.tolist()]


def test_documents_are_read_alone():
    """y of `write`, for any packing: documents in rows of their own or behind one another."""
    y, state = stored()
    sheet = Sheet(dataclasses.replace(SMALL, template=0, query_start=0), PARAMS)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(
            y[i, : len(text)], sheet.attend(text, [], np.zeros(len(text), bool)), rtol=1e-3, atol=1e-4
        )
        chunks = sheet.chunks(text)
        at = slice(int(state.store.doc_start[i]), int(state.store.doc_start[i]) + len(chunks))
        for j, name in enumerate(("k", "v", "rk")):
            np.testing.assert_allclose(getattr(state.store, name)[at], [c[j] for c in chunks], rtol=1e-3, atol=1e-4)
    assert state.store.doc_len.tolist() == [3, 1, 3, 1, 2, 0, 0, 0]
    assert state.store.count.tolist() == [10, 5, 0]

    # one block, with padding inside and between the documents
    x, valid, start, place = np.zeros((1, 36, D), np.float32), np.zeros((1, 36), bool), np.zeros((1, 36), bool), []
    at = 1
    for text in TEXTS:
        here = [at + i + (i > 1) for i in range(len(text))]
        start[0, at] = True
        x[0, here], valid[0, here] = text, True
        place.append(here)
        at = here[-1] + 2
    y2, packed = write(SMALL, PARAMS, SMALL.init_state(1), x, valid=valid, start=start)
    close(packed.store, state.store)
    for i, here in enumerate(place):
        close(y2[0, np.array(here)], y[i, : len(here)])


def test_permuting_the_corpus_changes_no_answer():
    order = np.array([3, 0, 4, 2, 1])
    y, state, aux = ask()
    y2, state2, aux2 = ask(state=stored(documents=DOCUMENTS[order], valid=VALID[order])[1])
    close(y2, y)
    np.testing.assert_array_equal(order[np.asarray(state2.documents)], state.documents)
    np.testing.assert_allclose(aux2["doc_scores"][..., :5], aux["doc_scores"][..., order], rtol=1e-5)


def test_documents_that_are_never_chosen_change_nothing():
    y, state, aux = ask()
    chosen = np.unique(np.asarray(state.documents))
    assert len(chosen) < len(LENGTHS)
    poor = np.isin(np.arange(len(LENGTHS)), chosen)
    y2, state2, _ = ask(state=stored(documents=DOCUMENTS[poor], valid=VALID[poor])[1])
    close(y2, y)
    np.testing.assert_array_equal(chosen[np.asarray(state2.documents)], state.documents)


def test_more_documents_follow_those_that_are_there():
    _, whole = stored()
    _, state = stored(documents=DOCUMENTS[:2], valid=VALID[:2])
    state = SMALL.restart(state, 3)
    _, state = write(SMALL, PARAMS, state, DOCUMENTS[2:], valid=VALID[2:])
    close(state.store, whole.store)


def test_answers_keep_the_choice_and_steps_equal_one_call():
    """Prefill of n + m tokens is prefill of n and m steps, once both are routed by the same n tokens."""
    more = normal(3, 2, 4, D)
    _, state, _ = ask()
    y, after, aux = apply(SMALL, PARAMS, state, more)
    now, ys = state, []
    for i in range(4):
        y_i, now = step(SMALL, PARAMS, now, more[:, i])
        ys.append(y_i)
    close(np.stack(ys, 1), y)
    close(now, after)
    np.testing.assert_array_equal(after.documents, state.documents)
    # the diagnostics tell of routing that happened, not of what was thrown away
    assert np.isneginf(aux["doc_scores"]).all() and (aux["documents"] == -1).all() and total(aux)["chunks_dropped"] == 0
    rerouted = ask(x=np.concatenate([X, more], 1))[0]
    assert np.abs(rerouted[:, ASKED:] - y).max() > 1e-4  # the question would have been another one


def test_the_template_neither_routes_nor_sees_the_memory():
    _, empty, _ = ask(x=X[:, :2])
    assert (empty.documents == -1).all() and not empty.chosen.any() and not empty.k.any()
    y, state, _ = apply(SMALL, PARAMS, empty, X[:, 2:])
    whole, want, _ = ask()
    close((y, state), (whole[:, 2:], want))
    other = np.concatenate([normal(9, 2, 2, D), X[:, 2:]], 1)
    np.testing.assert_allclose(ask(x=other)[2]["doc_scores"], ask()[2]["doc_scores"], rtol=1e-5)
    without, _, _ = ask(state=SMALL.init_state(2))
    close(without[:, :2], whole[:, :2])
    assert np.abs(without[:, 2:] - whole[:, 2:]).max() > 1e-3


def test_questions_packed_by_start_choose_each_for_itself():
    """A row: the rest of an answer, a whole question, another one behind padding; each as if alone."""
    _, begun, _ = ask(x=X[:1])
    rest, second, third = normal(4, 1, 3, D), normal(5, 1, 5, D), normal(6, 1, 4, D)
    x = np.concatenate([rest, second, np.zeros((1, 1, D), np.float32), third], 1)
    valid, start = np.arange(13)[None] != 8, np.isin(np.arange(13), [3, 8])[None]  # start acts on padding too
    y, state, aux = apply(SMALL, PARAMS, begun, x, valid=valid, start=start)
    close(y[:, :3], apply(SMALL, PARAMS, begun, rest)[0])
    for i, (part, at) in enumerate(((second, 3), (third, 9)), 1):
        alone, want, one = ask(x=part)
        close(y[:, at : at + part.shape[1]], alone)
        close(aux["doc_scores"][:, i], one["doc_scores"][:, 0])
    close(with_rows_of(state, 0), want)


def test_step_with_start_forgets_the_choice():
    _, state, _ = ask()
    y, new = step(SMALL, PARAMS, state, X[:, 0], start=np.array([True, False]))
    assert not new.chosen[0].any() and (new.documents[0] == -1).all() and new.ring.count.tolist() == [1, ASKED + 1]
    np.testing.assert_array_equal(new.chosen[1], state.chosen[1])
    fresh, _ = step(SMALL, PARAMS, SMALL.restart(state, 2), X[:, 0])
    close(y[0], fresh[0])


def test_a_question_of_padding_chooses_nothing():
    y, state, aux = ask(valid=np.array([[True] * ASKED, [False] * ASKED]))
    assert np.isneginf(aux["doc_scores"][1]).all() and (state.documents[1] == -1).all() and not state.chosen[1].any()
    assert not y[1].any()  # the released code: padding attends to nothing


def test_all_documents_are_chosen_where_top_k_allows():
    """With chunks of one token that is exact attention over the keys and values of every document."""
    memory = dataclasses.replace(SMALL, pool=1, top_k=7, capacity=30, max_chunks=30)
    y, state, _ = ask(memory)
    assert [sorted(r) for r in state.documents.tolist()] == [[-1, -1, 0, 1, 2, 3, 4]] * 2
    assert state.chosen.sum(1).tolist() == [sum(LENGTHS)] * 2
    sheet = Sheet(memory, PARAMS)
    for r in range(2):
        want = sheet.attend(X[r].astype(np.float64), TEXTS, np.arange(ASKED) >= 2)
        np.testing.assert_allclose(y[r], want, rtol=1e-3, atol=1e-4)


def test_one_chunk_for_documents_shorter_than_the_pool():
    _, state = stored(dataclasses.replace(SMALL, pool=WIDTH))
    assert state.store.doc_len.tolist() == [1] * 5 + [0] * 3
    assert state.store.doc_start.tolist()[:5] == [0, 1, 2, 3, 4]


def test_scaling_the_routers_changes_nothing_under_cosine():
    """Each head's by its own constant."""
    q, k = (np.repeat(np.float32(a), K)[None] for a in ((7, 0.5, 1, 3), (0.2, 9)))
    scaled = PARAMS | {"w_rq": q * PARAMS["w_rq"], "w_rk": k * PARAMS["w_rk"]}
    close(ask(params=scaled, state=stored(params=scaled)[1])[0], ask()[0])


def test_law_3_one_packed_row_is_reading_then_asking():
    """As in training, [template; documents; question; answer] layer by layer, against the verbs one after the other."""
    below = DocumentAttention(**{f.name: getattr(SMALL, f.name) for f in dataclasses.fields(DocumentAttention)})
    model = Stack((block(below, D), block(SMALL, D)))
    params, answer = model.init(jax.random.key(0)), normal(8, 1, 4, D)
    roles = np.concatenate([[0] * 2, *([i + 1] * n for i, n in enumerate(LENGTHS)), [0] * (ASKED - 2), [-1] * 4])[None]
    packed = np.zeros((1, roles.shape[1], D), np.float32)
    packed[roles == 0], packed[roles == -1], packed[roles > 0] = X[0], answer[0], DOCUMENTS[VALID]
    begins = (roles > 0) & (np.diff(roles, axis=1, prepend=0) != 0)
    masks = dict(documents=roles > 0, begins=begins, asks=roles == 0, follows=roles == -1)
    y = jit(lambda model, *args: Threaded(**masks)(model, *args)[0])(model, params, model.init_state(1), packed)

    read, state = write(model, params, model.init_state(len(LENGTHS)), DOCUMENTS, valid=VALID)
    asked, state, _ = apply(model, params, model.restart(state, 1), X[:1])
    answered, _, _ = apply(model, params, state, answer)
    for role, want in ((roles > 0, read[VALID]), (roles == 0, asked[0]), (roles == -1, answered[0])):
        close(y[role], want, atol=1e-5)


def test_only_the_router_loss_trains_the_routers():
    def loss(params, which):
        _, state = SMALL.write(params, SMALL.init_state(len(LENGTHS)), DOCUMENTS, valid=VALID)
        y, _, aux = SMALL.apply_with_aux(params, SMALL.restart(state, 2), X)
        positive = jnp.arange(8)[None] == jnp.array([1, 2])[:, None]
        return jnp.sum(y * y) if which == "lm" else router_loss(aux["doc_scores"][:, 0], positive).sum()

    lm, aux = (jit(lambda which, p: jax.grad(loss)(p, which))(which, PARAMS) for which in ("lm", "aux"))
    for name in ("w_rq", "w_rk"):
        assert not np.asarray(lm[name]).any() and np.abs(aux[name]).max() > 1e-3
    assert np.abs(lm["w_k"]).max() > 1e-3 and not np.asarray(aux["w_k"]).any()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves((lm, aux)))


def test_layers_below_the_routers_do_not_know_the_bank():
    below = DocumentAttention(**{f.name: getattr(SMALL, f.name) for f in dataclasses.fields(DocumentAttention)})
    model = Stack((Residual(below), Residual(SMALL)))
    params = model.init(jax.random.key(0))
    _, state = write(model, params, model.init_state(len(LENGTHS)), DOCUMENTS, valid=VALID)
    full, _, _ = apply(model, params, model.restart(state, 2), X)
    empty, bare, _ = apply(model, params, model.init_state(2), X)
    _, after, _ = apply(model, params, model.restart(state, 2), X)
    close(after["0"], bare["0"])
    assert np.abs(full - empty).max() > 1e-3


def test_a_full_store_counts_what_found_no_room():
    few = dataclasses.replace(SMALL, capacity=5)
    _, state = stored(few)
    assert state.store.count.tolist() == [5, 5, 5]
    assert state.store.doc_len.tolist() == [3, 1, 1, 0, 0, 0, 0, 0]
    close(jax.tree.map(lambda a: a[:5], state.store[:3]), jax.tree.map(lambda a: a[:5], stored()[1].store[:3]))
    _, state = write(few, PARAMS, state, DOCUMENTS, valid=VALID)
    assert state.store.count.tolist() == [5, 8, 15]
    few = dataclasses.replace(SMALL, documents=2)
    _, state = stored(few)
    assert state.store.count.tolist() == [4, 2, 6] and state.store.doc_len.tolist() == [3, 1]
    documents = ask(few, state=state)[1].documents
    assert sorted(set(documents.ravel().tolist())) == [0, 1]


def test_max_chunks_drops_the_end_of_the_lowest_scored_document():
    memory = dataclasses.replace(SMALL, top_k=5, max_chunks=6)
    y, state, aux = ask(memory)
    assert int(aux["chunks_dropped"]) == 2 * (10 - 6)
    sheet = Sheet(memory, PARAMS)
    for r in range(2):
        room, kept = 6, []
        for i in np.argsort(-sheet.scores(X[r, 2:].astype(np.float64), TEXTS)):
            take = min(room, -(-LENGTHS[i] // 3))
            kept, room = kept + [TEXTS[i][: 3 * take]] * (take > 0), room - take
        want = sheet.attend(X[r].astype(np.float64), kept, np.arange(ASKED) >= 2)
        np.testing.assert_allclose(y[r], want, rtol=1e-3, atol=1e-4)


def test_both_ways_sees_the_piece_that_is_appended():
    """As the released code appends a text: its tokens see each other, padding excepted."""
    memory = dataclasses.replace(SMALL, causal=False)
    _, state, _ = ask()
    more, valid = normal(7, 2, 3, D), np.array([[True, True, True], [True, True, False]])
    y, _, _ = apply(memory, PARAMS, state, more, valid=valid)
    other = more + np.float32([0, 0, 1])[None, :, None]
    y2, _, _ = apply(memory, PARAMS, state, other, valid=valid)
    assert np.abs(y2[0, 0] - y[0, 0]).max() > 1e-4
    close(y2[1], y[1])
    close(step(memory, PARAMS, state, more[:, 0])[0], step(SMALL, PARAMS, state, more[:, 0])[0])


def test_a_narrow_store():
    narrow = dataclasses.replace(SMALL, store_dtype="bfloat16")
    y, state, _ = ask(narrow)
    assert state.store.k.dtype == state.k.dtype == jnp.bfloat16
    assert 0 < np.abs(y - ask()[0]).max() < 0.1


def test_equal_routers_begin_equal():
    memory = dataclasses.replace(SMALL, kv_heads=H, equal_routers=True)
    params = memory.init(jax.random.key(0))
    np.testing.assert_array_equal(params["w_rq"], params["w_rk"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_heads": 3}, "MSA: kv_heads is 3, needs a divisor of 4 heads"),
        ({"kv_heads": 0}, "MSA: kv_heads is 0, needs at least 1"),
        ({"head_dim": 3}, "MSA: head_dim is 3, needs an even number to rotate"),
        ({"window": 0}, "MSA: window is 0, needs at least 1"),
        ({"pool": 0}, "MSA: pool is 0, needs at least 1"),
        ({"equal_routers": True}, "equal_routers needs kv_heads = heads, got 2 and 4"),
        ({"head_reduce": "sum"}, "head_reduce is 'sum', needs one of"),
        ({"query_reduce": "first"}, "query_reduce is 'first', needs one of"),
        ({"chunk_reduce": "last"}, "chunk_reduce is 'last', needs one of"),
    ],
)
def test_bad_fields(as_user, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
