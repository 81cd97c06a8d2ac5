"""Rounds with a model over a bank on disk: what routes in a round, what is left of the one before, and the golden.

The model is not trained: its weights are set so that each token decides the next one, and it asks for document 2, then
ends retrieval, then answers "x", whatever the question.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import Stack
from memjax.data import ByteTokenizer, File
from memjax.data.tokenizer import SPECIAL_TOKENS
from memjax.errors import ConfigError
from memjax.in_storage import bank as banks
from memjax.in_storage.bank_files import delete_files, open_bank
from memjax.in_storage.msa import MSA
from memjax.lm import LanguageModel, block, reader
from memjax.lm.build import build_bank
from memjax.lm.files import LoadedModel, ReadingSettings, load_model, save_model
from memjax.lm.generate import generate, read
from memjax.lm.interleave import answer_in_rounds, tokens
from memjax.lm.interleave_text import QUESTION, RESPONSE, Limits, Marks, Piece, Round
from memjax.lm.reading import pad_left
from tests import golden
from tests.adapters.msa import _with_attention, build, parameters

TOKENIZER = ByteTokenizer((*SPECIAL_TOKENS, "<next>", "<finish>"))
MARKS = Marks("<answer>", "<end>", "<next>", "<finish>", (), "", "?", (), "", "=", first=0)
LIMITS = Limits(rounds=3, characters=40, tokens=8, answer_tokens=4)
WINDOW = 128
ROUTER = MSA(
    dim=16, heads=2, kv_heads=2, head_dim=4, window=WINDOW, template=0, query_start=4, theta=100.0,
    pool=8, top_k=2, capacity=32, documents=8, max_chunks=12,
)  # fmt: skip
MODEL = LanguageModel(Stack((block(ROUTER, 8), block(ROUTER, 8))), TOKENIZER.vocab_size, tied=False, embed_std=1.0)
FILES = [File(f"{i}.txt", f"the number of house {i} is {i * i + 7}\n") for i in range(5)]


def chain(*said):
    """Parameters under which each of these tokens is followed by the next."""
    params = MODEL.init(jax.random.key(0))
    small = lambda path, a: a * 0.03 if path[-1].key in ("w_o", "w_down") else a  # noqa: E731
    params["body"] = jax.tree.map_with_path(small, params["body"])
    ids = [TOKENIZER.special[s] if s in TOKENIZER.special else int(TOKENIZER.encode(s)[0]) for s in said]
    basis = 8 * np.eye(16, dtype=np.float32)
    embed, head = np.array(params["embed"]), np.zeros_like(params["head"])
    for axis, (now, then) in zip(basis, zip(ids, ids[1:], strict=False), strict=False):
        embed[now] = axis
        head[:, then] += axis
    return params | {"embed": jnp.asarray(embed), "head": jnp.asarray(head)}


PARAMS = chain("<answer>", "[", "2", "]", "<next>", "<finish>", "x", "<end>")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    save_model(path, MODEL, PARAMS, TOKENIZER, reading=ReadingSettings(32, 2, 4))
    return load_model(path)


@pytest.fixture(scope="module")
def path(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "b"
    build_bank(loaded, FILES, path, progress=False)
    return path


@pytest.fixture(scope="module")
def opened(path):
    return open_bank(path)


def in_rounds(loaded: LoadedModel, opened, *questions, **kw):
    kw = {"marks": MARKS, "limits": LIMITS} | kw
    return answer_in_rounds(loaded.model, loaded.params, opened.bank, TOKENIZER, questions, opened.token_ids, **kw)


def prefilled(model, params, bank, text, width=64):
    ids, routes = tokens(TOKENIZER, text)
    ids, valid = pad_left([ids], width)
    asks = np.pad(routes, (width - len(routes), 0))[None]
    return reader.ask_prefix(model, params, bank, jnp.asarray(ids), jnp.asarray(valid), jnp.asarray(asks))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


# ---------------------------------------------------------------------------------------------- rounds


def test_a_model_asks_reads_and_answers(loaded, opened):
    got, other = in_rounds(loaded, opened, "who", "and you")
    assert got.text.answer == other.text.answer == "x" and got.text.stopped == "end_of_retrieval"
    assert got.text.rounds == (Round("[2]", (2,), (), (2,)), Round("")) and got.documents == (2,)
    assert "".join(p.text for p in got.text.text) == (
        f"who?\n<answer>[2]<next>[2]. {FILES[2].text}\n<next><finish><answer>who\n<next>x<end>"
    )
    assert len(got.routing) == 2  # the answer is written in the cache of the second round
    assert [r.documents.shape for r in got.routing] == [(2, 1, 2)] * 2
    assert not np.array_equal(got.routing[0].scores, got.routing[1].scores)  # the newest document asks too
    same(in_rounds(loaded, opened, "and you")[0].routing, other.routing)  # alone


def test_a_round_routes_as_its_text_read_for_the_first_time(loaded, opened):
    """Nothing of the round before is left: one fresh prefill of the same text and roles routes alike."""
    (got,) = in_rounds(loaded, opened, "who")
    second = [*got.text.text[:1], *(p._replace(role=RESPONSE) for p in got.text.text[1:7])]
    second[5] = second[5]._replace(role=QUESTION)
    assert second[5].text == f"[2]. {FILES[2].text}\n" and second[6].text == "<next>"
    _, routing = prefilled(loaded.model, loaded.params, opened.bank, second, 64)
    same(routing, got.routing[1])
    first = [Piece("who?", QUESTION), Piece("\n", QUESTION), Piece("<answer>", RESPONSE, True)]
    same(prefilled(loaded.model, loaded.params, opened.bank, first, 64)[1], got.routing[0])


def test_one_routing_without_interleave(loaded, opened):
    (got,) = in_rounds(loaded, opened, "who", interleave=False)
    (twice,) = in_rounds(loaded, opened, "who")
    assert got.documents == (2,) and got.text.stopped == "rounds" and got.text.answer == "x"
    same(got.routing, twice.routing[:1])
    assert f"[2]. {FILES[2].text}\n" in "".join(p.text for p in got.text.text)


def test_only_numbers_without_the_original_text(loaded, opened):
    (got,) = in_rounds(loaded, opened, "who", original_text=False)
    assert "[2]. \n" in [p.text for p in got.text.text] and got.text.answer == "x"


def test_a_deleted_document_is_never_read(loaded, path, tmp_path):
    copy = Path(shutil.copytree(path, tmp_path / "b"))
    delete_files(copy, ["2.txt"])
    (got,) = in_rounds(loaded, open_bank(copy), "who")
    assert got.text.rounds[0] == Round("[2]", (2,), (2,), ()) and got.documents == ()
    assert all(2 not in r.documents for r in got.routing)
    # the text did not change but for the delimiter; the model went on and answered
    assert got.text.stopped == "end_of_retrieval" and got.text.answer == "x"


def test_the_window_bounds_the_text(loaded, opened):
    question = "w" * 80  # twice in the text, and the document of 30 bytes has no room
    with pytest.raises(ConfigError, match=r"question: is 83 tokens with its prompt, and at most \d+ leave room"):
        in_rounds(loaded, opened, question)
    (got,) = in_rounds(loaded, opened, "w" * 46)
    assert got.text.stopped == "window" and got.text.rounds[0].asked == (2,) and got.documents == ()
    assert got.text.answer == "x" and len(tokens(TOKENIZER, got.text.text)[0]) <= WINDOW


def test_a_mark_that_is_no_token_is_found_in_the_text(loaded, opened):
    """MSA-4B spells the end of retrieval; here the delimiter is "2]"."""
    marks = MARKS._replace(delimiter="2]")
    params = chain("<answer>", "[", "3", "]", "2", "]")  # [3]2]
    got = answer_in_rounds(
        loaded.model, params, opened.bank, TOKENIZER, ["who"], opened.token_ids, marks=marks,
        limits=LIMITS._replace(rounds=1),
    )  # fmt: skip
    assert got[0].text.rounds == (Round("[3]", (3,), (), (3,)),) and got[0].documents == (3,)


def test_limits_of_a_round(loaded, opened):
    params = chain("<answer>", "[", "x", "[")
    for limits, reason, written in (
        (LIMITS, "tokens", "[x[x[x[x"),
        (Limits(3, 5, 8, 4), "characters", "[x[x[x"),
    ):
        (got,) = in_rounds(loaded._replace(params=params), opened, "who", limits=limits)
        assert got.text.stopped == reason and got.text.rounds == (Round(written),)


def test_marks_of_another_template(loaded, opened):
    with pytest.raises(ConfigError, match=r"marks: head has 1 tokens, the template of the model's layers has \[0\]"):
        in_rounds(loaded, opened, "who", marks=MARKS._replace(head=("<end>",)))


# ---------------------------------------------------------------------------------------------- roles


def test_marks_become_tokens_and_text_never_does():
    ids, routes = tokens(TOKENIZER, [Piece("a<next>", QUESTION), Piece("<next>", RESPONSE, True), Piece("", QUESTION)])
    assert ids.tolist() == [*TOKENIZER.encode("a<next>").tolist(), TOKENIZER.special["<next>"]]
    assert routes.tolist() == [True] * 7 + [False]


def test_only_the_question_and_the_newest_documents_route(loaded, opened):
    """What routes not may stand there or not: after the last that routes, in no layer; before it, in the first."""
    bank, params = opened.bank, MODEL.init(jax.random.key(1))
    asks, newest = Piece("?", QUESTION), Piece("[1]. the number\n", QUESTION)
    said, end = Piece("[1]", RESPONSE), Piece("<next>", RESPONSE, True)
    _, base = prefilled(MODEL, params, bank, [asks, said, newest, end])
    for tail in ([Piece("[4]", RESPONSE)], [end, Piece("something else", RESPONSE)]):
        close(prefilled(MODEL, params, bank, [asks, said, newest, *tail])[1], base)
    _, changed = prefilled(MODEL, params, bank, [asks, Piece("[3] or so", RESPONSE), newest, end])
    np.testing.assert_allclose(changed.scores[0], base.scores[0], rtol=1e-4)  # its queries are of tokens alone
    assert np.abs(changed.scores[1] - base.scores[1]).max() > 1e-5  # the newest document has read what stands before
    _, answered = prefilled(MODEL, params, bank, [asks, said, newest._replace(role=RESPONSE), end])
    _, alone = prefilled(MODEL, params, bank, [asks])
    close(answered, alone)
    assert np.abs(answered.scores[0] - base.scores[0]).max() > 1e-3
    _, none = prefilled(MODEL, params, bank, [asks._replace(role=RESPONSE)])
    assert (none.documents == -1).all()


def test_law_3_a_text_at_once_is_the_question_then_the_rest(opened):
    """Prefill of n + m tokens is prefill of n, then m steps, where the n alone route; else routing is another one."""
    params = MODEL.init(jax.random.key(1))
    asks, rest = Piece("where is it?", QUESTION), Piece(" here", RESPONSE)
    whole, routing = prefilled(MODEL, params, opened.bank, [asks, rest])
    begun, _ = prefilled(MODEL, params, opened.bank, [asks])
    close(read(MODEL, params, begun, TOKENIZER.encode(" here")[None]), whole, atol=1e-4)
    step = jax.jit(MODEL.step)
    state, logits = begun
    for token in TOKENIZER.encode(" here"):
        logits, state = step(params, state, jnp.asarray([token]))
    close((state, logits), tuple(whole), atol=1e-4)
    _, other = prefilled(MODEL, params, opened.bank, [asks, rest._replace(role=QUESTION)])
    assert np.abs(other.scores - routing.scores).max() > 1e-3


# ---------------------------------------------------------------------------------------------- the released code


def test_the_golden_through_a_bank():
    """Roles in one prefill over the golden's bank, greedy decoding, and an appended piece that sees all of itself."""
    arrays = dict(np.load(Path(golden.__file__).parent / "goldens" / "msa_a.npz"))
    cfg = json.loads(str(arrays["cfg_json"]))
    model = build(cfg, cfg["inf"], tokens=64, documents=6, window=32)
    params = parameters(arrays, model)
    k, v, rk = (arrays[f"out_inf_bank_{name}_1"][None] for name in ("k", "v", "rk"))
    doc_len = np.bincount(arrays["out_inf_bank_chunk_doc"])
    bank = banks.append(banks.empty(1, cfg["kv"], cfg["hd"], np.float32), k, v, rk, doc_len)

    template, query = arrays["in_inf_template_ids"], arrays["in_inf_query_ids"]
    b, t = query.shape
    text = np.concatenate([np.broadcast_to(template, (b, len(template))), query], 1)
    valid = np.pad(arrays["in_inf_query_attention_mask"] > 0, ((0, 0), (len(template), 0)), constant_values=True)
    routes = np.pad(arrays["in_inf_query_doc_ids"] == 0, ((0, 0), (len(template), 0)))
    assert (~valid).any() and (valid & ~routes)[:, len(template) :].any()  # padding, and roles that don't route

    for causal in (True, False):  # reading the whole text is causal for a model whose appended pieces are not
        both_ways = _with_attention(model, causal=causal)
        prefix, routing = reader.ask_prefix(both_ways, params, bank, *map(jnp.asarray, (text, valid, routes)))
        np.testing.assert_array_equal(routing.documents[0], arrays["out_inf_topk_docs_1"])
        assert golden.error(routing.scores[0], arrays["out_inf_topk_scores_1"]) < 1e-5
        assert golden.error(prefix.logits, arrays["out_inf_prefill_logits"][:, -1]) < 1e-5
    decoded, prefix = generate(both_ways, params, prefix, steps=cfg["inf"]["decode_steps"])
    np.testing.assert_array_equal(decoded, arrays["out_inf_decode_tokens"])
    assert golden.error(prefix.logits, arrays["out_inf_decode_logits"][:, -1]) < 1e-5
    appended = read(both_ways, params, prefix, arrays["in_inf_append_ids"])
    assert golden.error(appended.logits, arrays["out_inf_append_logits_noncausal"][:, -1]) < 1e-5
