"""The retrieval loss: what it adds up, whom it counts, and that its routers learn from it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.combinators import Repeat, Residual, Stack
from memjax.data import generated
from memjax.errors import CheckpointError
from memjax.in_context.canon import Canon
from memjax.in_storage.msa import MSA
from memjax.lm.model import LanguageModel
from memjax.train.retrieval import PUBLISHED, TOGETHER, fit_phases, retrieval_loss
from pallas_kernels.compat import QUICK_COMPILE

V = 13
ROUTER = MSA(dim=8, heads=2, kv_heads=2, head_dim=4, window=24, template=0, query_start=2, pool=2, top_k=2, capacity=10,
             documents=5, max_chunks=4)  # fmt: skip
MODEL = LanguageModel(Repeat(Residual(ROUTER), 2), V, embed_std=1.0)
PARAMS = MODEL.init(jax.random.key(0))
METRICS = {"aux", "answer_loss", "text_loss", "answer_accuracy", "recall_at_k", "lost_chunks"}


def batch(documents=5):
    rng = np.random.default_rng(0)
    ids = lambda *shape: rng.integers(0, V, shape).astype(np.int32)  # noqa: E731
    reading_valid = np.arange(6)[None] >= np.array([[0], [1], [2]])
    return {
        "documents": ids(documents, 4),
        "document_valid": np.arange(4)[None] < rng.integers(1, 5, (documents, 1)),
        "question": ids(3, 3),
        "question_valid": np.ones((3, 3), bool),
        "gold": np.array([0, 2, 4], np.int32),
        "reading": ids(3, 6),
        "reading_valid": reading_valid,
        "answer": np.broadcast_to(np.arange(6) >= 4, (3, 6)),
    }


def run(model, params, batch, **weights):
    loss = partial(jax.jit, compiler_options=QUICK_COMPILE)(retrieval_loss(model, **weights))
    value, metrics = loss(params, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    return float(value), {k: float(v) for k, v in metrics.items()}


def test_the_loss_is_the_weighted_sum_of_its_terms():
    value, m = run(MODEL, PARAMS, batch(), lm_weight=2.0, aux_weight=0.5, text_weight=0.25)
    assert set(m) == METRICS and all(np.isfinite(v) for v in m.values())
    assert value == pytest.approx(2 * (m["answer_loss"] + 0.25 * m["text_loss"]) + 0.5 * m["aux"], rel=1e-5)
    assert m["lost_chunks"] == 0 and m["aux"] > 0


def test_passages_only_route():
    """Another pool adds its router loss and its lost chunks; the rest of the loss is what it was."""
    alone, m = run(MODEL, PARAMS, batch(), aux_weight=0.5)
    pool = {name: a for name, a in batch(4).items() if name not in ("reading", "reading_valid", "answer")}
    pool["gold"] = np.array([1, 0, 3], np.int32)
    value, both = run(MODEL, PARAMS, batch() | {"passages": pool}, aux_weight=0.5)
    assert set(both) == METRICS | {"passages_aux", "passages_recall_at_k"}
    assert value == pytest.approx(alone + 0.5 * both["passages_aux"], rel=1e-5)
    assert {name: both[name] for name in METRICS} == pytest.approx(m, rel=1e-5)
    _, own = run(MODEL, PARAMS, batch() | pool)
    assert own["aux"] == pytest.approx(both["passages_aux"], rel=1e-5) and own["aux"] != pytest.approx(m["aux"])
    narrow = LanguageModel(Residual(MSA(**{**vars(ROUTER), "capacity": 6})), V)
    params = narrow.init(jax.random.key(0))
    lost = [run(narrow, params, b)[1]["lost_chunks"] for b in (batch(), batch() | {"passages": pool})]
    assert 0 < lost[0] < lost[1]


def test_right_padding_is_no_target():
    b = batch()
    b["reading_valid"], b["answer"] = np.arange(6)[None] < np.array([[4]] * 3), np.zeros((3, 6), bool)
    other = b | {"reading": np.where(b["reading_valid"], b["reading"], 1).astype(np.int32)}
    assert run(MODEL, PARAMS, b)[1]["text_loss"] == pytest.approx(run(MODEL, PARAMS, other)[1]["text_loss"], rel=1e-6)


def test_repeated_layers_count_like_stacked_ones():
    stack = LanguageModel(Stack((Residual(ROUTER),) * 2), V, embed_std=1.0)
    body = {str(i): jax.tree.map(lambda a, i=i: a[i], PARAMS["body"]) for i in range(2)}
    want, got = run(stack, PARAMS | {"body": body}, batch()), run(MODEL, PARAMS, batch())
    assert got[0] == pytest.approx(want[0], rel=1e-5) and got[1] == pytest.approx(want[1], rel=1e-4)


def test_perfect_answers_and_routing_are_counted_as_such():
    """Texts that count upwards, and a model that adds one to the id: the embedding of i + 1 is what it looks up."""
    b = batch()
    b["reading"] = (np.arange(6)[None] + np.array([[0], [3], [5]])).astype(np.int32)
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    params |= {"norm": PARAMS["norm"]}
    eye = jnp.eye(V, 8 * 2)
    model = LanguageModel(Residual(MSA(**{**vars(ROUTER), "dim": 16, "top_k": 5, "max_chunks": 10})), V, tied=False)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    params |= {"embed": eye, "norm": jnp.ones(16), "head": 9 * jnp.roll(eye, 1, 0).T}
    _, m = run(model, params, b)
    assert m["answer_accuracy"] == 1.0 and m["recall_at_k"] == 1.0
    assert m["answer_loss"] < 1e-3
    b["reading"] = b["reading"].copy()
    b["reading"][0, 5] = 0
    assert run(model, params, b)[1]["answer_accuracy"] == pytest.approx(2 / 3)


def test_a_store_too_small_is_told():
    narrow = LanguageModel(Residual(MSA(**{**vars(ROUTER), "capacity": 3})), V)
    assert run(narrow, narrow.init(jax.random.key(0)), batch())[1]["lost_chunks"] > 0
    with pytest.raises(ValueError, match="documents has 6 rows, the model's stores hold 5"):
        run(MODEL, PARAMS, batch(6))
    plain = LanguageModel(Canon(8), V)
    with pytest.raises(ValueError, match="documents has 5 rows, the model's stores hold 0"):
        run(plain, plain.init(jax.random.key(0)), batch())


def test_routers_learn_from_it():
    """A few steps of plain gradient descent lower the contrast."""
    loss = retrieval_loss(MODEL, lm_weight=0.0)
    b = jax.tree.map(jnp.asarray, batch())

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def step(params):
        (_, m), g = jax.value_and_grad(loss, has_aux=True)(params, b, jax.random.key(0))
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, g), m["aux"]

    params, seen = PARAMS, []
    for _ in range(8):
        params, aux = step(params)
        seen.append(float(aux))
    assert np.isfinite(seen).all() and seen[-1] < 0.8 * seen[0]


@pytest.mark.parametrize("phases", [PUBLISHED, TOGETHER])
def test_phases_share_all_the_steps(phases):
    assert sum(p.share for p in phases) == 1.0


@pytest.mark.slow
def test_phases_follow_each_other_and_know_their_settings(tmp_path, standard_promotion):
    def train(rate):
        return fit_phases(
            MODEL, PARAMS, lambda phase: generated(lambda rng: batch(), seed=phase), steps=4, key=jax.random.key(1),
            learning_rate=rate, directory=tmp_path, log_every=1,
        )  # fmt: skip

    result = train(0.01)
    assert result.step == 2 and [len((tmp_path / f"phase-{i}/metrics.jsonl").read_text().split()) for i in (0, 1)]
    again = train(0.01)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, result.params))
    with pytest.raises(CheckpointError, match="learning_rate"):
        train(0.02)
