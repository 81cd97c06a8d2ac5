"""The bridge to Flax: the values of the memory bit for bit, and what a user of nnx does with a module."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from memjax.catalog import CATALOG
from memjax.combinators import Repeat, Residual, Stack, total
from memjax.in_state.rwkv7 import RWKV7ChannelMixing
from memjax.lm.model import LanguageModel, block
from memjax.memory import Flow, How, Memory
from memjax.nnx import Module, from_module
from pallas_kernels.compat import QUICK_COMPILE

B, T = 2, 7


def small(name: str, **fields) -> Memory:
    return CATALOG[name].build_small(**fields)


def rwkv7_stack() -> Memory:
    """Layers that hand a stream to those above them."""
    parts = [
        Residual(m)
        for i in range(2)
        for m in (small("rwkv7", layer=i, layers=2), RWKV7ChannelMixing(dim=16, hidden=24, layer=i, layers=2))
    ]
    return Stack(tuple(parts))


MEMORIES = {
    "gla": lambda: small("gla"),
    "sliding_window_attention": lambda: small("sliding_window_attention"),
    "mom": lambda: small("mom"),  # with auxiliary losses
    "msa": lambda: small("msa"),  # with a store
    "stem": lambda: small("stem"),  # with ids
    "rwkv7_stack": rwkv7_stack,  # with streams
    "repeat": lambda: Repeat(Residual(small("simple_gla")), 2),
    "language_model": lambda: LanguageModel(Repeat(block(small("gated_delta_net"), 24), 2), vocab=20),
}


def contents(memory: Memory):
    """x, and the keyword arrays: token ids where they are read, padding in row 1, a border in row 0."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, memory.reads_ids or 1, (B, T)), jnp.int32)
    x = ids if memory.takes_ids else jnp.asarray(rng.standard_normal((B, T, memory.dim)), jnp.float32)
    valid, start = np.ones((B, T), bool), np.zeros((B, T), bool)
    valid[1, 3:5], start[0, 4] = False, True
    tokens = {"valid": jnp.asarray(valid), "start": jnp.asarray(start)}
    return x, tokens | ({"ids": ids} if memory.reads_ids and not memory.takes_ids else {})


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", MEMORIES)
def test_the_values_are_those_of_the_memory(name):
    memory = MEMORIES[name]()
    model = Module(memory, rngs=nnx.Rngs(0))
    params, state = memory.init(nnx.Rngs(0).params()), memory.init_state(B)
    x, tokens = contents(memory)

    jit = partial(jax.jit, compiler_options=QUICK_COMPILE)
    want = jit(memory.apply_with_aux)(params, state, x, **tokens)
    assert_same(jit(Module.apply_with_aux)(model, x, state, **tokens), want)
    assert (name in ("mom", "msa")) == bool(total(want[2]))

    one, tokens_t = x[:, 0], {label: a[:, 0] for label, a in tokens.items()}
    now = want[1]
    assert_same(jit(Module.step)(model, one, now, **tokens_t), jit(memory.step)(params, now, one, **tokens_t))

    if memory.has_store:
        got = jit(Module.write)(model, x, state)
        assert_same(got, jit(memory.write)(params, state, x))
        assert_same(model.restart(got[1], 1), memory.restart(got[1], 1))
        assert any(np.asarray(a).any() for a in jax.tree.leaves(model.restart(got[1], 1)))


def test_a_call_is_apply():
    memory = MEMORIES["gla"]()
    model, (x, tokens) = Module(memory, rngs=nnx.Rngs(0)), contents(memory)
    params, state = from_module(model)[1], memory.init_state(B)
    want = jax.jit(memory.apply)(params, state, x, **tokens)
    call = nnx.jit(lambda m, *args: m(*args, **tokens))
    assert_same(call(model, x), want)  # from the empty memory
    assert_same(call(model, x, model.init_state(B)), want)
    assert_same(call(model, x, want[1]), jax.jit(memory.apply)(params, want[1], x, **tokens))


def test_a_part_that_hands_a_stream_on_takes_a_flow():
    memory = small("rwkv7", layer=0, layers=2)
    model, (x, _) = Module(memory, rngs=nnx.Rngs(0)), contents(memory)
    y, _ = model(Flow(x, {}))
    want, _ = memory.apply(from_module(model)[1], memory.init_state(B), Flow(x, {}))
    assert isinstance(y, Flow) and y.shared
    assert_same(y, want)


@pytest.mark.parametrize("name", CATALOG)
def test_every_memory_of_the_catalog_goes_over_and_back(name):
    memory = small(name)
    model = nnx.eval_shape(lambda: Module(memory, rngs=nnx.Rngs(0)))
    back, params = from_module(model)
    like = jax.eval_shape(memory.init, jax.random.key(0))
    shape = lambda a: (a.shape, a.dtype)  # noqa: E731
    assert back == memory
    assert jax.tree.map(shape, params) == jax.tree.map(shape, like)


def test_the_way_back_gives_the_very_arrays():
    memory = MEMORIES["language_model"]()
    params = memory.init(jax.random.key(3))
    back, again = from_module(Module(memory, params=params))
    assert back == memory
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))


def test_split_and_merge():
    memory = MEMORIES["language_model"]()
    model = Module(memory, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    assert hash(graph) == hash(nnx.split(model)[0]) and not jax.tree.leaves(rest)
    doubled = nnx.merge(graph, jax.tree.map(lambda a: 2 * a, params), rest)
    assert doubled.memory == memory
    assert_same(from_module(doubled)[1], jax.tree.map(lambda a: 2 * a, from_module(model)[1]))


def test_parameters_say_their_axes_and_their_group():
    memory = MEMORIES["repeat"]()
    model = Module(memory, rngs=nnx.Rngs(0))
    specs = dict(jax.tree_util.tree_leaves_with_path(memory.param_specs()))
    found = jax.tree_util.tree_leaves_with_path(model.params, is_leaf=lambda p: isinstance(p, nnx.Param))
    assert {path: (p.out_sharding, p.kind) for path, p in found} == {p: (s.axes, s.kind) for p, s in specs.items()}
    gates = nnx.state(model, lambda path, p: getattr(p, "kind", None) == "gate")
    assert 0 < len(jax.tree.leaves(gates)) < len(specs)


def test_parameters_are_sharded_by_rules():
    memory = MEMORIES["gla"]()
    model, (x, _) = Module(memory, rngs=nnx.Rngs(0)), contents(memory)
    want, _ = model(x)
    mesh = jax.make_mesh((2,), ("model_parallel",), axis_types=(jax.sharding.AxisType.Auto,))
    with nnx.logical_axis_rules((("heads", "model_parallel"), ("model", None), ("value", None))):
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.device_put(params, nnx.get_named_sharding(params, mesh)))
    w = model.params["w_q"][...]
    assert w.sharding.spec == jax.P(None, "model_parallel")
    assert w.addressable_shards[0].data.shape == (16, w.shape[1] // 2)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x)[0])(model, x), want, atol=1e-6)


def test_gradients_and_an_optimizer_step(standard_promotion):
    memory = LanguageModel(Residual(small("hgrn2")), vocab=20)
    model, (ids, tokens) = Module(memory, rngs=nnx.Rngs(0)), contents(memory)
    params, tx = from_module(model)[1], optax.adam(1e-2)
    state = model.init_state(B)

    def cross_entropy(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    @nnx.jit
    def update(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(ids, state, **tokens)[0]))(model)
        optimizer.update(model, grads)
        return loss, grads

    @jax.jit
    def plainly(params, opt):
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(memory.apply(p, state, ids, **tokens)[0]))(params)
        updates, opt = tx.update(grads, opt, params)
        return loss, optax.apply_updates(params, updates), opt

    optimizer, opt = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(params)
    losses = []
    for _ in range(3):
        loss, grads = update(model, optimizer)
        want, params, opt = plainly(params, opt)
        np.testing.assert_array_equal(loss, want)
        assert all(np.asarray(g).any() for g in jax.tree.leaves(grads))
        losses.append(float(loss))
    assert_same(from_module(model)[1], params)
    assert losses[2] < losses[0]


def test_how_reaches_the_memory():
    model = Module(small("gla"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'no such'"):
        model(jnp.zeros((1, 3, 16)), how=How(implementation="no such"))


def test_what_is_refused():
    memory = small("gla")
    params = memory.init(jax.random.key(0))
    with pytest.raises(ValueError, match="Module: neither of rngs and params given"):
        Module(memory)
    with pytest.raises(ValueError, match="Module: both of rngs and params given"):
        Module(memory, rngs=nnx.Rngs(0), params=params)
    with pytest.raises(ValueError, match=r"Module: params has no params\['w_q'\]"):
        Module(memory, params={name: a for name, a in params.items() if name != "w_q"})


def test_a_module_may_keep_the_state():
    """What the docstring of memjax.nnx says to do."""

    class Keeps(nnx.Module):
        def __init__(self, model, batch):
            self.model, self.state = model, nnx.Variable(model.init_state(batch))

        def __call__(self, x):
            y, state = self.model(x, self.state.get_value())
            self.state.set_value(state)
            return y

    model, (x, _) = Module(MEMORIES["gla"](), rngs=nnx.Rngs(0)), contents(MEMORIES["gla"]())
    keeps, call = Keeps(model, B), nnx.jit(lambda m, x: m(x))
    got = [call(keeps, x), call(keeps, x)]
    first, state = nnx.jit(lambda m, x: m(x))(model, x)
    second, state = nnx.jit(lambda m, x, s: m(x, s))(model, x, state)
    assert_same((got, keeps.state.get_value()), ([first, second], state))
