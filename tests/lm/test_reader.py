"""Asking a bank equals asking a store that holds the same chunks; pooling, agreement, and whole answers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.combinators import Repeat, Residual, Stack
from memjax.data import ByteTokenizer, TokenizedDocuments
from memjax.errors import TokenizerError
from memjax.in_context.canon import Canon
from memjax.in_storage import bank as banks
from memjax.in_storage.msa import MSA
from memjax.in_weights.stem import STEM
from memjax.lm import pooling, reader, reading
from memjax.lm.generate import Sampling, generate
from memjax.lm.model import LanguageModel
from memjax.lm.reader import Routing
from memjax.lm.words import WordIndex, fuse
from pallas_kernels.compat import QUICK_COMPILE

TOKENIZER = ByteTokenizer()
ATTENTION = dict(dim=8, heads=2, kv_heads=1, head_dim=4, window=96, template=0, query_start=3, theta=100.0)
ROUTER = MSA(**ATTENTION, pool=4, top_k=2, capacity=16, documents=6, max_chunks=6)
# A leaf that reads ids, and routers of both kinds: alone and repeated.
BODY = Stack(
    (
        Residual(STEM(8, TOKENIZER.vocab_size, 8)),
        Residual(ROUTER),
        Repeat(Stack((Canon(8), Residual(ROUTER))), 2),
    )
)
MODEL = LanguageModel(BODY, TOKENIZER.vocab_size, embed_std=1.0)
PARAMS = MODEL.init(jax.random.key(0))

LENGTHS = np.array([9, 4, 10, 1, 7], np.int32)  # 3, 1, 3, 1, 2 chunks
IDS = np.random.default_rng(0).integers(7, TOKENIZER.vocab_size, (6, 10)).astype(np.int32)
VALID = np.arange(10)[None] < np.append(LENGTHS, 0)[:, None]  # the last row is no document
QUESTION, ASKED = IDS[::-1, :6][:2] % 200 + 7, np.array([[False, False, True, True, True, True], [True] * 6])

apply = partial(jax.jit, compiler_options=QUICK_COMPILE)(MODEL.apply_with_aux)


@pytest.fixture(scope="module")
def pooled():
    return pooling.pool_documents(MODEL, PARAMS, jnp.asarray(IDS), jnp.asarray(VALID), dtype=jnp.float32)


@pytest.fixture(scope="module")
def bank(pooled):
    k, v, rk = (np.asarray(a)[:, :10] for a in (pooled.k, pooled.v, pooled.rk))
    return banks.append(banks.empty(3, 1, 4, np.float32), k, v, rk, np.asarray(pooled.doc_len)[:5])


@pytest.fixture(scope="module")
def stored():
    """The model's own store after reading the same documents."""
    write = partial(jax.jit, compiler_options=QUICK_COMPILE)(MODEL.write)
    return write(PARAMS, MODEL.init_state(6), IDS, valid=VALID)[1]


def routers(tree):
    """The parts of a state or aux that belong to router layers, in their order."""
    body = tree["body"]
    return [body["1"]["memory"], *(r["1"]["memory"] for r in body["2"])]


def test_pooling_is_what_write_stores(pooled, stored):
    for i, layer in enumerate(routers(stored)):
        for name in ("k", "v", "rk"):
            np.testing.assert_allclose(getattr(pooled, name)[i], getattr(layer.store, name), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(pooled.doc_len, layer.store.doc_len)
    assert pooled.count.tolist() == [[10, 5, 0]] * 3
    assert pooled.doc_len.tolist() == [3, 1, 3, 1, 2, 0]


@pytest.mark.parametrize("where", ["host", "device"])
def test_asking_a_bank_is_asking_the_store(bank, stored, where):
    _, want, aux = apply(PARAMS, MODEL.restart(stored, 2), QUESTION, valid=ASKED)
    at = jax.device_put(bank) if where == "device" else bank
    wild = np.where(ASKED, QUESTION, -7).astype(np.int32)  # padding may hold anything
    state, routing = reader.ask(MODEL, PARAMS, at, jnp.asarray(wild), jnp.asarray(ASKED))
    assert jax.tree.structure(state) == jax.tree.structure(want)
    for i, (got, layer, a) in enumerate(zip(routers(state), routers(want), routers(aux), strict=True)):
        np.testing.assert_array_equal(routing.documents[i], a["documents"][:, 0])
        best = np.take_along_axis(np.asarray(a["doc_scores"][:, 0]), routing.documents[i], 1)
        np.testing.assert_allclose(routing.scores[i], best, rtol=1e-4, atol=1e-5)
        pairs = zip(jax.tree.leaves(got[1:]), jax.tree.leaves(layer[1:]), strict=True)  # all but the store
        jax.tree.map(lambda p: np.testing.assert_allclose(p[0], p[1], rtol=1e-4, atol=1e-5), list(pairs),
                     is_leaf=lambda p: isinstance(p, tuple))  # fmt: skip
    assert len({tuple(r) for r in routing.documents[:, 0]}) > 1  # layers choose for themselves
    # what is read next sees the same memory
    more = jnp.asarray(IDS[:2, :6])
    then = [apply(PARAMS, s, more, valid=jnp.ones((2, 6), bool))[0] for s in (state, MODEL.restart(want, 2), want)]
    np.testing.assert_allclose(then[0], then[2], rtol=1e-3, atol=1e-4)
    assert np.abs(then[1] - then[2]).max() > 1e-3


def test_a_deeper_ranking_reads_the_same(bank):
    asked = jnp.asarray(QUESTION), jnp.asarray(ASKED)
    state, routing = reader.ask(MODEL, PARAMS, bank, *asked)
    same, deep = reader.ask(MODEL, PARAMS, bank, *asked, depth=4)
    assert routing.documents.shape == (3, 2, 2) and deep.documents.shape == (3, 2, 4)
    np.testing.assert_array_equal(deep.documents[..., :2], routing.documents)
    jax.tree.map(np.testing.assert_array_equal, state, same)


def test_words_and_the_model_choose_together(bank):
    ids = lambda d: IDS[d][: LENGTHS[d]]  # noqa: E731
    found = WordIndex([TOKENIZER.decode(ids(d)) for d in range(5)])
    prepare = partial(reader.prepare, MODEL, PARAMS, bank, TOKENIZER, ["words of it", "x"], ids, steps=4)
    said = [(4, 2.0), (1, 1.0)]
    found.rank = lambda question, count: said if question == "x" else []  # type: ignore[method-assign]
    together = prepare(read=5, words=found)
    model = reader.rank(MODEL, PARAMS, bank, TOKENIZER, ["words of it", "x"], reader.RANKED)
    assert [len(ranking) for ranking in model] == [5, 5]  # all documents, not only those that a layer reads
    assert together.passages == [fuse(model[0], []), fuse(model[1], said)]
    assert together.routing.documents.shape == (3, 2, ROUTER.top_k)  # what was read, not the whole ranking
    assert [d for d, _ in together.passages[1]] != [d for d, _ in model[1]]
    assert len(prepare(read=2, words=found).passages[1]) == 2
    alone = prepare(read=5)  # more than the layers choose between them: two of five each
    assert [[d for d, _ in p] for p in alone.passages] == [[d for d, _ in ranking] for ranking in model]
    assert alone.routing.documents.shape == (3, 2, ROUTER.top_k)


def test_a_ranking_is_what_the_layers_agree_on(bank):
    questions = ["who?", "where is it, and when?"]
    got = reader.rank(MODEL, PARAMS, bank, TOKENIZER, questions, 4)
    special = reading.special_ids(TOKENIZER)
    for row, q in zip(got, questions, strict=True):  # each alone, without padding
        ids = reading.question(special, reading.encode_question(TOKENIZER, q))[None]
        _, routing = reader.ask(MODEL, PARAMS, bank, jnp.asarray(ids), jnp.ones(ids.shape, bool), depth=4)
        (want,) = reader.agree(routing, 4)
        assert [d for d, _ in row] == [d for d, _ in want]
        np.testing.assert_allclose([s for _, s in row], [s for _, s in want], atol=1e-5)
    cut = reader.rank(MODEL, PARAMS, bank, TOKENIZER, questions, 4, width=5)  # the mark, a space, three letters
    assert cut[1] == reader.rank(MODEL, PARAMS, bank, TOKENIZER, ["x", "whe"], 4, width=5)[1] != got[1]


def test_blocks_of_documents_are_padded_to_one_shape(pooled):
    number = np.arange(5, dtype=np.int32)
    documents = TokenizedDocuments(IDS[:5], LENGTHS, np.zeros(5, np.int32), number + 1, number + 2, ("a.txt",))
    blocks = list(pooling.pool_blocks(MODEL, PARAMS, documents, rows=3))
    assert [np.asarray(b.doc_len).tolist() for b in blocks] == [[3, 1, 3], [1, 2]]
    assert [len(i) for b in blocks for i in b.ids] == LENGTHS.tolist()
    np.testing.assert_allclose(
        np.concatenate([b.rk for b in blocks], 1).astype(np.float32), pooled.rk[:, :10], atol=0.01
    )
    assert blocks[1].path == ["a.txt"] * 2 and list(blocks[1].first_line) == [4, 5]
    small = LanguageModel(Residual(MSA(**ATTENTION, pool=4, capacity=2, documents=6)), TOKENIZER.vocab_size)
    with pytest.raises(ValueError, match="chunks of 3 documents find no room in the store of MSA"):
        next(pooling.pool_blocks(small, small.init(jax.random.key(0)), documents, rows=3))


def test_layers_are_counted_as_often_as_they_run(bank):
    assert pooling.router_layers(MODEL) == [ROUTER] * 3
    plain = LanguageModel(Canon(8), 9)
    with pytest.raises(ValueError, match="LanguageModel: has no MSA layer"):
        pooling.router_layers(plain)
    two = bank._replace(rk=bank.rk[:2])
    with pytest.raises(ValueError, match="ask: bank holds 2 router layers, the model has 3"):
        reader.ask(MODEL, PARAMS, two, jnp.asarray(QUESTION), jnp.asarray(ASKED))


def test_layers_agree_on_the_mean_score():
    documents = np.array([[[4, 2], [-1, -1]], [[2, 7], [3, -1]]])
    scores = np.array([[[0.9, 0.5], [-np.inf, -np.inf]], [[0.8, 0.1], [0.4, -np.inf]]])
    rows = reader.agree(Routing(documents, scores), 2)
    assert [d for d, _ in rows[0]] == [2, 4]  # 4: 0.9 and at most 0.1; 7: at most 0.5, and 0.1
    assert [s for _, s in rows[0]] == pytest.approx([0.65, 0.5])
    assert [d for d, _ in rows[1]] == [3]


def test_answers(bank):
    questions = ["who?", "where is it?"]
    read = lambda d: IDS[d, : LENGTHS[d]]  # noqa: E731
    got = reader.answer(MODEL, PARAMS, bank, TOKENIZER, questions, read, steps=3)
    assert got.tokens.shape == (2, 3) and got.routing.documents.shape == (3, 2, 2)
    # by hand: the questions route, the passages are read behind them, the answers are decoded
    special, asked = reading.special_ids(TOKENIZER), [TOKENIZER.encode(" " + q) for q in questions]
    ids, valid = reading.pad_left([reading.question(special, q) for q in asked], 16)
    state, routing = reader.ask(MODEL, PARAMS, bank, jnp.asarray(ids), jnp.asarray(valid))
    np.testing.assert_array_equal(routing.documents, got.routing.documents)
    assert got.passages == reader.agree(routing, 2)
    texts = [
        reading.reading(special, [read(d) for d, _ in reversed(p)], q) for p, q in zip(got.passages, asked, strict=True)
    ]
    for text, q, passages in zip(texts, questions, got.passages, strict=True):
        assert TOKENIZER.decode(text).endswith(q) and text[0] == special["<document>"]
        assert (text == special["<document>"]).sum() == len(passages) == 2
    ids, valid = reading.pad_left(texts, -(-max(map(len, texts)) // 16) * 16)
    want, _ = generate(MODEL, PARAMS, state, ids, valid=valid, steps=3, sampling=Sampling(stop=special["<end>"]))
    np.testing.assert_array_equal(got.tokens, want)
    with pytest.raises(
        ValueError, match="answer: question, passages and answer are .* tokens, the model's window is 96"
    ):
        reader.answer(MODEL, PARAMS, bank, TOKENIZER, questions, lambda d: np.zeros(90, np.int32), steps=3)


def test_texts():
    assert reading.encode_question(TOKENIZER, " who? ").tolist() == TOKENIZER.encode(" who?").tolist()
    assert len(reading.encode_question(TOKENIZER, " \n")) == 0
    assert (
        reader.answer_text(TOKENIZER, np.array([*TOKENIZER.encode(" 42"), TOKENIZER.special["<end>"], -1, -1])) == "42"
    )
    ids, valid = reading.pad_left([np.array([5, 6]), np.array([7])], 3)
    assert ids.tolist() == [[0, 5, 6], [0, 0, 7]] and valid.sum(1).tolist() == [2, 1]
    with pytest.raises(ValueError, match="pad_left: a row has 2 tokens, needs at most 1"):
        reading.pad_left([np.array([5, 6])], 1)
    with pytest.raises(TokenizerError, match="has no special token <question>"):
        reading.special_ids(ByteTokenizer(("<pad>",)))
