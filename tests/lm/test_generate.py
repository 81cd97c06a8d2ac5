"""Generation: greedy against `apply`, ragged prompts, stop tokens, sampling, streams, and whose state is consumed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.combinators import Residual, Stack
from memjax.in_context.canon import Canon
from memjax.in_state.gla import GatedLinearAttention
from memjax.in_storage.msa import MSA
from memjax.lm.generate import Sampling, decode, fork, generate, prefill, read, sample, stream
from memjax.lm.model import LanguageModel
from pallas_kernels.compat import QUICK_COMPILE

V = 11
# A store and a cache, so that what is shared and what is a row's own are both there.
ROUTER = MSA(dim=8, heads=2, kv_heads=1, head_dim=4, window=16, template=0, query_start=2, pool=2, top_k=1, capacity=8,
             documents=4, max_chunks=2)  # fmt: skip
MODEL = LanguageModel(Stack((Residual(Canon(8)), Residual(ROUTER))), V, tied=False, embed_std=1.0)
PARAMS = MODEL.init(jax.random.key(3))
PROMPT, STEPS = np.random.default_rng(0).integers(0, V, (2, 4)).astype(np.int32), 6


@pytest.fixture(scope="module")
def empty():
    """Rows over a store with two documents."""
    documents = np.random.default_rng(1).integers(0, V, (2, 4)).astype(np.int32)
    write = jax.jit(lambda p, s, x: MODEL.write(p, s, x)[1], compiler_options=QUICK_COMPILE)
    return MODEL.restart(write(PARAMS, MODEL.init_state(2), documents), 2)


@pytest.fixture(scope="module")
def greedy(empty):
    return np.asarray(generate(MODEL, PARAMS, empty, PROMPT, steps=STEPS)[0])


def test_greedy_is_the_argmax_of_apply(empty, greedy):
    apply = partial(jax.jit, compiler_options=QUICK_COMPILE)(MODEL.apply)
    first, state = apply(PARAMS, empty, PROMPT)
    then, _ = apply(PARAMS, state, greedy)
    logits = np.concatenate([first[:, -1:], then[:, :-1]], 1)
    np.testing.assert_array_equal(greedy, logits.argmax(-1))
    assert greedy.shape == (2, STEPS) and len(np.unique(greedy)) > 2


def test_decoding_consumes_its_own_state_and_not_the_callers(empty, greedy):
    tokens, _ = generate(MODEL, PARAMS, empty, PROMPT, steps=STEPS)
    np.testing.assert_array_equal(tokens, greedy)
    logits, state = prefill(MODEL, PARAMS, empty, jnp.asarray(PROMPT), jnp.ones((2, 4), bool))
    decode(MODEL, PARAMS, state, logits, jnp.zeros(2, bool), jax.random.split(jax.random.key(0), STEPS))
    assert all(a.is_deleted() for a in jax.tree.leaves(state))  # a decoded token copies no cache
    assert not any(a.is_deleted() for a in jax.tree.leaves(empty))  # though the store is in both


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_equal_each_alone(empty, greedy, side):
    """Row 0 is all four tokens, row 1 the same four less two, padded with an id that exists."""
    keep = np.array([[True] * 4, [False, False, True, True] if side == "left" else [True, True, False, False]])
    prompt = np.stack([PROMPT[0], np.where(keep[1], np.roll(PROMPT[1], 2 if side == "left" else 0), 5)])
    tokens, _ = generate(MODEL, PARAMS, empty, prompt, steps=STEPS, valid=keep)
    short = np.stack([PROMPT[1, :2]] * 2)
    alone, _ = generate(MODEL, PARAMS, empty, short, steps=STEPS)
    np.testing.assert_array_equal(tokens[0], greedy[0])
    np.testing.assert_array_equal(tokens[1], alone[1])


def test_a_row_ends_at_the_stop_token(empty, greedy):
    stop = int(greedy[0, 2])
    first = [row.tolist().index(stop) if stop in row else STEPS for row in greedy]
    tokens, _ = generate(MODEL, PARAMS, empty, PROMPT, steps=STEPS, sampling=Sampling(stop=stop))
    for row, want, at in zip(np.asarray(tokens), greedy, first, strict=True):
        assert row.tolist() == want[: at + 1].tolist() + [-1] * (STEPS - at - 1)
    assert first[0] <= 2


def test_streams_are_generate_in_pieces(empty, greedy):
    pieces = [np.asarray(t) for t, _ in stream(MODEL, PARAMS, empty, PROMPT, steps=STEPS, block=4)]
    assert [p.shape for p in pieces] == [(2, 4), (2, 2)]
    np.testing.assert_array_equal(np.concatenate(pieces, 1), greedy)
    how = {"key": jax.random.key(1), "sampling": Sampling(temperature=2.0)}
    whole, _ = generate(MODEL, PARAMS, empty, PROMPT, steps=STEPS, **how)
    parts = [np.asarray(t) for t, _ in stream(MODEL, PARAMS, empty, PROMPT, steps=STEPS, block=4, **how)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)
    assert (np.asarray(whole) != greedy).any()


def test_a_stream_ends_when_every_row_has(empty, greedy):
    same = np.stack([PROMPT[0]] * 2)
    stop = Sampling(stop=int(greedy[0, 1]))
    pieces = list(stream(MODEL, PARAMS, empty, same, steps=STEPS, block=2, sampling=stop))
    assert len(pieces) == 1


def test_a_stream_is_continued_by_its_state(empty, greedy):
    *_, (_, state) = stream(MODEL, PARAMS, empty, PROMPT, steps=3, block=3)
    more, _ = generate(MODEL, PARAMS, state, greedy[:, 3:4], steps=1)
    np.testing.assert_array_equal(more[:, 0], greedy[:, 4])


# ---------------------------------------------------------------------------------------------- prefixes


def test_a_prefix_goes_on_without_a_prompt(empty, greedy):
    tokens, prefix = generate(MODEL, PARAMS, empty, PROMPT, steps=3)
    for _ in range(2):  # it stays usable
        more, _ = generate(MODEL, PARAMS, prefix, steps=3)
        np.testing.assert_array_equal(np.concatenate([tokens, more], 1), greedy)
    nothing = read(MODEL, PARAMS, prefix, PROMPT, valid=np.zeros_like(PROMPT, bool))
    np.testing.assert_array_equal(nothing.logits, prefix.logits)


def test_rows_of_a_prefix_may_be_left_without_a_token(empty, greedy):
    prefix = read(MODEL, PARAMS, empty, PROMPT)
    valid = np.array([[True] * 2, [False] * 2])
    both, _ = generate(MODEL, PARAMS, prefix, PROMPT[:, :2], steps=3, valid=valid)
    np.testing.assert_array_equal(both[1], greedy[1, :3])
    alone, _ = generate(MODEL, PARAMS, prefix, PROMPT[:, :2], steps=3)
    np.testing.assert_array_equal(both[0], alone[0])


def test_a_fork_has_its_rows(empty, greedy):
    prefix = read(MODEL, PARAMS, empty, PROMPT)
    forked = fork(MODEL, prefix, [1, 0, 1])
    tokens, _ = generate(MODEL, PARAMS, forked, steps=STEPS)
    np.testing.assert_array_equal(tokens, greedy[[1, 0, 1]])
    one = fork(MODEL, prefix, [1])
    questions = np.stack([PROMPT[0], PROMPT[1], PROMPT[0] + 1])
    tokens, _ = generate(MODEL, PARAMS, fork(MODEL, one, 3), questions, steps=3)
    for row, question in zip(np.asarray(tokens), questions, strict=True):
        alone, _ = generate(MODEL, PARAMS, one, question[None], steps=3)
        np.testing.assert_array_equal(row, alone[0])
    with pytest.raises(ValueError, match="the prefix has 2 rows, needs 1 for 3 copies"):
        fork(MODEL, prefix, 3)
    for rows in ([], [2], [0, -1]):
        with pytest.raises(ValueError, match="needs at least one, each of them from 0 to 1"):
            fork(MODEL, prefix, rows)


def test_a_row_that_ended_ends_again(empty, greedy):
    stop = Sampling(stop=int(greedy[0, 1]))
    tokens, prefix = generate(MODEL, PARAMS, empty, PROMPT, steps=3, sampling=stop)
    more, _ = generate(MODEL, PARAMS, prefix, steps=2, sampling=stop)
    assert more[0].tolist() == [stop.stop, -1]
    assert tokens[0, -1] == -1


@pytest.mark.parametrize("block", [1, 3, 4, 7, 16])
def test_reading_in_blocks(block):
    model = LanguageModel(Stack((Residual(Canon(8)), Residual(GatedLinearAttention(8, heads=2)))), V, embed_std=1.0)
    params = model.init(jax.random.key(1))
    prompt = np.random.default_rng(2).integers(0, V, (2, 7)).astype(np.int32)
    valid = np.array([[True] * 7, [False] * 2 + [True] * 3 + [False] * 2])
    whole = read(model, params, model.init_state(2), prompt, valid=valid)
    pieces = read(model, params, model.init_state(2), prompt, valid=valid, block=block)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), pieces, whole)


def test_the_state_does_not_grow(empty):
    pieces = stream(MODEL, PARAMS, empty, PROMPT, steps=8, block=2)
    sizes = [sum(a.nbytes for a in jax.tree.leaves(prefix.state)) for _, prefix in pieces]
    assert sizes == [MODEL.state_bytes(2)] * 4


# ---------------------------------------------------------------------------------------------- sampling

LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))


def drawn(sampling, n=400):
    keys = jax.random.split(jax.random.key(0), n)
    return np.asarray(jax.jit(jax.vmap(lambda k: sample(LOGITS, k, sampling)[0]))(keys))


@pytest.mark.parametrize(
    "sampling, share",
    [
        (Sampling(), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=1), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.49), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.51), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
    ],
    ids=str,
)
def test_samples_have_their_distribution(sampling, share):
    got = np.bincount(drawn(sampling), minlength=4) / 400
    np.testing.assert_allclose(got, share, atol=0.08)
    assert not got[np.array(share) == 0].any()


@pytest.mark.parametrize("fields", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_bad_sampling(fields):
    with pytest.raises(ValueError, match="needs temperature >= 0, 0 < top_p <= 1, top_k >= 0"):
        Sampling(**fields)


def test_bad_calls(empty):
    with pytest.raises(ValueError, match="sampling needs a key"):
        generate(MODEL, PARAMS, empty, PROMPT, steps=2, sampling=Sampling(temperature=1.0))
    with pytest.raises(ValueError, match="steps is 0 and block 0, needs at least 1"):
        generate(MODEL, PARAMS, empty, PROMPT, steps=0)
    with pytest.raises(ValueError, match="needs a prompt, or a Prefix to go on from"):
        generate(MODEL, PARAMS, empty, steps=2)
    with pytest.raises(ValueError, match="row 1 of the prompt has no token to begin with"):
        read(MODEL, PARAMS, empty, PROMPT, valid=np.array([[True] * 4, [False] * 4]))
