"""SambaY: its units and attention against numpy, its layer map, its one cache, and a prompt without the upper half."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.combinators import Repeat, Residual
from memjax.in_context.sliding_window_attention import SlidingWindowAttention
from memjax.in_state.mamba import Mamba
from memjax.in_state.sambay import CrossAttention, GatedMemoryUnit, SambaY, SharedAttention
from memjax.layers import Ring
from memjax.lm.model import LanguageModel
from memjax.memory import Flow, NoState
from pallas_kernels.compat import QUICK_COMPILE
from tests.in_state.layer import inputs, sigmoid

LINEAR = Mamba(dim=8, state_size=3)
SMALL = SambaY(
    LINEAR,
    SlidingWindowAttention(dim=8, heads=2, window=3, rotary=False),
    dataclasses.replace(LINEAR, hands_on=True),
    layers=8,
    hidden=6,
    heads=4,
    kv_heads=2,
    capacity=32,
)
T = 9


def unit(memory, m, x=None, params=None):
    """What a gated memory unit makes of the stream m."""
    given, _, drawn = inputs(memory, t=m.shape[1])
    x, params = (drawn if x is None else x), (given if params is None else params)
    return memory.apply(params, NoState(), Flow(x, {"memory": m}))[0].x, params, x


M = jax.random.normal(jax.random.key(7), (2, T, 12))


@pytest.mark.parametrize("groups", [None, 1, 3])
def test_a_unit_equals_the_paper(groups):
    memory = GatedMemoryUnit(8, 12) if groups is None else GatedMemoryUnit(8, 12, True, groups, norm_eps=1e-2)
    params = memory.init(jax.random.key(1))
    if groups:
        params["norm"] = 1 + jax.random.normal(jax.random.key(2), (12,))
    y, _, x = unit(memory, M, params=params)
    p = {name: np.asarray(a, np.float64) for name, a in params.items()}
    want = np.zeros_like(x)
    for r in range(2):
        for i in range(T):
            gate = np.asarray(x[r, i], np.float64) @ p["w_1"]
            z = np.asarray(M[r, i], np.float64) * gate * sigmoid(gate)
            if groups:
                by_group = z.reshape(groups, -1)
                z = (by_group / np.sqrt((by_group**2).mean(-1, keepdims=True) + 1e-2)).reshape(-1) * p["norm"]
            want[r, i] = z @ p["w_2"]
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_a_unit_is_linear_in_the_memory_and_gated_by_x():
    memory = GatedMemoryUnit(8, 12)
    y, params, x = unit(memory, M)
    np.testing.assert_allclose(unit(memory, 3 * M, x, params)[0], 3 * y, rtol=1e-4, atol=1e-5)
    closed = params | {"w_1": jnp.zeros_like(params["w_1"])}
    assert not np.any(unit(memory, M, x, closed)[0])
    bottleneck = jax.nn.silu(x @ params["w_1"]) @ params["w_2"]
    np.testing.assert_allclose(unit(memory, jnp.ones_like(M), x, params)[0], bottleneck, rtol=1e-4, atol=1e-5)


def test_a_normalised_unit_does_not_see_the_scale_of_the_memory():
    memory = GatedMemoryUnit(8, 12, norm=True)
    y, params, x = unit(memory, M)
    np.testing.assert_allclose(unit(memory, 300 * M, x, params)[0], y, rtol=1e-3, atol=1e-3)


def softmax_attention(q, k, v):
    """Causal, in float64: q [b t h d], k and v [b t hkv d] -> [b t h*d]."""
    k, v = (np.repeat(a, q.shape[2] // k.shape[2], 2) for a in (k, v))
    e = np.exp(np.einsum("bthd,buhd->bhtu", q, k) * q.shape[-1] ** -0.5) * np.tri(q.shape[1])
    return np.einsum("bhtu,buhd->bthd", e / e.sum(-1, keepdims=True), v).reshape(*q.shape[:2], -1)


def test_cross_attention_reads_the_keys_of_the_layer_below():
    below, above = SharedAttention(dim=8, heads=4, kv_heads=2, capacity=T), CrossAttention(dim=8, heads=4)
    params, state, x = inputs(below, t=T)
    flow, _ = below.apply(params, state, Flow(x, {}))
    own = above.init(jax.random.key(5))
    x2 = jax.random.normal(jax.random.key(6), x.shape)
    y2, _ = above.apply(own, NoState(), flow.hand(x2))
    p, own = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, own))
    k, v = ((np.asarray(x, np.float64) @ p[w]).reshape(2, T, 2, 2) for w in ("w_k", "w_v"))
    for got, weights, source in ((flow.x, p, x), (y2.x, own, x2)):
        q = (np.asarray(source, np.float64) @ weights["w_q"]).reshape(2, T, 4, 2)
        np.testing.assert_allclose(got, softmax_attention(q, k, v) @ weights["w_o"], rtol=1e-4, atol=1e-5)


def mixers(memory):
    """In order."""
    if isinstance(memory, Repeat):
        return mixers(memory.block) * memory.n
    if isinstance(memory, Residual):
        return [memory.memory]
    return [m for block in memory.blocks for m in mixers(block)[: 1 if isinstance(block.parts[0], Residual) else None]]


@pytest.mark.parametrize("layers", [8, 12, 16])
def test_layer_map(layers):
    memory = dataclasses.replace(SMALL, layers=layers)
    half, want = layers // 2, []
    for i in range(layers):
        lower = LINEAR if i % 2 == 0 else SMALL.window
        upper = SMALL.gmu if i % 2 == 0 else SMALL.cross
        want.append(lower if i < half else SMALL.saved if i == half else SMALL.full if i == half + 1 else upper)
    assert mixers(memory.body) == want
    assert SMALL.gmu == GatedMemoryUnit(8, 16) and SMALL.cross == CrossAttention(8, 4)


@pytest.mark.parametrize("layers", [8, 16])
def test_one_cache_whatever_the_depth(layers):
    state = dataclasses.replace(SMALL, layers=layers).init_state(1)
    found = jax.tree.leaves(state, is_leaf=lambda a: isinstance(a, Ring))
    rings = [a for a in found if isinstance(a, Ring)]
    assert sum(a.k.shape == (1, 32, 2, 2) for a in rings) == 1
    assert len(rings) == 1 + layers // 4


@pytest.mark.slow
def test_a_prompt_does_without_the_upper_half():
    model = LanguageModel(dataclasses.replace(SMALL, layers=12), vocab=11)
    params, state = model.init(jax.random.key(0)), model.init_state(2)
    ids = jax.random.randint(jax.random.key(1), (2, T), 0, 11)
    jit = partial(jax.jit, compiler_options=QUICK_COMPILE)
    whole = jit(lambda ids: model.apply(params, state, ids)).lower(ids[:, :-1]).compile()
    lower = jit(lambda ids: model.apply(params, state, ids)[1]).lower(ids[:, :-1]).compile()
    assert lower.cost_analysis()["flops"] < 0.8 * whole.cost_analysis()["flops"]
    last, _ = jit(lambda s, i: model.step(params, s, i))(lower(ids[:, :-1]), ids[:, -1])
    want, _ = jit(lambda ids: model.apply(params, state, ids))(ids)
    np.testing.assert_allclose(last, want[:, -1], rtol=1e-4, atol=1e-5)


def test_streams_begin_and_end_in_it():
    assert SMALL.body.streams and not SMALL.streams
    with pytest.raises(
        ValueError, match="GatedMemoryUnit: needs the stream 'memory' of a layer below it, here is none"
    ):
        memory = GatedMemoryUnit(8, 12)
        memory.apply(memory.init(jax.random.key(0)), NoState(), jnp.zeros((2, T, 8)))
    with pytest.raises(ValueError, match="memory_dim is 10, the stream has 12 channels"):
        unit(GatedMemoryUnit(8, 10), M)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layers": 10}, "SambaY: layers is 10, needs a multiple of 4"),
        ({"layers": 4}, "SambaY: layers is 4, needs at least 8"),
        ({"hidden": 0}, "SambaY: hidden is 0, needs at least 1"),
        ({"saved": Mamba(dim=4, hands_on=True)}, r"SambaY: the parts have dim \[8, 8, 4\]"),
        ({"heads": 3}, "SharedAttention: heads is 3, needs a divisor of dim = 8"),
        ({"kv_heads": 3}, "SharedAttention: kv_heads is 3, needs a divisor of heads = 4"),
        ({"capacity": 0}, "SharedAttention: capacity is 0, needs at least 1"),
        ({"cache_dtype": "int8"}, "SharedAttention: cache_dtype is 'int8', needs one of"),
        ({"groups": 3}, "GatedMemoryUnit: groups is 3, needs a divisor of memory_dim = 16"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)
