"""JRT-RNN against the equations of the paper in numpy, and which tokens of which call are encoded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.in_state.based import Based
from memjax.in_state.jrt_rnn import PrefixLinearAttention
from tests.in_state.layer import apply, inputs

SMALL = PrefixLinearAttention(dim=6, heads=2, feature_dim=3, enc_length=5)
step = jax.jit(lambda memory, *args: memory.step(*args), static_argnums=0)
masked = jax.jit(
    lambda memory, params, state, x, valid=None, start=None: memory.apply(params, state, x, valid=valid, start=start),
    static_argnums=0,
)


def features(x):
    """phi of one vector, the full map."""
    d = len(x)
    return np.array([1.0, *(a / d**0.25 for a in x), *(a * b / np.sqrt(2 * d) for a in x for b in x)])


def paper(memory, params, x):
    """y and the final S beside z of one document, in float64, with loops over everything that the equations index."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), h = x.shape, memory.heads
    q, k, v, ke, ve = ((x @ p[w]).reshape(b, t, h, -1) for w in ("w_q", "w_k", "w_v", "w_k_enc", "w_v_enc"))
    f = len(features(q[0, 0, 0]))
    S, y = np.zeros((b, h, f, memory.v + 1)), np.zeros_like(x)
    for i in range(b):
        for j in range(h):
            for s in range(min(memory.enc_length, t)):
                S[i, j] += np.outer(features(ke[i, s, j]), [*ve[i, s, j], 1])
        for s in range(t):
            o = np.zeros((h, memory.v))
            for j in range(h):
                S[i, j] += np.outer(features(k[i, s, j]), [*v[i, s, j], 1])
                read = S[i, j].T @ features(q[i, s, j])
                o[j] = read[:-1] / (read[-1] + memory.eps)
            y[i, s] = o.reshape(-1) @ p["w_o"]
    return y, S


@pytest.mark.parametrize("enc_length", [5, 19, 100], ids=["a part", "all", "more than all"])
def test_equals_the_paper(enc_length):
    memory = dataclasses.replace(SMALL, enc_length=enc_length)
    params, state, x = inputs(memory, t=19)  # more than 16 tokens: the chunked form
    y, state = apply(memory, params, state, x)
    want_y, want_S = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.S, want_S, rtol=1e-4, atol=5e-6)
    np.testing.assert_array_equal(state.count, [19, 19])


def test_without_a_prefix_it_is_based():
    memory = dataclasses.replace(SMALL, enc_length=0)
    params, state, x = inputs(memory)
    based = Based(dim=6, heads=2, feature_dim=3)
    own = {name: params[name] for name in based.param_specs()}
    y, new = apply(memory, params, state, x)
    want, want_new = apply(based, own, based.init_state(2), x)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(new.S, want_new.S)


def test_only_the_prompt_is_seen_from_before():
    params, state, x = inputs(SMALL, t=12)
    y, _ = apply(SMALL, params, state, x)
    inside, _ = apply(SMALL, params, state, x.at[:, 4].add(1.0))
    assert np.abs(inside - y)[:, 0].max() > 1e-3
    behind, _ = apply(SMALL, params, state, x.at[:, 5].add(1.0))
    np.testing.assert_allclose(behind[:, :5], y[:, :5], rtol=1e-5, atol=1e-6)
    assert np.abs(behind - y)[:, 5].max() > 1e-3


def test_the_order_of_the_prompt_does_not_matter_after_it():
    params, state, x = inputs(SMALL, t=12)
    shuffled = x.at[:, :5].set(x[:, jnp.array([3, 0, 4, 2, 1])])
    y, new = apply(SMALL, params, state, x)
    again, new_again = apply(SMALL, params, state, shuffled)
    np.testing.assert_allclose(again[:, 5:], y[:, 5:], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new_again.S, new.S, rtol=1e-4, atol=1e-5)


def test_prefill_then_decoding_is_one_longer_prefill():
    params, state, x = inputs(SMALL, t=9)
    want, want_state = apply(SMALL, params, state, x)
    y, state = apply(SMALL, params, state, x[:, :6])
    np.testing.assert_allclose(y, want[:, :6], rtol=1e-4, atol=1e-6)
    for s in range(6, 9):
        y, state = step(SMALL, params, state, x[:, s])
        np.testing.assert_allclose(y, want[:, s], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.S, want_state.S, rtol=1e-4, atol=1e-5)


def test_prompts_of_different_lengths_are_padded():
    """Each is encoded whole in a call of its own, and equals the prompt alone with M = its length."""
    memory = dataclasses.replace(SMALL, enc_length=8)
    params, state, x = inputs(memory, t=10)
    lengths, prompt = [6, 3], 6
    valid = np.arange(prompt)[None] >= prompt - np.array(lengths)[:, None]
    y, state = masked(memory, params, state, x[:, :prompt], valid)
    after, state = masked(memory, params, state, x[:, prompt:])
    for row, n in enumerate(lengths):
        alone = dataclasses.replace(memory, enc_length=n)
        want, want_state = apply(alone, params, alone.init_state(1), x[row : row + 1, prompt - n :])
        np.testing.assert_allclose(y[row, prompt - n :], want[0, :n], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(after[row], want[0, n:], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.S[row], want_state.S[0], rtol=1e-4, atol=1e-5)


def test_packed_documents_are_each_encoded_alone():
    memory = dataclasses.replace(SMALL, enc_length=3)
    params, state, x = inputs(memory, t=20)
    warm = apply(memory, params, state, x[:, :5])[1]
    start = (np.arange(20) % 5 == 0)[None] & (np.arange(20)[None] >= np.array([[5], [0]]))  # row 0 goes on first
    y, new = masked(memory, params, warm, x, None, start)
    before = jax.tree.map(lambda old, fresh: jnp.stack([old[0], fresh[1]]), warm, state)
    for begin in range(0, 20, 5):
        want, want_state = apply(memory, params, before, x[:, begin : begin + 5])
        np.testing.assert_allclose(y[:, begin : begin + 5], want, rtol=1e-4, atol=2e-6)
        before = state
    np.testing.assert_allclose(new.S, want_state.S, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(new.count, [5, 5])


def test_later_calls_and_steps_encode_nothing():
    params, state, x = inputs(SMALL)
    causal = Based(dim=6, heads=2, feature_dim=3)
    own = {name: params[name] for name in causal.param_specs()}
    one, state = apply(SMALL, params, state, x[:, :1])
    y, _ = apply(SMALL, params, state, x[:, 1:])
    want, _ = apply(causal, own, causal.init_state(2)._replace(S=state.S), x[:, 1:])
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    stepped, _ = step(SMALL, params, SMALL.init_state(2), x[:, 0])
    want, _ = apply(causal, own, causal.init_state(2), x[:, :1])
    np.testing.assert_allclose(stepped, want[:, 0], rtol=1e-5, atol=1e-6)
    assert np.abs(one[:, 0] - stepped).max() > 1e-3


@pytest.mark.parametrize(
    "field, value, needs",
    [
        ("heads", 4, "a divisor of dim = 6"),
        ("feature_dim", 0, "at least 1"),
        ("enc_length", -1, "at least 0"),
        ("eps", 0.0, "> 0"),
    ],
)
def test_bad_fields(field, value, needs):
    with pytest.raises(ValueError, match=f"PrefixLinearAttention: {field} is {value}, needs .*{needs}"):
        dataclasses.replace(SMALL, **{field: value})
