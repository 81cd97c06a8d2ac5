"""Combinators against the same arithmetic written out, and `Repeat` against the stack it abbreviates."""

import re
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.catalog import CATALOG
from memjax.combinators import Gate, Repeat, Residual, Stack, pattern, total
from memjax.layers import rms_norm
from memjax.memory import How, Memory, NoState, Slot
from pallas_kernels.compat import QUICK_COMPILE

GLA, MSA, WINDOW, CANON = (CATALOG[n].build_small() for n in ("gla", "msa", "sliding_window_attention", "canon"))
X = np.random.default_rng(5).standard_normal((2, 5, 16), np.float32)


def close(got, want, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), got, want)


@dataclass(frozen=True)
class Counts(Memory):
    """y = `by` x; reports a loss, a wider array, and what verb it was called by."""

    dim: int = 16
    by: float = 2.0

    def state_specs(self, batch):
        return Slot((batch,), ("batch",), jnp.int32)

    def apply_with_aux(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        aux = {"loss": jnp.float32(self.by), "scores": jnp.full((2, 3), -jnp.inf)}
        return x * jnp.asarray(self.by, x.dtype), state + x.shape[1], aux


def test_residual_and_gate_are_their_formulas():
    memory = Residual(Gate(Counts(by=2.0), Counts(by=-1.0)), eps=0.1)
    params = memory.init(jax.random.key(0))
    params["norm"] = jnp.arange(16.0)
    y, state, aux = memory.apply_with_aux(params, memory.init_state(2), X)
    x = np.asarray(rms_norm(jnp.asarray(X), params["norm"], 0.1))
    g = 1 / (1 + np.exp(-x @ params["memory"]["gate"]))
    np.testing.assert_allclose(y, X + g * 2 * x - (1 - g) * x, rtol=1e-5, atol=1e-5)
    assert {k: v.tolist() for k, v in state["memory"].items()} == {"a": [5, 5], "b": [5, 5]}
    assert total(aux) == {"loss": 1.0}


def test_stack_runs_in_order_and_hands_down_how():
    class Tells(Counts):
        def apply_with_aux(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
            seen.append((self.by, how, ids is not None, valid is not None, start is not None))
            return x, state, {}

    seen: list = []
    stack = Stack((Residual(Tells(by=0.0)), Tells(by=1.0)))
    masks = {"ids": np.ones((2, 5), np.int32), "valid": X[..., 0] < 9, "start": X[..., 0] > 9}
    how = How(implementation="xla", remat=True)
    params = stack.init(jax.random.key(0))
    stack.apply(params, stack.init_state(2), X, **masks, how=how)
    stack.step(params, stack.init_state(2), X[:, 0], **{k: a[:, 0] for k, a in masks.items()}, how=how)
    stack.write(params, stack.init_state(2), X, **masks, how=how)
    assert seen == [(float(i), how, True, True, True) for _ in range(3) for i in range(2)]


def test_repeat_is_the_stack_it_abbreviates():
    """Every verb of a memory with a store, values and state, with the same parameters."""
    repeat, stack = Repeat(Residual(MSA), 2), Stack((Residual(MSA),) * 2)
    params = repeat.init(jax.random.key(0))
    layers = {str(i): jax.tree.map(lambda a, i=i: a[i], params) for i in range(2)}
    valid = np.array([[True] * 5, [False, True, True, False, True]])

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(x):
        out = []
        for m, p in ((repeat, params), (stack, layers)):
            state = m.init_state(2)
            y0, state = m.write(p, state, x)
            y1, state, aux = m.apply_with_aux(p, state, x, valid=valid)
            y2, state = m.step(p, state, x[:, 0])
            state, aux = (tuple(a.values()) if isinstance(a, dict) else a for a in (state, aux))
            out.append(((y0, y1, y2), state, aux))
        return out

    got, want = run(X)
    close(got, want)
    assert all(np.abs(y).max() > 0.1 for y in got[0])
    assert jax.tree.structure(got[1]) == jax.tree.structure(repeat.init_state(2))


def test_remat_changes_no_gradient():
    memory = Repeat(Residual(CANON), 2)
    params, state = memory.init(jax.random.key(0)), memory.init_state(2)

    def loss(params, how):
        return jnp.sum(memory.apply(params, state, X, how=how)[0] ** 2)

    grads = jax.jit(
        lambda p: [jax.grad(loss)(p, How(remat=remat)) for remat in (False, True)], compiler_options=QUICK_COMPILE
    )
    close(*grads(params), atol=1e-5)
    jaxprs = [str(jax.make_jaxpr(lambda p, how=How(remat=remat): loss(p, how))(params)) for remat in (False, True)]
    assert [bool(re.search(r"remat2?\[|checkpoint\[", text)) for text in jaxprs] == [False, True]


def test_pattern_repeats_the_period():
    memory = pattern(Counts(by=2.0), Counts(by=3.0), n=2)
    assert memory == Repeat(Stack((Counts(by=2.0), Counts(by=3.0))), 2)
    y, state, aux = memory.apply_with_aux(memory.init(jax.random.key(0)), memory.init_state(2), X)
    np.testing.assert_allclose(y, 36 * X, rtol=1e-6)
    assert [s["0"].tolist() for s in state] == [[5, 5]] * 2
    assert total(aux) == {"loss": 10.0}


def test_total_adds_scalars_by_their_last_name():
    aux = {"0": {"loss": jnp.float32(1), "z": jnp.float32(3)}, "1": ({"loss": jnp.float32(2)}, {"loss": jnp.ones(2)})}
    assert total(aux) == {"loss": 3.0, "z": 3.0}
    assert total({}) == {}


def test_what_is_derived_from_the_parts():
    memory = Residual(Gate(GLA, Stack((WINDOW, CANON))))
    assert memory.dim == 16 and memory.reads_ids is None
    assert Stack((GLA, CATALOG["stem"].build_small())).reads_ids == 50
    assert set(memory.implementations) == set(GLA.implementations) & set(CANON.implementations)
    assert Residual(WINDOW).implementations == ()
    axes = Repeat(Residual(GLA), 2).param_axes()
    assert axes["norm"] == ("layers", "model")
    assert Repeat(Counts(), 3).parts == (Counts(),)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Stack((Counts(dim=4), Counts(dim=8))), r"Stack: the parts have dim \[4, 8\], needs one width"),
        (lambda: Gate(Counts(dim=4), Counts(dim=8)), r"Gate: the parts have dim \[4, 8\]"),
        (lambda: Stack(()), r"Stack: the parts have dim \[\], needs one width"),
        (lambda: Repeat(Counts(), 0), "Repeat: n is 0, needs at least 1"),
    ],
)
def test_parts_that_do_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_memory_without_state_can_be_repeated():
    class Plain(Memory):
        dim = 16

        def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
            return -x, state

    y, state = Repeat(Plain(), 3).apply({}, (NoState(),) * 3, X)
    np.testing.assert_array_equal(y, -X)
    assert state == (NoState(),) * 3
