"""MoM against a loop over its memories in numpy, its three ways to the same result, and its limits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import laws
from memjax.catalog import CATALOG
from memjax.combinators import Repeat, Residual, Stack, total
from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.in_state.gla import GatedLinearAttention
from memjax.in_state.mom import MoM, joint_balance
from pallas_kernels.compat import QUICK_COMPILE
from tests.in_state.layer import inputs, sigmoid

INNER = GatedDeltaNet(dim=6, heads=2, head_dim=4, expand_v=1.0)
SMALL = MoM(INNER)
QKV = ("w_q", "w_k", "w_v")
jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
with_aux = jit(lambda memory, *args: memory.apply_with_aux(*args), static_argnums=0)
apply = jit(lambda memory, *args: memory.apply(*args), static_argnums=0)


class Packed(MoM):
    """Blocks so small that the packed form is taken."""

    pack = 2


def read(memory, p, x):
    """What one state of `memory` (Gated DeltaNet) reads of the tokens x [n, d], one after another, and the state."""
    n, h, k, v = len(x), memory.heads, memory.head_dim, memory.v
    padded = np.concatenate([np.zeros((memory.conv_size - 1, sum(memory.qkv))), x @ np.hstack([p[w] for w in QKV])])
    rows = sum(p["conv"][j] * padded[j : j + n] for j in range(memory.conv_size))
    q, key, value = (
        a.reshape(n, h, a.shape[-1] // h) for a in np.split(rows * sigmoid(rows), np.cumsum(memory.qkv)[:-1], -1)
    )
    q, key = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, key))
    beta, g = sigmoid(x @ p["w_b"]), -np.exp(p["A_log"]) * np.log1p(np.exp(x @ p["w_a"] + p["dt_bias"]))
    S, o = np.zeros((h, k, v)), np.zeros((n, h, v))
    for s in range(n):
        for j in range(h):
            S[j] *= np.exp(g[s, j])
            S[j] += beta[s, j] * np.outer(key[s, j], value[s, j] - S[j].T @ key[s, j])
            o[s, j] = k**-0.5 * S[j].T @ q[s, j]
    return o, S


def paper(memory, params, x):
    """y, the states [b E h k v], how often each memory was chosen and the loss, in float64."""
    inner = memory.memory
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    (b, t, _), e, k = x.shape, memory.num_memories, memory.top_k
    scores = np.exp(x @ p["router"])
    scores /= scores.sum(-1, keepdims=True)
    index = np.argsort(-scores, -1, kind="stable")[..., :k]
    weight = np.take_along_axis(scores, index, -1)
    weight /= weight.sum(-1, keepdims=True)
    o, states = np.zeros((b, t, inner.heads, inner.v)), np.zeros((b, e, inner.heads, inner.head_dim, inner.v))
    for r in range(b):
        for m in range(e):
            chosen = (index[r] == m).any(-1)
            got, states[r, m] = read(inner, p["common"] | {n: a[m] for n, a in p["memories"].items()}, x[r, chosen])
            o[r, chosen] += (weight[r] * (index[r] == m)).sum(-1)[chosen][:, None, None] * got
        if memory.shared_memory:
            o[r] += read(inner, p["common"] | p["shared"], x[r])[0]
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + inner.norm_eps) * p["common"]["norm"]
    z = x @ p["common"]["w_g"]
    f = np.stack([(index[..., j, None] == np.arange(e)).mean((0, 1)) for j in range(k)])
    loss = e * (f * scores.mean((0, 1))).sum()
    return (o.reshape(b, t, -1) * z * sigmoid(z)) @ p["common"]["w_o"], states, loss


@pytest.mark.parametrize(
    "memory",
    [
        SMALL,
        MoM(INNER, num_memories=5, top_k=3, shared_memory=False, single_kv_proj=True),
        Packed(INNER, num_memories=6, top_k=1),
    ],
    ids=["plain", "one projection, none shared", "packed"],
)
def test_equals_the_paper(memory):
    params, state, x = inputs(memory, t=19)
    params["router"] = 3 * params["router"]
    y, state, aux = with_aux(memory, params, state, x)
    want_y, want_S, loss = paper(memory, params, x)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(state.memories.S, want_S, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(aux["load_balance"], loss, rtol=1e-5)


def test_one_memory_is_the_layer_itself():
    memory = MoM(INNER, num_memories=1, top_k=1, shared_memory=False)
    params, state, x = inputs(memory)
    own = params["common"] | {name: a[0] for name, a in params["memories"].items()}
    want, want_state = apply(INNER, own, INNER.init_state(2), x)
    y, state = apply(memory, params, state, x)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.memories.S[:, 0], want_state.S, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.memories.conv[:, 0], want_state.conv, rtol=1e-5, atol=1e-6)


def test_all_memories_with_equal_weights_are_their_mean():
    memory = MoM(GatedLinearAttention(dim=8, heads=2), num_memories=3, top_k=3, shared_memory=False)
    params, state, x = inputs(memory)
    params["router"] = jnp.zeros_like(params["router"])
    y, _, aux = with_aux(memory, params, state, x)
    inner, common = memory.memory, params["common"]
    read = [
        inner.recall(common | {n: a[m] for n, a in params["memories"].items()}, inner.init_state(2), x)[0]
        for m in range(3)
    ]
    np.testing.assert_allclose(y, inner.output(common, sum(read) / 3, x), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(aux["load_balance"], 3.0, rtol=1e-6)  # top_k where the router is uniform


def test_the_order_of_the_memories_means_nothing():
    params, state, x = inputs(SMALL)
    order = np.array([2, 0, 3, 1])
    turned = params | {
        "router": params["router"][:, order],
        "memories": jax.tree.map(lambda a: a[order], params["memories"]),
    }
    y, new = apply(SMALL, params, state, x)
    y1, new1 = apply(SMALL, turned, state, x)
    np.testing.assert_allclose(y1, y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new1.memories.S, new.memories.S[:, order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory", [MoM(INNER, 5, 1), Packed(INNER, 5, 1)], ids=["masked", "packed"])
def test_a_memory_that_no_token_chooses_keeps_its_bits(memory):
    params, state, x = inputs(memory)
    x = x.at[..., 0].set(1.0)
    params["router"] = params["router"].at[0, 3].set(-100.0)
    state = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape), state)
    _, new = apply(memory, params, state, x)
    for before, after in zip(jax.tree.leaves(state.memories), jax.tree.leaves(new.memories), strict=True):
        np.testing.assert_array_equal(after[:, 3], before[:, 3])
        assert np.abs(after - before)[:, :3].max() > 1e-3


def test_padding_is_routed_nowhere_and_not_counted():
    params, state, x = inputs(SMALL, t=8)
    valid = jnp.arange(8)[None] < jnp.array([[8], [3]])
    _, new, aux = jit(lambda *a: SMALL.apply_with_aux(*a, valid=valid))(params, state, x)
    kept = SMALL.route(params, x)
    scores, index = (np.asarray(a)[np.asarray(valid)] for a in (jax.nn.softmax(kept.logits, -1), kept.index))
    f = np.stack([(index[:, j, None] == np.arange(4)).mean(0) for j in range(2)])
    np.testing.assert_allclose(aux["chosen"], f, rtol=1e-6)
    np.testing.assert_allclose(aux["load_balance"], 4 * (f * scores.mean(0)).sum(), rtol=1e-5)
    alone = apply(SMALL, params, SMALL.init_state(1), x[1:, :3])[1]
    np.testing.assert_allclose(new.memories.S[1], alone.memories.S[0], rtol=1e-4, atol=1e-6)


def test_selecting_is_passing_by():
    """`step` with few rows fetches the chosen memories only; `apply` passes by all of them."""
    memory = MoM(INNER, num_memories=5)
    assert memory._selecting_moves_less(1)
    assert not MoM(INNER)._selecting_moves_less(64)  # the parameters of 128 memories, or the states of 256
    params, state, x = inputs(memory, t=9, batch=1)
    valid, start = jnp.array([[1, 1, 0, 1, 1, 0, 1, 1, 1]], bool), jnp.array([[0, 0, 0, 0, 1, 0, 0, 1, 0]], bool)

    @jit
    def both(state):
        y, whole = memory.apply(params, state, x, valid=valid, start=start)
        steps = []
        for i in range(9):
            out, state = memory.step(params, state, x[:, i], valid=valid[:, i], start=start[:, i])
            steps.append(out)
        return (y, whole), (jnp.stack(steps, 1), state)

    (y, whole), (steps, state) = both(state)
    np.testing.assert_allclose(
        np.where(valid[..., None], steps, 0), np.where(valid[..., None], y, 0), rtol=1e-4, atol=1e-6
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state, whole)


@pytest.mark.slow
def test_the_laws_hold_in_the_packed_form_too():
    small = CATALOG["mom"].build_small()
    memory = Packed(small.memory, small.num_memories, small.top_k)
    assert memory._blocks(laws.bench.T)[1]
    laws.check(memory, raise_on_failure=True)


def test_blocks_hold_every_routing():
    memory = Packed(INNER, num_memories=6, top_k=2)
    c, n = memory._blocks(19)
    assert n and c % 2 == 0
    params, state, x = inputs(memory, t=19)
    params["router"] = jnp.zeros_like(params["router"])  # all tokens choose the memories 0 and 1
    masked = MoM(INNER, num_memories=6, top_k=2)
    assert masked._blocks(19)[1] == 0
    y, new = apply(memory, params, state, x)
    want, want_new = apply(masked, params, state, x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new.memories.S, want_new.memories.S, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_loss_over_all_layers():
    one = Residual(SMALL)
    model = Stack((one, Repeat(one, 2)))
    params, state, x = inputs(model)
    _, _, aux = with_aux(model, params, state, x)
    layers = [aux["0"]["memory"], *(a["memory"] for a in aux["1"])]
    f, p = (np.mean([layer[n] for layer in layers], 0) for n in ("chosen", "probability"))
    np.testing.assert_allclose(joint_balance(aux), 4 * (f * p).sum(), rtol=1e-6)
    np.testing.assert_allclose(total(aux)["load_balance"], sum(layer["load_balance"] for layer in layers), rtol=1e-6)


def test_only_what_is_written_is_a_memorys_own():
    specs = SMALL.param_specs()
    assert set(specs["memories"]) == set(specs["shared"]) == {"w_k", "w_v", "w_a", "w_b"}
    assert specs["memories"]["w_k"].shape == (4, 6, 8) and {"w_q", "conv", "A_log", "w_o"} < set(specs["common"])
    single = dataclasses.replace(SMALL, single_kv_proj=True).param_specs()
    assert not single["memories"] and set(single["common"]) == set(INNER.param_specs())
    drawn = SMALL.init(jax.random.key(0))["memories"]["w_k"]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"top_k": 5}, "top_k is 5, needs at most num_memories = 4"),
        ({"num_memories": 0}, "num_memories is 0, needs at least 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=f"MoM: {message}"):
        dataclasses.replace(SMALL, **fields)


def test_the_memory_is_a_recurrence():
    with pytest.raises((ValueError, TypeError), match="Recurrence"):
        MoM(CATALOG["canon"].build_small())
