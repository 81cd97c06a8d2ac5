"""A memory under equinox, without a bridge: it is hashable and compares by value, so a filter takes it for static."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from memjax.catalog import CATALOG
from memjax.combinators import Repeat, Residual
from memjax.lm.model import LanguageModel
from memjax.memory import Memory


def test_filters_take_a_memory_for_static():
    memory = CATALOG["hgrn2"].build_small()
    params, x = memory.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 7, 16))
    assert not eqx.is_array(memory)
    assert eqx.partition((memory, params), eqx.is_array) == (
        (None, params),
        (memory, jax.tree.map(lambda a: None, params)),
    )

    traces = []

    @eqx.filter_jit
    def apply(memory, params, state, x):
        traces.append(memory)
        return memory.apply(params, state, x)

    y, state = apply(memory, params, memory.init_state(2), x)
    want, want_state = jax.jit(memory.apply)(params, memory.init_state(2), x)
    jax.tree.map(np.testing.assert_array_equal, (y, state), (want, want_state))
    apply(CATALOG["hgrn2"].build_small(), params, state, x + 1)  # an equal memory, other values: the same program
    assert len(traces) == 1


class Classifier(eqx.Module):
    """A memory and its parameters as fields of a module, beside a layer of equinox."""

    memory: Memory
    params: dict[str, Any]
    head: eqx.nn.Linear

    def __init__(self, memory, classes, key):
        self.memory, self.params = memory, memory.init(key)
        self.head = eqx.nn.Linear(memory.dim, classes, key=key)

    def __call__(self, x):
        y, _ = self.memory.apply(self.params, self.memory.init_state(len(x)), x)
        return jax.vmap(self.head)(y[:, -1])


def test_a_module_with_a_memory_is_trained(standard_promotion):
    memory = Repeat(Residual(CATALOG["hgrn2"].build_small()), 2)
    model, tx = Classifier(memory, 3, jax.random.key(0)), optax.adam(1e-2)
    x, labels = jax.random.normal(jax.random.key(1), (4, 5, 16)), jnp.array([0, 1, 2, 0])

    def loss(model, x):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    @eqx.filter_jit
    def update(model, opt):
        value, grads = eqx.filter_value_and_grad(loss)(model, x)
        updates, opt = tx.update(grads, opt, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), opt, value, grads

    opt, values = tx.init(eqx.filter(model, eqx.is_array)), []
    for _ in range(3):
        before = model
        model, opt, value, grads = update(model, opt)
        values.append(float(value))
        assert model.memory == memory
    assert values[2] < values[0]
    want = jax.grad(lambda p: loss(eqx.tree_at(lambda m: m.params, before, p), x))(before.params)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6), grads.params, want)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(grads.params))


def test_a_model_decodes_under_filter_jit():
    model = LanguageModel(Residual(CATALOG["gla"].build_small()), vocab=20)
    params, ids = model.init(jax.random.key(0)), jnp.arange(5)[None]
    step = eqx.filter_jit(lambda model, params, state, token: model.step(params, state, token))
    state = model.init_state(1)
    for t in range(5):
        logits, state = step(model, params, state, ids[:, t])
    want, _ = model.apply(params, model.init_state(1), ids)
    np.testing.assert_allclose(logits, want[:, -1], atol=1e-5)
