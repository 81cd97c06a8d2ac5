"""Which layers of a hybrid stack are full, and that it is the stack of its layers."""

import dataclasses

import jax
import numpy as np
import pytest

from memjax.blocks import FeedForward, block
from memjax.combinators import Repeat, Residual, Stack
from memjax.in_context.sliding_window_attention import SlidingWindowAttention
from memjax.in_state.gla import GatedLinearAttention
from memjax.in_state.hybrid_stack import HybridStack
from memjax.layers import Ring
from memjax.memory import from_config, to_config
from tests.in_state.layer import apply, inputs

LINEAR = GatedLinearAttention(dim=8, heads=2, gate_low_rank_dim=2)
FULL = SlidingWindowAttention(dim=8, heads=2, window=16)
SMALL = HybridStack(LINEAR, FULL, layers=5, hidden=6, ratio=1)


def flat(memory, params=None, state=None):
    """The mixers in order, with their blocks' parameters and states."""
    if isinstance(memory, HybridStack):
        return flat(memory.body, params, state)
    if isinstance(memory, Repeat):
        layer = lambda i: jax.tree.map(lambda a: a[i], params)  # noqa: E731
        return [found for i in range(memory.n) for found in flat(memory.block, layer(i), state and state[i])]
    if isinstance(memory.parts[-1], Residual) and isinstance(memory.parts[-1].memory, FeedForward):
        return [(memory, params, state)]
    return [
        f for i, m in enumerate(memory.blocks) for f in flat(m, (params or {}).get(str(i)), state and state[str(i)])
    ]


def kinds(memory):
    """ "l" for each linear layer, "f" for each full one."""
    return "".join("f" if m.parts[0].memory is FULL else "l" for m, _, _ in flat(memory))


@pytest.mark.parametrize(
    "layers, ratio, placement, want",
    [
        (6, None, "r_to_1", "llllll"),
        (6, 3, "every_n", "llfllf"),
        (6, 2, "r_to_1", "llfllf"),
        (6, 3, "r_to_1", "lllfll"),
        (6, 6, "every_n", "lllllf"),
        (5, 2, "every_n", "lflfl"),
        (3, 1, "every_n", "fff"),
        (3, 0, "r_to_1", "fff"),
        (24, 24, "every_n", "l" * 23 + "f"),
    ],
)
def test_placement(layers, ratio, placement, want):
    memory = HybridStack(LINEAR, FULL, layers, 6, ratio, placement)
    assert kinds(memory) == want
    assert memory.full_layers == tuple(i for i, kind in enumerate(want) if kind == "f")


def test_the_released_models_have_24_layers():
    full = {n: len(HybridStack(LINEAR, FULL, 24, 6, n, "every_n").full_layers) for n in (24, 12, 6, 3)}
    assert full == {24: 1, 12: 2, 6: 4, 3: 8}


def test_pure_has_no_keys():
    def rings(memory):
        found = jax.tree.leaves(memory.state_specs(1), is_leaf=lambda s: isinstance(s, Ring))
        return sum(isinstance(s, Ring) for s in found)

    assert rings(SMALL) == 2
    assert rings(dataclasses.replace(SMALL, ratio=None)) == rings(HybridStack(LINEAR, None, 2, 6, None)) == 0


def test_parameters_differ_by_the_mixers_only():
    rest = Residual(FeedForward(8, 6)).param_bytes() + 4 * 8  # and the norm before the mixer
    for ratio, full in ((None, 0), (1, 2), (0, 5), (4, 1)):
        memory = dataclasses.replace(SMALL, ratio=ratio)
        mixers = (5 - full) * LINEAR.param_bytes() + full * FULL.param_bytes()
        assert memory.param_bytes() == mixers + 5 * rest


def test_it_is_its_layers_one_after_another():
    params, state, x = inputs(SMALL)
    y, new = apply(SMALL, params, state, x)
    states = []
    for memory, p, s in flat(SMALL, params, state):
        x, s = apply(memory, p, s, x)
        states.append(s)
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)
    for (_, _, got), want in zip(flat(SMALL, params, new), states, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_depth_is_compiled_once():
    linear = block(LINEAR, 6)
    assert dataclasses.replace(SMALL, layers=12, ratio=3).body == Repeat(Stack((Repeat(linear, 3), block(FULL, 6))), 3)
    assert dataclasses.replace(SMALL, ratio=None).body == Repeat(linear, 5)


def test_the_configuration_is_that_of_the_fields():
    config = to_config(SMALL)
    assert {"linear", "full", "layers", "hidden", "ratio", "placement", "eps", "class"} == set(config)
    assert from_config(config) == SMALL
    pure = HybridStack(LINEAR, None, 2, 6, None)
    assert from_config(to_config(pure)) == pure


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ratio": -1}, "ratio is -1, needs at least 0"),
        ({"ratio": 0, "placement": "every_n"}, "ratio is 0, needs at least 1"),
        ({"ratio": 5}, r"ratio is 5, needs a period \(here 6\) of at most 5 layers"),
        ({"placement": "last"}, "placement is 'last', needs one of"),
        ({"full": None}, "full is None, needs a memory where ratio is 1"),
        ({"full": dataclasses.replace(FULL, dim=4)}, r"the parts have dim \[8, 4\]"),
        ({"layers": 0}, "layers is 0, needs at least 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=f"HybridStack: {message}"):
        dataclasses.replace(SMALL, **fields)
